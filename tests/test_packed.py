"""Weights in oneDNN's order: when they are packed, what becomes of the plain ones, and half precision."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kandinsky import Prior, UNet, packed
from kandinsky.optimize import is_optimized, optimize, restore
from tests import small
from tests.helpers import needs_bfloat16_kernels, needs_packing, randn, relative_l2
from tests.small import NETWORKS, ours, unet_output

needs_orders = pytest.mark.skipif(
    not (packed.available() and packed.can_tell_orders()), reason="this PyTorch does not name oneDNN's orders"
)


@needs_packing
@torch.no_grad()
def test_a_kernel_is_packed_for_the_maps_that_it_meets(monkeypatch):
    monkeypatch.setattr(packed, "_order_for", lambda *asked: b"another")
    reorder, sizes = torch._C._nn.mkldnn_reorder_conv2d_weight, []
    record = lambda *args: sizes.append(tuple(args[-1])) or reorder(*args)  # noqa: E731
    monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", record)
    layer = nn.Conv2d(8, 24, 3, padding=1)
    weight = layer.weight.detach().clone()
    maps = [randn(2, 8, 5, 6), randn(2, 8, 5, 6, seed=1), randn(1, 8, 5, 6), randn(1, 8, 12, 6)]
    plain = [layer(x) for x in maps]
    assert packed.pack(layer) and sizes == []
    copied = copy.deepcopy(layer)
    for x, expected in zip(maps, plain):
        assert relative_l2(layer(x), expected) <= 1e-6
        assert torch.equal(layer.packed.plain(), weight)
    assert sizes == [(2, 8, 5, 6), (1, 8, 5, 6), (1, 8, 12, 6)]
    assert relative_l2(copied(maps[0]), plain[0]) <= 1e-6 and sizes[3:] == [(2, 8, 5, 6)]
    assert relative_l2(copy.deepcopy(layer)(maps[-1]), plain[-1]) <= 1e-6 and len(sizes) == 4  # shared
    layer(maps[-1])
    assert len(sizes) == 4  # its copy's maps are not its own


@needs_orders
@torch.no_grad()
@pytest.mark.parametrize("can_tell", [True, False])
def test_a_kernel_in_the_order_that_other_maps_ask_for_is_not_packed_again(monkeypatch, can_tell):
    """As on a part of the loop that is not guided, with half the rows."""
    pack, shapes = packed.packed_for, []
    monkeypatch.setattr(packed, "packed_for", lambda maps, *rest: shapes.append(maps) or pack(maps, *rest))
    monkeypatch.setattr(packed, "can_tell_orders", lambda: can_tell)
    layer, maps = nn.Conv2d(8, 24, 3, padding=1), [randn(2, 8, 5, 6), randn(1, 8, 5, 6), randn(2, 8, 5, 6)]
    plain = [layer(x) for x in maps]
    packed.pack(layer)
    monkeypatch.setattr(packed, "_order_for", lambda *asked: packed.order_of(layer.packed.current[1]))
    for x, expected in zip(maps, plain):
        assert relative_l2(layer(x), expected) <= 1e-6
    assert shapes == [x.shape for x in (maps[:1] if can_tell else maps)]


@needs_orders
@torch.no_grad()
def test_the_order_that_maps_ask_for_is_that_of_a_weight_packed_for_them():
    layer = nn.Conv2d(8, 24, 3, padding=1)
    packed.pack(layer)
    for x in (randn(2, 8, 5, 6), randn(1, 8, 40, 40)):
        layer(x)
        form = layer.packed
        assert packed.order_for(x.shape, form.current[1], form.where) == packed.order_of(form.current[1])
    other = packed.packed_for((1, 8, 5, 6), randn(16, 8, 3, 3), form.where)
    assert packed.order_of(other) != packed.order_of(form.current[1])


def few_rows(monkeypatch) -> None:
    """Also small weights, and on other processors than those for which it is known to be faster."""
    monkeypatch.setattr(packed.PackedForFewRows, "SMALLEST", 0)
    monkeypatch.setattr(packed.PackedForFewRows, "MOST_THREADS", 1000)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@needs_orders
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_few_rows_is_a_convolution(monkeypatch, bias):
    few_rows(monkeypatch)
    layer = nn.Linear(24, 40, bias=bias)
    weight, inputs = layer.weight.detach().clone(), [randn(n, 24, seed=n) for n in (1, 4, 6, 33, 70)]
    inputs += [randn(2, 3, 24), randn(24), randn(2, 24, 5).mT]
    plain = [layer(x) for x in inputs]
    assert packed.pack(layer, sees_few_rows=True) and type(layer.packed) is packed.PackedForFewRows
    for orders in (packed._order_for, lambda *asked: b"another"):  # which is never the weight's
        monkeypatch.setattr(packed, "_order_for", orders)
        for x, expected in zip(inputs, plain):
            assert layer(x).shape == expected.shape and relative_l2(layer(x), expected) <= 1e-6
        assert layer(randn(2, 3, 24)).is_contiguous() and layer(randn(0, 24)).shape == (0, 40)
    layer.unpack()
    assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)


@needs_orders
def test_rows_lie_in_the_widest_line_that_reads_the_weight_as_it_is(monkeypatch):
    few_rows(monkeypatch)
    form = packed.PackedForFewRows(randn(40, 24))
    asked, good = [], {8, 4}

    def order(maps: tuple, kernel: tuple, dtype: torch.dtype, where: tuple, num_threads: int) -> bytes:
        asked.append((*kernel, *maps, num_threads))
        return form.order if maps[-1] in good else b"another"

    monkeypatch.setattr(packed, "_order_for", order)
    assert [form.width(n) for n in (1, 4, 5, 8, 9, 33)] == [4, 4, 8, 8, 8, 8]
    threads = torch.get_num_threads()
    assert asked[-3:] == [(40, 24, 1, 1, -(-33 // w), 24, 1, w, threads) for w in (32, 16, 8)]
    good.remove(8)
    good.remove(4)
    assert form.width(6) is None


@needs_orders
def test_only_large_weights_of_the_prior_are_for_few_rows(monkeypatch):
    def forms(make) -> set[type]:
        network = make(0)
        optimize(network)
        return {type(m.packed) for m in network.modules() if isinstance(m, packed.PackedLinear)}

    prior, tower = NETWORKS["prior"][0], NETWORKS["text encoder"][0]
    assert forms(prior) == {packed.PackedWeight}
    few_rows(monkeypatch)
    assert forms(prior) == {packed.PackedForFewRows} and forms(tower) == {packed.PackedWeight}
    for capability, threads in (("AVX512", 2), ("AVX2", 1001)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert forms(prior) == {packed.PackedWeight}


@needs_orders
@torch.no_grad()
def test_a_prior_of_few_rows_gives_the_same_and_comes_back_to_the_bit(monkeypatch):
    few_rows(monkeypatch)
    make, output = NETWORKS["prior"]
    network, plain = make(0), output(make(0))
    optimize(network)
    assert relative_l2(output(network), plain) <= 1e-5
    copied = copy.deepcopy(network)
    assert torch.equal(output(copied), output(network))
    network.float()  # unpacks and packs again
    assert {type(m.packed) for m in network.modules() if isinstance(m, packed.PackedLinear)} == {
        packed.PackedForFewRows
    }
    for each in (network, copied):
        assert all(
            torch.equal(a, b) for a, b in zip(each.state_dict().values(), make(0).state_dict().values())
        )
        restore(each)
        assert torch.equal(output(each), plain)


@needs_packing
def test_an_optimized_network_lets_go_of_its_file(tmp_path):
    ours(UNet, small.reference_unet()).save_pretrained(tmp_path / "unet")
    unet = UNet.from_pretrained(tmp_path / "unet")
    mapped = lambda: str(tmp_path) in Path("/proc/self/maps").read_text()  # noqa: E731
    if not mapped():
        pytest.skip("files are not mapped here")
    optimize(unet)  # never called: no kernel is packed yet
    assert not mapped()


@needs_packing
def test_copies_that_were_never_called_come_back_with_weights_of_their_own():
    layer = nn.Conv2d(8, 24, 3, padding=1)
    packed.pack(layer)
    copied = copy.deepcopy(layer)
    layer.unpack()
    copied.unpack()
    with torch.no_grad():
        layer.weight.zero_()
    assert copied.weight.abs().min() > 0


@torch.no_grad()
def test_the_plain_forms_stand_in_where_the_operators_are_missing(monkeypatch):
    monkeypatch.setattr(packed, "available", lambda: False)
    for kind, (make, output) in NETWORKS.items():
        network = make(0)
        plain = output(network)
        assert optimize(network)["packed weights"] == 0
        assert relative_l2(output(network), plain) <= 1e-5


@needs_bfloat16_kernels
@torch.no_grad()
def test_half_precision_packs_and_lies_no_further_from_float32():
    for kind, (make, output) in NETWORKS.items():
        exact = output(make(0))
        network = make(0).to(torch.bfloat16)
        plain = relative_l2(output(network), exact)
        optimize(network)
        assert any(isinstance(layer, packed.PackedLinear) for layer in network.modules())
        assert relative_l2(output(network), exact) <= 1.3 * plain, kind


@torch.no_grad()
def test_float16_is_not_packed_and_runs():
    exact, network = (
        unet_output(ours(UNet, small.reference_unet())),
        ours(UNet, small.reference_unet()).half(),
    )
    plain = relative_l2(unet_output(network), exact)
    assert optimize(network)["packed weights"] == 0
    assert relative_l2(unet_output(network), exact) <= 1.3 * plain


@needs_bfloat16_kernels
@torch.no_grad()
def test_casting_an_optimized_network_equals_optimizing_a_cast_one():
    for make, output in NETWORKS.values():
        one, other = make(0), make(0).to(torch.bfloat16)
        optimize(one)
        optimize(other)
        one.to(torch.bfloat16)
        assert torch.equal(output(one), output(other)) and is_optimized(one)
        restore(one)
        restore(other)
        states = zip(one.state_dict().values(), other.state_dict().values())
        assert all(torch.equal(a, b) for a, b in states)


@needs_packing
def test_plain_weights_do_not_stay_in_memory():
    """A packed layer's own weight is one number, seen in its old shape; reading it by mistake gives NaN."""
    network = ours(Prior, small.reference_prior())
    optimize(network)
    for copied in (network, copy.deepcopy(network)):
        layers = [layer for layer in copied.modules() if isinstance(layer, packed.PackedLinear)]
        assert len(layers) == sum(
            type(m) is nn.Linear for m in ours(Prior, small.reference_prior()).modules()
        )
        for layer in layers:
            assert layer.weight.untyped_storage().nbytes() == 4 and layer.weight.isnan().all()
            assert layer.weight.shape == (layer.out_features, layer.in_features)


@needs_packing
def test_bfloat16_is_packed_only_where_the_processor_has_kernels(monkeypatch):
    weight = randn(4, 4)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert packed.can_pack(weight) and not packed.can_pack(weight.bfloat16())


@pytest.mark.slow
@needs_packing
def test_a_backward_pass_without_gradients_of_inputs_does_not_crash():
    """In a process of its own: packed layers in front of plain ones once ended it."""
    code = (
        "import torch; from tests import small; from kandinsky import UNet, optimize as o\n"
        "unet = small.ours(UNet, small.reference_unet()); o.optimize(unet)\n"
        "out = unet(torch.randn(1, 4, 8, 8), torch.tensor([20]), torch.randn(1, 32))\n"
        "out.square().sum().backward(); print(unet.conv_norm_out.weight.grad.isfinite().all().item())"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "True\n", done.stderr
