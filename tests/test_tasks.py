"""img2img, inpaint, hints, mix and embed_from against diffusers' pipelines from the same seed.

diffusers swaps height and width in its two img2img pipelines, so the reference gets them swapped.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from kandinsky import ImageEmbeds
from tests.helpers import half_mask, picture, randn, relative_l2, slow
from tests.small import EMBEDDING_DIM
from tests.test_pipeline import NEGATIVE, OTHER, PROMPT, generator, quiet

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="session")
def prior_parts(decoder_folder) -> dict:
    """Of the reference; every small checkpoint has the same prior."""
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    return {
        "prior": PriorTransformer.from_pretrained(prior / "prior").eval(),
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(prior / "image_encoder").eval(),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(prior / "text_encoder").eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(prior / "tokenizer"),
        "scheduler": UnCLIPScheduler.from_pretrained(prior / "scheduler"),
        "image_processor": CLIPImageProcessor.from_pretrained(prior / "image_processor"),
    }


@pytest.fixture(scope="session")
def prior_pipeline(prior_parts) -> KandinskyV22PriorPipeline:
    return quiet(KandinskyV22PriorPipeline(**prior_parts))


def decoder_pipeline(pipeline_class: type, folder: Path):
    return quiet(
        pipeline_class(
            unet=UNet2DConditionModel.from_pretrained(folder / "unet").eval(),
            scheduler=DDPMScheduler.from_pretrained(folder / "scheduler"),
            movq=VQModel.from_pretrained(folder / "movq").eval(),
        )
    )


@pytest.fixture(scope="session")
def references(prior_pipeline, decoder_folder, inpaint_folder, hint_folder):
    """Runs prior and decoder of diffusers from one generator, as its combined pipelines do."""
    classes = {
        "img2img": (KandinskyV22Img2ImgPipeline, decoder_folder),
        "inpaint": (KandinskyV22InpaintPipeline, inpaint_folder),
        "hint": (KandinskyV22ControlnetPipeline, hint_folder),
        "hint img2img": (KandinskyV22ControlnetImg2ImgPipeline, hint_folder),
    }
    pipelines = {task: decoder_pipeline(*made_of) for task, made_of in classes.items()}

    def run(task: str, seed: int, negative_prompt: str | None = None, **settings) -> torch.Tensor:
        stream = generator(seed)
        embeds = prior_pipeline(PROMPT, negative_prompt, num_inference_steps=3, generator=stream)
        size = {"height": HEIGHT, "width": WIDTH}
        if "img2img" in task:
            size = {"height": WIDTH, "width": HEIGHT}
        halves = {"image_embeds": embeds.image_embeds, "negative_image_embeds": embeds.negative_image_embeds}
        out = pipelines[task](**halves, generator=stream, output_type="np", **{**size, **settings}).images
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    return run


STEPS = {"num_inference_steps": 5}
OURS = {**STEPS, "prior_num_inference_steps": 3, "output_type": "pt"}


@pytest.mark.parametrize("strength", [0.45, *slow(0.8, 1.0)])
@pytest.mark.parametrize("negative_prompt, guidance_scale", [(None, 4.0), (NEGATIVE, 4.0), (NEGATIVE, 1.0)])
def test_img2img_equals_diffusers(pipe, references, strength, negative_prompt, guidance_scale):
    image = picture(WIDTH, HEIGHT)
    settings = {"strength": strength, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    theirs = references("img2img", 123, image=image, **STEPS, **settings)
    ours = pipe.img2img(PROMPT, image=image, seed=123, **OURS, **settings)
    assert relative_l2(ours, theirs) <= 1e-4


@pytest.mark.parametrize("negative_prompt, guidance_scale", [(None, 4.0), (NEGATIVE, 4.0), (NEGATIVE, 1.0)])
def test_inpaint_without_pasting_equals_diffusers(inpainter, references, negative_prompt, guidance_scale):
    image, mask = picture(WIDTH, HEIGHT), half_mask()
    settings = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    theirs = references("inpaint", 123, image=image, mask_image=mask.copy(), **STEPS, **settings)
    ours = inpainter.inpaint(PROMPT, image, mask, keep_unmasked=False, seed=123, **OURS, **settings)
    assert relative_l2(ours, theirs) <= 1e-4


@pytest.mark.parametrize("strength", [None, 0.45, *slow(0.8)])
def test_hints_equal_diffusers(hinted, references, strength):
    """The small MoVQ halves twice, the hint network three times: diffusers wants twice the picture's size."""
    hint, image = randn(1, 3, 2 * HEIGHT, 2 * WIDTH, seed=4).sigmoid(), picture(WIDTH, HEIGHT)
    for seed, negative_prompt in ((0, None), (123, NEGATIVE)):
        settings = {"hint": hint, "negative_prompt": negative_prompt}
        if strength is None:
            theirs = references("hint", seed, **STEPS, **settings)
            size = {"height": HEIGHT, "width": WIDTH}
            ours = hinted.text2img(PROMPT, seed=seed, **size, **OURS, **settings)
        else:
            settings |= {"image": image, "strength": strength}
            theirs = references("hint img2img", seed, **STEPS, **settings)
            ours = hinted.img2img(PROMPT, seed=seed, **OURS, **settings)
        assert relative_l2(ours, theirs) <= 1e-4


@pytest.mark.parametrize("task", ["inpaint", *slow("img2img", "hint")])
def test_three_images_equal_three_single_runs_of_diffusers(pipe, inpainter, hinted, references, task):
    image, mask = picture(WIDTH, HEIGHT), half_mask()
    hint = randn(3, 2 * HEIGHT, 2 * WIDTH, seed=4).sigmoid()
    given = {
        "img2img": {"image": image, "strength": 0.7},
        "inpaint": {"image": image, "mask_image": mask},
        "hint": {"hint": hint[None]},
    }[task]
    theirs = [references(task, 40 + i, NEGATIVE, **STEPS, **given) for i in range(3)]
    settings = {"negative_prompt": NEGATIVE, "num_images_per_prompt": 3, "seed": 40, **OURS}
    if task == "img2img":
        ours = pipe.img2img(PROMPT, **given, **settings)
    elif task == "inpaint":
        ours = inpainter.inpaint(PROMPT, keep_unmasked=False, **given, **settings)
    else:
        ours = hinted.text2img(PROMPT, height=HEIGHT, width=WIDTH, **given, **settings)
    assert relative_l2(ours, torch.cat(theirs)) <= 1e-4


def test_pictures_and_masks_of_other_sizes_are_resized_as_in_diffusers(pipe, inpainter, references):
    image = picture(131, 77, seed=2)
    mask = Image.fromarray((half_mask(77, 131) * 255).astype(np.uint8))
    size = {"height": HEIGHT, "width": WIDTH}
    theirs = references("img2img", 3, image=image, strength=0.5, **STEPS)
    ours = pipe.img2img(PROMPT, image=image, strength=0.5, seed=3, **size, **OURS)
    assert relative_l2(ours, theirs) <= 1e-4
    theirs = references("inpaint", 3, image=image, mask_image=mask, **STEPS)
    given = {"image": image, "mask_image": mask, "keep_unmasked": False}
    ours = inpainter.inpaint(PROMPT, seed=3, **given, **size, **OURS)
    assert relative_l2(ours, theirs) <= 1e-4


@pytest.mark.parametrize("strength", [0.3, 0.77, 1.0])
@pytest.mark.parametrize("negative_prompt, guidance_scale", [(None, 4.0), (NEGATIVE, 4.0), (NEGATIVE, 1.0)])
def test_embed_from_equals_diffusers(pipe, prior_parts, strength, negative_prompt, guidance_scale):
    reference = quiet(KandinskyV22PriorEmb2EmbPipeline(**prior_parts))
    image = picture(37, 24)
    settings = {"strength": strength, "num_inference_steps": 7, "guidance_scale": guidance_scale}
    theirs = reference(PROMPT, image, negative_prompt=negative_prompt, generator=generator(123), **settings)
    ours = pipe.embed_from(image, PROMPT, negative_prompt=negative_prompt, seed=123, **settings)
    assert relative_l2(ours.image_embeds, theirs.image_embeds) <= 1e-5
    if negative_prompt is None:
        assert ours.negative_image_embeds is None
    else:
        assert relative_l2(ours.negative_image_embeds, theirs.negative_image_embeds) <= 1e-5


def test_embed_from_of_several_images_equals_single_runs(pipe, prior_parts):
    reference = quiet(KandinskyV22PriorEmb2EmbPipeline(**prior_parts))
    image, settings = (
        picture(37, 24),
        {"strength": 0.6, "negative_prompt": NEGATIVE, "num_inference_steps": 5},
    )
    theirs = [reference(PROMPT, image, generator=generator(40 + i), **settings) for i in range(3)]
    ours = pipe.embed_from(image, PROMPT, num_images_per_prompt=3, seed=40, **settings)
    for half, name in enumerate(ImageEmbeds._fields):
        assert relative_l2(ours[half], torch.cat([getattr(out, name) for out in theirs])) <= 1e-5


@pytest.mark.parametrize("negative_prompt", ["", NEGATIVE])
@pytest.mark.parametrize("negative_prior_prompt", [None, "an", ""])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_mix_equals_diffusers_interpolate(
    pipe, prior_pipeline, negative_prompt, negative_prior_prompt, guidance_scale
):
    items, weights = [PROMPT, picture(40, 30), OTHER, picture(9, 50, seed=1)], [0.3, -0.2, 0.5, 0.4]
    settings = {"negative_prompt": negative_prompt, "negative_prior_prompt": negative_prior_prompt}
    settings |= {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    theirs = prior_pipeline.interpolate(items, weights, generator=generator(123), **settings)
    ours = pipe.mix(items, weights, seed=123, **settings)
    assert relative_l2(ours.image_embeds, theirs.image_embeds) <= 1e-5
    negative = ours.negative_image_embeds
    negative = pipe.zero_image_embeds if negative is None else negative
    assert relative_l2(negative, theirs.negative_image_embeds) <= 1e-5


def test_mix_of_several_images_equals_single_runs_of_interpolate(pipe, prior_pipeline):
    items, weights = [PROMPT, OTHER, picture(40, 30)], [0.3, 0.3, 0.4]
    settings = {"negative_prompt": NEGATIVE, "num_inference_steps": 3}
    theirs = [prior_pipeline.interpolate(items, weights, generator=generator(s), **settings) for s in (5, 9)]
    ours = pipe.mix(items, weights, num_images_per_prompt=2, seed=[5, 9], **settings)
    for half, name in enumerate(ImageEmbeds._fields):
        assert relative_l2(ours[half], torch.cat([getattr(out, name) for out in theirs])) <= 1e-5


def test_own_noise_of_mix_starts_every_prompt(pipe, prior_pipeline):
    for negative_prior_prompt, rows in ((None, 1), ("an", 2)):
        noise = randn(rows, EMBEDDING_DIM, seed=3)
        settings = {"negative_prior_prompt": negative_prior_prompt, "num_inference_steps": 3}
        settings |= {"negative_prompt": NEGATIVE, "latents": noise}
        theirs = prior_pipeline.interpolate([PROMPT, OTHER], [0.5, 0.5], generator=generator(2), **settings)
        ours = pipe.mix([PROMPT, OTHER], [0.5, 0.5], seed=2, **settings)
        assert relative_l2(ours.image_embeds, theirs.image_embeds) <= 1e-5
        assert relative_l2(ours.negative_image_embeds, theirs.negative_image_embeds) <= 1e-5


def test_image_embeddings_equal_the_reference_tower(pipe, prior_parts):
    pictures = [picture(40, 30), picture(24, 24, "L", 1), picture(9, 50, "RGB", 2)]
    pixels = prior_parts["image_processor"]([p.convert("RGB") for p in pictures], return_tensors="pt")
    with torch.no_grad():
        theirs = prior_parts["image_encoder"](pixels.pixel_values).image_embeds
    ours = pipe.embed_image(pictures)
    assert ours.shape == (3, EMBEDDING_DIM) and relative_l2(ours, theirs) <= 1e-5
    assert relative_l2(pipe.embed_image(np.array(pictures[0])), theirs[:1]) <= 1e-5
