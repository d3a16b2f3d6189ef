"""Kandinsky 2.1's networks at the released sizes, every tensor random, sharing weights with diffusers'."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import PriorTransformer, UNet2DConditionModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP as Reference
from reference import share

from kandinsky.config import TEXT_UNET, PriorConfig
from kandinsky.encoders import MultilingualCLIP
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from tests.helpers import randn, randomize, relative_l2

pytestmark = pytest.mark.full_size


def made(network: type, config) -> torch.nn.Module:
    with torch.device("meta"):
        model = network(config)
    return randomize(model.to_empty(device="cpu"))


@torch.no_grad()
def test_the_multilingual_tower_matches_diffusers():
    tower = made(MultilingualCLIP, MultilingualCLIP.config_class())
    with init_empty_weights():
        reference = Reference(MCLIPConfig(**tower.config.published()))
    share(reference, tower).eval()
    ids = torch.randint(4, 250000, (3, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    for row, length in zip(ids, (77, 20, 2)):
        row[length - 1], row[length:] = 2, 1
    pooled, hidden = reference(ids, (ids != 1).long())
    states, embeds = tower(ids)
    errors = relative_l2(states, hidden), relative_l2(embeds, pooled)
    print(f"multilingual tower: states {errors[0]:.1e}, embedding {errors[1]:.1e}")
    assert max(errors) <= 1e-5


@torch.no_grad()
def test_the_unet_matches_diffusers():
    unet = made(UNet, TEXT_UNET)
    with init_empty_weights():
        reference = UNet2DConditionModel.from_config(unet.config.published())
    share(reference, unet).eval()
    x, t, image_embeds = randn(1, 4, 32, 32), torch.tensor([681]), randn(1, 768, seed=1)
    texts = {"text_embeds": randn(1, 768, seed=2), "text_states": randn(1, 77, 1024, seed=3)}
    added = {"image_embeds": image_embeds, "text_embeds": texts["text_embeds"]}
    theirs = reference(x, t, encoder_hidden_states=texts["text_states"], added_cond_kwargs=added).sample
    error = relative_l2(unet(x, t, image_embeds, **texts), theirs)
    print(f"2.1's unet, 256 px: {error:.1e}")
    assert error <= 1e-5


@torch.no_grad()
def test_the_prior_matches_diffusers():
    prior = made(Prior, PriorConfig(embedding_dim=768))
    with init_empty_weights():
        reference = PriorTransformer.from_config(prior.config.published())
    share(reference, prior).eval()
    mask = torch.arange(77)[None] < torch.tensor([[77], [9]])
    inputs = (randn(2, 768, seed=1), randn(2, 77, 768, seed=2), mask)
    x, t = randn(2, 768), torch.tensor([957, 42])
    error = relative_l2(prior(x, t, *inputs), reference(x, t, *inputs).predicted_image_embedding)
    print(f"2.1's prior: {error:.1e}")
    assert error <= 1e-5
