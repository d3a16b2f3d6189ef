"""The U-Net's step as one CUDA graph: its thousand kernels are launched by one call.

A graph repeats the same kernels on the same memory. So all that changes between steps (the sample, scale and
shift of the blocks; with a new plan the keys and values and the hint's features too) is copied into buffers
that stay where they are. It is captured anew when a size changes, a weight lies elsewhere than before, or
`kandinsky.unet.attention` is another function. Other patches inside the blocks it does not notice.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky import unet as networks
from kandinsky.unet import Conditioning, Plan, UNet

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels


class GraphedUNet(UNet):
    """A U-Net on a CUDA device whose `step` replays a graph, but where there are hooks or gradients."""

    def step(self, x: Tensor, plan: Plan, index: int) -> Tensor:
        if not can_replay(self, x):
            return super().step(x, plan, index)
        given, graph = self.conditioning(plan, index), vars(self).get("graph")
        if graph is None or not graph.fits(self, x, given, plan):
            self.graph = graph = None  # its memory is free before the next is captured
            self.graph = graph = StepGraph(self, x, given, plan)
        return graph.replay(x, given, plan)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.graph = None
        return super()._apply(fn, recurse)


def can_replay(unet: UNet, x: Tensor) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    return x.is_cuda and not torch.is_grad_enabled() and not hooked


class StepGraph:
    """One captured step, and the buffers that it reads."""

    @torch.inference_mode(False)  # the buffers are written to in later calls, whatever mode these run in
    @torch.no_grad()
    def __init__(self, unet: UNet, x: Tensor, given: Conditioning, plan: Plan):
        self.x, self.plan, self.computes = x.clone(), weakref.ref(plan), what_computes(unet)
        self.given = {block: (a.clone(), b.clone()) for block, (a, b) in given.items()}
        self.hint_features = None if plan.hint_features is None else plan.hint_features.clone()
        self.run, self.out = capture(lambda: unet.denoise(self.x, self.given, self.hint_features))

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network captures its own."""

    def fits(self, unet: UNet, x: Tensor, given: Conditioning, plan: Plan) -> bool:
        if x.shape != self.x.shape or what_computes(unet) != self.computes:
            return False
        hinted = (plan.hint_features is None) == (self.hint_features is None)
        return plan is self.plan() or (hinted and shapes(given) == shapes(self.given))

    def replay(self, x: Tensor, given: Conditioning, plan: Plan) -> Tensor:
        new = [] if plan is self.plan() else [*plan.added]
        if new and plan.hint_features is not None:
            self.hint_features.copy_(plan.hint_features)
        changed = [block for block in given if block in new or block not in plan.added]
        into = [tensor for block in changed for tensor in self.given[block]]
        torch._foreach_copy_([self.x, *into], [x, *(tensor for block in changed for tensor in given[block])])
        self.plan = weakref.ref(plan)
        self.run()
        return self.out.clone()


def what_computes(unet: UNet) -> list[Any]:
    """The attention, and where each weight lies."""
    return [networks.attention, *(parameter.data_ptr() for parameter in unet.parameters())]


def shapes(given: Conditioning) -> list[tuple[torch.Size, torch.Size]]:
    return [(a.shape, b.shape) for a, b in given.values()]


def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """-> what computes it again, and where the result then lies"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()
    return graph.replay, out
