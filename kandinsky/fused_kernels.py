"""The fused norm on a GPU, in Triton: two readings and one writing of a map in NHWC order.

    x ─ moments: mean and spread of each channel in each chunk of pixels        a reading, little written
        affine:  of each group, and from it what each channel is multiplied by and what is added
    x ─ applied: x·a + b, SiLU                                                  a reading, a writing

PyTorch brings Triton along with CUDA; on other machines this file cannot be imported. A chunk of pixels is
held in registers, so that its spread is taken about its own mean; all sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS = 64, 64  # of a tile
PARTS = 1024  # moments that are read at once


@triton.jit
def tile_of(chunk, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a program's tile of an image lies: start in the map, offsets from there, and what is inside."""
    pixel = tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    start = (tl.program_id(2).to(tl.int64) * pixels + chunk * PIXELS) * channels
    return start, pixel * channels + channel, (chunk * PIXELS + pixel < pixels) & (channel < channels)


@triton.jit(do_not_specialize=["pixels"])
def moments(x, means, spreads, pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a chunk of pixels: each channel's mean, and its sum of squares about it."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    start, offsets, inside = tile_of(chunk, pixels, channels, PIXELS, CHANNELS)
    values = tl.load(x + start + offsets, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=0) / tl.minimum(pixels - chunk * PIXELS, PIXELS)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    into = (tl.program_id(2) * chunks + chunk) * channels + channel
    tl.store(means + into, mean, mask=channel < channels)
    tl.store(spreads + into, tl.sum(apart * apart, axis=0), mask=channel < channels)


@triton.jit
def part(first, means, spreads, pixels, channels, chunks, size, PIXELS: tl.constexpr, PARTS: tl.constexpr):
    """A group's moments from the first on: means, spreads, of how many pixels each (0 behind the last)."""
    index = first + tl.arange(0, PARTS)
    chunk, inside = index // size, index < chunks * size
    of = (tl.program_id(1) * chunks + chunk) * channels + tl.program_id(0) * size + index % size
    count = tl.where(inside, tl.minimum(pixels - chunk * PIXELS, PIXELS), 0).to(tl.float32)
    return tl.load(means + of, mask=inside, other=0.0), tl.load(spreads + of, mask=inside, other=0.0), count


@triton.jit(do_not_specialize=["pixels", "chunks", "size"])
def affine(
    means,
    spreads,
    weight,
    bias,
    scale,
    shift,
    a,
    b,
    pixels,
    channels,
    chunks,
    size,
    eps,
    MODULATED: tl.constexpr,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One group of one image: a and b of its channels, so that x·a + b is normed, scaled and shifted."""
    total = tl.zeros([PARTS], tl.float32)
    for first in range(0, chunks * size, PARTS):
        mean, _, count = part(first, means, spreads, pixels, channels, chunks, size, PIXELS, PARTS)
        total += mean * count
    group_mean = tl.sum(total, axis=0) / (pixels * size)
    total = tl.zeros([PARTS], tl.float32)
    for first in range(0, chunks * size, PARTS):
        mean, spread, count = part(first, means, spreads, pixels, channels, chunks, size, PIXELS, PARTS)
        total += spread + count * (mean - group_mean) * (mean - group_mean)
    var = tl.sum(total, axis=0) / (pixels * size)

    inside = tl.arange(0, PARTS) < size
    channel = tl.program_id(0) * size + tl.arange(0, PARTS)
    of = tl.program_id(1) * channels + channel
    a_value = tl.load(weight + channel, mask=inside).to(tl.float32) * tl.rsqrt(var + eps)
    b_value = tl.load(bias + channel, mask=inside).to(tl.float32) - group_mean * a_value
    if MODULATED:
        factor = 1 + tl.load(scale + of, mask=inside).to(tl.float32)
        a_value *= factor
        b_value = b_value * factor + tl.load(shift + of, mask=inside).to(tl.float32)
    tl.store(a + of, a_value, mask=inside)
    tl.store(b + of, b_value, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def applied(
    x, a, b, out, pixels, channels, ACTIVATE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    start, offsets, inside = tile_of(tl.program_id(0), pixels, channels, PIXELS, CHANNELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    of, known = tl.program_id(2) * channels + channel, channel < channels
    a_value, b_value = tl.load(a + of, mask=known)[None, :], tl.load(b + of, mask=known)[None, :]
    value = tl.load(x + start + offsets, mask=inside).to(tl.float32) * a_value + b_value
    if ACTIVATE:
        value *= tl.sigmoid(value)
    tl.store(out + start + offsets, value, mask=inside)


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None = None,
    activate: bool = True,
) -> Tensor:
    """As `kandinsky.fused.norm_silu`; the result is in NHWC order whatever x is in."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    pixels, size = height * width, channels // num_groups
    if size > PARTS:
        raise ValueError(f"a group of {size} channels; this kernel takes up to {PARTS}")
    chunks = triton.cdiv(pixels, PIXELS)
    grid, tile = (chunks, triton.cdiv(channels, CHANNELS), images), {"PIXELS": PIXELS, "CHANNELS": CHANNELS}
    accurate = {"dtype": torch.float32, "device": x.device}
    means, spreads = torch.empty(2, images, chunks, channels, **accurate)
    moments[grid](x, means, spreads, pixels, channels, **tile)

    scale, shift = modulation or (weight, bias)  # where there is none, nothing is read of these
    a, b = torch.empty(2, images, channels, **accurate)
    sizes = (pixels, channels, chunks, size, eps, modulation is not None, PIXELS, PARTS)
    vectors = weight, bias, scale.contiguous(), shift.contiguous()
    affine[num_groups, images](means, spreads, *vectors, a, b, *sizes)

    out = torch.empty_like(x)
    applied[grid](x, a, b, out, pixels, channels, activate, **tile)
    return out
