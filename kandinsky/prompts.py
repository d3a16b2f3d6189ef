"""Prompts to token ids: CLIP's byte-pair encoding, and XLM-RoBERTa's, which 2.1's decoder reads beside it.

    prompt ─ PromptTokenizer → ids (b, n), mask (b, n)     n is the longest prompt's length, at most 77
    prompt ─ MultilingualTokenizer → ids (b, 77)

Both are the Hub's own engine, `tokenizers`. CLIP's is set up here, as transformers sets it up: importing
transformers takes longer than all of a small picture's other imports but PyTorch.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.checkpoint import CheckpointError, read_json

# Contractions, runs of letters, single digits, runs of anything else: what merges never cross.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
SPECIAL["pad_token"] = SPECIAL["eos_token"]
LONGEST = 77


class PromptTokenizer:
    """CLIP's tokenizer; pads no further than the longest prompt and says what it cuts.

    engine: a `tokenizers.Tokenizer`; pad: the id that fills up.
    """

    def __init__(self, engine: Any, pad: int, max_length: int = LONGEST):
        self.engine, self.pad, self.max_length = engine, pad, min(max_length, LONGEST)
        engine.no_padding()
        engine.no_truncation()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PromptTokenizer":
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`; what is missing or broken is a
        CheckpointError."""
        folder, settings = Path(folder), {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                settings |= read_json(folder / name)
        special = {name: _added_token(settings.get(name) or text) for name, text in SPECIAL.items()}
        engine = read_engine(folder, special)
        pad = engine.token_to_id(special["pad_token"].content)
        if pad is None:
            raise CheckpointError(f"{folder} pads with {special['pad_token'].content!r}, no token of its own")
        return cls(engine, pad, settings.get("model_max_length") or LONGEST)

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> "PromptTokenizer":
        """From a CLIPTokenizer, which is copied: its own calls set how it pads and cuts."""
        from tokenizers import Tokenizer

        engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(engine, tokenizer.pad_token_id, tokenizer.model_max_length)

    def __len__(self) -> int:
        return self.engine.get_vocab_size()

    def tokens(self, ids: list[int]) -> list[str]:
        return [self.engine.id_to_token(index) for index in ids]

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> ids (b, n) and mask (b, n), True for real tokens; n is the longest prompt's length.

        What does not fit into 77 tokens is cut, and a UserWarning shows it; another warns of prompts in other
        scripts than Latin, which the tower does not understand.
        """
        rows = []
        for text, whole in zip(texts, self.engine.encode_batch(texts)):
            letters = [character for character in text if character.isalpha()]
            if sum(character > "\u024f" for character in letters) > len(letters) / 2:
                warnings.warn(f"the model understands English only, not {text!r}", stacklevel=2)
            ids = whole.ids
            if len(ids) > self.max_length:
                dropped = text[whole.offsets[self.max_length - 1][0] :]
                warnings.warn(
                    f"the prompt is longer than {self.max_length} tokens; this part was dropped: {dropped!r}",
                    stacklevel=2,
                )
                ids = [*ids[: self.max_length - 1], ids[-1]]  # the end is what the tower is read at
            rows.append(ids)
        lengths = torch.tensor([len(ids) for ids in rows])
        n = int(lengths.max())
        ids = torch.tensor([[*ids, *[self.pad] * (n - len(ids))] for ids in rows])
        return ids, torch.arange(n) < lengths[:, None]


def _added_token(said: str | dict[str, Any]) -> Any:
    """A special token as the settings name it, with how it is found in a text."""
    from tokenizers import AddedToken

    if isinstance(said, str):
        return AddedToken(said, normalized=False, special=True)
    how = {name: said[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in said}
    return AddedToken(said["content"], special=True, **how)


def read_engine(folder: Path, special: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of a folder's files; special: tokens by transformers' names for them."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    whole, pieces = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
    for path in () if whole.exists() else pieces:
        if not path.exists():
            raise CheckpointError(f"no such file: {path}")
    try:
        if whole.exists():
            return Tokenizer.from_file(str(whole))
        unknown = special["unk_token"].content
        given = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": "", "unk_token": unknown}
        engine = Tokenizer(models.BPE.from_file(*map(str, pieces), **given))
    except Exception as error:  # the engine raises nothing finer
        raise CheckpointError(f"{folder} holds no readable tokenizer ({error})") from None
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    engine.add_special_tokens(list(special.values()))
    ends = [special[name].content for name in ("eos_token", "bos_token")]
    ends = [(token, engine.token_to_id(token)) for token in ends]
    engine.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return engine


class MultilingualTokenizer:
    """XLM-RoBERTa's tokenizer; pads to the 77 tokens that 2.1's U-Net reads, and says what it cuts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MultilingualTokenizer":
        """Reads `tokenizer.json` or `sentencepiece.bpe.model`; without them it is a CheckpointError."""
        folder = Path(folder)
        if not any((folder / name).exists() for name in ("tokenizer.json", "sentencepiece.bpe.model")):
            raise CheckpointError(f"no such file: {folder / 'tokenizer.json'}")
        from transformers import XLMRobertaTokenizerFast

        return cls(XLMRobertaTokenizerFast.from_pretrained(folder, local_files_only=True))

    def __call__(self, texts: list[str]) -> Tensor:
        """Prompts -> ids (b, 77); padding is id 1. What does not fit is cut, and a UserWarning shows it."""
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids
        for text, whole in zip(texts, self.tokenizer(texts, verbose=False).input_ids):
            if len(whole) > 77:
                dropped = self.tokenizer.decode(whole[76:-1])
                warnings.warn(
                    f"the prompt is longer than 77 tokens; this part was dropped: {dropped!r}", stacklevel=2
                )
        return torch.tensor(ids)
