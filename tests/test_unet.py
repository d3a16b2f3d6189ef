"""The decoder's U-Net against diffusers, in its three forms, plain and prepared."""

import pytest
import torch

from kandinsky.unet import UNet
from tests.helpers import randn, relative_l2, slow
from tests.small import EMBEDDING_DIM, ours, reference_unet

FORMS = {"text-to-image": (4, False), "inpainting": (9, False), "hint": (8, True)}


def inputs(form: str, batch: int, h: int, w: int, seed: int = 0):
    channels = 9 if form == "inpainting" else 4
    hint = randn(batch, 3, 8 * h, 8 * w, seed=seed + 2) if form == "hint" else None
    t = torch.tensor([999, 1, 437, 20])[:batch]
    return randn(batch, channels, h, w, seed=seed), t, randn(batch, EMBEDDING_DIM, seed=seed + 1), hint


def reference_output(reference, x, t, image_embeds, hint=None):
    added = {"image_embeds": image_embeds} | ({} if hint is None else {"hint": hint})
    return reference(x, t, encoder_hidden_states=None, added_cond_kwargs=added).sample


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("batch, h, w, seed", [(3, 4, 12, 1), *slow((1, 8, 8, 0), (1, 20, 4, 2))])
@pytest.mark.parametrize("form", FORMS)
def test_unet_matches_diffusers(form, batch, h, w, seed, scale):
    reference = reference_unet(*FORMS[form], seed=seed)
    x, t, image_embeds, hint = inputs(form, batch, h, w, seed)
    x, image_embeds = x * scale, image_embeds * scale
    theirs = reference_output(reference, x, t, image_embeds, hint)
    assert relative_l2(ours(UNet, reference)(x, t, image_embeds, hint), theirs) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        {"block_out_channels": (32, 64), "layers_per_block": 1},
        {"block_out_channels": (16, 24, 40, 64), "layers_per_block": 3},
        {"cross_attention_dim": 40, "attention_head_dim": 16, "norm_num_groups": 4},
    ],
)
def test_unet_of_other_sizes_matches_diffusers(sizes):
    reference = reference_unet(**sizes)
    x, t, image_embeds, _ = inputs("text-to-image", 2, 8, 16)
    theirs = reference_output(reference, x, t, image_embeds)
    assert relative_l2(ours(UNet, reference)(x, t, image_embeds), theirs) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_prepared_steps_equal_plain_calls(form):
    unet = ours(UNet, reference_unet(*FORMS[form]))
    x, _, image_embeds, hint = inputs(form, 3, 4, 8)
    timesteps = list(range(999, 0, -7))  # more than two chunks of 64
    plan = unet.prepare(image_embeds, timesteps, hint)
    for index in (0, 1, 63, 64, 127, 128, 142, 5):  # the last goes back to a chunk already left
        plain = unet(x, torch.full((3,), timesteps[index]), image_embeds, hint)
        assert relative_l2(unet.step(x, plan, index), plain) <= 1e-5


@torch.no_grad()
def test_timesteps_may_be_a_tensor():
    unet = ours(UNet, reference_unet())
    x, _, image_embeds, _ = inputs("text-to-image", 1, 4, 4)
    as_list, as_tensor = (unet.prepare(image_embeds, t) for t in ([900, 3], torch.tensor([900, 3])))
    assert torch.equal(unet.step(x, as_list, 1), unet.step(x, as_tensor, 1))


@torch.no_grad()
@pytest.mark.parametrize("form", ["text-to-image", "hint"])
def test_bfloat16_weights_take_and_return_float32(form):
    unet = ours(UNet, reference_unet(*FORMS[form]))
    arguments = inputs(form, 2, 8, 8)
    full, half = unet(*arguments), unet.to(torch.bfloat16)(*arguments)
    assert half.dtype == torch.float32 and 1e-5 < relative_l2(half, full) < 0.1


def test_wrong_inputs_are_refused_with_both_sizes():
    unet = ours(UNet, reference_unet())
    x, t, image_embeds, _ = inputs("text-to-image", 2, 8, 8)
    for arguments, message in (
        ((x[:, :3], t, image_embeds), r"x is \(2, 3, 8, 8\), needs \(2, 4, h, w\), h and w multiples of 4"),
        ((x[..., :7], t, image_embeds), r"x is \(2, 4, 8, 7\)"),
        ((x[:1], t, image_embeds), r"x is \(1, 4, 8, 8\), needs \(2, 4"),
        ((x, t[:1], image_embeds), r"t is \(1,\), needs \(2,\)"),
        ((x, t, image_embeds[:, :5]), r"image_embeds is \(2, 5\), needs \(b, 32\)"),
        ((x, t, image_embeds, randn(2, 3, 64, 64)), "this UNet takes no hint"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(*arguments)
    with pytest.raises(TypeError, match=r"t is a int, needs a tensor of \(2,\)"):
        unet(x, 981, image_embeds)
    with pytest.raises(TypeError, match=r"image_embeds is a list, needs a tensor of \(b, 32\)"):
        unet(x, t, [[1.0] * 32] * 2)


def test_hint_form_needs_a_hint_of_eight_times_the_latents():
    unet = ours(UNet, reference_unet(8, True))
    x, t, image_embeds, hint = inputs("hint", 2, 8, 8)
    for wrong, message in (
        (None, "this UNet needs a hint"),
        (hint[:1], r"hint is \(1, 3, 64, 64\), needs \(2, 3, 8h, 8w\)"),
        (hint[:, :, :32], "does not belong to 8×8 latents"),
        (hint[..., :32], "does not belong to 8×8 latents; it needs 64×64 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(x, t, image_embeds, wrong)


def test_plan_refuses_an_index_outside_its_timesteps():
    unet = ours(UNet, reference_unet())
    x, _, image_embeds, _ = inputs("text-to-image", 1, 4, 4)
    plan = unet.prepare(image_embeds, [10, 5])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"index is {index}; this plan has 2 timesteps"):
            unet.step(x, plan, index)
    with pytest.raises(ValueError, match="at least one timestep"):
        unet.prepare(image_embeds, [])
