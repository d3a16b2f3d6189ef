"""What a picture shall show: image embeddings from prompts, from pictures, and from mixtures of both.

prompt ─ text encoder ─ prior → image_embeds (b, d)        embed
picture ─ image tower → image_embeds (b, d)                embed_image
Σ weight × either → image_embeds (b, d)                    mix
picture ─ image tower ─ noise ─ prior → image_embeds       embed_from
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kandinsky import arguments, images
from kandinsky.parts import Parts
from kandinsky.sampling import ImageEmbeds, Noise, Step, last_steps, sample_prior
from kandinsky.schedulers import Timesteps

OnStep = Callable[[Step], Any]  # returning False stops the run


class PriorRun(NamedTuple):
    """One of a mixture's runs of the prior."""

    text: str
    noise_row: int  # of the two that diffusers draws at each step where there is a negative prompt


class Embedding(Parts):
    """The prior's half of the pipeline. `seeds` lists those of the last call, one per image."""

    seeds: list[int] = []

    @arguments.public
    @torch.no_grad()
    def embed(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> ImageEmbeds | None:
        """Text encoder and prior: what the pictures shall show, as CLIP image embeddings.

        Args:
            negative_prompt: what to lead away from, one for all or one per prompt; None: the zero image.
            num_images_per_prompt: at least 1. num_inference_steps: 1 to the scheduler's 1000.
            guidance_scale: how far to lead towards the prompt (arXiv:2207.12598); at 1 and below there is no
                guidance, and half the work.
            seed: image i is drawn from seed + i; a list gives one per image; None: drawn, see `pipe.seeds`.
            latents: own noise, (images, d), or (2·images, d) with a negative prompt, prompts first.
            on_step: called with each Step; returning False ends the call with None.
            progress: shows a bar.

        Returns:
            `ImageEmbeds` of (images, d), image = prompt × num_images_per_prompt + k.

        Raises:
            ValueError, TypeError: an argument is not what it must be, or (as CheckpointError) a file; before
                any weight is read.
            FloatingPointError: the result is not finite.
        """
        texts = arguments.prompts(prompt)
        negatives = arguments.negative_prompts(negative_prompt, len(texts))
        images_per_prompt = arguments.whole(num_images_per_prompt, "num_images_per_prompt")
        seeds = arguments.seeds(seed, len(texts) * images_per_prompt)
        settings = self._prior_settings(num_inference_steps, guidance_scale)
        latents = self._own_noise(latents, len(seeds), 1 if negatives is None else 2)
        watch = self._watch(on_step, progress)
        self.check_files("text_encoder", "prior")
        self.seeds = seeds
        noise = Noise(self.seeds, self.device)
        return self._embed(texts, negatives, images_per_prompt, settings, noise, watch, latents)

    @arguments.public
    @torch.no_grad()
    def embed_image(self, image: Any) -> Tensor:
        """CLIP image embeddings of one picture or a list, in any form -> (b, d) float32"""
        pictures = images.pictures(image)
        self.check_files("image_encoder")
        return self._embed_pictures(pictures)

    @arguments.public
    @torch.no_grad()
    def embed_from(
        self,
        image: Any,
        prompt: str | list[str],
        strength: float = 0.3,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> ImageEmbeds | None:
        """A picture's embedding led towards a prompt: the prior started from it instead of from noise.

        Args:
            image: one for all prompts or one per prompt; also embeddings, (d,) or (b, d), or both in a list.
            strength: the share of the prior's steps to run, 0 to 1; where that is no whole step the picture's
                own embedding comes back, and the negative prompt has no part; a warning tells of it.
            latents: the noise that is added to the picture's embedding.
            Others as in `embed`.
        """
        strength = arguments.share(strength, "strength")
        texts, items = arguments.prompts(prompt), self._pictures_or_rows(image, "image")
        count = arguments.batch(prompts=len(texts), images=len(items))
        texts, items = texts * (count // len(texts)), items * (count // len(items))
        negatives = arguments.negative_prompts(negative_prompt, count)
        images_per_prompt = arguments.whole(num_images_per_prompt, "num_images_per_prompt")
        seeds = arguments.seeds(seed, count * images_per_prompt)
        timesteps, guidance_scale = self._prior_settings(num_inference_steps, guidance_scale)
        settings = (last_steps(timesteps, strength), guidance_scale)
        latents = self._own_noise(latents, len(seeds), 1 if negatives is None else 2)
        watch = self._watch(on_step, progress)
        pictures = [item for item in items if item.ndim == 3]
        self.check_files("text_encoder", "prior", *(["image_encoder"] if pictures else []))
        self.seeds = seeds
        start = self._embed_rows(items).repeat_interleave(images_per_prompt, dim=0)
        if not settings[0]:
            self._tell_of_no_step(strength, num_inference_steps, "the picture's own embedding comes back")
            return ImageEmbeds(start)
        noise = Noise(self.seeds, self.device)
        return self._embed(texts, negatives, images_per_prompt, settings, noise, watch, latents, start)

    @arguments.public
    @torch.no_grad()
    def mix(
        self,
        images_and_prompts: list,
        weights: list[float],
        negative_prompt: str | None = "",
        negative_prior_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> ImageEmbeds | None:
        """A weighted sum of what prompts, pictures and embeddings show.

        Args:
            images_and_prompts: strings, pictures, or embeddings (d,) or (1, d), in any number.
            weights: one real number each, used as given; a warning tells when they do not sum to one.
            negative_prompt: what the decoder leads away from. "" is the zero image; where
                negative_prior_prompt is given, the prior's embedding of that (as in diffusers).
            negative_prior_prompt: what the prior leads away from with every prompt.
            latents: (images, d), or (2·images, d) with negative_prior_prompt: every prompt's starting noise.
            Others as in `embed`.

        Returns:
            `ImageEmbeds` of (num_images_per_prompt, d). The prompts share one run of the prior; noise is
            drawn prompt after prompt.
        """
        items, weights = self._mixture(images_and_prompts, weights)
        texts = [item for item in items if isinstance(item, str)]
        negative = arguments.text("" if negative_prompt is None else negative_prompt, "negative_prompt")
        away = negative_prior_prompt
        away = away if away is None else arguments.text(away, "negative_prior_prompt")
        runs = [PriorRun(text, 0) for text in texts]
        # and one more for what the decoder leads away from
        away_runs = [PriorRun(negative, 0)] if negative else [PriorRun(away, 1)] if away is not None else []
        runs += away_runs
        count = arguments.whole(num_images_per_prompt, "num_images_per_prompt")
        watch = self._watch(on_step, progress)
        settings = self._prior_settings(num_inference_steps, guidance_scale, runs=bool(runs))
        seeds = arguments.seeds(seed, count)
        if runs:
            latents = self._own_noise(latents, count, 1 if away is None else 2)
        elif latents is not None:
            raise ValueError("latents is the prior's noise, and it does not run: there is no prompt to mix")
        pictures = [item for item in items if not isinstance(item, str) and item.ndim == 3]
        needed = ["text_encoder", "prior"] if runs else []
        self.check_files(*needed, *(["image_encoder"] if pictures else []))
        self.seeds, made = seeds, []
        if runs:
            made = self._run_mixture(runs, away, settings, watch, latents)
            if made is None:
                return None
        of_items, of_texts = iter(self._embed_rows([i for i in items if not isinstance(i, str)])), iter(made)
        rows = [next(of_texts) if isinstance(item, str) else next(of_items) for item in items]
        total = torch.stack([weight * row.expand(count, -1) for weight, row in zip(weights, rows)]).sum(dim=0)
        return ImageEmbeds(total, made[-1] if away_runs else None)

    def _run_mixture(
        self,
        runs: list[PriorRun],
        away: str | None,
        settings: tuple[Timesteps, float],
        watch: tuple[OnStep | None, bool],
        latents: Tensor | None,
    ) -> Tensor | None:
        """The prior's runs as one batch -> (runs, images, d)."""
        count, copies, dim = len(self.seeds), 1 if away is None else 2, self.prior_config.embedding_dim
        noise = Noise(self.seeds, self.device)
        num_draws = (latents is None) + sum(self.prior_scheduler.draws_noise(*step) for step in settings[0])
        drawn = [[noise.draw(copies, dim)[:, run.noise_row] for _ in range(num_draws)] for run in runs]
        draws = iter([torch.cat(step) for step in zip(*drawn)])  # (runs · images, d) each
        if latents is None:
            x = next(draws)
        else:
            x = torch.cat([latents[run.noise_row * count :][:count] for run in runs])
        texts = [run.text for run in runs for _ in range(count)]
        uncond = [away or ""] * len(texts)
        x = self._run_prior(texts, uncond, x, lambda: next(draws), settings, watch)
        return None if x is None else x.unflatten(0, (len(runs), count))

    def _embed(
        self,
        texts: list[str],
        negatives: list[str] | None,
        images_per_prompt: int,
        settings: tuple[Timesteps, float],
        noise: Noise,
        watch: tuple[OnStep | None, bool],
        latents: Tensor | None = None,
        start: Tensor | None = None,
    ) -> ImageEmbeds | None:
        """The prior's run, from noise or from noised embeddings `start` (images, d).

        With negative prompts the rows of x are all images, then all their negatives.
        """
        count, copies = len(texts) * images_per_prompt, 1 if negatives is None else 2
        dim = self.prior_config.embedding_dim

        def draw() -> Tensor:
            return noise.draw(copies, dim).transpose(0, 1).flatten(0, 1)  # (copies * count, d)

        x = draw() if latents is None else latents
        if start is not None:
            x = self.prior_scheduler.add_noise(start.repeat(copies, 1), x, settings[0][0][0])
        uncond = [""] * len(texts) if negatives is None else negatives
        uncond = [text for text in uncond for _ in range(images_per_prompt)]
        rows = [text for text in texts + (negatives or []) for _ in range(images_per_prompt)]
        x = self._run_prior(rows, uncond, x, draw, settings, watch)
        return None if x is None else ImageEmbeds(x[:count], None if negatives is None else x[count:])

    def _run_prior(
        self,
        texts: list[str],
        uncond: list[str],
        x: Tensor,
        draw: Callable[[], Tensor],
        settings: tuple[Timesteps, float],
        watch: tuple[OnStep | None, bool],
    ) -> Tensor | None:
        """texts: of each row of x; uncond: what the first rows are led away from. x: (b, d) -> (b, d)"""
        timesteps, guidance_scale = settings
        # every text goes through text encoder and prefill once; rows pick theirs, unconditional ones first
        rows = (uncond if guidance_scale > 1 else []) + texts
        unique = list(dict.fromkeys(rows))
        index = torch.tensor([unique.index(text) for text in rows], device=self.device)
        text_states, text_embeds, text_mask = self._encode_texts(unique)
        with self.using("prior") as prior:
            cache = prior.prefill(text_embeds, text_states, text_mask).rows(index)
            loop = sample_prior(prior, self.prior_scheduler, cache, x, draw, timesteps, guidance_scale)
            x = self._run(loop, len(timesteps), *watch, "prior")
            return None if x is None else prior.denormalize(x)

    @staticmethod
    def _tell_of_no_step(strength: float, num_steps: int, result: str) -> None:
        """For a public method, where `last_steps` leaves none: a warning, unless that was asked for."""
        if strength > 0:
            warnings.warn(f"strength {strength} of {num_steps} steps is none: {result}", stacklevel=6)

    @staticmethod
    def _watch(on_step: Any, progress: Any) -> tuple[OnStep | None, bool]:
        return arguments.function(on_step, "on_step"), arguments.flag(progress, "progress")

    def _prior_settings(
        self, num_steps: Any, scale: Any, prefix: str = "", runs: bool = True
    ) -> tuple[Timesteps, float] | None:
        """None where the prior does not run, as there may be none; the numbers are checked all the same."""
        scale = arguments.number(scale, f"{prefix}guidance_scale")
        if not runs:
            arguments.whole(num_steps, f"{prefix}num_inference_steps")
            return None
        return self._timesteps(self.prior_scheduler, num_steps, f"{prefix}num_inference_steps"), scale

    @staticmethod
    def _timesteps(scheduler: Any, num_steps: Any, name: str) -> Timesteps:
        return scheduler.timesteps(arguments.whole(num_steps, name, 1, scheduler.num_train_steps))

    def _own_noise(self, latents: Any, count: int, copies: int) -> Tensor | None:
        """The caller's noise for the prior of count images, as (copies · count, d)."""
        dim = self.prior_config.embedding_dim
        latents = arguments.noise(latents, ((count, dim), (2 * count, dim))[:copies])
        return None if latents is None else latents.repeat(copies * count // len(latents), 1).to(self.device)

    def _encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Texts -> states (b, n, d), embedding (b, d) and mask (b, n), n the longest text's tokens."""
        ids, mask = self.tokenizer(texts)
        with self.using("text_encoder") as text_encoder:
            text_states, text_embeds = text_encoder(ids.to(self.device))
        return text_states, text_embeds, mask.to(self.device)

    def _embed_pictures(self, pictures: list[Tensor]) -> Tensor:
        """Pictures (3, h, w) in [0, 1] -> (b, d)"""
        with self.using("image_encoder") as image_encoder:
            size = image_encoder.config.image_size
            pixels = [images.clip_pixels(images.to_pil(x[None])[0], size) for x in pictures]
            embeds = image_encoder(torch.stack(pixels).to(self.device))
        self._check_finite(embeds, "the picture's embedding")
        return embeds

    def _embed_rows(self, items: list[Tensor]) -> Tensor:
        """Pictures (3, h, w) and embeddings (1, d) -> (b, d); the pictures go through the tower together."""
        pictures = [item for item in items if item.ndim == 3]
        embedded = iter(self._embed_pictures(pictures)) if pictures else iter(())
        rows = [next(embedded)[None] if item.ndim == 3 else item.to(self.device) for item in items]
        return torch.cat(rows) if rows else torch.empty(0)

    def _pictures_or_rows(self, value: Any, name: str) -> list[Tensor]:
        """One or several pictures as (3, h, w), or embeddings as (1, d)."""
        rows = []
        # ImageEmbeds are a tuple
        for item in [value] if isinstance(value, ImageEmbeds) else images.listed(value, name):
            if isinstance(item, ImageEmbeds):
                raise TypeError(f"{name} is an ImageEmbeds; pass its image_embeds")
            if isinstance(item, Tensor) and item.ndim in (1, 2):
                embeds = arguments.embeddings(torch.atleast_2d(item), self.unet_config.image_dim, name)
                rows += embeds.split(1)
            else:
                rows.append(images.picture(item, name))
        return rows

    def _mixture(self, items: Any, weights: Any) -> tuple[list, list[float]]:
        """What to mix: strings, pictures (3, h, w) and embeddings (1, d); and how much of each."""
        if not isinstance(items, (list, tuple)) or not isinstance(weights, (list, tuple)):
            given = f"{type(items).__name__} and {type(weights).__name__}"
            raise TypeError(f"images_and_prompts and weights are {given}; two lists are needed")
        if not items or len(items) != len(weights):
            raise ValueError(f"{len(items)} items and {len(weights)} weights; give one weight for each item")
        weights = [arguments.number(weight, f"weights[{i}]") for i, weight in enumerate(weights)]
        checked = []
        for i, item in enumerate(items):
            name = f"item {i}"
            is_text = isinstance(item, str)
            found = [arguments.text(item, name)] if is_text else self._pictures_or_rows(item, name)
            if len(found) != 1:
                raise ValueError(
                    f"item {i} holds {len(found)} pictures or embeddings; give one for each weight"
                )
            checked += found
        if not math.isclose(sum(weights), 1, abs_tol=1e-6):
            warnings.warn(
                f"the weights sum to {sum(weights):.6g}, not to 1; they are used as given", stacklevel=6
            )
        return checked, weights

    def _run(
        self, loop: Iterator[Step], num_steps: int, on_step: OnStep | None, progress: bool, name: str
    ) -> Tensor | None:
        """Takes the loop's steps; the last sample, or None where on_step returned False."""
        from tqdm import tqdm

        with tqdm(loop, name, num_steps, disable=not progress) as bar:
            for step in bar:
                if on_step is not None and arguments.is_false(on_step(step)):
                    return None
        self._check_finite(step.x, f"the {name}'s result")
        return step.x

    def _check_finite(self, x: Tensor, what: str) -> None:
        if not x.isfinite().all():
            is_half = self.dtype == torch.float16
            hint = "; float16 overflows easily, try dtype=torch.bfloat16" if is_half else ""
            raise FloatingPointError(f"{what} is not finite (NaN or infinite values){hint}")
