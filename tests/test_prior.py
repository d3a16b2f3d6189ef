"""The prior against diffusers: plain over all tokens, and prepared from a prompt's cache."""

import pytest
import torch

from kandinsky.prior import Prior
from tests.helpers import randn, relative_l2
from tests.small import EMBEDDING_DIM, ours, reference_prior

LENGTHS = [[77], [3], [2, 77, 9], [20, 20, 20], [2, 2]]  # real tokens per row; an empty prompt has two


def inputs(lengths: list[int], seed: int = 0):
    b = len(lengths)
    mask = torch.arange(77)[None] < torch.tensor(lengths)[:, None]
    x, text_embeds = randn(b, EMBEDDING_DIM, seed=seed), randn(b, EMBEDDING_DIM, seed=seed + 1)
    return x, torch.tensor([999, 0, 437])[:b], text_embeds, randn(b, 77, EMBEDDING_DIM, seed=seed + 2), mask


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_prior_matches_diffusers(lengths, scale):
    for seed in range(3):
        reference = reference_prior(seed)
        x, t, text_embeds, text_states, mask = inputs(lengths, seed)
        x, text_embeds, text_states = x * scale, text_embeds * scale, text_states * scale
        theirs = reference(x, t, text_embeds, text_states, mask).predicted_image_embedding
        assert relative_l2(ours(Prior, reference)(x, t, text_embeds, text_states, mask), theirs) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("lengths", LENGTHS)
def test_three_token_step_equals_the_plain_call(lengths):
    prior = ours(Prior, reference_prior())
    x, t, *text = inputs(lengths)
    cache = prior.prefill(*text)
    assert cache.mask.shape[1] == max(lengths) + 1  # padding is not kept
    for shift in (0, 1):  # the cache serves more than one step
        assert relative_l2(prior.step(x, t // (1 + shift), cache), prior(x, t // (1 + shift), *text)) <= 1e-5


@torch.no_grad()
def test_a_mask_without_any_real_token_leaves_the_text_embedding():
    prior = ours(Prior, reference_prior())
    x, t, text_embeds, text_states, mask = inputs([5, 9])
    cache = prior.prefill(text_embeds, text_states, torch.zeros_like(mask))
    plain = prior(x, t, text_embeds, text_states, torch.zeros_like(mask))
    assert relative_l2(prior.step(x, t, cache), plain) <= 1e-5 and cache.mask.shape == (2, 1)


@torch.no_grad()
def test_short_text_states_equal_padded_ones():
    prior = ours(Prior, reference_prior())
    x, t, text_embeds, text_states, mask = inputs([5, 9])
    padded = prior(x, t, text_embeds, text_states, mask)
    assert relative_l2(prior(x, t, text_embeds, text_states[:, :9], mask[:, :9]), padded) <= 1e-5


@torch.no_grad()
def test_cache_rows_can_be_repeated_and_reordered():
    prior = ours(Prior, reference_prior())
    x, t, *text = inputs([4, 30])
    index = torch.tensor([1, 0, 1])
    x = randn(3, EMBEDDING_DIM, seed=5)
    t = torch.tensor([700, 3, 250])
    together = prior.step(x, t, prior.prefill(*text).rows(index))
    assert relative_l2(together, prior(x, t, *(part[index] for part in text))) <= 1e-5


@torch.no_grad()
def test_padding_has_no_influence():
    prior = ours(Prior, reference_prior())
    x, t, text_embeds, text_states, mask = inputs([6])
    changed = text_states.clone()
    changed[:, 6:] = 1e3
    assert torch.equal(prior(x, t, text_embeds, text_states, mask), prior(x, t, text_embeds, changed, mask))
    changed[:, 5] += 1  # the last real token has
    assert (
        relative_l2(prior(x, t, text_embeds, changed, mask), prior(x, t, text_embeds, text_states, mask))
        > 1e-4
    )


@torch.no_grad()
def test_denormalize_matches_diffusers():
    reference, x = reference_prior(), randn(3, EMBEDDING_DIM)
    assert torch.equal(ours(Prior, reference).denormalize(x), reference.post_process_latents(x))


@torch.no_grad()
def test_bfloat16_weights_take_and_return_float32():
    prior = ours(Prior, reference_prior())
    arguments = inputs([5, 9])
    full, half = prior(*arguments), prior.to(torch.bfloat16)(*arguments)
    assert half.dtype == torch.float32 and 1e-5 < relative_l2(half, full) < 0.1
    x, t, *text = arguments
    assert prior.step(x, t, prior.prefill(*text)).dtype == torch.float32


def test_wrong_inputs_are_refused_with_both_sizes():
    prior = ours(Prior, reference_prior())
    x, t, text_embeds, text_states, mask = inputs([5, 9])
    for arguments, message in (
        ((x[:, :4], t, text_embeds, text_states, mask), r"x is \(2, 4\), needs \(2, 32\)"),
        ((x, t[:1], text_embeds, text_states, mask), r"t is \(1,\), needs \(2,\)"),
        ((x, t, text_embeds[:1], text_states, mask), r"text_embeds is \(1, 32\), needs \(2, 32\)"),
        ((x, t, text_embeds, text_states[0], mask), r"text_states is \(77, 32\), needs \(b, n, 32\)"),
        ((x, t, text_embeds, text_states[..., :8], mask), r"text_states is \(2, 77, 8\), needs \(b, n, 32"),
        ((x, t, text_embeds, text_states, mask[:, :9]), r"text_mask is \(2, 9\), needs \(2, 77\)"),
        ((x, t, text_embeds, randn(2, 78, 32), torch.ones(2, 78)), "78 tokens, this prior reads at most 77"),
    ):
        with pytest.raises(ValueError, match=message):
            prior(*arguments)
    with pytest.raises(TypeError, match=r"t is a int, needs a tensor of \(2,\)"):
        prior(x, 981, text_embeds, text_states, mask)
    with pytest.raises(ValueError, match=r"text_embeds is \(2, 4\), needs \(2, 32\)"):
        prior.prefill(text_embeds[:, :4], text_states, mask)
    cache = prior.prefill(text_embeds, text_states, mask)
    with pytest.raises(ValueError, match=r"x is \(3, 32\), needs \(2, 32\)"):
        prior.step(randn(3, 32), torch.tensor([1, 1, 1]), cache)
