"""The U-Net of 2.1, which reads the prompt beside the picture, against diffusers."""

import json

import pytest
import torch

from kandinsky.checkpoint import CheckpointError
from kandinsky.config import TEXT_INPAINT_UNET, TEXT_UNET, UNetConfig, read_config
from kandinsky.random_weights import file_size, layout
from kandinsky.unet import UNet
from tests.helpers import SHARED, randn, relative_l2, slow
from tests.small import ours, reference_unet

TEXT_DIM, DIM = 40, 24
FORM = {"encoder_hid_dim": TEXT_DIM, "encoder_hid_dim_type": "text_image_proj"}
FORM |= {"addition_embed_type": "text_image", "cross_attention_dim": DIM}


def inputs(batch: int, channels: int = 4, h: int = 4, w: int = 12, seed: int = 0):
    x, t = randn(batch, channels, h, w, seed=seed), torch.tensor([999, 1, 437])[:batch]
    texts = randn(batch, DIM, seed=seed + 2), randn(batch, 77, TEXT_DIM, seed=seed + 3)
    return x, t, randn(batch, DIM, seed=seed + 1), *texts


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("batch, seed", [(3, 1), *slow((1, 0), (2, 2))])
def test_unet_with_text_matches_diffusers(channels, batch, seed, scale):
    reference = reference_unet(channels, seed=seed, **FORM)
    x, t, *condition = inputs(batch, channels, seed=seed)
    x, image_embeds, text_embeds, text_states = (c * scale for c in (x, *condition))
    added = {"image_embeds": image_embeds, "text_embeds": text_embeds}
    theirs = reference(x, t, encoder_hidden_states=text_states, added_cond_kwargs=added).sample
    texts = {"text_embeds": text_embeds, "text_states": text_states}
    assert relative_l2(ours(UNet, reference)(x, t, image_embeds, **texts), theirs) <= 1e-5


@torch.no_grad()
def test_prepared_steps_equal_plain_calls():
    unet = ours(UNet, reference_unet(**FORM))
    x, _, image_embeds, text_embeds, text_states = inputs(3)
    texts = {"text_embeds": text_embeds, "text_states": text_states}
    timesteps = list(range(999, 0, -7))
    plan = unet.prepare(image_embeds, timesteps, **texts)
    for index in (0, 63, 64, 142):
        plain = unet(x, torch.full((3,), timesteps[index]), image_embeds, **texts)
        assert relative_l2(unet.step(x, plan, index), plain) <= 1e-5


@torch.no_grad()
def test_bfloat16_weights_take_and_return_float32():
    unet = ours(UNet, reference_unet(**FORM))
    x, t, image_embeds, *texts = inputs(2)
    arguments = x, t, image_embeds, None, *texts
    full, half = unet(*arguments), unet.to(torch.bfloat16)(*arguments)
    assert half.dtype == torch.float32 and 1e-5 < relative_l2(half, full) < 0.1


def test_wrong_or_missing_texts_are_refused():
    unet = ours(UNet, reference_unet(**FORM))
    x, t, image_embeds, text_embeds, text_states = inputs(2)
    for texts, message in (
        ((None, None), "this UNet needs text_embeds and text_states"),
        ((text_embeds, None), "this UNet needs text_embeds and text_states"),
        ((text_embeds[:1], text_states), r"text_embeds is \(1, 24\), needs \(2, 24\)"),
        ((text_embeds, text_states[:1]), r"text_states is \(1, 77, 40\), needs \(2, n, 40\)"),
        ((text_embeds, text_states[..., :5]), r"text_states is \(2, 77, 5\), needs \(2, n, 40\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(x, t, image_embeds, None, *texts)
    plain = ours(UNet, reference_unet())
    with pytest.raises(ValueError, match="this UNet takes no texts"):
        plain(x, t, randn(2, 32), None, text_embeds, text_states)


@pytest.mark.parametrize("config", [TEXT_UNET, TEXT_INPAINT_UNET])
def test_config_survives_writing(config):
    assert read_config(UNetConfig, config.published()) == config


@pytest.mark.parametrize("wrong", ["image", "image_hint"])
def test_half_a_text_config_is_refused(wrong):
    with pytest.raises(CheckpointError, match="addition_embed_type|do not go together"):
        read_config(UNetConfig, TEXT_UNET.published() | {"addition_embed_type": wrong})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's documents are not here")
@pytest.mark.parametrize(
    "name, size",
    # file sizes as every safetensors but version 0.3.0 writes them; that one pads the header otherwise
    [("kandinsky-2-1", 4_914_727_720), ("kandinsky-2-1-inpaint", 4_914_796_840)],
)
def test_released_config_keys_and_size_are_the_published_ones(name, size):
    path = SHARED / "checkpoints" / "configs" / f"{name}__unet.json"
    config = read_config(UNetConfig, json.loads(path.read_text()))
    assert config == (TEXT_INPAINT_UNET if "inpaint" in name else TEXT_UNET)
    lines = (SHARED / "checkpoints" / "keys" / f"{name}__unet.keys.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    tensors = layout(UNet, config)
    assert {key: json.loads(shape) for key, shape, *_ in rows} == {
        k: list(s) for k, (s, _) in tensors.items()
    }
    assert file_size(tensors) == size
