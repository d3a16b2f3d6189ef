"""`Kandinsky`: the one object that ties tokenizer, encoders, prior, U-Net and MoVQ together.

    pipe = Kandinsky.from_pretrained("weights/kandinsky-2-2-decoder")
    image = pipe.text2img("a red cat", seed=7)[0]

`text2img(prompt)` is `embed` (text encoder, then prior), followed by what `text2img(embeds=…)` does (U-Net,
then MoVQ) with the noise that comes next.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kandinsky import arguments, images
from kandinsky.checkpoint import CheckpointError
from kandinsky.parts import Parts
from kandinsky.sampling import ImageEmbeds, Noise, Step, sample_latents, sample_prior

OnStep = Callable[[Step], Any]  # returning False stops the run
OUTPUT_TYPES = ("pil", "pt", "latent")
LONGEST_SIDE = 2**16  # pixels; a typing error beyond it would fill any memory


class Kandinsky(Parts):
    """Kandinsky 2.2, made by `from_pretrained`. `seeds` lists those of the last call, one per image."""

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
            seed: image i is drawn from seed + i; a list gives one per image; None: drawn, see `pipe.seeds`.
            latents: own noise, (images, d), or (2·images, d) with a negative prompt, prompts first.
            on_step: called with each Step; returning False ends the call with None.

        Returns:
            `ImageEmbeds` of (images, d), image = prompt × num_images_per_prompt + k.
        """
        texts = arguments.prompts(prompt)
        negatives = arguments.negative_prompts(negative_prompt, len(texts))
        images_per_prompt = arguments.whole(num_images_per_prompt, "num_images_per_prompt")
        self.seeds = arguments.seeds(seed, len(texts) * images_per_prompt)
        timesteps = self._timesteps(self.prior_scheduler, num_inference_steps, "num_inference_steps")
        guidance_scale = arguments.number(guidance_scale, "guidance_scale")
        self.check_files("text_encoder", "prior")
        noise = Noise(self.seeds, self.device)
        settings = (images_per_prompt, timesteps, guidance_scale)
        return self._embed(texts, negatives, *settings, noise, latents, on_step, progress)

    @arguments.public
    @torch.no_grad()
    def text2img(
        self,
        prompt: str | list[str] | None = None,
        *,
        embeds: ImageEmbeds | None = None,
        negative_prompt: str | list[str] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        seed: int | list[int] | None = None,
        output_type: str = "pil",
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> list[Image.Image] | Tensor | None:
        """Draws pictures from a prompt, or from embeddings made before.

        Args:
            prompt, embeds: one of the two; `embeds` takes the place of the prior's work.
            latents: the decoder's own noise, (images, 4, H/f, W/f), H and W the next multiples of f².
            height, width: pixels, up to 65,536; None: the checkpoint's own.
            output_type: "pil": a list; "pt": float32 (b, 3, h, w) in [0, 1]; "latent": uncropped latents.
            on_step: called with each of the decoder's Steps; returning False ends the call with None.
            Others as in `embed`, with `prior_` before those that are the prior's.

        Raises:
            ValueError, TypeError: an argument is not what it must be; before any weight is read.
            FloatingPointError: the result is not finite (float16 overflows where bfloat16 does not).
        """
        self._check_task("text2img")
        images_per_prompt = arguments.whole(num_images_per_prompt, "num_images_per_prompt")
        arguments.choice(output_type, "output_type", OUTPUT_TYPES)
        height, width = self._size(height, width)
        timesteps = self._timesteps(self.scheduler, num_inference_steps, "num_inference_steps")
        guidance_scale = arguments.number(guidance_scale, "guidance_scale")
        prior_guidance_scale = arguments.number(prior_guidance_scale, "prior_guidance_scale")
        texts, count = self._prompts_or_embeds(prompt, embeds, negative_prompt)
        count, shape = count * images_per_prompt, self._latent_shape(height, width)
        latents = arguments.noise(latents, ((count, *shape),))
        self.seeds = arguments.seeds(seed, count)
        needed = ["text_encoder", "prior"] if texts else []
        self.check_files(*needed, "unet", *(["movq"] if output_type != "latent" else []))
        if guidance_scale > 1 and (negative_prompt if texts else embeds.negative_image_embeds) is None:
            self.check_zero_image()
        noise = Noise(self.seeds, self.device)

        if texts is not None:
            negatives = arguments.negative_prompts(negative_prompt, len(texts))
            steps = (self.prior_scheduler, prior_num_inference_steps, "prior_num_inference_steps")
            settings = (images_per_prompt, self._timesteps(*steps), prior_guidance_scale)
            embeds, images_per_prompt = self._embed(texts, negatives, *settings, noise, progress=progress), 1
        image_embeds = self._guided_embeds(embeds, images_per_prompt, guidance_scale)
        x = noise.draw(*shape) if latents is None else latents.to(self.device)
        x = self._denoise(image_embeds, x, noise, timesteps, guidance_scale, on_step, progress)
        if x is None or output_type == "latent":
            return x
        return self._decode(x, height, width, output_type)

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

    def _embed(
        self,
        texts: list[str],
        negatives: list[str] | None,
        images_per_prompt: int,
        timesteps: list[tuple[int, int]],
        guidance_scale: float,
        noise: Noise,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        progress: bool = False,
    ) -> ImageEmbeds | None:
        """The prior's run. With negative prompts the rows of x are all images, then all their negatives."""
        dim = self.prior_config.embedding_dim
        count, copies = len(texts) * images_per_prompt, 1 if negatives is None else 2
        latents = arguments.noise(latents, ((count, dim), (2 * count, dim))[:copies])

        def draw() -> Tensor:
            return noise.draw(copies, dim).transpose(0, 1).flatten(0, 1)  # (copies * count, d)

        # every text goes through text encoder and prefill once; rows pick theirs, unconditional ones first
        uncond = [""] * len(texts) if negatives is None else negatives
        rows = (uncond if guidance_scale > 1 else []) + texts + (negatives or [])
        unique = list(dict.fromkeys(rows))
        index = torch.tensor([unique.index(text) for text in rows for _ in range(images_per_prompt)])
        x = draw() if latents is None else latents.repeat(copies * count // len(latents), 1).to(self.device)
        text_states, text_embeds, text_mask = self._encode(unique)
        with self.using("prior") as prior:
            cache = prior.prefill(text_embeds, text_states, text_mask).rows(index.to(self.device))
            loop = sample_prior(prior, self.prior_scheduler, cache, x, draw, timesteps, guidance_scale)
            x = self._run(loop, len(timesteps), on_step, progress, "prior")
            if x is None:
                return None
            x = prior.denormalize(x)
        return ImageEmbeds(x[:count], x[count:] if negatives is not None else None)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Texts -> states (b, n, d), embedding (b, d) and mask (b, n), n the longest text's tokens."""
        ids, mask = self.tokenizer(texts)
        with self.using("text_encoder") as text_encoder:
            text_states, text_embeds = text_encoder(ids.to(self.device))
        return text_states, text_embeds, mask.to(self.device)

    def _guided_embeds(self, embeds: ImageEmbeds, images_per_prompt: int, guidance_scale: float) -> Tensor:
        """-> (images, d), or (2·images, d) with the unconditional half first."""
        image_embeds, uncond = (e if e is None else e.to(self.device) for e in embeds)
        if guidance_scale > 1:
            uncond = self.zero_image_embeds if uncond is None else uncond
            image_embeds = torch.cat([uncond.expand(len(image_embeds), -1), image_embeds])
        return image_embeds.repeat_interleave(images_per_prompt, dim=0)

    def _denoise(
        self,
        image_embeds: Tensor,
        x: Tensor,
        noise: Noise,
        timesteps: list[tuple[int, int]],
        guidance_scale: float,
        on_step: OnStep | None,
        progress: bool,
    ) -> Tensor | None:
        shape = x.shape[1:]
        with self.using("unet") as unet:
            settings = (lambda: noise.draw(*shape), timesteps, guidance_scale)
            loop = sample_latents(unet, self.scheduler, image_embeds, x, *settings)
            return self._run(loop, len(timesteps), on_step, progress, "decoder")

    def _decode(
        self, latents: Tensor, height: int, width: int, output_type: str
    ) -> list[Image.Image] | Tensor:
        with self.using("movq") as movq:
            pixels = movq.decode(latents)
        self._check_finite(pixels, "the decoded picture")
        pixels = images.crop_to(images.to_unit_range(pixels), height, width)
        return images.to_pil(pixels) if output_type == "pil" else pixels

    def _run(
        self, loop: Iterator[Step], num_steps: int, on_step: OnStep | None, progress: bool, name: str
    ) -> Tensor | None:
        """Takes the loop's steps; the last sample, or None where on_step returned False."""
        from tqdm import tqdm

        with tqdm(loop, name, num_steps, disable=not progress) as bar:
            for step in bar:
                if on_step is not None and on_step(step) is False:
                    return None
        self._check_finite(step.x, f"the {name}'s result")
        return step.x

    def _check_finite(self, x: Tensor, what: str) -> None:
        if not x.isfinite().all():
            is_half = self.dtype == torch.float16
            hint = "; float16 overflows easily, try dtype=torch.bfloat16" if is_half else ""
            raise FloatingPointError(f"{what} is not finite (NaN or infinite values){hint}")

    def _check_task(self, task: str) -> None:
        if self.unet_config.hint:
            raise CheckpointError(f"{self.decoder_folder} needs a hint; use kandinsky-2-2-decoder for {task}")
        if self.unet_config.in_channels != self.unet_config.latent_channels:
            message = f"{self.decoder_folder} is for inpainting; use kandinsky-2-2-decoder for {task}"
            raise CheckpointError(message)

    def _prompts_or_embeds(
        self, prompt: Any, embeds: Any, negative_prompt: Any
    ) -> tuple[list[str] | None, int]:
        """The prompts, or None where embeds take their place; and how many there are."""
        if embeds is None:
            if prompt is None:
                raise ValueError("give a prompt, or embeds=ImageEmbeds(…) made by embed()")
            texts, dim = arguments.prompts(prompt), self.prior_config.embedding_dim
            if dim != self.unet_config.embedding_dim:
                needed = f"{self.decoder_folder} needs {self.unet_config.embedding_dim}"
                raise CheckpointError(f"the prior makes embeddings of width {dim}; {needed}")
            return texts, len(texts)
        if prompt is not None or negative_prompt is not None:
            raise ValueError("give either prompts or embeds: the prompts are in the embeds already")
        if not isinstance(embeds, ImageEmbeds):
            given = f"embeds is a {type(embeds).__name__}"
            raise TypeError(f"{given}; ImageEmbeds(image_embeds, negative_image_embeds) is needed")
        dim = self.unet_config.embedding_dim
        count = len(arguments.embeddings(embeds.image_embeds, dim, "embeds.image_embeds"))
        if embeds.negative_image_embeds is not None:
            name = "embeds.negative_image_embeds"
            negative_count = len(arguments.embeddings(embeds.negative_image_embeds, dim, name))
            if negative_count not in (1, count):
                raise ValueError(f"{negative_count} negative embeddings for {count}; give one, or as many")
        return None, count

    @staticmethod
    def _timesteps(scheduler: Any, num_steps: Any, name: str) -> list[tuple[int, int]]:
        return scheduler.timesteps(arguments.whole(num_steps, name, 1, scheduler.num_train_steps))

    def _size(self, height: Any, width: Any) -> tuple[int, int]:
        own = self.unet_config.sample_size * self.movq_config.downscale
        height = own if height is None else arguments.whole(height, "height", 1, LONGEST_SIDE)
        width = own if width is None else arguments.whole(width, "width", 1, LONGEST_SIDE)
        return height, width

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of one image: pictures are made at the next multiples of f²."""
        f = self.movq_config.downscale
        return (self.unet_config.latent_channels, -(-height // f**2) * f, -(-width // f**2) * f)
