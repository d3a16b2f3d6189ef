"""What trains the prior and the decoder: the two diffusion losses.

    prior    text, noisy image embedding at t ─ Prior → clean embedding      squared error
    decoder  image embedding, noisy latent at t ─ UNet → noise, variance     squared error + variational bound

Both read what the frozen networks make of a data set, computed once (`kandinsky.embedding_cache`). In a tenth
of the samples the prior gets the empty prompt, and the decoder the zero image's embedding: what guidance
leads away from.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky.clip_training import readable
from kandinsky.datasets import Samples
from kandinsky.embedding_cache import Cache
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.images import resize, to_unit_range
from kandinsky.lora import lora_parameters, save_lora
from kandinsky.movq import MoVQ
from kandinsky.own_steps import (
    MOST_GUIDANCE,
    at,
    earlier_than,
    noised,
    own_noise,
)
from kandinsky.prior import Prior
from kandinsky.sampling import sample_latents, sample_prior
from kandinsky.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky.training import Draws, Objective, initialize, save_as
from kandinsky.unet import UNet

DECODER_TEXTS = {"decoder_text_embeds", "decoder_text_states"}  # of a cache: what 2.1's U-Net reads
# groups of a batch, by length: padding would be half of what the prior reads of captions. On a GPU
# padding costs less than three more launches of every kernel, so there is one group.
LENGTHS = 4
DROPPED = 0.1  # arXiv:2204.06125 §2.1 and §2.2


def prior_loss(
    prior: Prior, scheduler: UnCLIPScheduler, x0: Tensor, noise: Tensor, t: Tensor, text: dict
) -> Tensor:
    """The prior's objective (arXiv:2204.06125, eq. 2): x0 is predicted.

    x0: (b, d), normalised; noise: (b·k, d) and t: (b·k,), k for each row, whose text is read once.
    """
    rows = torch.arange(len(t), device=t.device) // (len(t) // len(x0))
    known = prior.prefill(text["embeds"], text["states"], text["mask"]).rows(rows)
    return F.mse_loss(prior.step(noised(scheduler, x0[rows], noise, t), t, known), x0[rows])


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
    smallest = torch.cat([smallest[1:2], smallest[1:]]).log()  # it is zero at t = 0
    of_x0, of_x = (
        before.sqrt() * betas / (1 - alphas_cumprod),
        (1 - betas).sqrt() * (1 - before) / (1 - alphas_cumprod),
    )

    alpha_bar = at(alphas_cumprod, t, x)
    guess = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    true_mean = at(of_x0, t, x) * x0 + at(of_x, t, x) * x
    mean = at(of_x0, t, x) * guess + at(of_x, t, x) * x
    true_log, share = at(smallest, t, x), (variance + 1) / 2
    log = share * at(betas.log(), t, x) + (1 - share) * true_log
    divergence = (
        log - true_log + (true_log - log).exp() + (true_mean - mean).square() * (-log).exp() - 1
    ) / 2
    likelihood = -discretized_log_likelihood(x0, mean, (log / 2).exp())
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


class PriorObjective(Objective):
    """num_noises: for each caption, at timesteps spread over the schedule; text is most of the work, and
    at little noise it hardly matters. text_encoder: is trained too, reading the cache's token ids."""

    def __init__(
        self,
        prior: Prior,
        scheduler: UnCLIPScheduler,
        cache: Cache,
        fresh: Cache,
        dtype: torch.dtype = torch.float32,
        num_noises: int = 1,
        text_encoder: CLIPTextEncoder | None = None,
        own_steps: float = 0.0,
    ):
        super().__init__()
        self.prior, self.scheduler, self.cache, self.fresh, self.dtype = prior, scheduler, cache, fresh, dtype
        self.num_noises, self.text_encoder, self.own_steps = num_noises, text_encoder, own_steps
        for parameter in (prior.clip_mean, prior.clip_std):
            parameter.requires_grad_(False)

    def normalize_by(self, cache: Cache) -> None:
        """Sets mean and standard deviation of each dimension, from data."""
        image_embeds = cache["image_embeds"].float()
        self.prior.clip_mean.copy_(image_embeds.mean(dim=0, keepdim=True))
        self.prior.clip_std.copy_(image_embeds.std(dim=0, keepdim=True).clamp(min=1e-4))

    def batch(self, indices: list[int]) -> dict[str, Any]:
        return self.cache.rows(indices, "image_embeds", "text")

    def loss(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = (batch["image_embeds"] - self.prior.clip_mean) / self.prior.clip_std
        num_steps, n = self.scheduler.num_train_steps, self.num_noises
        spread = (draws.rand(n) + torch.arange(n, device=x0.device)) / n  # one in each n-th of the schedule
        t = (spread * num_steps).long().clamp(max=num_steps - 1).flatten()
        noise, t = draws.randn(n, x0.shape[1]), t.unflatten(0, (-1, n))
        text = self._text(batch, draws.rand() < DROPPED)
        own = self._draw_steps(t, draws) if self.own_steps else None
        lengths, total = text["mask"].sum(dim=1), x0.new_zeros(())
        for rows in lengths.argsort().chunk(LENGTHS if x0.device.type == "cpu" else 1):
            longest = int(lengths[rows].max())
            part = {name: x[rows] if name == "embeds" else x[rows, :longest] for name, x in text.items()}
            part, eps = self._read(part), noise[rows]
            if own is not None:
                step = {name: x[rows] for name, x in own.items()}
                eps = self._led_noise(x0[rows], eps, t[rows], part, step)
            given = x0[rows], eps.flatten(0, 1), t[rows].flatten()
            loss = prior_loss(self.prior, self.scheduler, *given, part)
            total = total + loss * len(rows) / len(x0)
        return total, {}

    def _draw_steps(self, t: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The steps that may lead to each of (b, k) t: (b, k, …); "rows", (b,): which captions take them."""
        n = t.shape[1]
        return {
            "rows": draws.rand() < self.own_steps,
            "earlier": earlier_than(t, self.scheduler, draws.rand(n)),
            "noise": draws.randn(n, self.prior.config.embedding_dim),
            "guidance_scale": 1 + (MOST_GUIDANCE - 1) * draws.rand(n, 1),
        }

    @torch.no_grad()
    def _led_noise(self, x0: Tensor, noise: Tensor, t: Tensor, text: dict, own: dict[str, Tensor]) -> Tensor:
        """x0: (b, d), noise: (b, k, d), t: (b, k) -> (b, k, d), what lies on the samples; `own_noise`"""
        led = own["rows"].nonzero()[:, 0]
        if len(led) == 0:
            return noise
        (k, d), b = noise.shape[1:], len(led)
        rows = torch.arange(b * k, device=t.device) // k
        empty = self._read({name: x.to(t.device) for name, x in self.cache.empty_text.items()})
        uncond = self.prior.prefill(*(empty[name] for name in ("embeds", "states", "mask")))
        cond = self.prior.prefill(*(text[name][led] for name in ("embeds", "states", "mask")))
        known = [uncond.rows(torch.zeros_like(rows)), cond.rows(rows)]

        clean, earlier = x0[led][rows], own["earlier"][led].flatten()
        x = noised(self.scheduler, clean, noise[led].flatten(0, 1), earlier)
        uncond, cond = (self.prior.step(x, earlier, cache) for cache in known)
        guess = uncond + own["guidance_scale"][led].flatten(0, 1) * (cond - uncond)
        after = t[led].flatten(), own["noise"][led].flatten(0, 1)
        made = own_noise(self.scheduler, clean, guess, x, earlier, *after)
        torch.clear_autocast_cache()  # weights cast without gradients would get none in the loss
        return noise.index_copy(0, led, made.view(b, k, d))

    def _text(self, batch: dict[str, Any], dropped: Tensor) -> dict[str, Tensor]:
        """What the prior reads, with the empty prompt in place of some."""
        empty, n = self.cache.empty_text, batch["text_mask"].shape[1]
        out = {}
        for name in ("embeds", "states", "mask", "ids"):
            text, none = batch[f"text_{name}"], empty[name].to(dropped.device)
            if name != "embeds":
                none = F.pad(none, (0,) * (2 * none.ndim - 4) + (0, n - none.shape[1]))
            out[name] = torch.where(dropped.reshape(-1, *[1] * (text.ndim - 1)), none, text)
        return out

    def _read(self, text: dict[str, Tensor]) -> dict[str, Tensor]:
        """Texts as the text tower reads them now, where it is trained too."""
        if self.text_encoder is None:
            return text
        states, embeds = self.text_encoder(text["ids"])
        return text | {"states": states, "embeds": embeds}

    def sample(self, draws: Draws) -> tuple[Tensor | None, dict[str, float]]:
        """How near the samples come to the pictures of their captions, and to those of other captions."""
        batch = self.fresh.rows(list(range(64)), "image_embeds", "text")
        batch = {name: x.to(draws.device) for name, x in batch.items()}
        flags = (torch.full((64,), flag, device=draws.device) for flag in (True, False))
        empty, text = (self._read(self._text(batch, dropped)) for dropped in flags)
        image_embeds, true = (
            draw_embeds(self.prior, self.scheduler, text, empty, draws),
            batch["image_embeds"],
        )
        mean = self.prior.clip_mean
        own = F.cosine_similarity(image_embeds - mean, true - mean).mean().item()
        other = F.cosine_similarity(image_embeds - mean, true.roll(1, dims=0) - mean).mean().item()
        return None, {"cosine": own, "cosine to another's": other}

    def save(self, folder: Path) -> None:
        save_trained(self.prior, folder, "prior", self.dtype)
        if self.text_encoder is not None:
            self.text_encoder.save_pretrained(folder / "text_encoder")


def save_trained(network: nn.Module, folder: Path, name: str, dtype: torch.dtype) -> None:
    """Writes the network's LoRA, where it has one, else the network in its folder."""
    if lora_parameters(network):
        save_lora(network, folder / f"{name}-lora.safetensors")
    else:
        save_as(network, folder / name, dtype)


def draw_embeds(
    prior: Prior,
    scheduler: UnCLIPScheduler,
    text: dict[str, Tensor],
    empty: dict[str, Tensor],
    draws: Draws,
    num_steps: int = 25,
) -> Tensor:
    """What the prior makes of texts, led away from the empty one as by default -> (b, d)"""
    b, d = text["embeds"].shape
    known = prior.prefill(*(torch.cat([empty[name], text[name]]) for name in ("embeds", "states", "mask")))
    steps = scheduler.timesteps(num_steps)
    for step in sample_prior(
        prior, scheduler, known, draws.randn(d)[:b], lambda: draws.randn(d)[:b], steps, 4.0
    ):
        pass
    return prior.denormalize(step.x)


class DecoderObjective(Objective):
    """cache: image_embeds and latents; for the hint form also `hint`, for inpainting `known`, as in
    `decoder_loss`; for 2.1 what `encode_decoder_texts` gives. Where the image embedding is dropped, 2.1 reads
    the empty prompt, as it does in guidance."""

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
            entrance[name.removeprefix("decoder_")] = torch.where(
                dropped.view(-1, *[1] * (texts.ndim - 1)), empty, texts
            )
        error, bound = decoder_loss(self.unet, self.scheduler, x0, noise, t, image_embeds, **entrance)
        return error + self.bound * bound, {"error": error.detach(), "bound": bound.detach()}

    def sample(self, draws: Draws) -> tuple[Tensor | None, dict[str, float]]:
        return (
            self.painter(self.unet, self.scheduler, self.zero_image_embeds, draws)
            if self.painter
            else (None, {})
        )

    def save(self, folder: Path) -> None:
        save_trained(self.unet, folder, "unet", self.dtype)


def draw_latents(
    unet: UNet,
    scheduler: DDPMScheduler,
    image_embeds: Tensor,
    uncond: Tensor,
    draws: Draws,
    num_steps: int = 50,
) -> Tensor:
    """Latents of (b, d) embeddings, guided as by default -> (b, 4, h, w)"""
    b, size = len(image_embeds), unet.config.sample_size
    shape = (unet.config.latent_channels, size, size)
    embeds = torch.cat([uncond.to(image_embeds.device).expand(b, -1), image_embeds])
    steps = scheduler.timesteps(num_steps)
    draw = lambda: draws.randn(*shape)[:b]  # noqa: E731
    for step in sample_latents(unet, scheduler, embeds, draw(), draw, steps, 4.0):
        pass
    return step.x


class Painter:
    """Draws fresh pictures from their own embeddings, as text2img would."""

    def __init__(self, movq: MoVQ, samples: Samples, image_embeds: Tensor):
        self.movq, self.samples, self.image_embeds = movq, samples, image_embeds

    def __call__(
        self, unet: UNet, scheduler: DDPMScheduler, uncond: Tensor, draws: Draws
    ) -> tuple[Tensor, dict[str, float]]:
        image_embeds = self.image_embeds.to(draws.device)
        pictures = to_unit_range(self.movq.decode(draw_latents(unet, scheduler, image_embeds, uncond, draws)))
        true = to_unit_range(self.samples.pixels.to(draws.device))
        grid = torch.stack(
            [row for i in range(0, len(true), 12) for row in (true[i : i + 12], pictures[i : i + 12])]
        )
        scenes = self.samples.scenes
        return grid, {} if scenes is None else {"readable": readable(pictures, scenes)}


def deepen(prior: Prior, layers: int, seed: int) -> Prior:
    """A prior with so many blocks behind its own, which start as the identity."""
    config = replace(prior.config, num_layers=prior.config.num_layers + layers)
    deeper = initialize(Prior(config), seed, ("to_out.0", "net.2"))
    deeper.load_state_dict(prior.state_dict(), strict=False)
    return deeper


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
