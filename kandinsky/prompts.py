"""Prompts to token ids: CLIP's byte-pair encoding, and XLM-RoBERTa's, which 2.1's decoder reads beside it.

    prompt ─ PromptTokenizer → ids (b, n), mask (b, n)     n is the longest prompt's length, at most 77
    prompt ─ MultilingualTokenizer → ids (b, 77)

Both are transformers' tokenizers. But importing transformers takes longer than anything else before a small
picture except importing PyTorch, and CLIP's tokenizer is no more than settings of the engine below it,
`tokenizers`. So the published files are read by that engine, set up alike; only what was added to them needs
transformers.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.checkpoint import CheckpointError, read_json

# Contractions, runs of letters, single digits, runs of anything else: merges join no two of these.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # where files do not say
ADDED = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
LONGEST = 77


class PromptTokenizer:
    """CLIP's tokenizer; pads no further than the longest prompt and says what it cuts.

    engine: a `tokenizers.Tokenizer`, set here to neither pad nor cut; pad: the id that fills up.
    """

    def __init__(self, engine: Any, pad: int, max_length: int = LONGEST):
        self.engine, self.pad, self.max_length = engine, pad, min(int(max_length), LONGEST)
        if self.max_length < 2:
            raise ValueError(f"model_max_length is {max_length}; a start and an end need 2")
        engine.no_padding()
        engine.no_truncation()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PromptTokenizer":
        """Reads `vocab.json` and `merges.txt`, as published, or any other form that transformers reads.

        Raises:
            CheckpointError: a file is missing or broken, or names a special token that is not in it.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").exists():
            for name in ("vocab.json", "merges.txt"):
                if not (folder / name).exists():
                    raise CheckpointError(f"no such file: {folder / name}")
        settings = _read_settings(folder)
        others = any((folder / name).exists() for name in ("tokenizer.json", "added_tokens.json"))
        try:
            if others or any(settings.get(name) for name in ADDED):
                from transformers import CLIPTokenizer

                return cls.from_transformers(CLIPTokenizer.from_pretrained(folder, local_files_only=True))
            special = {name: _special_token(settings.get(name) or token) for name, token in SPECIAL.items()}
            engine = _read_engine(folder, special)
            pad = engine.token_to_id(special["pad_token"].content)
            return cls(engine, pad, settings.get("model_max_length") or LONGEST)
        except Exception as error:  # neither library raises anything finer
            raise _unreadable(folder, error) from None

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> "PromptTokenizer":
        """From a CLIPTokenizer, which is copied: its own calls set how it pads and cuts."""
        from tokenizers import Tokenizer

        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no token to pad with; set its pad_token")
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
        if not texts:
            raise ValueError("no prompts were given")
        rows = []
        for text, whole in zip(texts, self.engine.encode_batch(texts)):
            letters = [character for character in text if character.isalpha()]
            if sum(character > "\u024f" for character in letters) > len(letters) / 2:
                warnings.warn(
                    f"the prior's text tower knows English; it reads little in {text!r}", stacklevel=2
                )
            ids = whole.ids
            if len(ids) > self.max_length:
                dropped = text[whole.offsets[self.max_length - 1][0] :]
                warnings.warn(
                    f"the prompt is longer than {self.max_length} tokens; this part was dropped: {dropped!r}",
                    stacklevel=2,
                )
                ids = [*ids[: self.max_length - 1], ids[-1]]  # the end is what the tower is read at
            rows.append(ids)
        lengths = torch.tensor([len(ids) for ids in rows], device="cpu")
        n = int(lengths.max())
        ids = torch.tensor([[*ids, *[self.pad] * (n - len(ids))] for ids in rows], device="cpu")
        return ids, torch.arange(n, device="cpu") < lengths[:, None]


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return CheckpointError(f"{folder} holds no readable tokenizer ({message})")


def _read_settings(folder: Path) -> dict[str, Any]:
    """Special tokens and the longest prompt; of two files that differ, transformers believes the second."""
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    return settings


def _special_token(said: str | dict[str, Any]) -> Any:
    """A special token as the settings name it, with how it is found in a text."""
    from tokenizers import AddedToken

    if isinstance(said, str):
        return AddedToken(said, normalized=False, special=True)
    how = {name: said[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in said}
    return AddedToken(said["content"], special=True, **how)


def _read_engine(folder: Path, special: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of the published files, as transformers' CLIPTokenizer sets it up."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    given = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": ""}
    _check_merges(folder)
    engine = Tokenizer(models.BPE.from_file(*files, **given, unk_token=special["unk_token"].content))
    for name, token in special.items():
        if engine.token_to_id(token.content) is None:
            raise ValueError(f"its {name} {token.content!r} is not in vocab.json")
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


def _check_merges(folder: Path) -> None:
    """Each merge makes a token of the vocabulary; in a file that was cut, some tokens have no merge."""
    vocabulary, lines = read_json(folder / "vocab.json"), (folder / "merges.txt").read_text(encoding="utf-8")
    made = {line.replace(" ", "") for line in lines.splitlines()}
    is_special = re.compile("<.*>").fullmatch
    longer = [token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and not is_special(token)]
    count = sum(token in made for token in longer)
    if count < len(longer):
        made_of = f"merges.txt makes {count} of {len(longer)} tokens of vocab.json"
        raise ValueError(f"{made_of}; fetch it again, or put tokens that you added into added_tokens.json")


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

        try:
            return cls(XLMRobertaTokenizerFast.from_pretrained(folder, local_files_only=True))
        except Exception as error:
            raise _unreadable(folder, error) from None

    def __call__(self, texts: list[str]) -> Tensor:
        """Prompts -> ids (b, 77); padding is id 1. What does not fit is cut, and a UserWarning shows it."""
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids
        for text, whole in zip(texts, self.tokenizer(texts, verbose=False).input_ids):
            if len(whole) > 77:
                dropped = self.tokenizer.decode(whole[76:-1])
                warnings.warn(
                    f"the prompt is longer than 77 tokens; this part was dropped: {dropped!r}", stacklevel=2
                )
        return torch.tensor(ids, device="cpu")
