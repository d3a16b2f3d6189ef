"""What the frozen networks make of a data set, computed once and kept in one safetensors file."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from kandinsky.checkpoint import CheckpointError, open_safetensors, temporaries, write_safetensors
from kandinsky.datasets import Dataset, Samples, shuffled
from kandinsky.encoders import CLIPTextEncoder, MultilingualCLIP
from kandinsky.prompts import MultilingualTokenizer, PromptTokenizer
from kandinsky.training import IF_TORN

Encode = Callable[[Samples], dict[str, Tensor]]  # samples -> tensors of as many rows


class Cache:
    """Tensors with a row for each picture; captions' states are packed, without their padding. seed: of the
    order in which rows are read."""

    def __init__(self, tensors: dict[str, Tensor], seed: int = 0):
        self.tensors, self.seed = tensors, seed
        self.empty_text: dict[str, Tensor] = {}
        if "text_states" in tensors:
            ends = tensors["text_lengths"].long().cumsum(dim=0)
            self.spans = list(zip([0, *ends.tolist()], ends.tolist()))
            states = tensors["empty_states"].float()[None]
            mask = torch.ones(1, states.shape[1], dtype=torch.bool)
            self.empty_text = {"embeds": tensors["empty_embeds"].float(), "states": states, "mask": mask}
            self.empty_text["ids"] = tensors["empty_ids"].long()[None]

    @classmethod
    def read(
        cls,
        path: Path,
        seed: int = 0,
        made_from: dict[str, Any] | None = None,
        unread: tuple[str, ...] = (),
    ) -> "Cache":
        """made_from: what it must say of itself, all but the names in unread; else a CheckpointError."""
        file = open_safetensors(path, if_torn=IF_TORN)
        if made_from is not None:
            known = json.loads((file.metadata() or {}).get("made_from", "{}"))
            names = (name for name in made_from | known if name not in unread)
            others = [name for name in names if made_from.get(name) != known.get(name)]
            if others:
                what = f"{path} is not known to be made from the same {', '.join(others)}"
                raise CheckpointError(f"{what}; delete it, or choose another --out")
        return cls({name: file.get_tensor(name) for name in file.keys()}, seed)

    def __len__(self) -> int:
        return len(self.tensors["image_embeds"])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def keys(self) -> set[str]:
        return set(self.tensors)

    def rows(self, indices: list[int], *names: str) -> dict[str, Tensor]:
        """Rows in `shuffled` order: every len(self) numbers visit each picture once.
        "text" gives text_embeds, text_states, text_ids and text_mask."""
        rows = [shuffled(index, len(self), self.seed) for index in indices]
        out = {name: self.tensors[name][rows].float() for name in names if name != "text"}
        if "text" in names:
            for name in ("states", "ids"):
                parts = [self.tensors[f"text_{name}"][slice(*self.spans[row])] for row in rows]
                out[f"text_{name}"] = pad_sequence(parts, batch_first=True)
            out["text_states"], out["text_ids"] = out["text_states"].float(), out["text_ids"].long()
            lengths = torch.tensor([len(part) for part in parts])
            out["text_mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
            out["text_embeds"] = self.tensors["text_embeds"][rows].float()
        return out


@torch.no_grad()
def build_cache(
    data: Dataset,
    count: int,
    path: Path,
    encode: Encode,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
    seed: int = 0,
    made_from: dict[str, Any] | None = None,
    unread: tuple[str, ...] = (),
) -> Cache:
    """Encodes the first `count` samples and writes the file; an existing one is read instead.
    Of the processes that torchrun started, the first of each machine does that, and the others wait for it.
    workers: processes that make the samples; 0: this one does. seed: of the order in which rows are read.
    made_from: what more the tensors depend on than data and count, for JSON; an existing file of other data
    or another of these is a CheckpointError. unread: names of these that may differ, as what depends on them
    is not read."""
    made_from = (made_from or {}) | {"data": name_of(data), "count": count}
    parent = os.getppid()
    while int(os.environ.get("LOCAL_RANK", 0)) and not path.exists():
        if os.getppid() != parent:
            raise ChildProcessError(f"{path} was not written, and what started this process has ended")
        time.sleep(1)
    if path.exists():
        return Cache.read(path, seed, made_from, unread)
    for left in temporaries(path):  # of saves that were killed
        left.unlink(missing_ok=True)
    from tqdm import tqdm

    parts: dict[str, list[Tensor]] = {}
    indices = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    load, generator = partial(_load_or_say_why, data), torch.Generator().manual_seed(0)
    loader = DataLoader(indices, None, collate_fn=load, num_workers=workers, generator=generator)
    for samples in tqdm(loader, "encoding", disable=not progress):
        if isinstance(samples, Exception):
            raise samples
        for name, tensor in encode(samples).items():
            parts.setdefault(name, []).append(tensor.cpu())
    # one after the other, so that not all of it is in memory twice
    tensors = {name: _joined(name, parts.pop(name)) for name in list(parts)}
    write_safetensors(tensors, path, {"made_from": json.dumps(made_from)})
    return Cache(tensors, seed)


def name_of(data: Dataset) -> str:
    """Its repr; of one without a repr of its own the type's name, as the other says where in memory it is."""
    return type(data).__name__ if type(data).__repr__ is object.__repr__ else repr(data)


def _joined(name: str, batches: list[Tensor]) -> Tensor:
    return batches[0] if name.startswith("empty_") else torch.cat(batches)


def digest(*networks: nn.Module) -> str:
    """Of weights in half precision, so that a network saved in it counts as the same."""
    found = hashlib.blake2b(digest_size=8)
    for network in networks:
        for name, x in network.state_dict().items():
            found.update(name.encode())
            found.update(x.half().cpu().numpy().tobytes())
    return found.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Of those files of a tokenizer that say which ids a text has."""
    found = hashlib.blake2b(digest_size=8)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "sentencepiece.bpe.model"):
        if (folder / name).exists():
            found.update(name.encode())
            found.update((folder / name).read_bytes())
    return found.hexdigest()


def _load_or_say_why(data: Dataset, indices: list[int]) -> Samples | Exception:
    """What a user can mend would come back from another process with all of its traceback as the message."""
    try:
        return data.load(indices)
    except (ValueError, OSError) as error:
        return error


def encode_texts(
    text_encoder: CLIPTextEncoder, tokenizer: PromptTokenizer, captions: list[str]
) -> dict[str, Tensor]:
    """What the prior reads of captions, and of the empty prompt, in half precision."""
    ids, mask = tokenizer([*captions, ""])
    states, embeds = text_encoder(ids.to(text_encoder.device))
    states, mask, ids = states.half().cpu(), mask.cpu(), ids.int().cpu()
    packed = {"text_states": states[:-1][mask[:-1]], "text_lengths": mask[:-1].sum(dim=1).int()}
    packed |= {
        "text_ids": ids[:-1][mask[:-1]],
        "empty_ids": ids[-1][mask[-1]],
        "text_embeds": embeds[:-1].half(),
        "empty_states": states[-1][mask[-1]],
        "empty_embeds": embeds[-1:].half(),
    }
    return packed


def encode_decoder_texts(
    text_encoder: MultilingualCLIP, tokenizer: MultilingualTokenizer, captions: list[str]
) -> dict[str, Tensor]:
    """What 2.1's U-Net reads of captions, padding and all, and of the empty prompt, in half precision."""
    ids = tokenizer([*captions, ""]).to(text_encoder.device)
    states, embeds = (x.half().cpu() for x in text_encoder(ids))
    texts = {"decoder_text_embeds": embeds[:-1], "decoder_text_states": states[:-1]}
    return texts | {"empty_decoder_text_embeds": embeds[-1:], "empty_decoder_text_states": states[-1:]}
