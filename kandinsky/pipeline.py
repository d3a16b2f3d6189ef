"""`Kandinsky`: the one object that ties tokenizer, encoders, prior, U-Net and MoVQ together.

    pipe = Kandinsky.from_pretrained("weights/kandinsky-2-2-decoder")
    image = pipe.text2img("a red cat", seed=7)[0]

Each task is: what to show, where to start (noise, or a noised picture), the U-Net's loop, and MoVQ's decoder.
Noise comes from one stream per image, first the prior's, then the decoder's. `Kandinsky` inherits, in this
order:

    Requests    a call's arguments, checked (request.py)
    Embedding   text encoder and prior: what to show (embedding.py)
    Parts       the folders, and the networks that are read from them (parts.py)
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kandinsky import arguments, images, masks
from kandinsky.embedding import OnStep
from kandinsky.movq import TO_ENCODE, MoVQ
from kandinsky.request import Batch, Content, Denoising, Inputs, Output, Request, Requests
from kandinsky.sampling import ImageEmbeds, Noise, Step, sample_inpainting, sample_latents
from kandinsky.schedulers import DDPMScheduler
from kandinsky.unet import UNet

# MoVQ takes pictures in groups of so many: its maps are 1 GiB then, in float32, and larger groups take a CPU
# longer
PIXELS_IN_MOVQ = 512 * 512
# a task's decoder loop with all but these given: (unet, image_embeds, x, draw) -> steps
Loop = Callable[[UNet, Tensor, Tensor, Callable[[], Tensor]], Iterator[Step]]


class Kandinsky(Requests):
    """Kandinsky 2.2 or 2.1, by `from_pretrained`. `seeds` lists those of the last call, one per image."""

    @arguments.public
    @torch.no_grad()
    def text2img(
        self,
        prompt: str | list[str] | None = None,
        *,
        embeds: ImageEmbeds | None = None,
        negative_prompt: str | list[str] | None = None,
        hint: Any = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_every: int = 1,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> list[Image.Image] | Tensor | None:
        """Draws pictures from a prompt, or from embeddings made before.

        Args:
            prompt, embeds: one of the two; `embeds` takes the place of the prior's work. 2.1's decoder reads
                the prompt itself and needs it beside embeds.
            hint: where things are: a picture in any form, of one channel or three in [0, 1], or a list. In a
                depth map near is white. For checkpoints with a hint network only.
            latents: the decoder's own noise, (images, 4, H/f, W/f), H and W the next multiples of f², or of
                f · `unet_config.downscale` if that is more; f is `movq_config.downscale`. Both are 8 for the
                released ones.
            height, width: pixels, up to 65,536; None: the checkpoint's own.
            sampler: "dpm++" for DPM-Solver++(2M), good in 15 to 20 steps; None: the checkpoint's scheduler.
            guidance_interval: (start, stop), shares of the loop: steps before and after it are not guided and
                cost half. cache_every: of so many steps one runs the whole U-Net, the others its outermost
                level. Both are approximate: see `kandinsky.approximate`.
            output_type: "pil": a list; "pt": float32 (b, 3, h, w) in [0, 1]; "latent": uncropped latents.
            on_step: called with each of the decoder's Steps; returning False ends the call with None.
            Others as in `embed`, with `prior_` before those that are the prior's.

        Raises:
            ValueError, TypeError: an argument is not what it must be; before any weight is read.
            FloatingPointError: the result is not finite (float16 overflows where bfloat16 does not).
        """
        request = self.request(
            "text2img",
            Content(prompt, embeds, negative_prompt, prior_num_inference_steps, prior_guidance_scale),
            Batch(num_images_per_prompt, seed, latents, height, width),
            Denoising(num_inference_steps, sampler, guidance_scale, guidance_interval, cache_every),
            Output(output_type, on_step, progress),
            Inputs(hint=hint),
        )
        self.seeds = request.seeds
        return self._finish(request, self._sample(request, self._text2img_loop(request)))

    @arguments.public
    @torch.no_grad()
    def img2img(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.3,
        *,
        embeds: ImageEmbeds | None = None,
        negative_prompt: str | list[str] | None = None,
        hint: Any = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_every: int = 1,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> list[Image.Image] | Tensor | None:
        """Redraws pictures: their latents are noised and denoised towards the prompt.

        Args:
            image: a picture in any form (see `images.picture`), or a list with one per prompt.
            strength: 0 to 1, the share of the steps that run, the last int(num_inference_steps × strength).
                Where that is 0 the picture is only encoded and decoded, which a warning tells of a strength
                above 0; at 1 little but its colours remains.
            latents: the noise that is added to the picture's latents.
            height, width: pixels, to which the picture is resized; None: the picture's own.
            Others as in `text2img`.
        """
        request = self.request(
            "img2img",
            Content(prompt, embeds, negative_prompt, prior_num_inference_steps, prior_guidance_scale),
            Batch(num_images_per_prompt, seed, latents, height, width),
            Denoising(num_inference_steps, sampler, guidance_scale, guidance_interval, cache_every),
            Output(output_type, on_step, progress),
            Inputs(image, hint=hint, strength=strength),
        )
        self.seeds = request.seeds
        z = self._encode(request)
        if not request.timesteps:
            result = "the picture is only encoded and decoded"
            self._tell_of_no_step(strength, num_inference_steps, result)
            return self._finish(request, z)

        def noised(noise: Tensor) -> Tensor:
            if self.unet_config.text:  # 2.1 noises by another schedule than it denoises by, as in diffusers
                linear = DDPMScheduler(beta_start=0.0001, beta_end=0.02)
                return linear.add_noise(z, noise, max(int(linear.num_train_steps * request.strength) - 2, 0))
            return request.scheduler.add_noise(z, noise, request.timesteps[0][0])

        return self._finish(request, self._sample(request, self._text2img_loop(request), noised))

    @arguments.public
    @torch.no_grad()
    def inpaint(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        keep_unmasked: bool = True,
        *,
        invert_mask: bool = False,
        grow_mask: int = 0,
        feather_mask: int = 0,
        embeds: ImageEmbeds | None = None,
        negative_prompt: str | list[str] | None = None,
        hint: None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        cache_every: int = 1,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> list[Image.Image] | Tensor | None:
        """Repaints what is white in the mask.

        Args:
            image, mask_image: in any form (see `images.picture`, `masks.mask`), or lists with one per prompt.
                A mask of another size is resized to the picture's. An empty or full one is not an error.
            keep_unmasked: pastes the picture back where the mask is black, to the last bit. False: MoVQ's
                version of it, as in diffusers.
            invert_mask: for masks of the old convention, where black is repainted.
            grow_mask: pixels, up to 4096, by which the repainted region grows. It also makes scratches count
                that are thinner than f pixels, which the U-Net otherwise may not see.
            feather_mask: pixels, likewise, over which the repainted region fades in, inside the mask; with
                keep_unmasked only.
            hint: none: no checkpoint inpaints with one.
            height, width: pixels, to which picture and mask are resized; None: the picture's own.
            Others as in `text2img`.
        """
        request = self.request(
            "inpaint",
            Content(prompt, embeds, negative_prompt, prior_num_inference_steps, prior_guidance_scale),
            Batch(num_images_per_prompt, seed, latents, height, width),
            Denoising(num_inference_steps, sampler, guidance_scale, guidance_interval, cache_every),
            Output(output_type, on_step, progress),
            Inputs(image, mask_image, hint, 1.0, keep_unmasked, invert_mask, grow_mask, feather_mask),
        )
        self.seeds = request.seeds
        repaint = [masks.resize(mask, *request.size)[None] for mask in request.masks]
        repaint = [
            masks.grow(1 - mask if request.invert_mask else mask, request.grow_mask) for mask in repaint
        ]
        padded = request.rows([images.pad_to(mask, *request.full_size, "constant") for mask in repaint])
        keep = masks.keep_latents(padded, self.movq_config.downscale).to(self.device)
        z = self._encode(request)
        texts = self._decoder_texts(request)

        def loop(unet: UNet, image_embeds: Tensor, x: Tensor, draw: Callable) -> Iterator[Step]:
            settings = (draw, request.timesteps, request.guidance_scale, z, keep, texts)
            return sample_inpainting(unet, request.scheduler, image_embeds, x, *settings)

        x = self._sample(request, loop)
        if not request.keep_unmasked:
            return self._finish(request, x)
        share = request.rows([masks.feather(mask, request.feather_mask) for mask in repaint]).to(self.device)
        original = request.rows([images.resize(x, *request.size) for x in request.pictures]).to(self.device)
        return self._finish(request, x, lambda pixels: masks.paste(pixels, original, share))

    @arguments.public
    def optimize(
        self, rewrites: tuple[str, ...] | None = None, compile: bool = False
    ) -> dict[str, dict[str, int]]:
        """Makes text tower, prior, UNet and MoVQ faster, now or when they are read from their files.

        The pictures change in the last bits only. A network that you assign later stays as it is.
        rewrites: some of those of `kandinsky.optimize`, by name; None: the usual ones. compile: blocks run
        under `torch.compile`, too; the first picture waits for the compiler.

        Returns what was changed in the networks that are in memory: how many layers by each rewrite of
        `kandinsky.optimize`.
        """
        from kandinsky import optimize

        return optimize.optimize_pipeline(self, rewrites, compile)

    @arguments.public
    def restore(self) -> None:
        """Undoes `optimize`, to the last bit."""
        from kandinsky import optimize

        optimize.restore_pipeline(self)

    @arguments.public
    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Adds a LoRA file's change to the prior and the decoder, whichever its keys name; several add up."""
        from kandinsky import lora

        lora.load_into(self, path, scale)

    @arguments.public
    def unload_lora(self) -> None:
        """Takes every LoRA off again, to the last bit; merged ones stay."""
        from kandinsky import lora

        lora.unload(self)

    @arguments.public
    def merge_lora(self) -> None:
        """Makes every LoRA part of the weights, for good; `pipe.unet.save_pretrained(folder)` saves it."""
        from kandinsky import lora

        lora.merge(self)

    def _sample(
        self, request: Request, loop: Loop, start: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor | None:
        """What to show, then the decoder's loop. start: makes the first sample of the noise."""
        noise = Noise(request.seeds, self.device)
        image_embeds = self._guided_embeds(request, noise)

        def draw() -> Tensor:
            return noise.draw(*request.latent_shape)

        x = draw() if request.latents is None else request.latents.to(self.device)
        x = x if start is None else start(x)
        with self.using("unet") as unet:
            unet = self._shortened(unet, request)
            steps = loop(unet, image_embeds, x, draw)
            return self._run(steps, len(request.timesteps), *request.watch, "decoder")

    def _shortened(self, unet: UNet, request: Request) -> Any:
        """The U-Net, or what leaves out some of its work."""
        interval, cache_every = request.guidance_interval, request.cache_every
        if (interval, cache_every) == ((0.0, 1.0), 1):
            return unet
        from kandinsky.approximate import approximate

        return approximate(unet, request.guidance_scale > 1, interval, cache_every)

    def _text2img_loop(self, request: Request) -> Loop:
        hint = None
        if request.hints is not None:
            hint = request.rows([self._fit_hint(request, x) for x in request.hints]).to(self.device)
        texts = self._decoder_texts(request)

        def loop(unet: UNet, image_embeds: Tensor, x: Tensor, draw: Callable) -> Iterator[Step]:
            settings = (draw, request.timesteps, request.guidance_scale, hint, texts)
            return sample_latents(unet, request.scheduler, image_embeds, x, *settings)

        return loop

    def _fit_hint(self, request: Request, hint: Tensor) -> Tensor:
        """The hint network halves three times, whatever MoVQ does: 8 hint pixels go with a latent."""
        f = self.movq_config.downscale
        height, width = (max(1, 8 * side // f) for side in request.size)
        return images.pad_to(
            images.resize(hint, height, width), *(8 * side // f for side in request.full_size)
        )

    def _guided_embeds(self, request: Request, noise: Noise) -> Tensor:
        """-> (images, d), or (2·images, d) with the unconditional half first."""
        words, copies = request.words, request.images_per_prompt
        if words.texts is not None:
            settings = (request.prior_settings, noise, (None, request.watch[1]))
            image_embeds, uncond = self._embed(words.texts, words.negatives, copies, *settings)
        else:
            rows = [e if e is None else list(e.to(self.device)) for e in words.embeds]
            image_embeds, uncond = (e if e is None else request.rows(e) for e in rows)
        if request.guidance_scale <= 1:
            return image_embeds
        uncond = self.zero_image_embeds if uncond is None else uncond
        return torch.cat([uncond.expand(len(image_embeds), -1), image_embeds])

    def _decoder_texts(self, request: Request) -> tuple[Tensor, Tensor] | None:
        """2.1: what the U-Net reads of the prompts itself, embeddings (rows, d) and states (rows, 77, c).

        Rows as in `_guided_embeds`; the other half is of "".
        """
        words = request.words
        if words.decoder_texts is None:
            return None
        uncond = words.negatives or [""] * words.num_prompts
        texts = (uncond if request.guidance_scale > 1 else []) + words.decoder_texts
        texts = [text for text in texts for _ in range(request.images_per_prompt)]
        unique = list(dict.fromkeys(texts))
        rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
        ids = self.decoder_tokenizer(unique).to(self.device)
        with self.using("decoder_text_encoder") as text_encoder:
            text_states, text_embeds = text_encoder(ids)
        return text_embeds[rows], text_states[rows]

    def _encode(self, request: Request) -> Tensor:
        """The pictures' latents, one row per image."""
        resized = [images.resize(x, *request.size) for x in request.pictures]
        fitted = [images.pad_to(x, *request.full_size) for x in resized]
        pixels = 2 * torch.stack(fitted).to(self.device) - 1
        rows = _rows_in_movq(request)
        z = self.in_movq(lambda movq, pixels: movq.encode(pixels), pixels, rows, "the encoded picture")
        return request.rows(list(z))

    def _finish(
        self, request: Request, x: Tensor | None, retouch: Callable[[Tensor], Tensor] | None = None
    ) -> list[Image.Image] | Tensor | None:
        """Latents as the output type wants them. retouch: is done to the pixels, (b, 3, h, w) in [0, 1]"""
        if x is None or request.output_type == "latent":
            return x
        rows, what = _rows_in_movq(request), "the decoded picture"
        pixels = self.in_movq(lambda movq, x: movq.decode(x), x, rows, what, without=TO_ENCODE)
        pixels = images.crop_to(images.to_unit_range(pixels), *request.size)
        pixels = pixels if retouch is None else retouch(pixels)
        return images.to_pil(pixels) if request.output_type == "pil" else pixels

    def in_movq(
        self,
        compute: Callable[[MoVQ, Tensor], Tensor],
        x: Tensor,
        rows: int,
        what: str,
        without: tuple[str, ...] = (),
    ) -> Tensor:
        """compute(movq, x), a few rows at a time; where float16 overflows once more in float32, as the steps
        before would be lost."""

        def all_rows(movq: MoVQ) -> Tensor:
            return torch.cat([compute(movq, part) for part in x.split(rows)])

        with self.using("movq", without) as movq:
            out = all_rows(movq)
            if movq.dtype == torch.float16 and not out.isfinite().all():
                try:
                    out = all_rows(movq.float())
                finally:
                    movq.half()  # every weight is again what it was
        self._check_finite(out, what)
        return out


def _rows_in_movq(request: Request) -> int:
    return max(1, PIXELS_IN_MOVQ // math.prod(request.full_size))
