"""Where training pictures and captions come from: the endless shapes, or a folder of the user's own."""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kandinsky import arguments, images, shapes
from kandinsky.captions import caption
from kandinsky.shapes import Scene

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OBJECT_HOLES = 0.75  # the share of holes that are an object's
HINT = ".hint"  # in a hint's name, before the suffix


@dataclass(frozen=True)
class Samples:
    """Pictures (b, 3, size, size) in [-1, 1], a caption each, and where they are known the scenes, and the
    hints, (b, 3, size, size) in [0, 1]; for inpainting holes, (b, 1, size, size) of 0 and 1, and the pictures
    as they were before."""

    pixels: Tensor
    captions: list[str]
    scenes: list[Scene] | None = None
    hints: Tensor | None = None
    holes: Tensor | None = None
    before: Tensor | None = None


class Dataset(Protocol):
    """Any number is a sample's: a finite data set goes round, each time in another order. Its repr tells it
    from others; without one of its own, its type's name does."""

    def load(self, indices: list[int]) -> Samples: ...

    def captions(self, indices: list[int]) -> list[str]:
        """Of the same samples, without their pictures."""


def first(data: Dataset, most: int) -> Samples:
    """So many of the first samples, of a finite data set each once."""
    return data.load(list(range(min(most, len(data) if hasattr(data, "__len__") else most))))


@dataclass(frozen=True)
class Shapes:
    """`kandinsky.shapes` as a data set without end."""

    seed: int = 0
    size: int = 64
    split: str = "train"
    hints: bool = False
    object_weights: Sequence[float] = shapes.OBJECT_WEIGHTS

    def __post_init__(self) -> None:
        shapes.check_object_weights(self.object_weights)

    def _scenes(self, indices: list[int]) -> list[Scene]:
        given = self.split, self.object_weights
        return [shapes.random_scene(self.seed, index, *given) for index in indices]

    def _captions(self, indices: list[int], scenes: list[Scene]) -> list[str]:
        draws = (Random(f"{self.seed} {index} {self.split} caption") for index in indices)
        return [caption(scene, draw) for scene, draw in zip(scenes, draws)]

    def captions(self, indices: list[int]) -> list[str]:
        return self._captions(indices, self._scenes(indices))

    def load(self, indices: list[int]) -> Samples:
        scenes = self._scenes(indices)
        captions = self._captions(indices, scenes)
        pixels = torch.stack([shapes.as_pixels(shapes.render(scene, self.size)) for scene in scenes])
        if not self.hints:
            return Samples(pixels, captions, scenes)
        depths = torch.stack([torch.from_numpy(shapes.depth_hint(scene, self.size)) for scene in scenes])
        return Samples(pixels, captions, scenes, depths[:, None].expand(-1, 3, -1, -1).float() / 255)


class Folder:
    """Pictures with captions in a folder: `metadata.jsonl` with `file_name` and `text` or `caption`, as the
    Hub's imagefolder has it, or a `.txt` beside each picture. What cannot be read is reported and left out.

    hints: each picture needs one of its own aspect, `hint_file_name` in `metadata.jsonl`, or `cat.hint.png`
        beside `cat.jpg`.
    seed: of the order.

    Raises ValueError when nothing is left.
    """

    def __init__(self, folder: str | Path, size: int, hints: bool = False, seed: int = 0):
        self.folder, self.size, self.hints, self.seed = Path(folder), size, hints, seed
        if not self.folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
        listed = self.folder / "metadata.jsonl"
        entries = self._listed(listed) if listed.exists() else self._beside()
        self.samples = [entry for entry in entries if self._is_readable(*entry)]
        if not self.samples:
            raise ValueError(f"{folder} has no readable picture with a caption{' and a hint' * hints}")

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        """What it holds, wherever it lies: a cache of it says so."""
        files = [(p.name, p.stat().st_size, text, hint and hint.name) for p, text, hint in self.samples]
        if self.hints:
            files += [hint.stat().st_size for _, _, hint in self.samples]
        digest = hashlib.blake2b(repr(files).encode(), digest_size=8).hexdigest()
        return f"Folder({digest}, size={self.size}, hints={self.hints}, seed={self.seed})"

    def _chosen(self, indices: list[int]) -> list[tuple[Path, str, Path | None]]:
        return [self.samples[shuffled(index, len(self.samples), self.seed)] for index in indices]

    def captions(self, indices: list[int]) -> list[str]:
        return [text for _, text, _ in self._chosen(indices)]

    def load(self, indices: list[int]) -> Samples:
        chosen = self._chosen(indices)
        pixels = torch.stack([read_picture(path, self.size) for path, _, _ in chosen])
        hints = None
        if self.hints:
            hints = torch.stack([read_picture(hint, self.size) for _, _, hint in chosen]) / 2 + 0.5
        return Samples(pixels, [text for _, text, _ in chosen], hints=hints)

    def _listed(self, path: Path) -> list[tuple[Path, str, Path | None]]:
        entries = []
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)  # UTF-8, with or without a mark at the start
                text = arguments.text(fields.get("text", fields.get("caption")), "text")
                hint = fields.get("hint_file_name")
                entries.append((self.folder / fields["file_name"], text, hint and self.folder / hint))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                what = "has no file_name and text, or what is no name for a file"
                report(f"{path.name} line {number} {what}: {error}")
        return entries

    def _beside(self) -> list[tuple[Path, str, Path | None]]:
        entries = []
        for path in sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in PICTURES):
            if path.stem.endswith(HINT):
                continue
            text, hint = path.with_suffix(".txt"), path.with_suffix(f"{HINT}.png")
            try:
                words = " ".join(text.read_text(encoding="utf-8-sig").split())
                entries.append((path, words, hint if hint.exists() else None))
            except FileNotFoundError:
                report(f"{path} has no caption: neither metadata.jsonl nor {text.name}")
            except (OSError, ValueError) as error:
                report(f"{text} cannot be read: {error}")
        return entries

    def _is_readable(self, path: Path, _: str, hint: Path | None) -> bool:
        if self.hints and hint is None:
            report(f"{path} has no hint: neither hint_file_name nor {path.stem}{HINT}.png")
            return False
        try:
            for file in (path, hint) if self.hints else (path,):
                read_picture(file, self.size)
            if self.hints and not math.isclose(aspect(path), aspect(hint), rel_tol=0.02):
                raise ValueError(f"{hint.name} has another aspect")
        except (OSError, ValueError) as error:
            report(f"{path} cannot be read: {error}")
            return False
        return True


def with_holes(samples: Samples, rng: Random) -> Samples:
    """Holes to be repainted, and in them what is not to be seen again.

    The autoencoder spreads a little of what is in a hole over the latents around it. Were that the sample
    itself, the decoder would learn to read it there, and would later paint again what was to be replaced.
    Mostly the hole is that of an object exchanged for another; where the scene is not known, and else, it is
    a rectangle, a quarter to all of each side, in which the next picture is seen.
    """
    size, holes = samples.pixels.shape[-1], []
    before = torch.stack([_another(samples.pixels, row) for row in range(len(samples.pixels))])
    for row, pixels in enumerate(samples.pixels):
        if samples.scenes is not None and rng.random() < OBJECT_HOLES:
            scene = samples.scenes[row]
            other, changed = shapes.with_another_object(scene, rng)
            hole = torch.from_numpy(shapes.hole_of(scene, other, changed, size))
            before[row] = shapes.as_pixels(shapes.render(other, size))
        else:
            hole = torch.zeros(size, size, dtype=torch.bool)
            hole[_span(size, rng), _span(size, rng)] = True
        before[row] = torch.where(hole, before[row], pixels)
        holes.append(hole)
    return replace(samples, holes=torch.stack(holes)[:, None].float(), before=before)


def _another(pixels: Tensor, row: int) -> Tensor:
    """The next picture that is not this one; where there is none, this one's negative."""
    others = (pixels[(row + step) % len(pixels)] for step in range(1, len(pixels)))
    return next((other for other in others if not torch.equal(other, pixels[row])), -pixels[row])


def _span(size: int, rng: Random) -> slice:
    length = rng.uniform(0.25, 1)
    start = rng.uniform(0, 1 - length)
    return slice(round(start * size), round((start + length) * size))


def report(message: str) -> None:
    print(f"left out: {message}", file=sys.stderr)


def read_picture(path: Path, size: int) -> Tensor:
    """The middle square of a picture -> (3, size, size) in [-1, 1]"""
    image = images.open_image(path)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    if side >= 4 * size and image.mode in ("L", "RGB"):  # before it is floats, four times as large
        image = image.reduce(side // (2 * size))
    square = images.picture(image, str(path))[None]
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1) * 2 - 1


def aspect(path: Path) -> float:
    width, height = images.open_image(path).size
    return width / height


def shuffled(index: int, count: int, seed: int = 0) -> int:
    """The index-th row of an endless walk that visits all `count` rows once in each round, in a new order."""
    round_number, at = divmod(index, count)
    key = (round_number + 1_000_003 * seed) % 2**32, count  # PyTorch's CPU generators take 32 bits of a seed
    if key not in _orders:
        if len(_orders) > 8:
            _orders.clear()
        generator = torch.Generator().manual_seed(key[0])
        _orders[key] = torch.randperm(count, generator=generator).tolist()
    return _orders[key][at]


_orders: dict[tuple[int, int], list[int]] = {}
