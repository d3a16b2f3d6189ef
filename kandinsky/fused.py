"""A group norm and what follows it, in two readings and one writing of a map in NHWC order, on CUDA.

    mean and variance of each group ─ a, b (batch, c) ─ x·a + b ─ SiLU       `kandinsky.fused_kernels`

PyTorch's own group norm brings an NHWC map into NCHW order first, and scale, shift and SiLU each read and
write it again. What is computed is the same; statistics and sums are float32 in every dtype. PyTorch's
compiler does not do it: for sizes that vary it reads the channels of a group one by one, far apart in memory,
and divides long integers for each number; for fixed ones it compiles every size of map for itself.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky import unet
from kandinsky.packed import wants_gradient


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    modulation: tuple[Tensor, Tensor] | None = None,
    activate: bool = True,
) -> Tensor:
    """silu(group_norm(x) · (1 + scale) + shift). x: (b, c, h, w), modulation: scale and shift, (b, c) each
    -> like x"""
    groups = x.float().unflatten(1, (num_groups, -1))
    var, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
    size = x.shape[1] // num_groups
    a = (var + eps).rsqrt().repeat_interleave(size, dim=1) * weight.float()
    b = bias.float() - mean.repeat_interleave(size, dim=1) * a
    if modulation is not None:
        scale, shift = modulation
        a, b = a * (1 + scale.float()), b * (1 + scale.float()) + shift.float()
    out = torch.addcmul(b[:, :, None, None], x.float(), a[:, :, None, None])
    return (F.silu(out) if activate else out).to(x.dtype)


@cache
@torch.no_grad()
def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels work on this machine, and rightly: they need Triton, which needs a C compiler."""
    try:
        x, weight, scale = (torch.linspace(-1, 2, n, device=device) for n in (4 * 32 * 80, 32, 4 * 32))
        x, weight, scale = (a.to(dtype) for a in (x.reshape(4, 32, 8, 10), weight, scale.reshape(4, 32)))
        given = x, weight, weight, 8, 1e-5, (scale, scale)
        with torch.cuda.device_of(x):
            torch.testing.assert_close(kernels()(*given), norm_silu(*given), rtol=0.02, atol=0.02)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds, and none is worth a picture
        reason = " ".join(str(error).split())[:120]
        warnings.warn(f"norms are not fused: Triton does not work here ({reason})", stacklevel=2)
        return False
    return True


def kernels() -> Callable:
    """`norm_silu` in Triton; the first call of a process takes a second or two."""
    from kandinsky import fused_kernels

    return fused_kernels.norm_silu


def apply(
    norm: nn.GroupNorm, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None, activate: bool = True
) -> Tensor:
    """`norm_silu` with a norm's weights, in Triton where the map is on CUDA."""
    given = x, norm.weight, norm.bias, norm.num_groups, norm.eps, modulation, activate
    if not x.is_cuda:
        return norm_silu(*given)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return kernels()(*given)


class FusedGroupNorm(nn.GroupNorm):
    """Where no SiLU follows: in attention, and in MoVQ's spatial norms."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or wants_gradient(x, self.weight):
            return super().forward(x)
        return apply(self, x, activate=False)


class FusedResnetBlock(unet.ResnetBlock):
    """The norms themselves are not called: hooks on them see nothing."""

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        if wants_gradient(x, self.conv1.weight):
            return super().forward(x, modulation)
        out = self.resized(apply(self.norm1, x))
        out = self.conv2(apply(self.norm2, out, modulation))
        return self.conv_shortcut(self.resize(x)) + out

    def resized(self, x: Tensor) -> Tensor:
        """The first convolution, of the resized map."""
        return self.conv1(self.resize(x))
