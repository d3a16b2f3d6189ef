"""MoVQ against diffusers: encoder, codebook and decoder."""

import pytest
import torch

from kandinsky.movq import MoVQ
from tests.helpers import randn, relative_l2
from tests.small import ours, reference_movq


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize(
    "levels, batch, h, w, seed", [(3, 1, 16, 16, 0), (3, 3, 12, 40, 1), (4, 2, 24, 8, 2), (2, 1, 7, 9, 3)]
)
def test_encode_and_decode_match_diffusers(levels, batch, h, w, seed, scale):
    reference = reference_movq(levels, seed)
    movq = ours(MoVQ, reference)
    pixels = randn(batch, 3, h, w, seed=seed) * scale
    assert relative_l2(movq.encode(pixels), reference.encode(pixels).latents) <= 1e-5
    latents = randn(batch, 4, h // 4, w // 4, seed=seed) * scale
    theirs = reference.decode(latents, force_not_quantize=True).sample
    f, decoded = 2 ** (levels - 1), movq.decode(latents)
    assert decoded.shape == (batch, 3, h // 4 * f, w // 4 * f)
    assert relative_l2(decoded, theirs) <= 1e-5


@torch.no_grad()
def test_whole_autoencoder_goes_through_the_codebook_like_diffusers():
    for seed in range(3):
        reference = reference_movq(seed=seed)
        movq, pixels = ours(MoVQ, reference), randn(2, 3, 16, 24, seed=seed)
        assert relative_l2(movq(pixels), reference(pixels).sample) <= 1e-5
        unquantized = movq.decode(movq.encode(pixels))
        assert relative_l2(movq(pixels), unquantized) > 1e-2


@torch.no_grad()
def test_quantizer_takes_the_nearest_vector_and_leaves_codebook_vectors_alone():
    quantize = ours(MoVQ, reference_movq()).quantize
    codes = quantize.embedding.weight[torch.tensor([[3, 19, 0], [7, 7, 11]])].permute(2, 0, 1)[None]
    assert torch.equal(quantize(codes), codes)
    assert torch.equal(quantize(codes + 1e-4), codes)


@torch.no_grad()
def test_what_a_size_has_beyond_a_multiple_of_f_is_left_out():
    movq = ours(MoVQ, reference_movq())
    for size in range(4, 17):
        assert movq.encode(randn(1, 3, size, 16)).shape == (1, 4, size // 4, 4)


@torch.no_grad()
def test_bfloat16_weights_take_and_return_float32():
    movq = ours(MoVQ, reference_movq())
    pixels, latents = randn(1, 3, 16, 16), randn(1, 4, 4, 4)
    full = movq.encode(pixels), movq.decode(latents), movq(pixels)
    movq.to(torch.bfloat16)
    half = movq.encode(pixels), movq.decode(latents), movq(pixels)
    assert all(h.dtype == torch.float32 for h in half)
    assert all(1e-5 < relative_l2(h, f) < 0.1 for h, f in zip(half[:2], full[:2]))


def test_wrong_inputs_are_refused_with_both_sizes():
    movq = ours(MoVQ, reference_movq())
    with pytest.raises(ValueError, match=r"pixels is \(1, 4, 8, 8\), needs \(b, 3, h, w\)"):
        movq.encode(randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"latents is \(4, 8, 8\), needs \(b, 4, h, w\)"):
        movq.decode(randn(4, 8, 8))
