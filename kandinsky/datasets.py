"""Where training pictures and captions come from: the endless shapes, or a folder of the user's own."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky import shapes
from kandinsky.shapes import Scene

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Samples:
    """Pictures (b, 3, size, size) in [-1, 1], a caption each, and the scenes where they are known."""

    pixels: Tensor
    captions: list[str]
    scenes: list[Scene] | None = None


class Dataset(Protocol):
    """Any number is a sample's: a finite data set goes round, each time in another order."""

    def load(self, indices: list[int]) -> Samples: ...


@dataclass(frozen=True)
class Shapes:
    """`kandinsky.shapes` as a data set without end."""

    seed: int = 0
    size: int = 64
    split: str = "train"

    def load(self, indices: list[int]) -> Samples:
        return Samples(*shapes.batch(self.seed, indices, self.size, self.split))


class Folder:
    """Pictures with captions in a folder: `metadata.jsonl` with `file_name` and `text`, as the Hub's
    imagefolder has it, or a `.txt` beside each picture. What cannot be read is reported and left out.

    Raises ValueError when nothing is left.
    """

    def __init__(self, folder: str | Path, size: int):
        self.folder, self.size = Path(folder), size
        if not self.folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
        listed = self.folder / "metadata.jsonl"
        entries = self._listed(listed) if listed.exists() else self._beside()
        self.samples = [(path, text) for path, text in entries if self._is_readable(path)]
        if not self.samples:
            raise ValueError(f"{folder} has no readable picture with a caption")

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, indices: list[int]) -> Samples:
        chosen = [self.samples[shuffled(index, len(self.samples))] for index in indices]
        pixels = torch.stack([read_picture(path, self.size) for path, _ in chosen])
        return Samples(pixels, [text for _, text in chosen])

    def _listed(self, path: Path) -> list[tuple[Path, str]]:
        entries = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                text = fields.get("text", fields.get("caption"))
                entries.append((self.folder / fields["file_name"], str(text)))
            except (ValueError, KeyError, AttributeError, TypeError):
                report(f"{path.name} line {number} has no file_name and text")
        return entries

    def _beside(self) -> list[tuple[Path, str]]:
        entries = []
        for path in sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in PICTURES):
            text = path.with_suffix(".txt")
            if text.exists():
                entries.append((path, " ".join(text.read_text(encoding="utf-8").split())))
            else:
                report(f"{path} has no caption: neither metadata.jsonl nor {text.name}")
        return entries

    def _is_readable(self, path: Path) -> bool:
        try:
            read_picture(path, self.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            report(f"{path} cannot be read: {error}")
            return False
        return True


def report(message: str) -> None:
    print(f"left out: {message}", file=sys.stderr)


def read_picture(path: Path, size: int) -> Tensor:
    """The middle square of a picture -> (3, size, size) in [-1, 1]"""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def shuffled(index: int, count: int) -> int:
    """The index-th row of an endless walk that visits all `count` rows once in each round, in a new order."""
    round_number, at = divmod(index, count)
    if (round_number, count) not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        generator = torch.Generator().manual_seed(round_number)
        _orders[round_number, count] = torch.randperm(count, generator=generator).tolist()
    return _orders[round_number, count][at]


_orders: dict[tuple[int, int], list[int]] = {}
