"""MoVQ in bands of rows: the same numbers, whatever the height of a band."""

import statistics

import pytest
import torch

from kandinsky import bands
from kandinsky.optimize import USUAL, optimize
from tests.helpers import needs_bfloat16_kernels, randn, relative_l2
from tests.small import NETWORKS, movq_output


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("numbers", [1, 3000, 2**30])
@pytest.mark.parametrize("rewrites", [("row bands",), USUAL])
def test_bands_of_any_height_give_the_same(monkeypatch, numbers, rewrites):
    """An even and an odd number of rows, one row at a time, and some."""
    for seed in range(2):
        movq, calls = NETWORKS["movq"][0](seed), []
        plain = movq_output(movq)
        optimize(movq, rewrites)
        # maps that are not cut: the same bits
        assert torch.equal(movq_output(movq), plain) or rewrites != ("row bands",)
        with monkeypatch.context() as patch:
            patch.setattr(bands, "LARGEST", 0)
            patch.setattr(bands, "BAND", numbers)
            hook = movq.decoder.conv_out.register_forward_hook(lambda m, args, out: calls.append(len(out)))
            assert relative_l2(movq_output(movq), plain) <= 1e-5
            hook.remove()
        assert (len(calls) > 2) == (numbers < 2**30)  # it decodes twice


@torch.no_grad()
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_rows_stay_in_the_order_of_the_map(order):
    x = randn(2, 6, 8, 12).to(memory_format=order)
    scale, shift = randn(2, 6, 4, 3, seed=1), randn(2, 6, 4, 3, seed=2)
    wide, added = (a.repeat_interleave(2, 2).repeat_interleave(4, 3) for a in (scale, shift))
    band = bands.applied(x[:, :, 3:7], 3, 8, scale, shift)
    assert relative_l2(band, (x * wide + added)[:, :, 3:7]) <= 1e-6
    assert (band.stride(1) == 1) == (order is torch.channels_last) and band.is_contiguous(memory_format=order)


@needs_bfloat16_kernels
@torch.no_grad()
def test_bands_lie_no_further_from_float32_in_half_precision(monkeypatch):
    away = {"plain": [], "bands": []}
    for seed in range(4):
        movq = NETWORKS["movq"][0](seed)
        exact = movq_output(movq)
        movq = movq.to(torch.bfloat16)
        away["plain"].append(relative_l2(movq_output(movq), exact))
        optimize(movq, ("row bands",))
        with monkeypatch.context() as patch:
            patch.setattr(bands, "LARGEST", 0)
            patch.setattr(bands, "BAND", 3000)
            away["bands"].append(relative_l2(movq_output(movq), exact))
    assert statistics.median(away["bands"]) <= 1.3 * statistics.median(away["plain"])


def test_gradients_pass_through_banded_blocks(monkeypatch):
    monkeypatch.setattr(bands, "LARGEST", 0)
    plain, banded = (NETWORKS["movq"][0](0) for _ in range(2))
    optimize(banded, ("row bands",))
    for movq in (plain, banded):
        movq.decode(randn(1, 4, 4, 4)).square().sum().backward()
    for name, parameter in plain.decoder.named_parameters():
        torch.testing.assert_close(banded.decoder.get_parameter(name).grad, parameter.grad)
