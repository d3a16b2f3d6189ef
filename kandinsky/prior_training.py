"""What trains the prior: text, noisy image embedding at t ─ Prior → clean embedding, the squared error.

It reads what the frozen networks make of a data set, computed once (`kandinsky.embedding_cache`). In a tenth
of the samples it gets the empty prompt: what guidance leads away from.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kandinsky.embedding_cache import Cache
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.own_steps import MOST_GUIDANCE, earlier_than, noised, own_noise
from kandinsky.prior import Prior
from kandinsky.sampling import sample_prior
from kandinsky.schedulers import UnCLIPScheduler
from kandinsky.training import DROPPED, Draws, Objective, initialize, save_trained

# groups of a batch, by length: padding would be half of what the prior reads of captions. On a GPU
# padding costs less than three more launches of every kernel, so there is one group.
LENGTHS = 4


def prior_loss(
    prior: Prior, scheduler: UnCLIPScheduler, x0: Tensor, noise: Tensor, t: Tensor, text: dict
) -> Tensor:
    """The prior's objective (arXiv:2204.06125, eq. 2): x0 is predicted.

    x0: (b, d), normalised; noise: (b·k, d) and t: (b·k,), k for each row, whose text is read once.
    """
    rows = torch.arange(len(t), device=t.device) // (len(t) // len(x0))
    cache = prior.prefill(text["embeds"], text["states"], text["mask"]).rows(rows)
    return F.mse_loss(prior.step(noised(scheduler, x0[rows], noise, t), t, cache), x0[rows])


def length_groups(text: dict[str, Tensor], count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """A batch's rows in so many groups of texts alike in length, each cut after its longest: (rows, texts)"""
    lengths = text["mask"].sum(dim=1)
    for rows in lengths.argsort().chunk(count):
        longest = int(lengths[rows].max())
        yield rows, {name: x[rows] if name == "embeds" else x[rows, :longest] for name, x in text.items()}


class PriorObjective(Objective):
    """The prior's training.

    Args:
        cache: image embeddings and text states.
        fresh: the same of pictures never trained on, for `sample`.
        dtype: of the weights that are saved.
        num_noises: noise levels for each caption in a step, spread over the schedule: reading the text is
            most of the work, and one reading serves them all.
        text_encoder: is trained too, reading the cache's token ids.
        own_steps: the share of captions whose samples come from a guided step of the prior's own; see
            `kandinsky.own_steps`.
    """

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
        several = len(image_embeds) > 1  # one picture has a deviation of 0
        std = image_embeds.std(dim=0, correction=int(several), keepdim=True)
        self.prior.clip_std.copy_(std.clamp(min=1e-4))

    def batch(self, indices: list[int]) -> dict[str, Any]:
        return self.cache.rows(indices, "image_embeds", "text")

    def loss(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = (batch["image_embeds"] - self.prior.clip_mean) / self.prior.clip_std
        t = self._timesteps(draws)
        noise = draws.randn(self.num_noises, x0.shape[1])
        text = self._text(batch, draws.rand() < DROPPED)
        steps = self._draw_steps(t, draws) if self.own_steps else None
        total = x0.new_zeros(())
        for rows, texts in length_groups(text, LENGTHS if x0.device.type == "cpu" else 1):
            texts, noises = self._read(texts), noise[rows]
            if steps is not None:
                own = {name: x[rows] for name, x in steps.items()}
                noises = self._led_noise(x0[rows], noises, t[rows], texts, own)
            given = x0[rows], noises.flatten(0, 1), t[rows].flatten()
            loss = prior_loss(self.prior, self.scheduler, *given, texts)
            total = total + loss * len(rows) / len(x0)
        return total, {}

    def _timesteps(self, draws: Draws) -> Tensor:
        """(b, num_noises), one in each of so many equal parts of the schedule"""
        num_steps, n = self.scheduler.num_train_steps, self.num_noises
        share = draws.rand(n)
        spread = (share + torch.arange(n, device=share.device)) / n
        return (spread * num_steps).long().clamp(max=num_steps - 1)

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
        k, b = noise.shape[1], len(led)
        rows = torch.arange(b * k, device=t.device) // k
        empty = self._read({name: x.to(t.device) for name, x in self.cache.empty_text.items()})
        uncond = self.prior.prefill(*(empty[name] for name in ("embeds", "states", "mask")))
        cond = self.prior.prefill(*(text[name][led] for name in ("embeds", "states", "mask")))
        caches = [uncond.rows(torch.zeros_like(rows)), cond.rows(rows)]

        clean, earlier = x0[led][rows], own["earlier"][led].flatten()
        x = noised(self.scheduler, clean, noise[led].flatten(0, 1), earlier)
        uncond, cond = (self.prior.step(x, earlier, cache) for cache in caches)
        guess = uncond + own["guidance_scale"][led].flatten(0, 1) * (cond - uncond)
        after = t[led].flatten(), own["noise"][led].flatten(0, 1)
        made = own_noise(self.scheduler, clean, guess, x, earlier, *after)
        torch.clear_autocast_cache()  # weights cast without gradients would get none in the loss
        return noise.index_copy(0, led, made.unflatten(0, (b, k)))

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
        to_own = F.cosine_similarity(image_embeds - mean, true - mean).mean().item()
        to_others = F.cosine_similarity(image_embeds - mean, true.roll(1, dims=0) - mean).mean().item()
        return None, {"cosine": to_own, "cosine to another's": to_others}

    def save(self, folder: Path) -> None:
        save_trained(self.prior, folder, "prior", self.dtype)
        if self.text_encoder is not None:
            self.text_encoder.save_pretrained(folder / "text_encoder")


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
    cache = prior.prefill(*(torch.cat([empty[name], text[name]]) for name in ("embeds", "states", "mask")))
    steps = scheduler.timesteps(num_steps)
    for step in sample_prior(
        prior, scheduler, cache, draws.randn(d)[:b], lambda: draws.randn(d)[:b], steps, 4.0
    ):
        pass
    return prior.denormalize(step.x)


def deepen(prior: Prior, layers: int, seed: int) -> Prior:
    """A prior with so many blocks behind its own, which start as the identity."""
    config = replace(prior.config, num_layers=prior.config.num_layers + layers)
    deeper = initialize(Prior(config), seed, ("to_out.0", "net.2"))
    deeper.load_state_dict(prior.state_dict(), strict=False)
    return deeper
