"""The released sizes, every tensor random: ours against diffusers and transformers, sharing their weights."""

import json
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    DDPMScheduler,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)
from transformers import CLIPTextConfig as ReferenceTextConfig
from transformers import CLIPTextModelWithProjection

from kandinsky import ImageEmbeds, Kandinsky, random_weights
from kandinsky.checkpoint import write_json
from kandinsky.cli import WEIGHTS
from kandinsky.config import HINT_UNET, INPAINT_UNET, MoVQConfig, PriorConfig, UNetConfig
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.movq import MoVQ
from kandinsky.optimize import optimize
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from tests.helpers import picture, randn, randomize, relative_l2
from tests.small import SCHEDULER

pytestmark = pytest.mark.full_size


def both(network: type, reference_class: type, config):
    """Our network and the reference's, at the same weights in the same memory."""
    with torch.device("meta"):
        model = network(config)
    randomize(model.to_empty(device="cpu"))
    with init_empty_weights():  # leaves the reference's buffers real
        reference = reference_class.from_config(config.published())
    reference.load_state_dict(model.state_dict(), assign=True)
    return model, reference.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "config, size",
    [(UNetConfig(), 64), (INPAINT_UNET, 32), (HINT_UNET, 32)],
    ids=["text2img-512", "inpaint-256", "hint-256"],
)
def test_unet_matches_diffusers(config, size):
    unet, reference = both(UNet, UNet2DConditionModel, config)
    channels = 4 if config.hint else config.in_channels
    x, image_embeds, t = randn(1, channels, size, size), randn(1, 1280, seed=1), torch.tensor([681])
    hint = randn(1, 3, 8 * size, 8 * size, seed=2) if config.hint else None
    for scale in (1.0, 0.01) if size == 64 else (1.0,):
        added = {"image_embeds": image_embeds * scale} | ({"hint": hint} if config.hint else {})
        theirs = reference(x * scale, t, encoder_hidden_states=None, added_cond_kwargs=added).sample
        ours = unet(x * scale, t, image_embeds * scale, hint)
        plan = unet.prepare(image_embeds * scale, [981, 681], hint)
        error, prepared_error = relative_l2(ours, theirs), relative_l2(unet.step(x * scale, plan, 1), ours)
        name = f"unet {config.in_channels} channels, {8 * size} px, inputs × {scale}"
        print(f"{name}: {error:.1e}, prepared {prepared_error:.1e}")
        assert error <= 1e-5 and prepared_error <= 1e-5


@torch.no_grad()
def test_text_tower_matches_transformers():
    with torch.device("meta"):
        encoder = CLIPTextEncoder()
    randomize(encoder.to_empty(device="cpu"))
    with init_empty_weights():
        reference = CLIPTextModelWithProjection(ReferenceTextConfig(**encoder.config.published()))
    reference.load_state_dict(encoder.state_dict(), assign=True)
    reference.eval()
    ids = torch.randint(1000, 40000, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 76:], ids[1, 8:] = 49406, 49407, 49407
    theirs = reference(ids)
    states, embeds = encoder(ids)
    errors = relative_l2(states, theirs.last_hidden_state), relative_l2(embeds, theirs.text_embeds)
    print(f"text tower: states {errors[0]:.1e}, embedding {errors[1]:.1e}")
    assert max(errors) <= 1e-5


@torch.no_grad()
def test_prior_matches_diffusers():
    prior, reference = both(Prior, PriorTransformer, PriorConfig())
    mask = torch.arange(77)[None] < torch.tensor([[77], [9]])
    x, text_embeds, text_states = randn(2, 1280), randn(2, 1280, seed=1), randn(2, 77, 1280, seed=2)
    t = torch.tensor([957, 42])
    for scale in (1.0, 0.01):
        inputs = (text_embeds * scale, text_states * scale, mask)
        theirs = reference(x * scale, t, *inputs).predicted_image_embedding
        ours = prior(x * scale, t, *inputs)
        cached = prior.step(x * scale, t, prior.prefill(*inputs))
        error, cached_error = relative_l2(ours, theirs), relative_l2(cached, ours)
        print(f"prior, inputs × {scale}: {error:.1e}, cached {cached_error:.1e}")
        assert error <= 1e-5 and cached_error <= 1e-5


@torch.no_grad()
def test_movq_matches_diffusers():
    movq, reference = both(MoVQ, VQModel, MoVQConfig())
    for scale in (1.0, 0.01):
        pixels, latents = randn(1, 3, 512, 512) * scale, randn(1, 4, 64, 64, seed=1) * scale
        encode_error = relative_l2(movq.encode(pixels), reference.encode(pixels).latents)
        theirs = reference.decode(latents, force_not_quantize=True).sample
        decode_error = relative_l2(movq.decode(latents), theirs)
        print(f"movq 512 px, inputs × {scale}: encode {encode_error:.1e}, decode {decode_error:.1e}")
        assert encode_error <= 1e-5
        # diffusers' float32 lies 1.3e-5 from float64, on one thread 3.4e-5; ours 5.4e-6 on both (DESIGN §5)
        assert decode_error <= (3e-5 if torch.get_num_threads() > 1 else 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("network", [UNet, Prior, MoVQ])
def test_optimized_networks_give_the_same(network):
    config = network.config_class()
    with torch.device("meta"):
        model = network(config)
    randomize(model.to_empty(device="cpu"))
    if network is UNet:  # 256 px: the coarse levels take the packed form, the fine ones Winograd's
        call = lambda: model(randn(1, 4, 32, 32), torch.tensor([681]), randn(1, 1280, seed=1))  # noqa: E731
    elif network is Prior:
        text = (randn(1, 1280, seed=1), randn(1, 9, 1280, seed=2), torch.ones(1, 9, dtype=torch.bool))
        call = lambda: model(randn(1, 1280), torch.tensor([681]), *text)  # noqa: E731
    else:
        call = lambda: model.decode(randn(1, 4, 32, 32))  # noqa: E731
    plain = call()
    changed = optimize(model)
    error = relative_l2(call(), plain)
    print(f"{network.__name__} optimized: {error:.1e}, {changed}")
    assert changed["packed weights"] > 60
    assert error <= (3e-5 if network is MoVQ else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "network, reference_class, config",
    [(Prior, PriorTransformer, PriorConfig()), (MoVQ, VQModel, MoVQConfig())],
    ids=["prior", "movq"],
)
def test_what_diffusers_saves_loads_here_and_the_reverse(network, reference_class, config, tmp_path):
    model, reference = both(network, reference_class, config)
    reference.save_pretrained(tmp_path, max_shard_size="1GB")  # in shards where it is larger
    loaded = network.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)
    del loaded
    shutil.rmtree(tmp_path)
    model.save_pretrained(tmp_path)
    size = (tmp_path / network.weights_name).stat().st_size
    assert size == random_weights.file_size(random_weights.layout(network, config)), "the official byte count"
    theirs = reference_class.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_written_files_have_the_official_byte_count(part, tmp_path):
    """On disk, one after the other; test_random_weights.py predicts those of all repositories."""
    files = json.loads((WEIGHTS / "manifest.json").read_text())["repositories"]
    repository = random_weights.REPOSITORIES[part]
    for subfolder, network, config in random_weights.networks_of(
        repository, random_weights.SIZES["released"]
    ):
        random_weights.write_network(tmp_path / subfolder, network, config, 0, say=print)
        size = (tmp_path / subfolder / network.weights_name).stat().st_size
        assert size == files[repository.folder]["files"][f"{subfolder}/{network.weights_name}"]["bytes"]
        shutil.rmtree(tmp_path / subfolder)


@torch.no_grad()
@pytest.mark.parametrize("task", ["img2img", "inpaint", "hint img2img"])
def test_tasks_match_diffusers(tmp_path, task):
    """256 × 192 pixels, 2 steps, from one noise: whole pictures."""
    config, pipeline_class = {
        "img2img": (UNetConfig(), KandinskyV22Img2ImgPipeline),
        "inpaint": (INPAINT_UNET, KandinskyV22InpaintPipeline),
        "hint img2img": (HINT_UNET, KandinskyV22ControlnetImg2ImgPipeline),
    }[task]
    unet, reference_unet = both(UNet, UNet2DConditionModel, config)
    movq, reference_movq = both(MoVQ, VQModel, MoVQConfig())
    write_json(config.published(), tmp_path / "unet" / "config.json")
    write_json(MoVQConfig().published(), tmp_path / "movq" / "config.json")
    DDPMScheduler(**SCHEDULER).save_pretrained(tmp_path / "scheduler")
    pipe = Kandinsky.from_pretrained(tmp_path)
    pipe.unet, pipe.movq = unet, movq

    embeds = ImageEmbeds(randn(1, 1280), randn(1, 1280, seed=1))
    given = {"image": picture(192, 256), "num_inference_steps": 2}
    if task == "inpaint":
        given |= {"mask_image": (torch.arange(256 * 192).reshape(256, 192) % 192 > 70).numpy() * 1.0}
        size, ours = {"height": 256, "width": 192}, {"keep_unmasked": False}
    else:  # diffusers swaps height and width here
        given |= {"strength": 1.0}
        size, ours = {"height": 192, "width": 256}, {}
    if "hint" in task:
        given |= {"hint": randn(1, 3, 256, 192, seed=4).sigmoid()}
    method = pipe.inpaint if task == "inpaint" else pipe.img2img
    out = method(embeds=embeds, seed=5, output_type="pt", **given, **ours)
    reference = pipeline_class(reference_unet, DDPMScheduler(**SCHEDULER), reference_movq)
    halves = dict(zip(("image_embeds", "negative_image_embeds"), embeds))
    stream = torch.Generator().manual_seed(5)
    theirs = reference(generator=stream, output_type="np", **halves, **size, **given).images
    error = relative_l2(out, torch.from_numpy(theirs).permute(0, 3, 1, 2))
    print(f"{task}, 256 × 192 px: {error:.1e}")
    assert error <= 1e-4
