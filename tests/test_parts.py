"""The networks of a pipeline: where they lie, when they are read, replaced, moved and freed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from kandinsky import CheckpointError, ImageEmbeds, Kandinsky, parts, schedulers
from kandinsky.checkpoint import write_safetensors
from kandinsky.config import MoVQConfig, PriorConfig, UNetConfig, read_config
from kandinsky.encoders import CLIPImageEncoder
from kandinsky.lora import add_lora, merge_lora
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from kandinsky.zero_image import compute_zero_image_embeds, zero_image_embeds
from tests.helpers import randn, relative_l2
from tests.small import (
    EMBEDDING_DIM,
    ours,
    reference_image_encoder,
    reference_movq,
    reference_unet,
    unet_output,
)
from tests.test_pipeline import NEGATIVE, PROMPT, our_pictures


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

    pipe.change("image_encoder", double)
    assert relative_l2(pipe.zero_image_embeds, 2 * whole) <= 1e-6


def test_the_zero_image_is_a_changed_towers_also_where_one_is_stored(decoder_folder, tmp_path):
    shutil.copytree(decoder_folder.parent, tmp_path, dirs_exist_ok=True)
    prior = tmp_path / "kandinsky-2-2-prior"
    stored = compute_zero_image_embeds(prior)
    write_safetensors({"zero_image_embeds": stored}, prior / "zero_image_embeds.safetensors")
    pipe = Kandinsky.from_pretrained(tmp_path / decoder_folder.name)
    assert torch.equal(pipe.zero_image_embeds, stored)
    pipe.change("image_encoder", lambda tower: tower.visual_projection.weight.mul_(2))
    assert relative_l2(pipe.zero_image_embeds, 2 * stored) <= 1e-6


def test_a_change_that_fails_is_not_kept(pipe):
    def fails(network):
        raise RuntimeError("this change fails")

    _ = pipe.prior
    with pytest.raises(RuntimeError, match="this change fails"):
        pipe.change("prior", fails)
    with pytest.raises(ValueError, match="name is 'decoder'; allowed are 'text_encoder', 'prior',"):
        pipe.change("decoder", fails)
    assert not pipe.changes.get("prior") and "decoder" not in pipe.changes


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


@pytest.mark.slow
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


def test_a_unet_of_more_levels_than_movq_draws_any_size(pipe):
    channels = (32, 32, 64, 64)
    pipe.unet = UNet(replace(pipe.unet_config, block_out_channels=channels, layers_per_block=1)).eval()
    embeds = ImageEmbeds(randn(1, EMBEDDING_DIM))
    settings = {"embeds": embeds, "num_inference_steps": 1, "guidance_scale": 1.0}
    assert pipe.text2img(height=17, width=40, **settings)[0].size == (40, 17)
    latents = pipe.text2img(height=17, width=40, output_type="latent", **settings)
    assert latents.shape == (1, 4, 8, 16)  # three halvings


def test_a_unet_without_variance_is_not_taken_for_an_inpainting_one(pipe):
    pipe.unet = UNet(replace(pipe.unet_config, out_channels=4)).eval()
    with pytest.raises(CheckpointError, match="the U-Net's latents have 2 channels, MoVQ's 4"):
        pipe.check("text2img", embeds=ImageEmbeds(randn(1, EMBEDDING_DIM)))


@pytest.mark.parametrize("channels", [3, 5, 8])
def test_a_unet_that_reads_what_no_task_has_is_refused(pipe, channels):
    pipe.unet = UNet(replace(pipe.unet_config, in_channels=channels)).eval()
    message = f"the U-Net reads {channels} channels and its latents have 4; 4 are needed, or 9 for inpainting"
    with pytest.raises(CheckpointError, match=message):
        pipe.check("text2img", prompt=PROMPT)


def test_replaced_networks_bring_their_own_sizes_and_task(pipe):
    pipe.movq = ours(MoVQ, reference_movq(4))
    picture = pipe.text2img(PROMPT, height=40, width=70, num_inference_steps=1, output_type="pt", seed=0)
    latents = pipe.text2img(PROMPT, height=40, width=70, num_inference_steps=1, output_type="latent", seed=0)
    assert picture.shape == (1, 3, 40, 70) and latents.shape == (1, 4, 8, 16)
    pipe.unet = ours(UNet, reference_unet(in_channels=9))
    with pytest.raises(CheckpointError, match="is for inpainting"):
        pipe.text2img(PROMPT)


def test_a_process_may_go_to_another_folder(decoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(decoder_folder.parent)
    given = {"prior": "kandinsky-2-2-prior"}
    pipes = [Kandinsky.from_pretrained(decoder_folder.name, **more) for more in ({}, given)]
    monkeypatch.chdir(tmp_path)
    assert torch.equal(*(our_pictures(pipe, 1, prompt=PROMPT) for pipe in pipes))


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
    (folder.parent / "kandinsky-2-2-prior" / "tokenizer" / "vocab.json").unlink()
    fresh = Kandinsky.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such file: .*vocab.json"):
        fresh.embed(PROMPT, seed=9)
    assert pipe.seeds == [5] and set(pipe._loaded) == {"unet"} and not fresh._loaded and not fresh.seeds


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


def test_where_a_move_fails_what_was_changed_in_place_stays(pipe, monkeypatch):
    unet, movq = pipe.unet, pipe.movq

    def fail(*_):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(movq, "to", fail)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        pipe.to("cpu")
    assert pipe.unet is unet and pipe.movq is movq


def test_a_tower_of_ones_own_makes_its_own_zero_image(decoder_folder):
    class Tower(CLIPImageEncoder):
        def forward(self, pixels):
            return 2 * super().forward(pixels)

    class Own(Kandinsky):
        image_encoder = parts.Part(Tower, "prior")

    own, plain = (c.from_pretrained(decoder_folder).zero_image_embeds for c in (Own, Kandinsky))
    assert relative_l2(own, 2 * plain) <= 1e-6


def test_what_a_call_in_inference_mode_reads_can_be_changed_and_trained_outside(decoder_folder):
    given = {"prompt": PROMPT, "height": 16, "width": 16, "num_inference_steps": 1}
    with torch.inference_mode():
        pipe = Kandinsky.from_pretrained(decoder_folder)
        our_pictures(pipe, 0, **given)
        pipe.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    networks = [pipe.text_encoder, pipe.prior, pipe.unet, pipe.movq]
    assert not any(p.is_inference() for network in networks for p in network.parameters())
    constants = [s.alphas_cumprod for s in (pipe.scheduler, pipe.prior_scheduler)] + [pipe.zero_image_embeds]
    assert not any(constant.is_inference() for constant in constants)
    with torch.inference_mode():
        pipe.optimize()
    our_pictures(pipe, 0, **given)
    with torch.inference_mode():
        pipe.restore()
        pipe.change("prior", lambda network: setattr(network, "added", torch.zeros(1)))
    assert not pipe.prior.added.is_inference()
    pipe.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    add_lora(pipe.unet, 2)
    unet_output(pipe.unet).sum().backward()
    merge_lora(pipe.unet)


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


def test_a_compiled_network_names_the_way_to_have_it(pipe):
    wrapped = torch.nn.Module()  # as torch.compile gives one; to import the compiler takes seconds
    wrapped._orig_mod = pipe.unet
    with pytest.raises(TypeError, match=r"unet is compiled; pipe.optimize\(compile=True\)"):
        pipe.unet = wrapped
