"""What `optimize` rewrites: the same numbers, undone to the bit, and nothing else stops working."""

import copy

import pytest
import torch
from torch import nn

from kandinsky import Kandinsky, MoVQ, Prior, UNet, lora, packed, winograd
from kandinsky.checkpoint import CheckpointError
from kandinsky.optimize import FOR_CUDA, UNCOMPILED, is_optimized, named, optimize, restore
from kandinsky.upsampling import MergedUpResnetBlock, MergedUpsampling
from tests import small
from tests.helpers import needs_packing, randn, relative_l2
from tests.small import EMBEDDING_DIM, NETWORKS, ours, unet_output

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


@torch.no_grad()
def test_attention_in_several_chunks_gives_the_same(monkeypatch):
    monkeypatch.setattr("kandinsky.optimize.QUERIES", 5)
    movq, z, pixels = ours(MoVQ, small.reference_movq()), randn(2, 4, 4, 6), randn(1, 3, 16, 24)
    plain = movq.decode(z), movq.encode(pixels)
    optimize(movq, ("chunked attention",))
    assert (
        relative_l2(movq.decode(z), plain[0]) <= 1e-5 and relative_l2(movq.encode(pixels), plain[1]) <= 1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(1, 1), (1, 5), (4, 3)])
def test_merged_upsampling_equals_doubling_and_convolution(h, w):
    conv, x = nn.Conv2d(3, 5, 3, padding=1), randn(2, 3, h, w)
    doubled = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert relative_l2(MergedUpsampling(conv)(x), doubled) <= 1e-6


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


def test_a_second_call_keeps_the_first_ones_rewrites():
    network = ours(UNet, small.reference_unet())
    optimize(network, ("merged upsampling",))
    changed = optimize(network, ("packed weights",))
    assert set(changed) == {"merged upsampling", "packed weights"} and changed["merged upsampling"] == 2


def test_with_the_compiler_go_no_rewrites_that_hinder_it():
    assert not {*UNCOMPILED, *FOR_CUDA} & {*named(None, True)} and {*UNCOMPILED} <= {*named(None, False)}


PROMPT = "a red circle"


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    return small.write_checkpoints(tmp_path_factory.mktemp("small"))


def draw(pipe: Kandinsky, **settings) -> torch.Tensor:
    steps = {"num_inference_steps": 3, "prior_num_inference_steps": 2}
    return pipe.text2img(PROMPT, seed=0, output_type="pt", height=32, width=32, **steps, **settings)


@pytest.mark.slow
@needs_packing
def test_a_pipeline_is_optimized_now_and_when_networks_are_read(decoder_folder):
    for keep_loaded in (True, False):
        pipe = Kandinsky.from_pretrained(decoder_folder, keep_loaded=keep_loaded)
        plain = draw(pipe)
        changed = pipe.optimize()
        assert set(changed) == ({"text_encoder", "prior", "unet", "movq"} if keep_loaded else set())
        fast = draw(pipe)
        assert pipe.is_optimized
        assert not torch.equal(fast, plain) and relative_l2(fast, plain) <= 1e-4
        assert pipe.optimize() is not None and torch.equal(draw(pipe), fast)  # once is enough
        pipe.restore()
        assert torch.equal(draw(pipe), plain) and not pipe.is_optimized


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


@pytest.mark.slow
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
    assert relative_l2(draw(pipe), plain) <= 1e-4 < relative_l2(wanted, plain)
    light = Kandinsky.from_pretrained(decoder_folder, keep_loaded=False)
    light.load_lora(tmp_path / "lora.safetensors")
    light.optimize()
    assert relative_l2(draw(light), wanted) <= 1e-4
    light.restore()
    assert relative_l2(draw(light), wanted) <= 1e-6
    pipe.to(dtype=torch.bfloat16)
    assert is_optimized(pipe.unet) and draw(pipe).isfinite().all()
