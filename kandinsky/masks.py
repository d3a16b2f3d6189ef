"""Inpainting masks: white, 1, is repainted and black, 0, is kept.

any form ─ masks → (h, w) ─ resize → (height, width) of 0 and 1 ─ grow → what the caller gets back repainted
                                                                └ keep_latents → what the U-Net is told
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kandinsky import images

WIDEST = 4096  # margin of a mask, pixels
MASK = "a PIL picture, or a numpy array or tensor (h, w) in [0, 1]"


def masks(value: Any) -> list[Tensor]:
    """One mask, a list of them, or a batch (b, 1, h, w) -> (h, w) float32 in [0, 1] each."""
    return [mask(item) for item in images.listed(value, "mask_image")]


def mask(value: Any, name: str = "mask_image") -> Tensor:
    """Any form of a mask -> (h, w) float32 in [0, 1], in memory of its own.

    Args:
        value: a PIL picture (its luminance counts, alpha over white), or a numpy array or tensor (h, w),
            (1, h, w) or (h, w, 1) of booleans, floats in [0, 1], or integers 0 and 1; uint8 also up to 255.

    Raises:
        PictureError: a wrong shape, or values outside the range. TypeError: none of these forms.
    """
    if isinstance(value, Image.Image):
        levels = images.picture(value, name)
        return levels[0].clone() if (levels == levels[:1]).all() else _luminance(levels)
    if not isinstance(value, (np.ndarray, Tensor)):
        opened = "; open files with images.open_image" if isinstance(value, (str, Path)) else ""
        raise TypeError(f"{name} is a {type(value).__name__}; needed is {MASK}{opened}")
    x = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach().cpu()
    if x.ndim == 3 and 1 in (x.shape[0], x.shape[2]):
        first = x.shape[0] == 1 and (x.shape[2] != 1 or isinstance(value, Tensor))
        x = x.squeeze(0 if first else 2)
    if x.ndim != 2:
        raise images.PictureError(f"{name} has the shape {tuple(value.shape)}; needed is {MASK}")
    if not x.is_floating_point() and ((x == 0) | (x == 1)).all():
        x = x.float()
    return images.unit_range(x, name)


def _luminance(x: Tensor) -> Tensor:
    """(3, h, w) -> (h, w), by Pillow's weights and its 256 levels"""
    gray = np.array(images.to_pil(x[None])[0].convert("L"))
    return torch.from_numpy(gray).float() / 255


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(h, w) -> (height, width) of 0 and 1: Lanczos through 8 bits where the size differs, then ≥ 0.5"""
    if x.shape != (height, width):
        image = Image.fromarray((x * 255).round().to(torch.uint8).numpy())
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        x = torch.from_numpy(np.array(image)).float() / 255
    return (x >= 0.5).float()


def grow(x: Tensor, pixels: int) -> Tensor:
    """Repaints a margin of so many pixels more, in all directions. (1, h, w) of 0 and 1 -> likewise"""
    for dim in (-1, -2):
        before = F.pad(x.transpose(-1, dim), (1, 0)).cumsum(dim=-1)  # how many are repainted before each
        place = torch.arange(x.shape[dim], device=x.device)
        first, last = (place - pixels).clamp(min=0), (place + pixels + 1).clamp(max=len(place))
        x = (before[..., last] > before[..., first]).float().transpose(-1, dim)
    return x.contiguous()


def feather(x: Tensor, pixels: int) -> Tensor:
    """A ramp inside the repainted region, that wide; outside it stays 0. (1, h, w) of 0 and 1 -> [0, 1]"""
    return steps_inside(x).clamp(max=pixels + 1) / (pixels + 1) if pixels else x


def steps_inside(x: Tensor) -> Tensor:
    """How many steps lead to the nearest 0, diagonal ones too; where there is none, a number beyond all.

    Two passes over the rows (Rosenfeld and Pfaltz 1968): along a row the least of value + distance is a
    running minimum. x: (1, h, w) of 0 and 1 -> (1, h, w)
    """
    h, w = x.shape[-2:]
    steps, place = x * (h + w + WIDEST), torch.arange(w, dtype=x.dtype, device=x.device)
    for _ in range(2):  # down and to the right, then up and to the left
        for y in range(h):
            if y:
                above = -F.max_pool1d(-steps[:, y - 1], 3, stride=1, padding=1)
                steps[:, y] = torch.minimum(steps[:, y], above + 1)
            steps[:, y] = (steps[:, y] - place).cummin(dim=-1).values + place
        steps = steps.flip(-2, -1)
    return steps


def keep_latents(x: Tensor, downscale: int) -> Tensor:
    """What the inpainting U-Net was trained on: 1 where a latent is kept.

    The mask is read at the top left pixel of each block of `downscale`². Each repainted latent makes six of
    its eight neighbours repainted too, all but the top right and the bottom left one: the maximum over the
    2×2 latents that start there and the 2×2 that end there. x: (b, 1, H, W) of 0 and 1 -> (b, 1, h, w)
    """
    x = x[..., ::downscale, ::downscale]
    squares = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2, stride=1)  # (b, 1, h + 1, w + 1)
    return 1 - torch.maximum(squares[..., :-1, :-1], squares[..., 1:, 1:])


def paste(pixels: Tensor, original: Tensor, share: Tensor) -> Tensor:
    """Repainted pixels where `share` is 1, the original to the last bit where it is 0. (b, 3, h, w) each"""
    return share * pixels + (1 - share) * original
