"""Writing over what was read: SiLU, scale and shift, and sums in the memory of the map that they change.

On a CPU new memory of more than 32 MiB costs more time than any of them, as the system clears it first. A map
that someone else may see, or that a gradient may ask for, is left as it is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules

from kandinsky import movq


def may_overwrite(layer: nn.Module) -> bool:
    """Whether what a layer has just returned is nobody else's: it is of a kind that makes new memory at each
    call, no hook has seen it, and no gradient will be asked of it."""
    is_seen = layer._forward_hooks or torch_modules._global_forward_hooks
    makes_new = isinstance(layer, (nn.GroupNorm, movq.SpatialNorm, nn.Conv2d))
    return makes_new and not is_seen and not torch.is_grad_enabled()


def memory_for(out: Tensor, layer: nn.Module) -> Tensor | None:
    """Where to write what is made of a layer's result `out`: over it, or into memory of the same order, so
    that a hook changes no bit. None: wherever, for gradients."""
    if torch.is_grad_enabled():
        return None
    return out if may_overwrite(layer) else torch.empty_like(out)


def activated(norm: nn.Module, x: Tensor, *zq: Tensor) -> Tensor:
    """F.silu(norm(x, *zq))"""
    return F.silu(norm(x, *zq), inplace=may_overwrite(norm))
