"""Both CLIP towers against transformers' classes."""

import pytest
import torch

from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from tests.helpers import randn, relative_l2
from tests.small import ours, reference_image_encoder, reference_text_encoder

END = 518


def random_ids(lengths: list[int], n: int, seed: int = 0) -> torch.Tensor:
    """Prompts of random words: a start, words, an end, then padding with the end token."""
    ids = torch.randint(0, 517, (len(lengths), n), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 517
    for row, length in zip(ids, lengths):
        row[length - 1 :] = END
    return ids


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("lengths, n", [([5], 5), ([2, 77, 30], 77), ([3, 9, 4], 12)])
def test_text_tower_matches_transformers(lengths, n, act, seed):
    reference = reference_text_encoder(seed, hidden_act=act, num_attention_heads=2, projection_dim=40)
    encoder, ids = ours(CLIPTextEncoder, reference), random_ids(lengths, n, seed)
    theirs = reference(ids)
    states, embeds = encoder(ids)
    assert relative_l2(states, theirs.last_hidden_state) <= 1e-5
    assert relative_l2(embeds, theirs.text_embeds) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("eos_token_id", [2, END, 7])
def test_pooling_follows_the_end_token_or_the_published_files_largest_id(eos_token_id):
    reference = reference_text_encoder(eos_token_id=eos_token_id)
    ids = torch.tensor([[517, 40, 7, 3, END, 7, END], [517, 2, 9, END, END, 7, 7]])
    _, embeds = ours(CLIPTextEncoder, reference)(ids)
    assert relative_l2(embeds, reference(ids).text_embeds) <= 1e-5


@torch.no_grad()
def test_padding_changes_nothing_before_it():
    encoder = ours(CLIPTextEncoder, reference_text_encoder())
    short, long = random_ids([6, 4], 6), random_ids([6, 4], 77)
    long[:, :6] = short
    (states, embeds), (padded_states, padded_embeds) = encoder(short), encoder(long)
    assert relative_l2(states, padded_states[:, :6]) <= 1e-6 and relative_l2(embeds, padded_embeds) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_image_tower_matches_transformers(act, batch, scale):
    for seed in range(3):
        reference = reference_image_encoder(seed, hidden_act=act, image_size=26, patch_size=8)
        encoder, pixels = ours(CLIPImageEncoder, reference), scale * randn(batch, 3, 26, 26, seed=seed)
        assert relative_l2(encoder(pixels), reference(pixels).image_embeds) <= 1e-5


@torch.no_grad()
def test_bfloat16_towers_take_and_return_float32():
    text = ours(CLIPTextEncoder, reference_text_encoder())
    image = ours(CLIPImageEncoder, reference_image_encoder())
    ids, pixels = random_ids([5], 5), randn(1, 3, 24, 24)
    full = *text(ids), image(pixels)
    text.to(torch.bfloat16), image.to(torch.bfloat16)
    half = *text(ids), image(pixels)
    assert all(h.dtype == torch.float32 and 1e-5 < relative_l2(h, f) < 0.1 for h, f in zip(half, full))


def test_wrong_inputs_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"ids is \(1, 78\), needs \(b, n\) with n from 1 to 77"):
        ours(CLIPTextEncoder, reference_text_encoder())(torch.zeros(1, 78, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pixels is \(1, 3, 25, 24\), needs \(b, 3, 24, 24\)"):
        ours(CLIPImageEncoder, reference_image_encoder())(randn(1, 3, 25, 24))
