"""What `optimize` rewrites: the same numbers, undone to the bit, and nothing else stops working."""

import copy
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from kandinsky import Kandinsky, MoVQ, Prior, UNet, bands, lora, packed, winograd
from kandinsky.checkpoint import CheckpointError
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.optimize import (
    USUAL,
    is_optimized,
    optimize,
    restore,
)
from kandinsky.upsampling import MergedUpResnetBlock, MergedUpsampling
from tests import small
from tests.helpers import needs_bfloat16_kernels, randn, relative_l2
from tests.small import EMBEDDING_DIM, ours

needs_packing = pytest.mark.skipif(not packed.available(), reason="this PyTorch has no oneDNN operators")


def unet_output(unet: UNet, h: int = 8, w: int = 12) -> torch.Tensor:
    t = torch.tensor([999, 20])
    return unet(randn(2, 4, h, w), t, randn(2, EMBEDDING_DIM, seed=1))


def prior_output(prior: Prior) -> torch.Tensor:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    text = (randn(2, EMBEDDING_DIM, seed=1), randn(2, 5, EMBEDDING_DIM, seed=2), mask)
    return prior(randn(2, EMBEDDING_DIM), torch.tensor([999, 20]), *text)


def movq_output(movq: MoVQ) -> torch.Tensor:
    return torch.cat([movq.decode(randn(2, 4, 6, 5)), movq.decode(movq.encode(randn(2, 3, 24, 20, seed=3)))])


def text_output(encoder: CLIPTextEncoder) -> torch.Tensor:
    return torch.cat([x.flatten() for x in encoder(torch.tensor([[0, 7, 300, 2], [0, 9, 2, 2]]))])


NETWORKS = {
    "unet": (lambda seed: ours(UNet, small.reference_unet(seed=seed)), unet_output),
    "prior": (lambda seed: ours(Prior, small.reference_prior(seed)), prior_output),
    "movq": (lambda seed: ours(MoVQ, small.reference_movq(3, seed)), movq_output),
    "text encoder": (lambda seed: ours(CLIPTextEncoder, small.reference_text_encoder(seed)), text_output),
}
CHANGES = {
    "unet": {"merged upsampling", "packed weights"},
    "prior": {"packed weights"},
    "movq": {"merged upsampling", "low spatial norm", "row bands", "chunked attention", "packed weights"},
    "text encoder": {"packed weights"},
}


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_optimized_networks_give_the_same_and_come_back_to_the_bit(kind):
    make, output = NETWORKS[kind]
    network = make(0)
    plain, weights = output(network), copy.deepcopy(network.state_dict())
    changed = optimize(network)
    assert {name for name, count in changed.items() if count} == CHANGES[kind]
    assert relative_l2(output(network), plain) <= 1e-5
    assert is_optimized(network) and not any(optimize(network).values())  # a second time changes nothing
    restore(network)
    assert not is_optimized(network) and torch.equal(output(network), plain)
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


ALONE = [
    pytest.param(kind, name, marks=[needs_packing] if name == "packed weights" else [])
    for kind in CHANGES
    for name in sorted(CHANGES[kind])
]


@torch.no_grad()
@pytest.mark.parametrize("kind, rewrite", ALONE)
def test_each_rewrite_alone_gives_the_same(kind, rewrite):
    make, output = NETWORKS[kind]
    network = make(1)
    plain = output(network)
    (changed,) = optimize(network, (rewrite,)).items()
    assert changed[0] == rewrite and changed[1] > 0
    assert relative_l2(output(network), plain) <= 1e-5


@torch.no_grad()
def test_a_rewrite_that_does_not_fit_changes_nothing():
    """Another network's, another device's, or one of layers that another rewrite would have made."""
    for kind, rewrite in (("prior", "row bands"), ("unet", "winograd"), ("movq", "cuda graph")):
        make, output = NETWORKS[kind]
        network = make(0)
        plain = output(network)
        assert optimize(network, (rewrite,)) == {rewrite: 0} and torch.equal(output(network), plain)


@needs_packing
@torch.no_grad()
def test_a_kernel_is_packed_for_the_maps_that_it_meets(monkeypatch):
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


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(1, 1), (1, 5), (4, 3)])
def test_merged_upsampling_equals_doubling_and_convolution(h, w):
    conv, x = nn.Conv2d(3, 5, 3, padding=1), randn(2, 3, h, w)
    doubled = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert relative_l2(MergedUpsampling(conv)(x), doubled) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("b, h, w", [(1, 1, 1), (2, 5, 3), (1, 8, 13), (3, 16, 4)])
def test_winograd_equals_convolution(b, h, w):
    orders = {
        "NCHW": randn(b, 6, h, w),
        "NHWC": randn(b, 6, h, w).to(memory_format=torch.channels_last),
        "cropped": randn(b, h + 3, w + 2, 6)[:, :h, :w].permute(0, 3, 1, 2),
    }
    for bias, x in product((True, False), orders.values()):
        conv = nn.Conv2d(6, 10, 3, padding=1, bias=bias)
        out = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
        assert relative_l2(out, conv(x)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("most_tiles", [1, 5, 12])
def test_winograd_in_bands_equals_all_at_once(monkeypatch, most_tiles):
    conv, x = nn.Conv2d(6, 10, 3, padding=1), randn(2, 6, 18, 9)
    whole = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
    monkeypatch.setattr(winograd, "MOST_TILES", most_tiles)
    bands = winograd.convolve(x, winograd.transform_kernel(conv.weight), conv.bias)
    assert bands.shape == whole.shape and relative_l2(bands, whole) <= 1e-6


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


@needs_packing
@torch.no_grad()
def test_networks_with_winograd_give_the_same_and_come_back_to_the_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(winograd, "NARROWEST", 16)
    monkeypatch.setattr(winograd, "FEWEST_TILES", 4)
    for kind in ("unet", "movq"):
        make, output = NETWORKS[kind]
        network, calls = make(0), []
        plain = output(network)
        assert optimize(network)["winograd"] > 4
        with monkeypatch.context() as patch:
            convolve = winograd.convolve
            patch.setattr(winograd, "convolve", lambda *args: calls.append(1) or convolve(*args))
            assert relative_l2(output(network), plain) <= 1e-5 and len(calls) > 4
        network.to(torch.float32)
        assert any(isinstance(layer, winograd.WinogradConv2d) for layer in network.modules())
        network.save_pretrained(tmp_path / kind)
        assert torch.equal(output(type(network).from_pretrained(tmp_path / kind)), plain)
        network.to(torch.bfloat16)
        assert not any(isinstance(layer, winograd.WinogradConv2d) for layer in network.modules())
        network = make(0)
        optimize(network)
        restore(network)
        assert torch.equal(output(network), plain)


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
@torch.no_grad()
def test_an_optimized_network_is_saved_and_copied_as_the_plain_one(tmp_path):
    for kind, network_class in (("unet", UNet), ("movq", MoVQ), ("prior", Prior)):
        make, output = NETWORKS[kind]
        network = make(0)
        plain = output(network)
        optimize(network)
        network.save_pretrained(tmp_path / kind)
        assert torch.equal(output(network_class.from_pretrained(tmp_path / kind)), plain)
        twin = copy.deepcopy(network)
        assert torch.equal(output(twin), output(network))
        restore(twin)
        assert torch.equal(output(twin), plain) and is_optimized(network)


@needs_packing
def test_new_weights_and_pickles_are_refused():
    network = ours(UNet, small.reference_unet())
    state = network.state_dict()
    optimize(network)
    with pytest.raises(RuntimeError, match="restore"):
        network.load_state_dict(state)
    import pickle

    with pytest.raises(TypeError, match="restore"):
        pickle.dumps(network)
    with pytest.raises(ValueError, match="no rewrite is called 'magic'; there are merged upsampling"):
        optimize(network, ("magic",))


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
@torch.no_grad()
def test_copies_share_what_is_derived_from_weights(monkeypatch):
    monkeypatch.setattr(winograd, "NARROWEST", 16)
    network = ours(UNet, small.reference_unet())
    optimize(network)
    pairs = list(zip(network.modules(), copy.deepcopy(network).modules()))
    tensors = {
        packed.PackedLinear: lambda layer: layer.packed.tensor,
        packed.PackedConv2d: lambda layer: layer.packed.current[1],
        winograd.WinogradConv2d: lambda layer: layer.kernel.tensor,
    }
    for kind, tensor in tensors.items():
        found = [pair for pair in pairs if isinstance(pair[0], kind)]
        assert found and all(tensor(a) is tensor(b) for a, b in found)


def test_an_optimized_network_is_not_trained(tmp_path):
    from kandinsky.training import Settings, Trainer

    network = ours(UNet, small.reference_unet())
    optimize(network)
    with pytest.raises(ValueError, match="restore"):
        Trainer(network, Settings(), tmp_path)


@needs_packing
def test_bfloat16_is_packed_only_where_the_processor_has_kernels(monkeypatch):
    weight = randn(4, 4)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert packed.can_pack(weight) and not packed.can_pack(weight.bfloat16())


@needs_packing
def test_gradients_pass_through_an_optimized_network():
    network, other = (ours(UNet, small.reference_unet()) for _ in range(2))
    optimize(network)
    of_x, of_embeds = [], []
    for unet in (network, other):
        x, embeds = randn(2, 4, 8, 8).requires_grad_(), randn(2, EMBEDDING_DIM, seed=1).requires_grad_()
        unet(x, torch.tensor([999, 20]), embeds).square().sum().backward()
        of_x.append(x.grad)
        of_embeds.append(embeds.grad)
    assert relative_l2(*of_x) <= 1e-4 and relative_l2(*of_embeds) <= 1e-4
    movqs = [ours(MoVQ, small.reference_movq()) for _ in range(2)]
    optimize(movqs[0])
    latents = [randn(1, 4, 4, 4).requires_grad_() for _ in movqs]
    for movq, z in zip(movqs, latents):
        movq.decode(z).square().sum().backward()
    assert relative_l2(*(z.grad for z in latents)) <= 1e-4


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


@needs_packing
@torch.no_grad()
def test_hooks_keep_working():
    network = ours(UNet, small.reference_unet())
    seen = []
    layers = [network.mid_block.attentions[0].to_q, network.up_blocks[0].upsamplers[0], network.conv_in]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(module))
    optimize(network)
    unet_output(network)
    assert len(seen) == 3 and set(seen) == set(layers)


HOOKED = {
    "all": lambda name: True,
    "inner norms": lambda name: name.endswith("norm_layer"),
    "norms": lambda name: name.endswith(("norm1", "norm2", "norm_out", "spatial_norm")),
    "convolutions": lambda name: name.endswith(("conv1", "conv2", "conv_out")),
}


@torch.no_grad()
@pytest.mark.parametrize("where", [*HOOKED, "all modules of a process"])
def test_what_a_hook_has_seen_is_not_overwritten(monkeypatch, where):
    monkeypatch.setattr(winograd, "NARROWEST", 96)  # some layers' maps are in another order then
    monkeypatch.setattr(winograd, "FEWEST_TILES", 4)
    movq, seen = NETWORKS["movq"][0](0), []
    optimize(movq)
    unseen = movq_output(movq)

    def see(module, args, out):
        seen.append((out, out.clone()))

    if where in HOOKED:
        hooks = [m.register_forward_hook(see) for name, m in movq.named_modules() if HOOKED[where](name)]
    else:
        hooks = [nn.modules.module.register_module_forward_hook(see)]
    try:
        assert torch.equal(movq_output(movq), unseen)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) > 20 and all(torch.equal(now, then) for now, then in seen)


class Nothing(nn.Module):
    """In place of a spatial norm."""

    def forward(self, x: torch.Tensor, zq: torch.Tensor) -> torch.Tensor:
        return x


class Kept(Nothing):
    """The same map at each call."""

    def __init__(self, *shape: int):
        super().__init__()
        self.map = randn(*shape)

    def forward(self, x: torch.Tensor, zq: torch.Tensor) -> torch.Tensor:
        return self.map


@torch.no_grad()
def test_norms_put_in_place_of_others_lose_nothing():
    """They may return what they were given, or what they keep."""
    movq, z = NETWORKS["movq"][0](0), randn(2, 4, 6, 5)
    first, second = movq.decoder.mid_block.resnets
    first.norm1.norm_layer, second.norm1 = nn.Identity(), Nothing()
    second.norm2 = Kept(2, second.conv2.in_channels, 6, 5)
    plain = movq.decode(z)
    optimize(movq, ("low spatial norm", "row bands"))
    for _ in range(2):
        assert relative_l2(movq.decode(z), plain) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_silu_and_the_sum_take_the_memory_of_what_they_read(monkeypatch, half):
    movq, at = NETWORKS["movq"][0](0), {"norms": [], "convolutions read": [], "conv2": []}
    optimize(movq, ("low spatial norm", "row bands"))
    block = getattr(movq, half).mid_block.resnets[0]

    def noting(name, compute):
        def computed(*args):
            out = compute(*args)
            at[name].append(out.data_ptr())
            return out

        return computed

    def note(module, args):
        at["convolutions read"].append(args[0].data_ptr())

    monkeypatch.setattr(nn.functional, "group_norm", noting("norms", nn.functional.group_norm))
    monkeypatch.setattr(block.conv2, "_conv_forward", noting("conv2", block.conv2._conv_forward))
    for conv in (block.conv1, block.conv2):
        conv.register_forward_pre_hook(note)
    x = randn(1, block.conv1.in_channels, 4, 4)
    out = block(x) if half == "encoder" else block(x, randn(1, 4, 2, 2))
    assert at["convolutions read"] == at["norms"] and at["conv2"] == [out.data_ptr()]


@torch.no_grad()
def test_the_compiler_takes_the_overwriting_as_it_is():
    movq, zq = NETWORKS["movq"][0](0), randn(1, 4, 2, 2)
    optimize(movq, ("low spatial norm", "row bands"))
    block = movq.decoder.mid_block.resnets[0]
    x = randn(1, block.conv1.in_channels, 4, 4)
    plain = block(x, zq)
    assert relative_l2(torch.compile(block, backend="aot_eager", fullgraph=True)(x, zq), plain) <= 1e-5
    assert torch.equal(x, randn(1, block.conv1.in_channels, 4, 4))


@needs_packing
@torch.no_grad()
def test_loras_go_on_and_come_off_an_optimized_network(tmp_path):
    network = ours(UNet, small.reference_unet())
    lora.add_lora(network, 2)
    for parameter in lora.lora_parameters(network):
        parameter.copy_(randn(*parameter.shape, seed=parameter.numel()) / 10)
    lora.save_lora(network, tmp_path / "lora.safetensors")
    changed = unet_output(network)
    lora.remove_lora(network)
    plain = unet_output(network)
    optimize(network)
    before = unet_output(network)
    lora.load_lora(network, tmp_path / "lora.safetensors")
    assert is_optimized(network) and relative_l2(unet_output(network), changed) <= 1e-5
    lora.remove_lora(network)
    assert is_optimized(network) and torch.equal(unet_output(network), before)
    lora.load_lora(network, tmp_path / "lora.safetensors")
    lora.merge_lora(network)
    assert is_optimized(network) and relative_l2(unet_output(network), changed) <= 1e-5
    assert relative_l2(changed, plain) > 1e-2
    with pytest.raises(CheckpointError, match="not_there"):
        lora.Attach("x", {"not_there": lora.Factors(randn(2, 3), randn(3, 2), 2.0)})(network)
    assert is_optimized(network)


@needs_packing
@torch.no_grad()
def test_a_lora_leaves_the_chosen_rewrites_as_they_are():
    network = ours(UNet, small.reference_unet())
    optimize(network, ("packed weights",))
    lora.add_lora(network, 2)
    lora.remove_lora(network)
    kinds = {type(layer) for layer in network.modules()}
    assert packed.PackedLinear in kinds and MergedUpResnetBlock not in kinds
    restore(network)
    lora.add_lora(network, 2)
    lora.remove_lora(network)
    assert not is_optimized(network)


@needs_packing
@torch.no_grad()
def test_a_lora_of_a_convolution_goes_on_a_winograd_layer(monkeypatch):
    monkeypatch.setattr(winograd, "NARROWEST", 16)
    network, other = (ours(UNet, small.reference_unet()) for _ in range(2))
    optimize(network)
    name = next(n for n, m in network.named_modules() if isinstance(m, winograd.WinogradConv2d))
    c_out, c_in = network.get_submodule(name).weight.shape[:2]
    factors = {name: lora.Factors(randn(2, c_in, 3, 3) / 10, randn(c_out, 2, 1, 1) / 10, 2.0)}
    attach = lora.Attach("x", factors)
    attach.check(network)
    attach(network)
    attach(other)
    assert is_optimized(network) and relative_l2(unet_output(network), unet_output(other)) <= 1e-5


PROMPT = "a red circle"


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    return small.write_checkpoints(tmp_path_factory.mktemp("small"))


def draw(pipe: Kandinsky, **settings) -> torch.Tensor:
    steps = {"num_inference_steps": 3, "prior_num_inference_steps": 2}
    return pipe.text2img(PROMPT, seed=0, output_type="pt", height=32, width=32, **steps, **settings)


@needs_packing
def test_a_pipeline_is_optimized_now_and_when_networks_are_read(decoder_folder):
    for keep_loaded in (True, False):
        pipe = Kandinsky.from_pretrained(decoder_folder, keep_loaded=keep_loaded)
        plain = draw(pipe)
        changed = pipe.optimize()
        assert set(changed) == ({"text_encoder", "prior", "unet", "movq"} if keep_loaded else set())
        fast = draw(pipe)
        assert not torch.equal(fast, plain) and relative_l2(fast, plain) <= 1e-4
        assert pipe.optimize() is not None and torch.equal(draw(pipe), fast)  # once is enough
        pipe.restore()
        assert torch.equal(draw(pipe), plain)


@needs_packing
def test_a_pipeline_takes_some_rewrites_and_further_ones_later(decoder_folder):
    pipe = Kandinsky.from_pretrained(decoder_folder)
    assert pipe.optimize(["packed weights"]) == {} and pipe.unet.rewrites == ("packed weights",)
    assert pipe.movq.rewrites == ("packed weights",)
    changed = pipe.optimize(("merged upsampling",))
    assert changed["unet"]["merged upsampling"] == 2 and changed["unet"]["packed weights"] > 30
    again = Kandinsky.from_pretrained(decoder_folder)
    again.optimize(["packed weights"])
    again.optimize(["merged upsampling"])
    assert set(again.unet.rewrites) == {"packed weights", "merged upsampling"}
    assert torch.equal(draw(pipe), draw(again))
    with pytest.raises(ValueError, match="no rewrite is called 'magic'"):
        pipe.optimize(["magic"])
    with pytest.raises(TypeError, match="names in a tuple or a list"):
        pipe.optimize("winograd")


@needs_packing
def test_a_pipeline_can_be_cast_and_given_loras_while_optimized(decoder_folder, tmp_path):
    pipe = Kandinsky.from_pretrained(decoder_folder)
    lora.add_lora(pipe.unet, 2)
    for parameter in lora.lora_parameters(pipe.unet):
        parameter.data.copy_(randn(*parameter.shape) / 10)
    lora.save_lora(pipe.unet, tmp_path / "lora.safetensors")
    lora.remove_lora(pipe.unet)
    pipe.load_lora(tmp_path / "lora.safetensors")
    wanted = draw(pipe)
    pipe.unload_lora()
    plain = draw(pipe)
    pipe.optimize()
    pipe.load_lora(tmp_path / "lora.safetensors")
    assert is_optimized(pipe.unet) and relative_l2(draw(pipe), wanted) <= 1e-4
    pipe.unload_lora()
    assert relative_l2(draw(pipe), plain) <= 1e-4
    pipe.to(dtype=torch.bfloat16)
    assert is_optimized(pipe.unet) and draw(pipe).isfinite().all()
