"""The sampling loops, as generators that yield every step.

A loop is model call, guidance, scheduler step and nothing else; whoever runs it shows progress, previews or
records, and stops it by taking no more steps. The rows that guidance needs come first in the batch:
`[unconditional, x]`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kandinsky.checkpoint import CheckpointError, open_safetensors, write_safetensors
from kandinsky.prior import Prior, PriorCache
from kandinsky.schedulers import NoiseScheduler, Timesteps, UnCLIPScheduler
from kandinsky.unet import UNet


class Step(NamedTuple):
    """What a loop yields after each step."""

    index: int  # from 0
    num_steps: int
    t: int  # the timestep this step started from
    x: Tensor  # the sample after the step
    x0: Tensor  # the clean sample as predicted in this step


class ImageEmbeds(NamedTuple):
    """What the decoder draws: CLIP image embeddings (b, d), and what guidance leads away from.

    `negative_image_embeds` None stands for the embedding of the zero image.
    """

    image_embeds: Tensor
    negative_image_embeds: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically."""
        given = {name: t for name, t in self._asdict().items() if t is not None}
        write_safetensors(given, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "ImageEmbeds":
        """Reads what `save` wrote; any other file is a CheckpointError."""
        file = open_safetensors(Path(path))
        if not {"image_embeds"} <= set(file.keys()) <= set(cls._fields):
            raise CheckpointError(f"{path} holds {', '.join(file.keys()) or 'nothing'}, not image embeddings")
        return cls(**{name: file.get_tensor(name).clone() for name in file.keys()})


class Noise:
    """One CPU generator per image: the same noise on every device, alone or in a batch."""

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def draw(self, *shape: int) -> Tensor:
        """The next noise of every image, drawn in one call each -> (images, *shape) float32"""
        where = {"dtype": torch.float32, "device": "cpu"}  # whatever the process has for defaults
        noise = torch.stack([torch.randn(shape, generator=g, **where) for g in self.generators])
        if self.device.type == "cuda":  # out of pinned memory, so that the loop does not wait for the copy
            return noise.pin_memory().to(self.device, non_blocking=True)
        return noise.to(self.device)


def last_steps(timesteps: Timesteps, strength: float) -> Timesteps:
    """What a strength in [0, 1] leaves to run: the last int(num_steps × strength) steps."""
    return timesteps[len(timesteps) - int(len(timesteps) * strength) :]


def guide(out: Tensor, num_uncond: int, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598, eq. 6, where the scale is w + 1).

    out: (num_uncond + b, …): unconditional rows for the first num_uncond of the b rows behind them. Rows that
        have none are left as they are. -> (b, …)
    """
    uncond, cond = out[:num_uncond], out[num_uncond:]
    return torch.cat([uncond + guidance_scale * (cond[:num_uncond] - uncond), cond[num_uncond:]])


@torch.no_grad()
def sample_prior(
    prior: Prior,
    scheduler: UnCLIPScheduler,
    cache: PriorCache,
    x: Tensor,
    draw: Callable[[], Tensor],
    timesteps: Timesteps,
    guidance_scale: float,
) -> Iterator[Step]:
    """From noise to normalised image embeddings.

    Args:
        cache: of b rows, or of num_uncond + b when the first num_uncond rows of x are guided.
        x: (b, d) noise.
        draw: gives the next noise, (b, d).
        timesteps: (t, t_prev) pairs from the scheduler.
    """
    num_uncond = len(cache.mask) - len(x)
    for index, (t, t_prev) in enumerate(timesteps):
        t_batch = torch.full((num_uncond + len(x),), t, device=x.device)
        out = prior.step(torch.cat([x[:num_uncond], x]), t_batch, cache)
        x0 = guide(out, num_uncond, guidance_scale)
        noise = draw() if scheduler.draws_noise(t, t_prev) else None
        x, x0 = scheduler.step(x0, x, t, t_prev, noise)
        yield Step(index, len(timesteps), t, x, x0)


@torch.no_grad()
def sample_latents(
    unet: UNet,
    scheduler: NoiseScheduler,
    image_embeds: Tensor,
    x: Tensor,
    draw: Callable[[], Tensor],
    timesteps: Timesteps,
    guidance_scale: float,
    hint: Tensor | None = None,
    texts: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Step]:
    """From noise, or from a noised picture's latents, to latents.

    Args:
        image_embeds: (b, d), or (2b, d) with the unconditional half first.
        x: (b, 4, h, w) the sample at the first timestep.
        draw: gives the next noise, (b, 4, h, w).
        timesteps: (t, t_prev) pairs from the scheduler.
        hint: (b, 3, 8h, 8w) in [0, 1], for a U-Net with a hint network.
        texts: for 2.1, its own text tower's embeddings and states, (rows, d) and (rows, n, c), rows as many
            as those of image_embeds.
    """
    num_uncond = len(image_embeds) - len(x)
    hint = None if hint is None else torch.cat([hint[:num_uncond], hint])
    plan = unet.prepare(image_embeds, [t for t, _ in timesteps], hint, *(texts or (None, None)))
    earlier = None
    for index, (t, t_prev) in enumerate(timesteps):
        eps, variance = unet.step(torch.cat([x[:num_uncond], x]), plan, index).chunk(2, dim=1)
        eps = guide(eps, num_uncond, guidance_scale)
        noise = draw() if scheduler.draws_noise(t, t_prev) else None
        x, x0 = scheduler.step(eps, x, t, t_prev, noise, variance[num_uncond:], earlier)
        earlier = (t, x0)
        yield Step(index, len(timesteps), t, x, x0)


@torch.no_grad()
def sample_inpainting(
    unet: UNet,
    scheduler: NoiseScheduler,
    image_embeds: Tensor,
    x: Tensor,
    draw: Callable[[], Tensor],
    timesteps: Timesteps,
    guidance_scale: float,
    z: Tensor,
    keep: Tensor,
    texts: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Step]:
    """From noise to latents that are the picture's where these are kept.

    Args:
        z: (b, 4, h, w) the picture's latents.
        keep: (b, 1, h, w) 1 where a latent is kept, 0 where it is repainted.
        Others as in `sample_latents`; x is pure noise, and noises the kept latents too.
    """
    num_uncond, start = len(image_embeds) - len(x), x
    known = torch.cat([z * keep, keep], dim=1)
    plan = unet.prepare(image_embeds, [t for t, _ in timesteps], None, *(texts or (None, None)))
    earlier = None
    levels = [t for t, _ in timesteps[1:]]  # that the sample has after each step but the last
    for index, (t, t_prev) in enumerate(timesteps):
        rows = torch.cat([x, known], dim=1)
        eps, variance = unet.step(torch.cat([rows[:num_uncond], rows]), plan, index).chunk(2, dim=1)
        eps = guide(eps, num_uncond, guidance_scale)
        noise = draw() if scheduler.draws_noise(t, t_prev) else None
        x, x0 = scheduler.step(eps, x, t, t_prev, noise, variance[num_uncond:], earlier)
        earlier = (t, x0)
        if texts is None:  # 2.1 does not put the known latents back, here as in diffusers
            kept = scheduler.add_noise(z, start, levels[index]) if index < len(levels) else z
            x = keep * kept + (1 - keep) * x
        yield Step(index, len(timesteps), t, x, x0)
