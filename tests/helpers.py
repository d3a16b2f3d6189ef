"""What several test files use: random weights that hide nothing, the distance in which parity is stated."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky.packed import available, can_pack

# the project's documents, beside the checkout; tests that read them skip without
SHARED = Path(__file__).resolve().parents[2] / "shared"


needs_packing = pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN operators")
# without them a processor takes tens of times as long in bfloat16 as in float32
needs_bfloat16_kernels = pytest.mark.skipif(
    not can_pack(torch.empty(1, dtype=torch.bfloat16)), reason="this processor has no bfloat16 kernels"
)


def slow(*values) -> list:
    """Of a parameter of tests, what only `-m slow` takes; a tuple's values are of several."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm weights near one, matrices by fan-in, everything else drawn too, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.ndim == 1:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.3, generator=generator)
            else:
                p.normal_(0.0, p[0].numel() ** -0.5 if p.ndim in (2, 4) else 0.3, generator=generator)
    return model.eval()


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in float64; shapes must agree."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def norms(model: nn.Module) -> dict[str, tuple[float, int]]:
    """eps and number of groups of every norm, by name: at ordinary activations an eps shows in no output."""
    kinds = (nn.GroupNorm, nn.LayerNorm)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: (module.eps, getattr(module, "num_groups", 1)) for name, module in found.items()}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def half_mask(height: int = 32, width: int = 48) -> np.ndarray:
    """White in a box that touches no grid of latents."""
    mask = np.zeros((height, width), dtype=np.float32)
    mask[height // 4 + 1 : height - 7, width // 3 - 1 : width - 10] = 1
    return mask


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
