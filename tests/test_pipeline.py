"""`embed` and `text2img` against diffusers' pipelines from the same seed, and what only ours does."""

import copy
import inspect
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from kandinsky import CheckpointError, ImageEmbeds, Kandinsky, images, request, schedulers
from kandinsky.checkpoint import write_safetensors
from kandinsky.cli import WEIGHTS
from kandinsky.movq import MoVQ
from tests.helpers import randn, relative_l2, slow
from tests.small import (
    EMBEDDING_DIM,
    SCHEDULER,
    write_checkpoints,
)

PROMPT, OTHER, NEGATIVE = "a red cat, 4k photo", "an", "blurry and bad quality"


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def reference(decoder_folder) -> KandinskyV22CombinedPipeline:
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    return quiet(
        KandinskyV22CombinedPipeline(
            unet=UNet2DConditionModel.from_pretrained(decoder_folder / "unet").eval(),
            scheduler=DDPMScheduler.from_pretrained(decoder_folder / "scheduler"),
            movq=VQModel.from_pretrained(decoder_folder / "movq").eval(),
            prior_prior=PriorTransformer.from_pretrained(prior / "prior").eval(),
            prior_image_encoder=CLIPVisionModelWithProjection.from_pretrained(prior / "image_encoder").eval(),
            prior_text_encoder=CLIPTextModelWithProjection.from_pretrained(prior / "text_encoder").eval(),
            prior_tokenizer=CLIPTokenizer.from_pretrained(prior / "tokenizer"),
            prior_scheduler=UnCLIPScheduler.from_pretrained(prior / "scheduler"),
            prior_image_processor=CLIPImageProcessor.from_pretrained(prior / "image_processor"),
        )
    )


@pytest.fixture(scope="session")
def reference_parts(reference) -> tuple[KandinskyV22PriorPipeline, KandinskyV22Pipeline]:
    return quiet(reference.prior_pipe), quiet(reference.decoder_pipe)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def reference_pictures(reference, seed: int, output_type: str = "pt", **settings) -> torch.Tensor:
    """Pictures (b, 3, h, w) in [0, 1], or latents, of the combined pipeline."""
    settings = {
        "num_inference_steps": 4,
        "prior_num_inference_steps": 3,
        "height": 32,
        "width": 48,
        **settings,
    }
    their_type = "np" if output_type == "pt" else output_type
    out = reference(generator=generator(seed), output_type=their_type, **settings).images
    return torch.from_numpy(out).permute(0, 3, 1, 2) if output_type == "pt" else out


def our_pictures(pipe, seed, output_type: str = "pt", **settings) -> torch.Tensor:
    settings = {
        "num_inference_steps": 4,
        "prior_num_inference_steps": 3,
        "height": 32,
        "width": 48,
        **settings,
    }
    return pipe.text2img(seed=seed, output_type=output_type, **settings)


@pytest.mark.parametrize(
    "negative_prompt, guidance_scale, prior_guidance_scale",
    [
        (None, 4.0, 4.0),
        (NEGATIVE, 4.0, 4.0),
        (NEGATIVE, 1.0, 1.0),
        ("", 4.0, 4.0),
        *slow((None, 4.0, 1.0), (None, 1.0, 4.0), (None, 1.0, 1.0), (None, 0.5, 0.0)),
        *slow((NEGATIVE, 4.0, 1.0), (NEGATIVE, 1.0, 4.0), (NEGATIVE, 0.5, 0.0)),
    ],
)
def test_text2img_from_a_prompt_equals_the_combined_pipeline(
    pipe, reference, negative_prompt, guidance_scale, prior_guidance_scale
):
    settings = {
        "prompt": PROMPT,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
        "prior_guidance_scale": prior_guidance_scale,
    }
    theirs = reference_pictures(reference, 123, "latent", **settings)
    assert relative_l2(our_pictures(pipe, 123, "latent", **settings), theirs) <= 1e-4


@pytest.mark.parametrize("steps, prior_steps", [(7, 2), *slow((1, 2), (10, 25))])
def test_other_numbers_of_steps_equal_the_combined_pipeline(pipe, reference, steps, prior_steps):
    settings = {"prompt": OTHER, "num_inference_steps": steps, "prior_num_inference_steps": prior_steps}
    theirs = reference_pictures(reference, 5, **settings)
    assert relative_l2(our_pictures(pipe, 5, **settings), theirs) <= 1e-4


@pytest.mark.parametrize("negative_prompt", [None, NEGATIVE])
def test_embed_then_text2img_equals_the_two_pipelines(pipe, reference_parts, negative_prompt):
    prior, decoder = reference_parts
    theirs = prior(PROMPT, negative_prompt, num_inference_steps=5, generator=generator(3))
    embeds = pipe.embed(PROMPT, negative_prompt, num_inference_steps=5, seed=3)
    assert relative_l2(embeds.image_embeds, theirs.image_embeds) <= 1e-5
    assert (embeds.negative_image_embeds is None) == (negative_prompt is None)
    if negative_prompt is not None:
        assert relative_l2(embeds.negative_image_embeds, theirs.negative_image_embeds) <= 1e-5
    else:
        assert relative_l2(pipe.zero_image_embeds, theirs.negative_image_embeds) <= 1e-5
    settings = {"num_inference_steps": 4, "height": 32, "width": 48}
    decoded = decoder(
        theirs.image_embeds,
        theirs.negative_image_embeds,
        generator=generator(9),
        output_type="latent",
        **settings,
    )
    latents = pipe.text2img(embeds=embeds, seed=9, output_type="latent", **settings)
    assert relative_l2(latents, decoded.images) <= 1e-4


@pytest.mark.parametrize("height, width", [(30, 47), *slow((1, 1), (16, 33), (5, 64))])
def test_any_size_is_made_at_multiples_of_16_and_cropped_in_the_middle(pipe, reference, height, width):
    size = {"prompt": PROMPT, "height": height, "width": width}
    theirs = {kind: reference_pictures(reference, 1, kind, **size) for kind in ("latent", "pt")}
    full_height, full_width = (-(-side // 16) * 16 for side in (height, width))
    top, left = (full_height - height) // 2, (full_width - width) // 2
    latents = our_pictures(pipe, 1, "latent", **size)
    assert latents.shape == (1, 4, full_height // 4, full_width // 4)
    assert relative_l2(latents, theirs["latent"]) <= 1e-4
    picture = our_pictures(pipe, 1, **size)
    wanted = theirs["pt"][..., top : top + height, left : left + width]
    assert picture.shape == (1, 3, height, width) and relative_l2(picture, wanted) <= 1e-4


def test_pil_output_equals_the_combined_pipeline_to_one_level(pipe, reference):
    settings = {"num_inference_steps": 4, "prior_num_inference_steps": 3, "height": 32, "width": 48}
    (theirs,) = reference(PROMPT, generator=generator(2), **settings).images
    (picture,) = pipe.text2img(PROMPT, seed=2, **settings)
    difference = [abs(a - b) for a, b in zip(picture.tobytes(), theirs.tobytes())]
    assert picture.size == (48, 32) and picture.mode == "RGB" and max(difference) <= 1


@pytest.mark.parametrize(
    "negative_prompt, guidance_scale", [(NEGATIVE, 4.0), *slow((None, 4.0), (NEGATIVE, 1.0))]
)
def test_three_images_equal_three_single_runs_of_diffusers(pipe, reference, negative_prompt, guidance_scale):
    """With guidance off and several images diffusers crashes for lists; single runs are the reference."""
    settings = {"prompt": PROMPT, "negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
    ours = our_pictures(pipe, 40, "latent", num_images_per_prompt=3, **settings)
    theirs = [reference_pictures(reference, 40 + i, "latent", **settings) for i in range(3)]
    assert relative_l2(ours, torch.cat(theirs)) <= 1e-4
    assert pipe.seeds == [40, 41, 42]


def test_a_batch_equals_the_single_runs(pipe):
    prompts, negatives, seeds = [PROMPT, OTHER, "a cat"], [NEGATIVE, "", "an"], [7, 1, 99]
    together = our_pictures(pipe, seeds, "latent", prompt=prompts, negative_prompt=negatives)
    alone = [
        our_pictures(pipe, seed, "latent", prompt=prompt, negative_prompt=negative)
        for prompt, negative, seed in zip(prompts, negatives, seeds)
    ]
    assert relative_l2(together, torch.cat(alone)) <= 1e-5


def test_images_come_prompt_by_prompt(pipe):
    together = our_pictures(pipe, 5, "latent", prompt=[PROMPT, OTHER], num_images_per_prompt=2)
    first = our_pictures(pipe, 5, "latent", prompt=PROMPT, num_images_per_prompt=2)
    second = our_pictures(pipe, 7, "latent", prompt=OTHER, num_images_per_prompt=2)
    assert relative_l2(together, torch.cat([first, second])) <= 1e-5


@pytest.mark.parametrize("negatives", ["none", "one", "each"])
def test_embeds_go_with_several_images_each(pipe, negatives):
    embeds = pipe.embed([PROMPT, OTHER], NEGATIVE, num_inference_steps=2, seed=0)
    negative = {"none": None, "one": embeds.negative_image_embeds[:1], "each": embeds.negative_image_embeds}[
        negatives
    ]
    embeds = ImageEmbeds(embeds.image_embeds, negative)
    together = pipe.text2img(
        embeds=embeds, num_images_per_prompt=2, num_inference_steps=2, seed=4, output_type="latent"
    )
    for i in range(4):
        row = i // 2 if negatives == "each" else 0
        one = ImageEmbeds(
            embeds.image_embeds[i // 2][None], None if negative is None else negative[row][None]
        )
        alone = pipe.text2img(embeds=one, num_inference_steps=2, seed=4 + i, output_type="latent")
        assert relative_l2(together[i : i + 1], alone) <= 1e-5


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(pipe, decoder_folder):
    first = our_pictures(pipe, 11, prompt=PROMPT)
    assert torch.equal(first, our_pictures(Kandinsky.from_pretrained(decoder_folder), 11, prompt=PROMPT))
    assert relative_l2(our_pictures(pipe, 12, prompt=PROMPT), first) > 1e-2


def test_a_drawn_seed_is_reported_and_repeats_the_picture(pipe):
    first = our_pictures(pipe, None, prompt=PROMPT)
    (seed,) = pipe.seeds
    assert torch.equal(our_pictures(pipe, seed, prompt=PROMPT), first)
    our_pictures(pipe, None, prompt=PROMPT)
    assert pipe.seeds != [seed]


def test_global_random_state_is_left_alone(pipe):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    our_pictures(pipe, None, prompt=PROMPT, negative_prompt=NEGATIVE)
    pipe.embed(PROMPT, num_inference_steps=2, seed=1)
    assert states() == before


def test_own_decoder_noise_is_used_and_not_drawn(pipe, reference_parts):
    prior, decoder = reference_parts
    embeds = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=2, seed=0)
    noise = randn(1, 4, 8, 12, seed=8)
    kept = noise.clone()
    settings = {"num_inference_steps": 4, "height": 32, "width": 48, "output_type": "latent"}
    ours = pipe.text2img(embeds=embeds, latents=noise, seed=3, **settings)
    theirs = decoder(*embeds, latents=noise, generator=generator(3), **settings).images
    assert relative_l2(ours, theirs) <= 1e-4 and torch.equal(noise, kept)
    half = pipe.text2img(embeds=embeds, latents=noise.half(), seed=3, **settings)
    assert 0 < relative_l2(half, ours) < 1e-2
    assert relative_l2(pipe.text2img(embeds=embeds, latents=-noise, seed=3, **settings), ours) > 1e-2


def test_own_noise_of_several_images_is_theirs_in_order(pipe):
    noise, prior_noise = randn(3, 4, 8, 12), randn(6, EMBEDDING_DIM, seed=1)
    batch = pipe.embed(PROMPT, NEGATIVE, 3, num_inference_steps=3, seed=[5, 6, 7], latents=prior_noise)
    settings = {"num_inference_steps": 3, "height": 32, "width": 48, "output_type": "latent"}
    latents = pipe.text2img(embeds=batch, latents=noise, seed=[5, 6, 7], **settings)
    for i in range(3):
        own = prior_noise[[i, 3 + i]]
        embeds = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=3, seed=5 + i, latents=own)
        assert relative_l2(batch.image_embeds[i], embeds.image_embeds[0]) <= 1e-5
        single = pipe.text2img(embeds=embeds, latents=noise[i : i + 1], seed=5 + i, **settings)
        assert relative_l2(latents[i], single[0]) <= 1e-5


def test_own_prior_noise_is_used_and_not_drawn(pipe, reference_parts):
    prior, _ = reference_parts
    for negative, rows in ((None, 1), (NEGATIVE, 2)):
        noise = randn(rows, EMBEDDING_DIM, seed=6)
        theirs = prior(PROMPT, negative, num_inference_steps=4, generator=generator(3), latents=noise)
        embeds = pipe.embed(PROMPT, negative, num_inference_steps=4, seed=3, latents=noise)
        assert relative_l2(embeds.image_embeds, theirs.image_embeds) <= 1e-5
    one = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=4, seed=3, latents=noise[:1])
    both = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=4, seed=3, latents=noise[:1].repeat(2, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, both))


@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_off_runs_the_networks_once_per_step(pipe, batch):
    rows = []
    for network in (pipe.unet.conv_in, pipe.prior.proj_in):
        network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    settings = {
        "prompt": PROMPT,
        "num_images_per_prompt": batch,
        "guidance_scale": 1.0,
        "prior_guidance_scale": 1.0,
    }
    our_pictures(pipe, 0, **settings)
    assert rows == [batch] * (3 + 4)


def test_a_negative_prompt_costs_three_prior_rows_per_image_not_four(pipe):
    rows = []
    pipe.prior.proj_in.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    pipe.embed(PROMPT, NEGATIVE, num_inference_steps=2, seed=0, num_images_per_prompt=2)
    assert rows == [6, 6]


def test_on_step_sees_every_step_and_can_stop_without_decoding(pipe):
    steps, decoded = [], []
    pipe.movq.decoder.register_forward_pre_hook(lambda *_: decoded.append(True))
    settings = {"prompt": PROMPT, "num_inference_steps": 4, "height": 16, "width": 16, "seed": 0}
    latents = pipe.text2img(on_step=steps.append, output_type="latent", **settings)
    assert [(s.index, s.num_steps, s.t) for s in steps] == [(0, 4, 751), (1, 4, 501), (2, 4, 251), (3, 4, 1)]
    # clipped by the official scheduler
    assert torch.equal(steps[-1].x, latents) and steps[0].x0.abs().max() <= 1
    assert pipe.text2img(on_step=lambda step: step.index < 1, **settings) is None and not decoded
    prior_steps = []
    assert pipe.embed(PROMPT, seed=0, on_step=lambda step: prior_steps.append(step.t) or False) is None
    assert prior_steps == [999]
    for enough in (np.bool_(False), torch.tensor(False), torch.zeros(1) > 1):
        assert pipe.embed(PROMPT, seed=0, on_step=lambda step: enough) is None
    for other in (
        0,
        None,
        "",
        [],
        np.float32(0),
        torch.tensor(True),
        torch.zeros(2) > 1,
    ):  # what a function happens to return
        assert pipe.embed(PROMPT, num_inference_steps=1, seed=0, on_step=lambda step: other) is not None


@pytest.mark.parametrize("sampler", [None, "dpm++"])
def test_between_steps_no_number_is_read_back_from_the_device(pipe, sampler):
    """A GPU would have to finish first, and then wait for the next step's kernels."""
    reads = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    def between_steps(step):
        if step.index == 0:
            watch.__enter__()
        elif step.index == step.num_steps - 1:
            watch.__exit__(None, None, None)

    settings = {"height": 16, "width": 16, "num_inference_steps": 4, "sampler": sampler, "seed": 0}
    for draw in (
        lambda: pipe.embed(PROMPT, num_inference_steps=4, seed=0, on_step=between_steps),
        lambda: pipe.text2img(embeds=pipe.embed(PROMPT, seed=0), on_step=between_steps, **settings),
    ):
        watch, called = Watch(), []
        draw()
        assert len(called) > 100 and not reads & set(called)


def test_progress_shows_one_bar_for_each_loop(pipe, capsys):
    our_pictures(pipe, 0, prompt=PROMPT, progress=True)
    shown = capsys.readouterr().err
    assert "prior" in shown and "decoder" in shown and "4/4" in shown
    pipe.mix([PROMPT], [1], num_inference_steps=2, progress=True)
    assert "prior" in capsys.readouterr().err
    our_pictures(pipe, 0, prompt=PROMPT)
    assert capsys.readouterr().err == ""


def test_ddim_and_unclipped_schedulers_drive_whole_pictures(tmp_path, reference):
    decoder = write_checkpoints(tmp_path)
    changes = {"set_alpha_to_one": False, "clip_sample": True}
    DDIMScheduler(**{**SCHEDULER, **changes}).save_pretrained(decoder / "ddim")
    ddpm = {
        "variance_type": "learned_range",
        "thresholding": True,
        "sample_max_value": 2.0,
        "steps_offset": 0,
    }
    DDPMScheduler(**{**SCHEDULER, **ddpm, "clip_sample": False}).save_pretrained(decoder / "ddpm")
    for subfolder, scheduler in (("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)):
        pipe = Kandinsky.from_pretrained(decoder, scheduler=subfolder)
        embeds = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=2, seed=0)
        theirs = KandinskyV22Pipeline(
            reference.decoder_pipe.unet,
            scheduler.from_pretrained(decoder / subfolder),
            reference.decoder_pipe.movq,
        )
        settings = {"num_inference_steps": 6, "height": 32, "width": 48, "output_type": "latent"}
        wanted = quiet(theirs)(*embeds, generator=generator(3), **settings).images
        assert relative_l2(pipe.text2img(embeds=embeds, seed=3, **settings), wanted) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_diffusers(decoder_folder, reference, dtype):
    """Median over 8 seeds, small size: at most 1.3 times diffusers' own distance."""
    pipe = Kandinsky.from_pretrained(decoder_folder, dtype=dtype)
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    half = quiet(
        KandinskyV22CombinedPipeline(
            UNet2DConditionModel.from_pretrained(decoder_folder / "unet").eval(),
            DDPMScheduler.from_pretrained(decoder_folder / "scheduler"),
            VQModel.from_pretrained(decoder_folder / "movq").eval(),
            PriorTransformer.from_pretrained(prior / "prior").eval(),
            CLIPVisionModelWithProjection.from_pretrained(prior / "image_encoder").eval(),
            CLIPTextModelWithProjection.from_pretrained(prior / "text_encoder").eval(),
            reference.prior_tokenizer,
            reference.prior_scheduler,
            reference.prior_image_processor,
        ).to(dtype)
    )
    ours, theirs = [], []
    for seed in range(8):
        full = reference_pictures(reference, seed, "latent", prompt=PROMPT)
        ours.append(relative_l2(our_pictures(pipe, seed, "latent", prompt=PROMPT), full))
        their_half = reference_pictures(half, seed, "latent", prompt=PROMPT)
        theirs.append(relative_l2(their_half.float(), full))
    assert sorted(ours)[4] <= 1.3 * sorted(theirs)[4]


class Own(schedulers.NoiseScheduler):
    """DDIM without its class."""

    def timesteps(self, num_steps):
        return schedulers.DDIMScheduler().timesteps(num_steps)

    def draws_noise(self, t, t_prev):
        return False

    def step(self, eps, x, t, t_prev, noise=None, variance=None, earlier=None):
        return schedulers.DDIMScheduler().step(eps, x, t, t_prev)


def test_any_scheduler_of_the_kind_drives_the_loop(pipe):
    pictures = {}
    for scheduler in (Own(), schedulers.DDIMScheduler(), schedulers.DPMSolverScheduler()):
        pipe.scheduler = scheduler
        pictures[type(scheduler).__name__] = our_pictures(pipe, 1, prompt=PROMPT)
    assert torch.equal(pictures["Own"], pictures["DDIMScheduler"])
    assert torch.equal(pictures["DPMSolverScheduler"], our_pictures(pipe, 1, prompt=PROMPT, sampler="dpm++"))
    pipe.scheduler = schedulers.NoiseScheduler()
    with pytest.raises(NotImplementedError):
        our_pictures(pipe, 1, prompt=PROMPT)


def test_a_call_that_is_refused_leaves_the_last_seeds(pipe):
    pipe.seeds = [5]
    image = Image.new("RGB", (8, 8))
    for call in (
        lambda: pipe.embed(PROMPT, seed=9, num_inference_steps=0),
        lambda: pipe.embed_from(image, PROMPT, seed=9, latents=randn(1)),
        lambda: pipe.mix([PROMPT], [1.0], seed=9, latents=randn(1)),
        lambda: pipe.text2img(PROMPT, seed=9, prior_num_inference_steps=0),
    ):
        with pytest.raises(ValueError, match="num_inference_steps|latents"):
            call()
    assert pipe.seeds == [5]


def test_a_call_can_be_checked_alone(decoder_folder, inpaint_folder):
    class Own(Kandinsky):
        def text2img(self, prompt=None, **settings):
            return super().text2img(prompt, **settings)

    image = Image.new("RGB", (16, 16))
    pipe, inpainter = Own.from_pretrained(decoder_folder), Kandinsky.from_pretrained(inpaint_folder)
    pipe.seeds = inpainter.seeds = [5]
    pipe.check("text2img", prompt=PROMPT, height=500, negative_prompt=NEGATIVE)
    pipe.check("img2img", prompt=PROMPT, image=image)
    inpainter.check("inpaint", prompt=PROMPT, image=image, mask_image=torch.ones(16, 16), feather_mask=3)
    for task, call, error, message in (
        ("txt2img", {}, ValueError, "task is 'txt2img'; allowed are 'text2img', 'img2img', 'inpaint'"),
        ("img2img", {"prompt": PROMPT}, TypeError, "image is a NoneType"),
        ("img2img", {"foo": 3}, TypeError, r"img2img\(\) has no argument 'foo'"),
        ("text2img", {"prompt": PROMPT, "width": 0}, ValueError, "width is 0"),
        ("inpaint", {"prompt": PROMPT}, CheckpointError, "is not for inpainting"),
    ):
        with pytest.raises(error, match=message):
            pipe.check(task, **call)
    assert pipe.seeds == inpainter.seeds == [5] and not pipe._loaded and not inpainter._loaded


def test_what_is_not_given_is_checked_as_the_tasks_default():
    groups = (request.Content, request.Batch, request.Denoising, request.Output, request.Inputs)
    assumed = dict(itertools.chain(*(group._field_defaults.items() for group in groups)))
    for task in request.TASKS:
        own = {n: p.default for n, p in inspect.signature(getattr(Kandinsky, task)).parameters.items()}
        del own["self"]
        assert own == {name: assumed[name] for name in own} | ({"strength": 0.3} if task == "img2img" else {})


def test_numbers_may_be_numpys(pipe):
    numbers = {"seed": np.uint64(2**64 - 1), "guidance_scale": np.float32(2), "height": np.int64(16)}
    our_pictures(pipe, prompt=PROMPT, num_images_per_prompt=np.int32(1), **numbers)
    assert pipe.seeds == [2**64 - 1] and type(pipe.seeds[0]) is int
    for flag in (np.bool_(True), 1, np.int64(1)):
        assert Kandinsky.from_pretrained(pipe.decoder_folder, keep_loaded=flag).keep_loaded is True
    with pytest.raises(TypeError, match="keep_loaded is 2; True or False is needed"):
        Kandinsky.from_pretrained(pipe.decoder_folder, keep_loaded=2)


def test_a_side_that_is_not_given_is_the_checkpoints(pipe):
    settings = {"embeds": ImageEmbeds(*randn(2, 1, EMBEDDING_DIM)), "num_inference_steps": 1}
    assert pipe.text2img(height=16, **settings)[0].size == (32, 16)
    assert pipe.text2img(width=16, **settings)[0].size == (16, 32)


def test_embeds_survive_a_file(pipe, tmp_path):
    same = randn(2, EMBEDDING_DIM)
    ImageEmbeds(same, same).save(tmp_path / "embeds.safetensors")
    assert torch.equal(ImageEmbeds.load(tmp_path / "embeds.safetensors").negative_image_embeds, same)
    with pytest.raises(CheckpointError):
        ImageEmbeds.load(tmp_path)
    write_safetensors({"negative_image_embeds": same}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="not image embeddings"):
        ImageEmbeds.load(tmp_path / "half.safetensors")
    for negative in (None, NEGATIVE):
        embeds = pipe.embed(PROMPT, negative, num_inference_steps=2, seed=0)
        embeds.save(tmp_path / "embeds.safetensors")
        loaded = ImageEmbeds.load(tmp_path / "embeds.safetensors")
        assert torch.equal(loaded.image_embeds, embeds.image_embeds)
        assert (loaded.negative_image_embeds is None) == (negative is None)
    with pytest.raises(CheckpointError, match="not image embeddings"):
        ImageEmbeds.load(pipe.decoder_folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_dropped(pipe, reference):
    words = " ".join(["cat"] * 75 + ["and then the rest"])
    with pytest.warns(UserWarning, match="and then the rest"):
        ours = our_pictures(pipe, 1, prompt=words)
    assert relative_l2(ours, reference_pictures(reference, 1, prompt=words)) <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        our_pictures(pipe, 1, prompt="cat " * 75)


@pytest.mark.slow
@pytest.mark.parametrize("scale, images, prompts", itertools.product([0, 1, 1.5, 4], [1, 3], [1, 2]))
def test_every_combination_of_guidance_images_and_prompts_works(pipe, scale, images, prompts):
    """diffusers crashes at scales <= 1 with several images, and at two prompts with one negative string."""
    pictures = pipe.text2img(
        [PROMPT, OTHER][:prompts],
        negative_prompt=NEGATIVE if images == 3 else None,
        num_images_per_prompt=images,
        guidance_scale=scale,
        prior_guidance_scale=scale,
        num_inference_steps=1,
        prior_num_inference_steps=1,
        height=16,
        width=16,
    )
    assert len(pictures) == images * prompts == len(pipe.seeds)


BAD_CALLS = [
    ({"prompt": None}, ValueError, "give a prompt, or embeds"),
    ({"prompt": 3}, TypeError, "prompt is a int; a string or a list of strings is needed"),
    ({"prompt": []}, TypeError, "prompt is an empty list; a string or a list"),
    (
        {"prompt": ImageEmbeds(torch.zeros(1, 2))},
        TypeError,
        "an ImageEmbeds, which the tasks take as embeds=",
    ),
    ({"prompt": ["a", 3]}, TypeError, "prompt is a list with a int in it; a string or a list"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts for 1 prompts; give one, or as many"),
    ({"negative_prompt": 1}, TypeError, "negative_prompt is a int"),
    ({"prompt": ["a"] * 3, "negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts for 3 prompts"),
    ({"prompt": "\ud800"}, ValueError, r"prompt is '\\ud800', which is no text"),
    ({"prompt": "\udfff"}, ValueError, r"prompt is '\\udfff', which is no text"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt is 0; allowed is 1 and more"),
    (
        {"num_images_per_prompt": True},
        TypeError,
        "num_images_per_prompt is True of type bool; an int is needed",
    ),
    ({"num_inference_steps": 0}, ValueError, "^num_inference_steps is 0; allowed is 1 to 1000"),
    ({"num_inference_steps": 1001}, ValueError, "^num_inference_steps is 1001; allowed is 1 to 1000"),
    ({"num_inference_steps": "5"}, TypeError, "^num_inference_steps is '5' of type str; an int is needed"),
    ({"prior_num_inference_steps": "5"}, TypeError, "^prior_num_inference_steps is '5' of type str"),
    ({"prior_num_inference_steps": 0}, ValueError, "^prior_num_inference_steps is 0; allowed is 1 to"),
    ({"guidance_scale": "4"}, TypeError, "guidance_scale is '4' of type str; a number is needed"),
    ({"guidance_scale": float("nan")}, ValueError, "guidance_scale is nan; a finite number is needed"),
    ({"guidance_scale": 10**400}, ValueError, "guidance_scale is inf; a finite number is needed"),
    (
        {"prior_guidance_scale": float("inf")},
        ValueError,
        "^prior_guidance_scale is inf; a finite number is needed",
    ),
    ({"height": 0}, ValueError, "height is 0; allowed is 1 to 65536"),
    ({"height": 8000, "width": 8001}, ValueError, "the picture would be 8001×8000; at most 64 megapixels"),
    ({"height": 10**20}, ValueError, "height is 100000000000000000000; allowed is 1 to 65536"),
    ({"width": 51.2}, TypeError, "width is 51.2 of type float; an int is needed"),
    ({"seed": -1}, ValueError, "seed is -1"),
    ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, ValueError, f"seed is {2**64 - 1}; allowed is 0 to"),
    ({"seed": 1.0}, TypeError, "seed is 1.0 of type float"),
    ({"seed": [1, 2]}, ValueError, "2 seeds for 1 images; give one int, or one seed per image"),
    ({"output_type": "np"}, ValueError, "output_type is 'np'; use 'pt', "),
    ({"output_type": "png"}, ValueError, "output_type is 'png'; allowed are 'pil', 'pt', 'latent'"),
    ({"on_step": 5}, TypeError, "on_step is a int; a function of a Step is needed"),
    ({"progress": "yes"}, TypeError, "progress is 'yes'; True or False is needed"),
    ({"latents": torch.zeros(1, 4, 8, 9)}, ValueError, r"latents is \(1, 4, 8, 9\); needs \(1, 4, 8, 8\)"),
    ({"latents": [1]}, TypeError, r"latents is a list; a tensor of \(1, 4, 8, 8\) is needed"),
    (
        {"latents": torch.full((1, 4, 8, 8), float("nan"))},
        ValueError,
        "latents must be floating point and finite",
    ),
    ({"embeds": ImageEmbeds(torch.zeros(1, EMBEDDING_DIM))}, ValueError, "give either prompts or embeds"),
    (
        {"prompt": None, "embeds": torch.zeros(1, EMBEDDING_DIM)},
        TypeError,
        "embeds is a Tensor; an ImageEmbeds is",
    ),
    (
        {"prompt": None, "embeds": ImageEmbeds(torch.zeros(1, 5))},
        ValueError,
        r"is \(1, 5\); this checkpoint needs",
    ),
    (
        {"prompt": None, "embeds": ImageEmbeds(torch.zeros(3, EMBEDDING_DIM), torch.zeros(2, EMBEDDING_DIM))},
        ValueError,
        "2 negative embeddings for 3; give one, or as many",
    ),
    *(
        ({"prompt": None, "embeds": ImageEmbeds(*embeds)}, ValueError, message)
        for embeds, message in (
            ((torch.zeros(1, EMBEDDING_DIM), torch.zeros(1, 5)), r"negative_image_embeds is \(1, 5\); this"),
            (
                (torch.full((1, EMBEDDING_DIM), float("nan")),),
                "image_embeds must be floating point and finite",
            ),
            ((torch.zeros(1, EMBEDDING_DIM).long(),), "image_embeds must be floating point and finite"),
        )
    ),
    (
        {"prompt": None, "negative_prompt": "bad", "embeds": ImageEmbeds(torch.zeros(1, EMBEDDING_DIM))},
        ValueError,
        "give either prompts or embeds",
    ),
    ({"prompt": None, "embeds": "a cat"}, TypeError, "embeds is a str; .* which .*embed.prompt. gives"),
    ({"generator": None}, TypeError, r"text2img\(\) has no argument 'generator'; use seed="),
    ({"image_embeds": None}, TypeError, "use embeds=ImageEmbeds"),
    ({"callback_on_step_end": None}, TypeError, "use on_step="),
    ({"colour": 1}, TypeError, "has no argument 'colour'; use one of prompt, embeds"),
    (
        {"height": torch.zeros(3, 9, 9)},
        TypeError,
        "height is tensor.{60,90}… of type Tensor; an int is needed",
    ),
    ({"guidance_scale": torch.zeros(3, 9, 9)}, TypeError, "… of type Tensor; a number is needed"),
    ({"progress": torch.zeros(3, 9, 9)}, TypeError, "…; True or False is needed"),
    ({"sampler": torch.zeros(3, 9, 9).numpy()}, ValueError, "sampler is array.*…; allowed are 'dpm"),
    ({"output_type": torch.zeros(3, 9, 9).numpy()}, ValueError, "output_type is array.*…; allowed are 'pil'"),
]


@pytest.mark.parametrize("changes, error, message", BAD_CALLS, ids=[str(next(iter(c[0]))) for c in BAD_CALLS])
def test_bad_input_is_refused_in_one_line_before_any_weight_is_read(pipe, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        pipe.text2img(**{"prompt": PROMPT, **changes})
    assert "\n" not in str(caught.value) and not pipe._loaded


@pytest.mark.parametrize(
    "channels, hint, message",
    [(9, False, "is for inpainting;"), (8, True, "needs a hint; pass hint= .--hint., or")],
)
def test_a_checkpoint_of_another_task_names_the_one_to_use(tmp_path, channels, hint, message):
    pipe = Kandinsky.from_pretrained(write_checkpoints(tmp_path, in_channels=channels, hint=hint))
    with pytest.raises(CheckpointError, match=f"{message} use kandinsky-2-2-decoder for text2img"):
        pipe.text2img(PROMPT)


def test_an_embedded_checkpoint_names_an_embedded_one():
    for name, task, given, needed in (
        ("mini-decoder-inpaint", "text2img", {}, "mini-decoder"),
        ("mini-decoder", "inpaint", {}, "mini-decoder-inpaint"),
        ("mini-decoder", "text2img", {"hint": torch.zeros(3, 8, 8)}, "mini-controlnet-depth"),
        ("mini-controlnet-depth", "text2img", {}, "mini-decoder"),
    ):
        with pytest.raises(CheckpointError, match=f"{name} .*use {needed} for {task}"):
            getattr(Kandinsky.from_pretrained(WEIGHTS / name), task)(PROMPT, **given)


def test_a_picture_whose_embedding_is_not_finite_stops_there(pipe):
    with torch.no_grad():
        pipe.image_encoder.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the picture's embedding is not finite"):
        pipe.embed_image(np.zeros((16, 16, 3)))


def test_numbers_of_a_prior_that_does_not_run_are_checked_too(pipe):
    embeds = ImageEmbeds(randn(1, EMBEDDING_DIM), randn(1, EMBEDDING_DIM))
    for wrong in ({"prior_num_inference_steps": 0}, {"prior_guidance_scale": "x"}):
        with pytest.raises((ValueError, TypeError), match="prior_"):
            pipe.text2img(embeds=embeds, **wrong)
    for wrong in ({"num_inference_steps": 0}, {"guidance_scale": None}, {"negative_prompt": 0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            pipe.mix([randn(EMBEDDING_DIM)], [1.0], **wrong)
    assert not pipe._loaded


def test_non_finite_results_stop_the_run(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    call = {"embeds": ImageEmbeds(*randn(2, 1, EMBEDDING_DIM)), "num_inference_steps": 1}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe.to(dtype=dtype)
        with pytest.raises(FloatingPointError, match="the decoder's result is not finite") as caught:
            pipe.text2img(height=16, width=16, **call)
        assert ("try dtype=torch.bfloat16" in str(caught.value)) == (dtype == torch.float16)


@pytest.mark.slow
@torch.no_grad()
def test_what_overflows_in_movq_in_float16_is_computed_in_float32(pipe):
    pipe.to(dtype=torch.float16)
    for half in (pipe.movq.decoder, pipe.movq.encoder):
        half.conv_in.weight.copy_(6e4 * half.conv_in.weight.sign())  # float16 ends at 65,504
    weights = copy.deepcopy(pipe.movq.state_dict())
    latents = our_pictures(pipe, 0, "latent", prompt=PROMPT)
    assert not pipe.movq.decode(latents).isfinite().all()
    picture = our_pictures(pipe, 0, prompt=PROMPT)
    exact = images.to_unit_range(copy.deepcopy(pipe.movq).float().decode(latents))
    assert torch.equal(picture, images.crop_to(exact, *picture.shape[-2:]))
    given = {"prompt": PROMPT, "image": Image.new("RGB", (32, 32), "red"), "strength": 0}
    assert pipe.img2img(**given, output_type="pt").isfinite().all()
    assert pipe.movq.dtype == torch.float16
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.movq.state_dict().items())


@torch.no_grad()
def test_movq_is_half_again_where_float32_has_no_memory(pipe, monkeypatch):
    pipe.to(dtype=torch.float16)
    pipe.movq.decoder.conv_in.weight.copy_(6e4 * pipe.movq.decoder.conv_in.weight.sign())
    decode = MoVQ.decode

    def decode_in_little_memory(movq, z):
        if movq.dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(movq, z)

    monkeypatch.setattr(MoVQ, "decode", decode_in_little_memory)
    embeds = ImageEmbeds(*randn(2, 1, EMBEDDING_DIM))
    with pytest.raises(MemoryError):
        pipe.text2img(embeds=embeds, num_inference_steps=1, height=16, width=16)
    assert pipe.movq.dtype == torch.float16


def test_a_decoded_picture_that_is_not_finite_stops_the_run(pipe):
    with torch.no_grad():
        pipe.movq.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the decoded picture is not finite"):
        our_pictures(pipe, 0, prompt=PROMPT)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\nand more"),
        torch.OutOfMemoryError("the device is full\nand more"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.08 GiB)\nand more"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate\nand more"),
    ],
)
def test_running_out_of_memory_says_what_to_try(pipe, error):
    def fail(*_):
        raise error

    pipe.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(
        MemoryError, match="in this order try: keep_loaded=False .*, dtype=torch.bfloat16 "
    ) as caught:
        our_pictures(pipe, 0, prompt=PROMPT)
    assert "\n" not in str(caught.value)
