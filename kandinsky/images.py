"""Between pictures and tensors: CLIP's preprocessing, the way out to PIL, and writing files."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky.checkpoint import atomic_file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def clip_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """What CLIP's image tower reads: shortest edge to `size`, centre crop, normalised colours.

    image: a picture of any size -> (3, size, size) float32
    """
    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    new_size = (size, long) if width <= height else (long, size)
    image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (new_size[0] - size) // 2, (new_size[1] - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def to_unit_range(pixels: Tensor) -> Tensor:
    """MoVQ's output, about [-1, 1] -> [0, 1], clamped"""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of a map. (…, H, W) -> (…, height, width)"""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [0, 1] -> RGB pictures, rounded to the nearest of 256 levels"""
    levels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]


def check_suffix(path: Path) -> str:
    """The format that a file name asks for; another suffix is a ValueError."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: cannot write {suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}"
        )
    return SUFFIXES[suffix]


def check_writable(path: Path) -> None:
    """Raises now what `save_image` would raise after the work is done."""
    path = Path(path)
    check_suffix(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the picture's name too")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"{path} cannot be written: {parent} is not a folder that can be written to")


def save_image(image: Image.Image, path: Path, overwrite: bool = False) -> None:
    """Writes a picture, atomically; the suffix names the format. An existing file is a FileExistsError."""
    path, file_format = Path(path), check_suffix(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or allow overwriting")
    with atomic_file(path) as temporary:
        image.save(temporary, format=file_format)
