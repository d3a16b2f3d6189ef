"""`embed` and `text2img` against diffusers' pipelines from the same seed, and what only ours does."""

import copy
import itertools
import json
import random
import shutil
import warnings
from dataclasses import replace

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
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from kandinsky import CheckpointError, ImageEmbeds, Kandinsky, images, parts, schedulers
from kandinsky.checkpoint import write_safetensors
from kandinsky.cli import WEIGHTS
from kandinsky.config import MoVQConfig, PriorConfig, UNetConfig, read_config
from kandinsky.encoders import CLIPImageEncoder
from kandinsky.lora import add_lora, merge_lora
from kandinsky.movq import MoVQ
from kandinsky.parts import compute_zero_image_embeds, zero_image_embeds
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from tests.helpers import randn, relative_l2
from tests.small import (
    EMBEDDING_DIM,
    SCHEDULER,
    ours,
    reference_image_encoder,
    reference_movq,
    reference_unet,
    unet_output,
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
        *itertools.product([None, NEGATIVE], [4.0, 1.0], [4.0, 1.0]),
        (None, 0.5, 0.0),
        (NEGATIVE, 0.5, 0.0),
        ("", 4.0, 4.0),
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


@pytest.mark.parametrize("steps, prior_steps", [(1, 2), (10, 25), (7, 2)])
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


@pytest.mark.parametrize("height, width", [(1, 1), (30, 47), (16, 33), (5, 64)])
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


@pytest.mark.parametrize("negative_prompt, guidance_scale", [(NEGATIVE, 4.0), (None, 4.0), (NEGATIVE, 1.0)])
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


def test_keep_loaded_false_holds_one_network_at_a_time_and_gives_the_same_picture(pipe, decoder_folder):
    light = Kandinsky.from_pretrained(decoder_folder, keep_loaded=False)
    held = []
    picture = our_pictures(
        light,
        3,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        on_step=lambda step: held.append(set(light._loaded)),
    )
    assert torch.equal(picture, our_pictures(pipe, 3, prompt=PROMPT, negative_prompt=NEGATIVE))
    assert all(names == {"unet"} for names in held) and not light._loaded
    assert {"text_encoder", "prior", "unet", "movq"} == set(pipe._loaded)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        our_pictures(light, 3, prompt=PROMPT, on_step=stop)
    assert not light._loaded


def test_what_encodes_is_read_only_when_something_is_encoded(decoder_folder, pipe):
    light = Kandinsky.from_pretrained(decoder_folder)
    light.optimize(["merged upsampling", "low spatial norm"])
    picture = our_pictures(light, 3, prompt=PROMPT)
    half = light.loaded("movq")
    assert {name.split(".")[0] for name in half.state_dict()} == {"post_quant_conv", "decoder"}
    assert torch.equal(our_pictures(light, 3, prompt=PROMPT), picture) and light.loaded("movq") is half
    assert light.to(dtype=torch.bfloat16).loaded("movq").dtype == torch.bfloat16
    light.to(dtype=torch.float32).restore()
    settings = {"num_inference_steps": 1, "strength": 0, "seed": 1, "output_type": "pt"}
    redrawn = [p.img2img(PROMPT, Image.new("RGB", (32, 48), "red"), **settings) for p in (light, pipe)]
    assert torch.equal(*redrawn) and light.movq is not half
    assert light.movq.state_dict().keys() == pipe.movq.state_dict().keys()
    with pytest.raises(
        ValueError, match="movq was read without encoder, .*; a pipeline takes whole networks"
    ):
        light.movq = half


def test_the_image_tower_is_read_only_when_its_constant_is_not_stored(decoder_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(decoder_folder.parent, folder)
    pipe = Kandinsky.from_pretrained(folder / decoder_folder.name)
    picture = our_pictures(pipe, 3, prompt=PROMPT)
    assert "image_encoder" not in pipe._loaded  # read for the one vector, and freed
    reads = []
    pipe.image_encoder.visual_projection.register_forward_pre_hook(lambda *_: reads.append(1))
    assert torch.equal(our_pictures(pipe, 3, prompt=PROMPT), picture) and not reads  # computed once
    prior = folder / "kandinsky-2-2-prior"
    assert not (prior / "zero_image_embeds.safetensors").exists()
    zero = compute_zero_image_embeds(prior)
    write_safetensors({"zero_image_embeds": zero}, prior / "zero_image_embeds.safetensors")
    shutil.rmtree(prior / "image_encoder")
    pipe = Kandinsky.from_pretrained(folder / decoder_folder.name)
    assert torch.equal(our_pictures(pipe, 3, prompt=PROMPT), picture)
    write_safetensors({"other": zero}, prior / "zero_image_embeds.safetensors")
    with pytest.raises(CheckpointError, match="does not hold zero_image_embeds alone"):
        our_pictures(Kandinsky.from_pretrained(folder / decoder_folder.name), 3, prompt=PROMPT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_zero_image_is_computed_without_the_whole_tower(pipe, tmp_path, monkeypatch, dtype):
    reference_image_encoder().save_pretrained(tmp_path / "image_encoder", max_shard_size="20KB")
    assert len(list(tmp_path.rglob("*.safetensors"))) > 1
    whole = zero_image_embeds(CLIPImageEncoder.from_pretrained(tmp_path / "image_encoder", dtype=dtype))
    with monkeypatch.context() as patch:
        patch.setattr(CLIPImageEncoder, "from_pretrained", None)
        assert relative_l2(compute_zero_image_embeds(tmp_path, dtype=dtype), whole) <= 1e-6
        assert relative_l2(pipe.to(dtype=dtype).zero_image_embeds, whole) <= 1e-6

    def double(tower):
        tower.visual_projection.weight.mul_(2)

    pipe.to(dtype=dtype).change("image_encoder", double)
    assert relative_l2(pipe.zero_image_embeds, 2 * whole) <= 1e-6


def test_a_decoder_alone_draws_embeds(decoder_folder, tmp_path, pipe):
    shutil.copytree(decoder_folder, tmp_path / "my-decoder")
    alone = Kandinsky.from_pretrained(tmp_path / "my-decoder")
    embeds = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=2, seed=0)
    settings = {"num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    assert torch.equal(alone.text2img(embeds=embeds, **settings), pipe.text2img(embeds=embeds, **settings))
    only = ImageEmbeds(embeds.image_embeds)
    alone.text2img(embeds=only, guidance_scale=1.0, **settings)
    for call in (
        lambda: alone.text2img(PROMPT),
        lambda: alone.text2img(embeds=only),
        lambda: alone.embed(PROMPT),
    ):
        with pytest.raises(
            CheckpointError, match="has no prior beside it; pass prior=FOLDER .* was trained on"
        ):
            call()
    with_prior = Kandinsky.from_pretrained(
        tmp_path / "my-decoder", decoder_folder.parent / "kandinsky-2-2-prior"
    )
    assert torch.equal(our_pictures(with_prior, 1, prompt=PROMPT), our_pictures(pipe, 1, prompt=PROMPT))
    (tmp_path / "my-decoder" / "unet" / "config.json").write_text(json.dumps(UNetConfig().published()))
    official = Kandinsky.from_pretrained(tmp_path / "my-decoder")
    with pytest.raises(CheckpointError, match="pass prior=FOLDER .*weights.py 2.2 --only prior` fetches one"):
        official.embed(PROMPT)


def test_parts_can_be_replaced_and_are_then_kept(decoder_folder):
    pipe = Kandinsky.from_pretrained(decoder_folder, keep_loaded=False)
    before = our_pictures(pipe, 1, prompt=PROMPT)
    unet = UNet.from_pretrained(decoder_folder / "unet")
    with torch.no_grad():
        unet.conv_out.bias.add_(0.5)
    pipe.unet = unet
    changed = our_pictures(pipe, 1, prompt=PROMPT)
    assert relative_l2(changed, before) > 1e-3 and pipe.unet is unet
    pipe.tokenizer = CLIPTokenizer.from_pretrained(pipe.prior_folder / "tokenizer")  # transformers' own
    assert torch.equal(our_pictures(pipe, 1, prompt=PROMPT), changed)
    pipe.scheduler = schedulers.DDIMScheduler(clip_sample=True)
    pipe.prior_scheduler = schedulers.UnCLIPScheduler(clip_sample_range=0.5)
    others = our_pictures(pipe, 1, prompt=PROMPT)
    assert relative_l2(others, changed) > 1e-3
    del pipe.unet
    pipe.scheduler = schedulers.DDPMScheduler()
    pipe.prior_scheduler = schedulers.UnCLIPScheduler()
    assert torch.equal(our_pictures(pipe, 1, prompt=PROMPT), before)


def test_a_network_on_another_device_is_refused(pipe):
    before = pipe.unet
    with pytest.raises(ValueError, match="unet is on meta, the pipeline on cpu; move one of them"):
        pipe.unet = UNet(before.config).to("meta")
    assert pipe.unet is before


def test_replaced_networks_bring_their_own_sizes_and_task(pipe):
    pipe.movq = ours(MoVQ, reference_movq(4))
    picture = pipe.text2img(PROMPT, height=40, width=70, num_inference_steps=1, output_type="pt", seed=0)
    latents = pipe.text2img(PROMPT, height=40, width=70, num_inference_steps=1, output_type="latent", seed=0)
    assert picture.shape == (1, 3, 40, 70) and latents.shape == (1, 4, 8, 16)
    pipe.unet = ours(UNet, reference_unet(in_channels=9))
    with pytest.raises(CheckpointError, match="is for inpainting"):
        pipe.text2img(PROMPT)


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


def test_a_process_may_go_to_another_folder(decoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(decoder_folder.parent)
    given = {"prior": "kandinsky-2-2-prior"}
    pipes = [Kandinsky.from_pretrained(decoder_folder.name, **more) for more in ({}, given)]
    monkeypatch.chdir(tmp_path)
    assert torch.equal(*(our_pictures(pipe, 1, prompt=PROMPT) for pipe in pipes))


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


def test_the_zero_image_outlives_other_networks_that_are_replaced(pipe, monkeypatch):
    towers = []
    compute = parts.zero_image_embeds
    monkeypatch.setattr(parts, "zero_image_embeds", lambda tower: towers.append(1) or compute(tower))
    computed = parts.compute_zero_image_embeds
    monkeypatch.setattr(parts, "compute_zero_image_embeds", lambda *a: towers.append(1) or computed(*a))
    assert pipe.zero_image_embeds.shape == (1, EMBEDDING_DIM)
    pipe.unet, pipe.movq, pipe.prior = pipe.unet, pipe.movq, pipe.prior
    _ = pipe.zero_image_embeds
    assert len(towers) == 1
    tower = pipe.image_encoder = pipe.image_encoder
    _ = pipe.zero_image_embeds
    assert len(towers) == 2 and pipe.image_encoder is tower  # kept, being the user's
    pipe._constants["zero_image_embeds"] = randn(1, 7)
    with pytest.raises(ValueError, match=r"the zero image is \(1, 7\); this checkpoint needs"):
        our_pictures(pipe, 1, prompt=PROMPT)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("unet", torch.nn.Identity(), "unet is a Identity; a UNet is needed"),
        (
            "scheduler",
            schedulers.UnCLIPScheduler(),
            "scheduler is a UnCLIPScheduler; a NoiseScheduler is needed",
        ),
        ("scheduler", DDPMScheduler, "scheduler is a type; a NoiseScheduler is needed"),
        ("prior_scheduler", schedulers.DDPMScheduler(), "a UnCLIPScheduler is needed"),
        ("tokenizer", str, "tokenizer is a type; a PromptTokenizer is needed"),
    ],
)
def test_parts_of_another_kind_are_refused_when_assigned(pipe, name, value, message):
    with pytest.raises(TypeError, match=message):
        setattr(pipe, name, value)


def test_schedulers_of_the_other_network_are_refused_when_read(decoder_folder, tmp_path):
    shutil.copytree(decoder_folder.parent, tmp_path / "copy")
    decoder, prior = tmp_path / "copy" / decoder_folder.name, tmp_path / "copy" / "kandinsky-2-2-prior"
    shutil.copytree(prior / "scheduler", decoder / "unclip")
    with pytest.raises(CheckpointError, match="'UnCLIPScheduler'; allowed are DDPMScheduler, DDIMScheduler"):
        Kandinsky.from_pretrained(decoder, scheduler="unclip")
    shutil.rmtree(prior / "scheduler")
    shutil.copytree(decoder / "scheduler", prior / "scheduler")
    with pytest.raises(CheckpointError, match="'DDPMScheduler'; allowed are UnCLIPScheduler"):
        Kandinsky.from_pretrained(decoder).embed(PROMPT)


@pytest.mark.parametrize(
    "decoder, prior",
    [
        ("kandinsky-2-2-decoder", "kandinsky-2-2-prior"),
        ("kandinsky-2-2-decoder-inpaint", "kandinsky-2-2-prior"),
        ("kandinsky-2-2-controlnet-depth", "kandinsky-2-2-prior"),
        ("kandinsky-2-1", "kandinsky-2-1-prior"),
        ("kandinsky-2-1-inpaint", "kandinsky-2-1-prior"),
        ("mini-decoder", "mini-prior"),
        ("mini-decoder-inpaint", "mini-prior"),
        ("my-decoder", None),
        ("kandinsky-2-20", None),
    ],
)
def test_a_decoder_finds_its_prior_by_name(decoder_folder, tmp_path, decoder, prior):
    for name in ("kandinsky-2-2-prior", "kandinsky-2-1-prior", "mini-prior"):
        (tmp_path / name).mkdir()
    shutil.copytree(decoder_folder, tmp_path / decoder)
    found = Kandinsky.from_pretrained(tmp_path / decoder).prior_folder
    assert found == (prior and tmp_path / prior)


def test_a_linked_decoder_finds_its_prior_beside_the_link_or_the_target(decoder_folder, tmp_path):
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    (tmp_path / "any-name").symlink_to(decoder_folder)
    assert Kandinsky.from_pretrained(tmp_path / "any-name").prior_folder == prior
    (tmp_path / "kandinsky-2-2-decoder").symlink_to(decoder_folder)
    (tmp_path / "kandinsky-2-2-prior").symlink_to(prior)
    linked = Kandinsky.from_pretrained(tmp_path / "kandinsky-2-2-decoder")
    assert linked.prior_folder == tmp_path / "kandinsky-2-2-prior"


def test_a_missing_zero_image_is_told_before_the_prior_runs(decoder_folder, tmp_path):
    shutil.copytree(decoder_folder.parent, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "kandinsky-2-2-prior" / "image_encoder")
    pipe = Kandinsky.from_pretrained(tmp_path / "copy" / decoder_folder.name)
    pipe.seeds = [5]
    for call in (
        lambda: pipe.text2img(PROMPT),
        lambda: pipe.mix([PROMPT, Image.new("RGB", (9, 9))], [0.5, 0.5]),
    ):
        with pytest.raises(CheckpointError, match="image_encoder is not a checkpoint folder"):
            call()
    assert not pipe._loaded and pipe.seeds == [5]
    our_pictures(pipe, 0, prompt=PROMPT, negative_prompt=NEGATIVE)
    our_pictures(pipe, 0, prompt=PROMPT, guidance_scale=1.0)


def test_missing_weights_leave_the_last_seeds_and_what_needs_them_not(decoder_folder, tmp_path):
    shutil.copytree(decoder_folder.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / decoder_folder.name
    for network in (folder / "movq", folder.parent / "kandinsky-2-2-prior" / "prior"):
        (network / "diffusion_pytorch_model.safetensors").unlink()
    pipe, embeds = Kandinsky.from_pretrained(folder), ImageEmbeds(*randn(2, 1, EMBEDDING_DIM))
    latents = {"embeds": embeds, "num_inference_steps": 1, "output_type": "latent", "seed": 5}
    pipe.text2img(**latents)
    for call in (
        lambda: pipe.embed(PROMPT, seed=9),
        lambda: pipe.img2img(image=Image.new("RGB", (16, 16)), **latents | {"seed": 9}),
    ):
        with pytest.raises(CheckpointError, match="no such file: .*(prior|movq).diffusion_pytorch_model"):
            call()
    assert pipe.seeds == [5] and set(pipe._loaded) == {"unet"}


def test_replaced_networks_need_no_prior_folder(decoder_folder, tmp_path, pipe):
    shutil.copytree(decoder_folder, tmp_path / "my-decoder")
    alone = Kandinsky.from_pretrained(tmp_path / "my-decoder")
    for name in ("text_encoder", "tokenizer", "prior", "prior_scheduler", "image_encoder"):
        setattr(alone, name, getattr(pipe, name))
    assert torch.equal(our_pictures(alone, 1, prompt=PROMPT), our_pictures(pipe, 1, prompt=PROMPT))


@pytest.mark.parametrize("stored", [False, True])
def test_another_image_tower_has_another_zero_image(decoder_folder, tmp_path, stored):
    shutil.copytree(decoder_folder.parent, tmp_path / "copy")
    prior = tmp_path / "copy" / "kandinsky-2-2-prior"
    if stored:
        zero = compute_zero_image_embeds(prior)
        write_safetensors({"zero_image_embeds": zero}, prior / "zero_image_embeds.safetensors")
    pipe = Kandinsky.from_pretrained(tmp_path / "copy" / decoder_folder.name)
    before = pipe.zero_image_embeds
    with torch.no_grad():
        pipe.image_encoder.visual_projection.weight.mul_(2)
    pipe.image_encoder = pipe.image_encoder
    assert relative_l2(pipe.zero_image_embeds, 2 * before) <= 1e-6
    del pipe.image_encoder
    assert relative_l2(pipe.zero_image_embeds, before) <= 1e-6


def test_a_zero_image_of_half_precision_is_computed_anew_in_float32(decoder_folder, pipe):
    half = Kandinsky.from_pretrained(decoder_folder, dtype=torch.bfloat16)
    assert not torch.equal(half.zero_image_embeds, pipe.zero_image_embeds)
    assert torch.equal(half.to(dtype=torch.float32).zero_image_embeds, pipe.zero_image_embeds)


def test_to_moves_what_is_loaded_assigned_and_to_come(pipe):
    pipe.unet = pipe.unet
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.unet.dtype == pipe.movq.dtype == torch.bfloat16


def test_where_to_fails_half_way_the_pipeline_is_as_it_was(pipe, monkeypatch):
    pipe.unet = pipe.unet
    picture = our_pictures(pipe, 0, prompt=PROMPT)
    assert list(pipe._loaded)[0] == "unet" and list(pipe._loaded)[-1] == "movq"

    def fail(*_):
        pipe.text_encoder.text_projection.to(torch.bfloat16)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.text_encoder, "to", fail)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        pipe.to(dtype=torch.bfloat16)
    assert pipe.dtype == pipe.unet.dtype == pipe.prior.dtype == pipe.text_encoder.dtype == torch.float32
    pipe.unet = UNet.from_pretrained(pipe.decoder_folder / "unet")  # what was cast and cast back is rounded
    assert torch.equal(our_pictures(pipe, 0, prompt=PROMPT), picture)


def test_what_a_call_in_inference_mode_reads_can_be_changed_and_trained_outside(decoder_folder):
    with torch.inference_mode():
        pipe = Kandinsky.from_pretrained(decoder_folder)
        our_pictures(pipe, 0, prompt=PROMPT)
        pipe.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    networks = [pipe.text_encoder, pipe.prior, pipe.unet, pipe.movq]
    assert not any(p.is_inference() for network in networks for p in network.parameters())
    constants = [s.alphas_cumprod for s in (pipe.scheduler, pipe.prior_scheduler)] + [pipe.zero_image_embeds]
    assert not any(constant.is_inference() for constant in constants)
    with torch.inference_mode():
        pipe.optimize()
    our_pictures(pipe, 0, prompt=PROMPT)
    with torch.inference_mode():
        pipe.restore()
    pipe.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    add_lora(pipe.unet, 2)
    unet_output(pipe.unet).sum().backward()
    merge_lora(pipe.unet)


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
    ({"prompt": ImageEmbeds(torch.zeros(1, 2))}, TypeError, "prompt is an ImageEmbeds; pass it as embeds="),
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
    ({"guidance_scale": 10**400}, ValueError, "guidance_scale is 10{19}; a finite number is needed"),
    (
        {"prior_guidance_scale": float("inf")},
        ValueError,
        "^prior_guidance_scale is inf; a finite number is needed",
    ),
    ({"height": 0}, ValueError, "height is 0; allowed is 1 to 65536"),
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
]


@pytest.mark.parametrize("changes, error, message", BAD_CALLS, ids=[str(next(iter(c[0]))) for c in BAD_CALLS])
def test_bad_input_is_refused_in_one_line_before_any_weight_is_read(pipe, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        pipe.text2img(**{"prompt": PROMPT, **changes})
    assert "\n" not in str(caught.value) and not pipe._loaded


def test_bad_folders_devices_and_dtypes_are_refused(decoder_folder, tmp_path):
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    for arguments, message in (
        (("kandinsky-community/kandinsky-2-2-decoder",), "a hub id and is no local folder.*weights.py 2.2`"),
        (("ai-forever/Kandinsky_2.1",), "a hub id and is no local folder.*download_weights.py 2.1` and"),
        ((tmp_path / "gone",), "decoder: no folder at"),
        ((prior,), "is not a decoder: it has no unet/; it looks like a prior"),
        ((decoder_folder / "unet",), "it looks like a single network"),
        ((decoder_folder, decoder_folder), "is not a prior: it has no prior/; it looks like a decoder"),
        ((decoder_folder, tmp_path / "gone"), "prior: no folder at"),
        ((decoder_folder, None, "cuda:99"), "device 'cuda:99' cannot be used here"),
        ((decoder_folder, None, "gpu"), "device 'gpu' cannot be used here"),
        ((decoder_folder, None, "cpu", torch.int8), "dtype is torch.int8; allowed are torch.float32"),
        ((decoder_folder, None, "cpu", torch.float32, True, "gone"), "gone"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Kandinsky.from_pretrained(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="use dtype="):
        Kandinsky.from_pretrained(decoder_folder, torch_dtype=torch.float16)
    with pytest.raises(TypeError, match="decoder is int; a path to a folder is needed"):
        Kandinsky.from_pretrained(3)
    with pytest.raises(TypeError, match="keep_loaded is 'no'; True or False is needed"):
        Kandinsky.from_pretrained(decoder_folder, keep_loaded="no")


@pytest.mark.parametrize("network", ["unet", "movq"])
def test_a_decoder_with_a_broken_config_is_not_opened(decoder_folder, tmp_path, network):
    shutil.copytree(decoder_folder, tmp_path / "decoder")
    (tmp_path / "decoder" / network / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"{network}.config.json: _class_name is None"):
        Kandinsky.from_pretrained(tmp_path / "decoder")


def test_a_refused_move_changes_nothing(pipe):
    for arguments, error, message in (
        (("meta", torch.float16), ValueError, "device 'meta' holds no numbers"),
        (("cpu", "fp16"), ValueError, "dtype is 'fp16'; allowed are"),
        ((torch.float16,), TypeError, "device is torch.float16; pass it as dtype="),
    ):
        with pytest.raises(error, match=message):
            pipe.to(*arguments)
        assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)


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


def test_a_prior_of_another_width_is_refused(tmp_path, pipe):
    pipe.prior = Prior(PriorConfig(num_heads=2, head_dim=8, num_layers=1, embedding_dim=EMBEDDING_DIM + 8))
    with pytest.raises(CheckpointError, match="the prior makes embeddings of width 40; .* needs 32"):
        pipe.text2img(PROMPT)
    embeds = ImageEmbeds(torch.zeros(1, EMBEDDING_DIM + 8))
    with pytest.raises(ValueError, match=r"this checkpoint needs \(b, 32\)"):
        pipe.text2img(embeds=embeds)


def test_files_that_do_not_go_together_are_refused_before_weights_are_read(decoder_folder, tmp_path):
    for repository in (decoder_folder, decoder_folder.parent / "kandinsky-2-2-prior"):
        shutil.copytree(repository, tmp_path / repository.name)
    decoder, prior = tmp_path / decoder_folder.name, tmp_path / "kandinsky-2-2-prior"

    def refused(message: str) -> None:
        pipe = Kandinsky.from_pretrained(decoder)
        with pytest.raises(ValueError, match=message):
            pipe.img2img(PROMPT, image=np.zeros((16, 16, 3)), num_inference_steps=1)
        assert not pipe._loaded

    for embeds, message in ((randn(2, EMBEDDING_DIM), "holds 2 embeddings"), (randn(1, 3), r"is \(1, 3\)")):
        save_file({"zero_image_embeds": embeds}, prior / "zero_image_embeds.safetensors")
        refused(message)
    (prior / "zero_image_embeds.safetensors").write_bytes(b"half a file")
    refused("is not a whole safetensors file")
    (prior / "zero_image_embeds.safetensors").unlink()
    settings = json.loads((decoder / "movq" / "config.json").read_text())
    pipe = Kandinsky.from_pretrained(decoder)
    pipe.movq = MoVQ(replace(read_config(MoVQConfig, settings), latent_channels=3))
    with pytest.raises(CheckpointError, match="the U-Net's latents have 4 channels, MoVQ's 3"):
        pipe.text2img(PROMPT)
    shutil.rmtree(prior / "tokenizer")
    refused("no such file: .*vocab.json")


def test_a_picture_whose_embedding_is_not_finite_stops_there(pipe):
    with torch.no_grad():
        pipe.image_encoder.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the picture's embedding is not finite"):
        pipe.embed_image(np.zeros((16, 16, 3)))


def test_a_compiled_network_names_the_way_to_have_it(pipe):
    with pytest.raises(TypeError, match=r"unet is compiled; pipe.optimize\(compile=True\)"):
        pipe.unet = torch.compile(pipe.unet)


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
