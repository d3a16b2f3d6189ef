"""Kandinsky 2.1's tasks against diffusers' pipelines, from the same seed, on the same random weights.

diffusers serves as it is, its networks in eval mode; where it breaks ours is held against single runs.
"""

import functools
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizerFast,
)

from kandinsky import ImageEmbeds, Kandinsky, lora
from kandinsky.checkpoint import CheckpointError
from kandinsky.prompts import MultilingualTokenizer
from tests import small
from tests.helpers import picture, randn, relative_l2
from tests.small import EMBEDDING_DIM
from tests.test_scripts import run
from tests.test_tasks import HEIGHT, WIDTH, generator, half_mask, quiet

slow = pytest.mark.slow
SEEDS = [0, *(pytest.param(seed, marks=slow) for seed in (7, 123))]

PROMPT, NEGATIVE, STEPS = "a red cat", "кот", {"num_inference_steps": 4}
OURS = {**STEPS, "height": HEIGHT, "width": WIDTH, "output_type": "pt"}
CLASSES = {
    "text2img": diffusers.KandinskyPipeline,
    "img2img": diffusers.KandinskyImg2ImgPipeline,
    "inpaint": diffusers.KandinskyInpaintPipeline,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("2.1")
    decoder = small.write_checkpoints_2_1(folder)
    inpaint = small.write_checkpoints_2_1(folder, inpaint=True)
    return {"text2img": decoder, "img2img": decoder, "inpaint": inpaint}


def reference(task: str, folder, scheduler: str = "scheduler"):
    kind = DDPMScheduler if scheduler == "ddpm_scheduler" else DDIMScheduler
    return quiet(
        CLASSES[task](
            text_encoder=MultilingualCLIP.from_pretrained(folder / "text_encoder").eval(),
            tokenizer=XLMRobertaTokenizerFast.from_pretrained(folder / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet").eval(),
            scheduler=kind.from_pretrained(folder / scheduler),
            movq=VQModel.from_pretrained(folder / "movq").eval(),
        )
    )


def embeds_of(count: int = 1) -> ImageEmbeds:
    return ImageEmbeds(randn(count, EMBEDDING_DIM), randn(count, EMBEDDING_DIM, seed=1))


def both(folders, task, seed, scheduler="scheduler", height=HEIGHT, width=WIDTH, **settings):
    """Our picture and theirs, each (1, 3, h, w) in [0, 1]."""
    pipe, embeds = Kandinsky.from_pretrained(folders[task], scheduler=scheduler), embeds_of()
    more, ours_only = {}, {}
    if task != "text2img":
        more["image"] = picture(width, height)
    if task == "inpaint":
        more["mask_image"], ours_only["keep_unmasked"] = half_mask(height, width), False
    given = {**STEPS, "guidance_scale": 4.0, "height": height, "width": width, **more, **settings}
    theirs = reference(task, folders[task], scheduler)(
        PROMPT, **embeds._asdict(), generator=generator(seed), output_type="np", **given
    ).images
    ours = getattr(pipe, task)(PROMPT, embeds=embeds, seed=seed, output_type="pt", **given, **ours_only)
    return ours, torch.from_numpy(theirs).permute(0, 3, 1, 2)


@slow
@pytest.mark.parametrize("negative_prompt", [None, NEGATIVE])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_text2img_equals_diffusers(folders, negative_prompt, guidance_scale):
    for seed in (0, 7, 123):
        settings = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
        assert relative_l2(*both(folders, "text2img", seed, **settings)) <= 1e-4


@slow
def test_the_learned_variance_and_dynamic_thresholding_equal_diffusers(folders):
    for seed in (0, 7, 123):
        assert relative_l2(*both(folders, "text2img", seed, "ddpm_scheduler")) <= 1e-4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strength", [0.5, pytest.param(1.0, marks=slow)])
@pytest.mark.parametrize("negative_prompt", [NEGATIVE, pytest.param(None, marks=slow)])
def test_img2img_equals_diffusers_where_that_works(folders, strength, negative_prompt, seed):
    """On squares: diffusers encodes others at another size than it draws them."""
    settings = {"height": 32, "width": 32, "strength": strength, "negative_prompt": negative_prompt}
    assert relative_l2(*both(folders, "img2img", seed, **settings)) <= 1e-4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("negative_prompt", [NEGATIVE, pytest.param(None, marks=slow)])
def test_inpainting_equals_diffusers(folders, negative_prompt, seed):
    assert relative_l2(*both(folders, "inpaint", seed, negative_prompt=negative_prompt)) <= 1e-4


@slow
@pytest.mark.parametrize("task", CLASSES)
def test_a_batch_equals_single_runs_also_where_diffusers_breaks(folders, task):
    """Two prompts of two images each, of other pictures, not square."""
    pipe, embeds = Kandinsky.from_pretrained(folders[task]), embeds_of(2)
    pictures = [picture(WIDTH, HEIGHT, seed=i) for i in range(2)]
    lists = {} if task == "text2img" else {"image": pictures}
    if task == "inpaint":
        lists["mask_image"] = [half_mask()] * 2
    settings = {**OURS, "num_images_per_prompt": 2, "output_type": "latent"}
    prompts, seeds = [PROMPT, NEGATIVE], [3, 4, 5, 6]
    method = getattr(pipe, task)
    together = method(prompts, embeds=embeds, negative_prompt=["", "a"], seed=seeds, **lists, **settings)
    for row, seed in enumerate(seeds):
        i = row // 2
        alone = method(
            prompts[i],
            embeds=ImageEmbeds(*(e[i : i + 1] for e in embeds)),
            negative_prompt=["", "a"][i],
            seed=seed,
            **{name: items[i] for name, items in lists.items()},
            **{**settings, "num_images_per_prompt": 1},
        )
        # from noise, 4 steps magnify rounding: diffusers in float32 lies 8e-6 from float64 (8 seeds)
        assert relative_l2(together[row : row + 1], alone) <= (1e-5 if task == "img2img" else 2e-5)


@pytest.fixture(scope="module")
def their_prior(folders):
    folder = folders["text2img"].parent / "kandinsky-2-1-prior"
    return quiet(
        diffusers.KandinskyPriorPipeline(
            prior=diffusers.PriorTransformer.from_pretrained(folder / "prior").eval(),
            image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval(),
            text_encoder=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval(),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            scheduler=diffusers.UnCLIPScheduler.from_pretrained(folder / "scheduler"),
            image_processor=CLIPImageProcessor.from_pretrained(folder / "image_processor"),
        )
    )


@slow
def test_the_prior_and_the_whole_path_equal_diffusers(folders, their_prior):
    """The combined pipeline's stream. It passes the decoder no negative prompt, so none is given."""
    decoder = folders["text2img"]
    theirs = reference("text2img", decoder)
    pipe = Kandinsky.from_pretrained(decoder)
    for seed in (0, 7, 123):
        stream = generator(seed)
        embeds, negative = their_prior(PROMPT, num_inference_steps=3, generator=stream).to_tuple()
        size = {"height": HEIGHT, "width": WIDTH}
        wanted = theirs(PROMPT, embeds, negative, generator=stream, output_type="np", **STEPS, **size).images
        ours = pipe.text2img(PROMPT, prior_num_inference_steps=3, seed=seed, **OURS)
        assert relative_l2(pipe.embed(PROMPT, num_inference_steps=3, seed=seed).image_embeds, embeds) <= 1e-5
        assert relative_l2(ours, torch.from_numpy(wanted).permute(0, 3, 1, 2)) <= 1e-4


@slow
def test_mixtures_equal_interpolate_and_go_with_a_prompt(folders, their_prior):
    pipe, items, weights = (
        Kandinsky.from_pretrained(folders["text2img"]),
        [PROMPT, picture(24, 24)],
        [0.3, 0.7],
    )
    for seed in (0, 7):
        wanted = their_prior.interpolate(
            items, weights, num_inference_steps=3, generator=generator(seed), negative_prompt=""
        )
        ours = pipe.mix(items, weights, num_inference_steps=3, seed=seed)
        assert relative_l2(ours.image_embeds, wanted.image_embeds) <= 1e-5
    assert pipe.text2img("", embeds=ours, seed=0, **OURS).shape == (1, 3, HEIGHT, WIDTH)


@slow
@pytest.mark.parametrize(
    "script, given",
    [
        ("text2img", [PROMPT, "--negative-prompt", NEGATIVE]),
        ("text2img", ["--image", "cat.png"]),
        ("img2img", [PROMPT, "--image", "cat.png"]),
        ("inpaint", [PROMPT, "--image", "cat.png", "--mask", "mask.png"]),
        ("mix", [PROMPT, "--image", "cat.png"]),
    ],
)
def test_scripts_draw_and_repeat_their_pictures(folders, tmp_path, monkeypatch, script, given):
    monkeypatch.chdir(tmp_path)
    picture(16, 16).save("cat.png")
    Image.fromarray((255 * half_mask(16, 16)).astype("uint8")).save("mask.png")
    weights = ["--weights", folders[script if script == "inpaint" else "text2img"]]
    short = ["--steps", "2", "--prior-steps", "2", "--seed", "3", "--height", "16", "--width", "16"]
    assert run(script, *given, *weights, *short, "--out", "a.png") == 0
    files = given[given.index("--image") :] if "--image" in given else []
    assert run(script, "--from-png", "a.png", *weights, *files, "--out", "b.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@slow
@pytest.mark.parametrize("frames", [[], ["--frames", "2"]])
def test_a_mixtures_negative_prompt_reaches_the_decoders_own_tower(folders, tmp_path, monkeypatch, frames):
    given, draw = [], Kandinsky.text2img
    noted = functools.wraps(draw)(lambda pipe, **call: given.append(call) or draw(pipe, **call))
    monkeypatch.setattr(Kandinsky, "text2img", noted)
    short = ["--steps", "1", "--prior-steps", "1", "--height", "16", "--width", "16"]
    flags = ["--negative-prompt", NEGATIVE, "--weights", folders["text2img"], "--out", tmp_path / "a.png"]
    assert run("mix", PROMPT, "a dog", *frames, *flags, *short) == 0
    assert {(call["prompt"], call["negative_prompt"]) for call in given} == {("", NEGATIVE)}


@slow
def test_loras_and_rewrites_go_on_and_come_off(folders, tmp_path):
    pipe = Kandinsky.from_pretrained(folders["text2img"])
    draw = lambda: pipe.text2img(PROMPT, embeds=embeds_of(), seed=0, **OURS)  # noqa: E731
    plain = draw()
    lora.add_lora(pipe.unet, 2)
    for parameter in lora.lora_parameters(pipe.unet):
        parameter.data.copy_(randn(*parameter.shape, seed=parameter.numel()) / 10)
    lora.save_lora(pipe.unet, tmp_path / "lora.safetensors")
    changed = draw()
    pipe.unload_lora()
    pipe.optimize()
    pipe.load_lora(tmp_path / "lora.safetensors")
    assert relative_l2(draw(), changed) <= 1e-4 < relative_l2(changed, plain)
    pipe.restore()
    pipe.unload_lora()
    assert torch.equal(draw(), plain)


@slow
def test_networks_are_freed_and_read_again(folders):
    pipes = [Kandinsky.from_pretrained(folders["text2img"], keep_loaded=keep) for keep in (True, False)]
    pictures = [pipe.text2img(PROMPT, prior_num_inference_steps=2, seed=0, **OURS) for pipe in pipes]
    assert torch.equal(*pictures)
    assert pipes[0].loaded("decoder_text_encoder") is not None
    assert pipes[1].loaded("decoder_text_encoder") is None


def test_mistakes_are_named_before_any_weight_is_read(folders, tmp_path):
    pipe = Kandinsky.from_pretrained(folders["text2img"])
    with pytest.raises(ValueError, match="2.1's decoder reads the prompt itself; give it beside the embeds"):
        pipe.text2img(embeds=embeds_of())
    with pytest.raises(ValueError, match="3 embeds, 2 prompts: lists must be of equal length"):
        pipe.text2img(["a", "b"], embeds=embeds_of(3))
    with pytest.raises(CheckpointError, match="is not for inpainting; use kandinsky-2-1-inpaint for inpaint"):
        pipe.inpaint(PROMPT, picture(8, 8), half_mask(8, 8))
    with pytest.raises(CheckpointError, match="is for inpainting; use kandinsky-2-1 for text2img"):
        Kandinsky.from_pretrained(folders["inpaint"]).text2img(PROMPT)
    with pytest.raises(CheckpointError, match="takes no hint"):
        pipe.text2img(PROMPT, hint=picture(8, 8))
    with pytest.raises(TypeError, match="decoder_tokenizer"):
        pipe.decoder_tokenizer = pipe.tokenizer
    pipe.decoder_tokenizer = MultilingualTokenizer.from_pretrained(folders["text2img"] / "tokenizer")
    assert pipe._loaded == {}


@slow
@pytest.mark.parametrize(
    "task, kind",
    [
        ("text2img", diffusers.KandinskyCombinedPipeline),
        ("img2img", diffusers.KandinskyImg2ImgCombinedPipeline),
        ("inpaint", diffusers.KandinskyInpaintCombinedPipeline),
    ],
)
def test_the_combined_pipelines_are_one_call(folders, their_prior, task, kind):
    """From prompt to picture. They pass the decoder no negative prompt, so none is given."""
    prior = {f"prior_{name}": part for name, part in their_prior.components.items()}
    combined = kind(**reference(task, folders[task]).components, **prior)
    for part in (combined, combined.prior_pipe, combined.decoder_pipe):
        quiet(part)
    size = {"height": 32, "width": 32}
    given, ours_only = {} if task == "text2img" else {"image": picture(32, 32)}, {}
    if task == "inpaint":
        given["mask_image"], ours_only["keep_unmasked"] = half_mask(32, 32), False
    if task == "img2img":
        given["strength"] = 0.6
    for seed in (0, 7, 123):
        settings = {**STEPS, **size, **given, "prior_num_inference_steps": 3}
        theirs = combined(PROMPT, generator=generator(seed), output_type="np", **settings).images
        ours = getattr(Kandinsky.from_pretrained(folders[task]), task)(
            PROMPT, seed=seed, output_type="pt", **settings, **ours_only
        )
        assert relative_l2(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2)) <= 1e-4


@slow
@pytest.mark.parametrize("negative_prompt", [None, NEGATIVE])
def test_embed_from_equals_the_later_pipeline_on_the_same_networks(folders, their_prior, negative_prompt):
    """diffusers has it for 2.2 only, but its class takes 2.1's prior as it is."""
    reference = quiet(diffusers.KandinskyV22PriorEmb2EmbPipeline(**their_prior.components))
    pipe, image = Kandinsky.from_pretrained(folders["text2img"]), picture(37, 24)
    settings = {"strength": 0.6, "num_inference_steps": 5, "negative_prompt": negative_prompt}
    for seed in (0, 7, 123):
        theirs = reference(PROMPT, image, generator=generator(seed), **settings)
        ours = pipe.embed_from(image, PROMPT, seed=seed, **settings)
        assert relative_l2(ours.image_embeds, theirs.image_embeds) <= 1e-5
        if negative_prompt is not None:
            assert relative_l2(ours.negative_image_embeds, theirs.negative_image_embeds) <= 1e-5
