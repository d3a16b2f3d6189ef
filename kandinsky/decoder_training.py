"""What trains the decoder: image embedding, noisy latent at t ─ UNet → noise, variance.

The loss is the noise's squared error, and a variational bound for the variance. It reads what the frozen
networks make of a data set, computed once (`kandinsky.embedding_cache`). In a tenth of the samples it gets
the zero image's embedding: what guidance leads away from.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kandinsky.clip_training import readable
from kandinsky.datasets import Samples
from kandinsky.embedding_cache import Cache
from kandinsky.images import resize, to_unit_range
from kandinsky.movq import MoVQ
from kandinsky.own_steps import at, noised
from kandinsky.sampling import sample_latents
from kandinsky.schedulers import DDPMScheduler
from kandinsky.training import DROPPED, Draws, Objective, save_trained
from kandinsky.unet import UNet

ROW = 12  # pictures in a row of the grid, which are drawn at once
DECODER_TEXTS = {"decoder_text_embeds", "decoder_text_states"}  # of a cache: what 2.1's U-Net reads


def decoder_loss(
    unet: UNet,
    scheduler: DDPMScheduler,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    image_embeds: Tensor,
    **entrance: Any,
) -> tuple[Tensor, Tensor]:
    """The decoder's objective (arXiv:2102.09672, eq. 16): the noise's squared error, and the bound that
    teaches the variance alone.

    Args:
        x0, noise: (b, 4, h, w).
        entrance: `known`, (b, 5, h, w), what an inpainting U-Net reads beside the sample; or `hint`,
            (b, 3, 8h, 8w); 2.1's reads `text_embeds`, (b, d), and `text_states`, (b, n, c).

    Returns:
        the two parts, to be added
    """
    x, known = noised(scheduler, x0, noise, t), entrance.pop("known", None)
    sample = x if known is None else torch.cat([x, known], dim=1)
    eps, variance = unet(sample, t, image_embeds, **entrance).chunk(2, dim=1)
    return F.mse_loss(eps, noise), variance_bound(scheduler, x0, x, t, eps.detach(), variance).mean()


def variance_bound(
    scheduler: DDPMScheduler, x0: Tensor, x: Tensor, t: Tensor, eps: Tensor, variance: Tensor
) -> Tensor:
    """One term of the variational bound, in bits for each value (arXiv:2102.09672, eq. 4 to 6 and 15).

    eps, variance: (b, c, h, w), the network's two halves; variance -1 stands for the smallest, 1 for the
    largest. -> (b,)
    """
    betas = scheduler.betas.double()  # 1 minus a level near 1 would lose four digits
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    smallest = betas * (1 - before) / (1 - alphas_cumprod)
    log_smallest = torch.cat([smallest[1:2], smallest[1:]]).log()  # it is zero at t = 0
    of_x0 = before.sqrt() * betas / (1 - alphas_cumprod)
    of_x = (1 - betas).sqrt() * (1 - before) / (1 - alphas_cumprod)

    alpha_bar = at(alphas_cumprod, t, x)
    x0_pred = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    true_mean = at(of_x0, t, x) * x0 + at(of_x, t, x) * x
    mean = at(of_x0, t, x) * x0_pred + at(of_x, t, x) * x
    true_log, share = at(log_smallest, t, x), (variance + 1) / 2
    log_variance = share * at(betas.log(), t, x) + (1 - share) * true_log
    off = (true_mean - mean).square() * (-log_variance).exp()
    divergence = (log_variance - true_log + (true_log - log_variance).exp() + off - 1) / 2
    likelihood = -discretized_log_likelihood(x0, mean, (log_variance / 2).exp())
    bound = torch.where(t.reshape(-1, 1, 1, 1) == 0, likelihood, divergence)
    return bound.flatten(1).mean(dim=1) / math.log(2)


def discretized_log_likelihood(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of the 1/127.5 wide bin around each value, open at ±1 (arXiv:2006.11239, eq. 13)"""
    lower = ((x0 - 1 / 255 - mean) / std).masked_fill(x0 < -0.999, -torch.inf)
    upper = ((x0 + 1 / 255 - mean) / std).masked_fill(x0 > 0.999, torch.inf)
    flip = lower > 0  # near 1 the difference of two probabilities has no digits left; near 0 it has
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    share = (torch.erfc(-upper / 2**0.5) - torch.erfc(-lower / 2**0.5)) / 2
    return share.clamp(min=1e-12).log()


class DecoderObjective(Objective):
    """The decoder's training. Where the image embedding is dropped, 2.1 reads the empty prompt too.

    Args:
        cache: image_embeds and latents; for the hint form also `hint`, for inpainting `known`, as in
            `decoder_loss`; for 2.1 what `encode_decoder_texts` gives.
        painter: draws what `sample` gives.
        bound: the weight of the variational bound.
        embedding_noise: standard deviation of what is added to the image embeddings.
        dtype: of the weights that are saved.
    """

    def __init__(
        self,
        unet: UNet,
        scheduler: DDPMScheduler,
        cache: Cache,
        zero_image_embeds: Tensor,
        painter: Any = None,
        bound: float = 1.0,
        embedding_noise: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.unet, self.scheduler, self.cache, self.painter = unet, scheduler, cache, painter
        self.zero_image_embeds, self.bound, self.dtype = zero_image_embeds, bound, dtype
        self.embedding_noise = embedding_noise

    def batch(self, indices: list[int]) -> dict[str, Any]:
        others = {"hint", "known", *DECODER_TEXTS} & self.cache.keys()
        batch = self.cache.rows(indices, "image_embeds", "latents", *others)
        if "hint" in batch:  # 8 of its pixels go with a latent, whatever MoVQ does
            height, width = (8 * side for side in batch["latents"].shape[-2:])
            batch["hint"] = torch.stack([resize(hint, height, width) for hint in batch["hint"]])
        return batch

    def loss(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = batch["latents"]
        if self.scheduler.clip_sample:  # what lies outside cannot be drawn
            x0 = x0.clamp(-self.scheduler.clip_sample_range, self.scheduler.clip_sample_range)
        t, noise = draws.randint(self.scheduler.num_train_steps), draws.randn(*x0.shape[1:])
        dropped = (draws.rand() < DROPPED)[:, None]
        image_embeds = torch.where(dropped, self.zero_image_embeds.to(x0.device), batch["image_embeds"])
        if self.embedding_noise:  # what the prior draws is never exact
            image_embeds = image_embeds + self.embedding_noise * draws.randn(image_embeds.shape[1])
        entrance = {name: batch[name] for name in ("hint", "known") if name in batch}
        for name in DECODER_TEXTS & batch.keys():
            texts, empty = batch[name], self.cache[f"empty_{name}"].float().to(x0.device)
            dropped_rows = dropped.reshape(-1, *[1] * (texts.ndim - 1))
            entrance[name.removeprefix("decoder_")] = torch.where(dropped_rows, empty, texts)
        error, bound = decoder_loss(self.unet, self.scheduler, x0, noise, t, image_embeds, **entrance)
        return error + self.bound * bound, {"error": error.detach(), "bound": bound.detach()}

    def sample(self, draws: Draws) -> tuple[Tensor | None, dict[str, float]]:
        if self.painter is None:
            return None, {}
        return self.painter(self.unet, self.scheduler, self.zero_image_embeds, draws)

    def save(self, folder: Path) -> None:
        save_trained(self.unet, folder, "unet", self.dtype)


def draw_latents(
    unet: UNet,
    scheduler: DDPMScheduler,
    image_embeds: Tensor,
    uncond: Tensor,
    draws: Draws,
    size: int,
    num_steps: int = 50,
) -> Tensor:
    """Latents of (b, d) embeddings, guided as by default -> (b, 4, size, size)"""
    b = len(image_embeds)
    shape = (unet.config.latent_channels, size, size)
    embeds = torch.cat([uncond.to(image_embeds.device).expand(b, -1), image_embeds])
    steps = scheduler.timesteps(num_steps)
    draw = lambda: draws.randn(*shape)[:b]  # noqa: E731
    for step in sample_latents(unet, scheduler, embeds, draw(), draw, steps, 4.0):
        pass
    return step.x


class Painter:
    """Draws fresh pictures from their own embeddings, as text2img would, at the size of the samples."""

    def __init__(self, movq: MoVQ, samples: Samples, image_embeds: Tensor):
        self.movq, self.samples, self.image_embeds = movq, samples, image_embeds

    def __call__(
        self, unet: UNet, scheduler: DDPMScheduler, uncond: Tensor, draws: Draws
    ) -> tuple[Tensor, dict[str, float]]:
        size = self.samples.pixels.shape[-1] // self.movq.config.downscale
        true, drawn = self.samples.pixels.to(draws.device).split(ROW), []
        for i, image_embeds in enumerate(self.image_embeds.to(draws.device).split(ROW)):
            own = draws.part(slice(i * ROW, (i + 1) * ROW))
            drawn.append(self.movq.decode(draw_latents(unet, scheduler, image_embeds, uncond, own, size)))
        grid = torch.stack([to_unit_range(row) for pair in zip(true, drawn) for row in pair])
        scenes = self.samples.scenes
        return grid, {} if scenes is None else {"readable": readable(grid[1::2].flatten(0, 1), scenes)}


def widen(unet: UNet, wider: UNet) -> UNet:
    """Gives a U-Net with more input channels a text-to-image one's weights; new channels start at zero."""
    weights, own = unet.state_dict(), wider.state_dict()
    for name, tensor in own.items():
        if name == "conv_in.weight":
            old = weights[name]
            tensor.zero_()[:, : old.shape[1]] = old
        elif name in weights:
            tensor.copy_(weights[name])
    return wider
