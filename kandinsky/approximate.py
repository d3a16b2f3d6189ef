"""Approximate ways through the decoder's loop, off by default: they leave out work, and change the picture.

    guidance interval   guidance in a part of the loop only (arXiv:2404.07724); elsewhere the unconditional
                        rows are not computed
    kept features       what the inner levels make is kept for some steps (arXiv:2312.00858); in these only
                        the outermost level runs, on the way in and on the way out

Each stands in for the U-Net in the loops of `kandinsky.sampling`, which know of neither.
"""

from collections.abc import Sequence
from dataclasses import replace
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kandinsky.unet import Conditioning, Plan, UNet


class Denoiser(Protocol):
    """What the loops need of a U-Net, and what stands in for one."""

    def prepare(self, image_embeds: Tensor, timesteps: Sequence[int], *others: Tensor | None) -> Any: ...

    def step(self, x: Tensor, plan: Any, index: int) -> Tensor: ...


class Plans(NamedTuple):
    """Of all rows, and of the conditional ones alone."""

    guided: Plan
    unguided: Plan


class GuidanceInterval:
    """Guides the steps of which index / num_steps lies in [start, stop). Rows: unconditional ones first."""

    def __init__(self, unet: Denoiser, start: float, stop: float):
        self.unet, self.start, self.stop = unet, start, stop

    def prepare(self, image_embeds: Tensor, timesteps: Sequence[int], *others: Tensor | None) -> Plans:
        plan = self.unet.prepare(image_embeds, timesteps, *others)
        return Plans(plan, last_rows(plan, len(image_embeds) // 2))

    def step(self, x: Tensor, plans: Plans, index: int) -> Tensor:
        """As UNet's; outside the interval both halves are the conditional prediction, left as it is."""
        if self.start <= index / len(plans.guided.temb) < self.stop:
            return self.unet.step(x, plans.guided, index)
        cond = self.unet.step(x[len(x) // 2 :], plans.unguided, index)
        return torch.cat([cond, cond])


def last_rows(plan: Plan, count: int) -> Plan:
    """The plan of the last rows alone."""
    added = {block: (keys[-count:], values[-count:]) for block, (keys, values) in plan.added.items()}
    hint_features = plan.hint_features if plan.hint_features is None else plan.hint_features[-count:]
    return replace(
        plan, temb=plan.temb[:, -count:], added=added, hint_features=hint_features, chunk=-1, modulations={}
    )


class KeptFeatures:
    """Runs the whole U-Net at each `every`-th step, and its outermost level at the others. Whole steps run
    under a hook, and so are never replayed as a CUDA graph."""

    def __init__(self, unet: UNet, every: int):
        self.unet, self.every, self.inner = unet, every, None

    def prepare(self, *given: Any) -> Plan:
        return self.unet.prepare(*given)

    def step(self, x: Tensor, plan: Plan, index: int) -> Tensor:
        """As UNet's, steps in order. The whole network also runs where rows are new, as guidance begins."""
        if index % self.every == 0 or self.inner is None or len(self.inner) < len(x):
            return self._whole_step(x, plan, index)
        given = self.unet.conditioning(plan, index)
        return outermost(self.unet, x, self.inner[-len(x) :], given, plan.hint_features)

    def _whole_step(self, x: Tensor, plan: Plan, index: int) -> Tensor:
        thread = get_ident()

        def keep(_: Any, args: tuple) -> None:
            if get_ident() == thread:  # others may run the same network
                self.inner = args[0]

        # before others' hooks, which come again when the block gets what was kept
        hook = self.unet.up_blocks[-1].register_forward_pre_hook(keep, prepend=True)
        try:
            return self.unet.step(x, plan, index)
        finally:
            hook.remove()


def outermost(
    unet: UNet, x: Tensor, inner: Tensor, given: Conditioning, hint_features: Tensor | None
) -> Tensor:
    """`UNet.denoise` with what the inner levels made: inner (b, c, h, w), the input of the last up block."""
    x = unet.enter(x, hint_features)
    skips = [x]
    for resnet in unet.down_blocks[0].resnets:
        x = resnet(x, given[resnet])
        skips.append(x)
    x = unet.up_blocks[-1](inner, skips, given)
    return unet.leave(x)


def approximate(
    unet: UNet, guided: bool, guidance_interval: tuple[float, float], cache_every: int
) -> Denoiser:
    """What stands in for the U-Net in a loop; itself where nothing is left out. guided: half of the rows are
    unconditional."""
    if cache_every > 1:
        unet = KeptFeatures(unet, cache_every)
    if guided and guidance_interval != (0.0, 1.0):
        unet = GuidanceInterval(unet, *guidance_interval)
    return unet
