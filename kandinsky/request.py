"""What a call of a task asks for: every argument checked, before any weight is read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kandinsky import arguments, images, masks
from kandinsky.checkpoint import CheckpointError
from kandinsky.embedding import Embedding, OnStep
from kandinsky.sampling import ImageEmbeds, last_steps
from kandinsky.schedulers import DPMSolverScheduler, NoiseScheduler, Timesteps

TASKS = ("text2img", "img2img", "inpaint")
LONGEST_SIDE = 2**16  # pixels, also in the settings of a PNG
OUTPUT_TYPES = ("pil", "pt", "latent")


class Content(NamedTuple):
    """What to show, as the caller gave it; so are the four below. Defaults are the tasks'."""

    prompt: Any = None
    embeds: Any = None
    negative_prompt: Any = None
    prior_num_inference_steps: Any = 25
    prior_guidance_scale: Any = 4.0


class Batch(NamedTuple):
    """How many pictures, of what size, from which noise."""

    num_images_per_prompt: Any = 1
    seed: Any = None
    latents: Any = None
    height: Any = None
    width: Any = None


class Denoising(NamedTuple):
    """The decoder's loop."""

    num_inference_steps: Any = 50
    sampler: Any = None
    guidance_scale: Any = 4.0
    guidance_interval: Any = (0.0, 1.0)
    cache_every: Any = 1


class Output(NamedTuple):
    """What comes back, and what is told meanwhile."""

    output_type: Any = "pil"
    on_step: Any = None
    progress: Any = False


class Inputs(NamedTuple):
    """The pictures that a task starts from, and how they are taken; what a task does not have is as here.
    (img2img's own strength is 0.3.)"""

    image: Any = None
    mask_image: Any = None
    hint: Any = None
    strength: Any = 1.0
    keep_unmasked: Any = True
    invert_mask: Any = False
    grow_mask: Any = 0
    feather_mask: Any = 0


class Words(NamedTuple):
    """What to show."""

    texts: list[str] | None  # one per prompt, or None where embeds take their place
    negatives: list[str] | None
    decoder_texts: list[str] | None  # 2.1: what the U-Net reads itself, one per prompt
    embeds: ImageEmbeds | None
    num_prompts: int


class Request(NamedTuple):
    """What a call asks for, checked.

    Rows, one per image, are prompt × images_per_prompt + k.
    """

    words: Words
    images_per_prompt: int
    prior_settings: tuple[Timesteps, float] | None
    scheduler: NoiseScheduler
    timesteps: Timesteps
    guidance_scale: float
    guidance_interval: tuple[float, float]
    cache_every: int
    size: tuple[int, int]  # of the pictures to return
    full_size: tuple[int, int]  # that they are made at; see `_full_size`
    latent_shape: tuple[int, int, int]  # of one image
    latents: Tensor | None
    output_type: str
    watch: tuple[OnStep | None, bool]
    seeds: list[int]  # one per image
    strength: float
    pictures: list[Tensor] | None
    masks: list[Tensor] | None
    hints: list[Tensor] | None
    keep_unmasked: bool
    invert_mask: bool
    grow_mask: int
    feather_mask: int

    def rows(self, items: list[Tensor]) -> Tensor:
        """One item for every prompt, or one alone for all -> (images, …)"""
        items = torch.stack(items)
        return items.expand(self.words.num_prompts, *items.shape[1:]).repeat_interleave(
            self.images_per_prompt, 0
        )


class Requests(Embedding):
    """How `Kandinsky`'s tasks check their arguments."""

    def check(self, task: str, **call: Any) -> None:
        """Raises what `text2img`, `img2img` or `inpaint` would raise for these arguments; reads no weight."""
        arguments.choice(task, "task", TASKS)
        arguments.known_names(getattr(self, task), call)
        groups = (Content, Batch, Denoising, Output, Inputs)
        given = [{name: call[name] for name in group._fields if name in call} for group in groups]
        self.request(task, *(group(**own) for group, own in zip(groups, given)))

    def request(
        self,
        task: str,
        content: Content,
        batch: Batch,
        denoising: Denoising,
        output: Output,
        inputs: Inputs,
    ) -> Request:
        """Checks a call of a task, and draws its seeds."""
        own = self._own_part(task, inputs)
        pictures = own["pictures"]
        images_per_prompt = arguments.whole(batch.num_images_per_prompt, "num_images_per_prompt")
        arguments.output_type(output.output_type, OUTPUT_TYPES)
        size = self._size(batch.height, batch.width, pictures)
        full_size, latent_shape = self._full_size(size)
        scheduler = self._sampler(denoising.sampler)
        guidance_scale = arguments.number(denoising.guidance_scale, "guidance_scale")
        words = self._words(content, **{name: own[name] for name in ("pictures", "masks", "hints")})
        num_images = words.num_prompts * images_per_prompt
        strength = arguments.share(inputs.strength, "strength")
        timesteps = self._timesteps(scheduler, denoising.num_inference_steps, "num_inference_steps")
        prior = (content.prior_num_inference_steps, content.prior_guidance_scale, "prior_")
        request = Request(
            words=words,
            images_per_prompt=images_per_prompt,
            prior_settings=self._prior_settings(*prior, runs=bool(words.texts)),
            scheduler=scheduler,
            timesteps=last_steps(timesteps, strength),
            guidance_scale=guidance_scale,
            guidance_interval=arguments.interval(denoising.guidance_interval, "guidance_interval"),
            cache_every=arguments.whole(denoising.cache_every, "cache_every"),
            size=size,
            full_size=full_size,
            latent_shape=latent_shape,
            latents=arguments.noise(batch.latents, ((num_images, *latent_shape),)),
            output_type=output.output_type,
            watch=self._watch(output.on_step, output.progress),
            seeds=arguments.seeds(batch.seed, num_images),
            strength=strength,
            **own,
        )
        self._check_weights(words, guidance_scale, output.output_type != "latent" or pictures is not None)
        return request

    def _own_part(self, task: str, inputs: Inputs) -> dict[str, Any]:
        """What one task has and another has not, as a Request's fields."""
        self._check_task(task, inputs.hint)
        keep_unmasked = arguments.flag(inputs.keep_unmasked, "keep_unmasked")
        feather_mask = arguments.whole(inputs.feather_mask, "feather_mask", 0, masks.WIDEST)
        if feather_mask and not keep_unmasked:
            what = f"feather_mask is {feather_mask}, and keep_unmasked False"
            raise ValueError(f"{what}: only over a picture that is kept can the repainted part fade in")
        return {
            "pictures": None if task == "text2img" else images.pictures(inputs.image),
            "masks": masks.masks(inputs.mask_image) if task == "inpaint" else None,
            "hints": None if inputs.hint is None else images.hints(inputs.hint),
            "keep_unmasked": keep_unmasked,
            "invert_mask": arguments.flag(inputs.invert_mask, "invert_mask"),
            "grow_mask": arguments.whole(inputs.grow_mask, "grow_mask", 0, masks.WIDEST),
            "feather_mask": feather_mask,
        }

    def _sampler(self, name: Any) -> NoiseScheduler:
        if name is None:
            return self.scheduler
        arguments.choice(name, "sampler", ("dpm++",))
        return DPMSolverScheduler.of(self.scheduler)

    def _words(self, content: Content, **lists: list[Tensor] | None) -> Words:
        """Texts and embeds, repeated to as many as there are pictures, masks or hints; one goes with all."""
        prompt, embeds, negative_prompt = content[:3]
        texts, given = self._prompts_or_embeds(prompt, embeds, negative_prompt)
        lengths = {name: len(items) for name, items in lists.items() if items is not None}
        decoder_texts = None
        if self.unet_config.text:
            decoder_texts = texts or arguments.prompts(prompt)
            lengths["prompts"] = len(decoder_texts)
        count = arguments.batch(**{"prompts" if texts else "embeds": given} | lengths)
        texts = texts and texts * (count // given)
        decoder_texts = decoder_texts and decoder_texts * (count // len(decoder_texts))
        negatives = arguments.negative_prompts(negative_prompt, count)
        return Words(texts, negatives, decoder_texts, embeds, count)

    def _full_size(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """What a size in pixels is made at, and the shape of its latents: the next multiples of f², as in
        diffusers, or of more where a U-Net of more levels than MoVQ needs it."""
        f = self.movq_config.downscale
        multiple = f * max(f, self.unet_config.downscale)
        height, width = (-(-side // multiple) * multiple for side in size)
        return (height, width), (self.unet_config.latent_channels, height // f, width // f)

    def _check_weights(self, words: Words, guidance_scale: float, needs_movq: bool) -> None:
        """The files of all networks that will be read, whether they go together, and the zero image's
        embedding, where guidance will need it."""
        config, read = self.unet_config, self.movq_config.latent_channels
        made, name = config.latent_channels, self.decoder_folder
        if needs_movq and made != read:
            raise CheckpointError(f"{name}: the U-Net's latents have {made} channels, MoVQ's {read}")
        if not (config.hint or config.inpaints or config.in_channels == made):
            what = f"{name}: the U-Net reads {config.in_channels} channels and its latents have {made}"
            raise CheckpointError(f"{what}; {made} are needed, or {2 * made + 1} for inpainting")
        needed = (["text_encoder", "prior"] if words.texts else []) + ["unet"] + ["movq"] * needs_movq
        self.check_files(*needed, *(["decoder_text_encoder"] if words.decoder_texts else []))
        negatives = words.negatives if words.texts else words.embeds.negative_image_embeds
        if guidance_scale > 1 and negatives is None:
            self.check_zero_image()

    def _check_task(self, task: str, hint: Any) -> None:
        config, name = self.unet_config, self.decoder_folder
        plain, hinted = "kandinsky-2-2-decoder", "kandinsky-2-2-controlnet-depth"
        if name.name.startswith("mini-"):
            plain, hinted = "mini-decoder", "mini-controlnet-depth"
        family = "kandinsky-2-1" if config.text else plain
        if config.inpaints and task != "inpaint":
            needed = family if hint is None else hinted
            raise CheckpointError(f"{name} is for inpainting; use {needed} for {task}")
        if task == "inpaint" and not config.inpaints:
            raise CheckpointError(f"{name} is not for inpainting; use {family}-inpaint for {task}")
        if task == "inpaint" and hint is not None:
            raise CheckpointError("no checkpoint takes a hint for inpainting; leave hint out")
        if config.hint and hint is None:
            raise CheckpointError(f"{name} needs a hint; pass hint= (--hint), or use {plain} for {task}")
        if hint is not None and not config.hint:
            raise CheckpointError(f"{name} takes no hint; use {hinted} for {task} with one")

    def _prompts_or_embeds(
        self, prompt: Any, embeds: Any, negative_prompt: Any
    ) -> tuple[list[str] | None, int]:
        """The prompts, or None where embeds take their place; and how many there are."""
        if embeds is None:
            if prompt is None:
                raise ValueError("give a prompt, or embeds=ImageEmbeds(…) made by embed()")
            texts, dim = arguments.prompts(prompt), self.prior_config.embedding_dim
            if dim != self.unet_config.image_dim:
                needed = f"{self.decoder_folder} needs {self.unet_config.image_dim}"
                raise CheckpointError(f"the prior makes embeddings of width {dim}; {needed}")
            return texts, len(texts)
        if self.unet_config.text:
            if prompt is None:
                raise ValueError("2.1's decoder reads the prompt itself; give it beside the embeds")
        elif prompt is not None or negative_prompt is not None:
            raise ValueError("give either prompts or embeds: the prompts are in the embeds already")
        if not isinstance(embeds, ImageEmbeds):
            given = f"embeds is a {type(embeds).__name__}"
            raise TypeError(f"{given}; an ImageEmbeds is needed, which embed(prompt) gives")
        dim = self.unet_config.image_dim
        count = len(arguments.embeddings(embeds.image_embeds, dim, "embeds.image_embeds"))
        if embeds.negative_image_embeds is not None:
            name = "embeds.negative_image_embeds"
            negative_count = len(arguments.embeddings(embeds.negative_image_embeds, dim, name))
            if negative_count not in (1, count):
                raise ValueError(f"{negative_count} negative embeddings for {count}; give one, or as many")
        return None, count

    def _size(self, height: Any, width: Any, pictures: list[Tensor] | None = None) -> tuple[int, int]:
        own = [self.unet_config.sample_size * self.movq_config.downscale] * 2
        if pictures is not None:
            own, *others = dict.fromkeys(tuple(x.shape[-2:]) for x in pictures)
            if others and None in (height, width):
                sizes = ", ".join(f"{w}×{h}" for h, w in [own, *others])
                raise ValueError(f"the pictures' sizes differ ({sizes}); give height and width")
        height = own[0] if height is None else arguments.whole(height, "height", 1, LONGEST_SIDE)
        width = own[1] if width is None else arguments.whole(width, "width", 1, LONGEST_SIDE)
        if height * width > images.MAX_PIXELS:
            most = images.MAX_PIXELS // 10**6
            raise ValueError(f"the picture would be {width}×{height}; at most {most} megapixels are drawn")
        return height, width
