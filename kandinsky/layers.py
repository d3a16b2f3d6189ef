"""What two or more networks use."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention; all attention in the package runs through here, but an optimized MoVQ's.

    Args:
        q: (b, n, c)
        k, v: (b, m, c)
        mask: boolean, broadcastable to (b, heads, n, m); True lets a query see a key.

    Returns:
        (b, n, c)
    """
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=num_heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "b heads n d -> b n (heads d)")


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep; cosines first, where arXiv:1706.03762 has sines first.

    t: (b,) -> (b, dim) float32
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def check_shape(name: str, x: Tensor, *shape: int | str) -> None:
    """For what users pass to a network: an error with the numbers where x is of another shape. Letters in it
    stand for any number."""
    needed = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, needs a tensor of {needed}")
    numbers = [n if isinstance(wanted, int) else wanted for n, wanted in zip(x.shape, shape)]
    if x.ndim != len(shape) or numbers != list(shape):
        raise ValueError(f"{name} is {tuple(x.shape)}, needs {needed}")


class TimestepMLP(nn.Module):
    """From sinusoids to the embedding that the networks use."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.in_dim = in_dim
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """t: (b,) -> (b, dim), in the weights' dtype"""
        sinusoids = timestep_embedding(t, self.in_dim).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))
