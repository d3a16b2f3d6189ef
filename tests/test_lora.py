"""LoRA: the change itself, every layout of file against diffusers, peft or the rule, and what is refused.

diffusers drops the added projections of old files without a word, so for those the reference is the rule
itself, W += scale · up @ down in float32, on the weights of diffusers' network.
"""

import copy
import functools
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from kandinsky import CheckpointError, Kandinsky, Prior, UNet
from kandinsky.lora import (
    Attach,
    LoRALinear,
    add_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    train_only_lora,
)
from kandinsky.lora_files import HEADER_KEY, Factors, read_lora, write_lora
from kandinsky.prior import Block
from kandinsky.unet import AttentionBlock, ResnetBlock
from tests.helpers import needs_bfloat16_kernels, randn, randomize, relative_l2, slow
from tests.small import EMBEDDING_DIM, ours, reference_prior, reference_unet
from tests.test_scripts import run

OLD = ("to_q", "to_k", "to_v", "to_out")  # F1
ADDED = ("add_k_proj", "add_v_proj")  # F2 has these too
FILE = "pytorch_lora_weights.safetensors"


def unet_inputs(batch: int = 2):
    t = torch.tensor([999, 20, 437])[:batch]
    return randn(batch, 4, 4, 8, seed=50), t, randn(batch, EMBEDDING_DIM, seed=51)


def prior_inputs():
    mask = torch.arange(77)[None] < torch.tensor([5, 20])[:, None]
    states = randn(2, 77, EMBEDDING_DIM, seed=62)
    x, text_embeds = randn(2, EMBEDDING_DIM, seed=60), randn(2, EMBEDDING_DIM, seed=61)
    return x, torch.tensor([999, 3]), text_embeds, states, mask


def unet_output(reference, x, t, image_embeds):
    return reference(x, t, None, added_cond_kwargs={"image_embeds": image_embeds}).sample


def prior_output(reference, *arguments):
    return reference(*arguments).predicted_image_embedding


# our class, diffusers' network, inputs, and how diffusers' is called
KINDS = {
    "unet": (UNet, reference_unet, unet_inputs, unet_output),
    "prior": (Prior, reference_prior, prior_inputs, prior_output),
}


def attention_layers(network: torch.nn.Module, projections=OLD) -> dict[str, torch.nn.Linear]:
    ends = tuple(f".{p}.0" if p == "to_out" else f".{p}" for p in projections)
    return {name: layer for name, layer in network.named_modules() if name.endswith(ends)}


def random_factors(network, projections=OLD, rank: int = 3) -> dict[str, Factors]:
    """Strong enough to move the output by tens of percent; no two alike."""
    factors = {}
    for i, (name, layer) in enumerate(attention_layers(network, projections).items()):
        down = randn(rank, layer.in_features, seed=1000 + i) * layer.in_features**-0.5
        factors[name] = Factors(down, randn(layer.out_features, rank, seed=2000 + i) * 0.5, float(rank))
    return factors


def old_name(name: str) -> str:
    """The name of a layer in F1 and F2, up to `.down.weight`."""
    module, projection = name.removesuffix(".0").rsplit(".", 1)
    return f"{module}.processor.{projection}_lora"


STYLES = {
    "F1": lambda name: (f"{old_name(name)}.down.weight", f"{old_name(name)}.up.weight"),
    "F3": lambda name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
    "F4": lambda name: (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
    "F4 old": lambda name: (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"),
    "F5": lambda name: tuple(f"base_model.model.{name}.lora_{half}.weight" for half in "AB"),
}


def write_style(factors: dict[str, Factors], path: Path, style, header: dict | None = None) -> Path:
    """`style`: one of STYLES, or a function from a layer's name to one."""
    tensors = {}
    for name, (down, up, _) in factors.items():
        keys = STYLES[style if isinstance(style, str) else style(name)](name)
        tensors |= dict(zip(keys, (down, up)))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if header is None else {HEADER_KEY: json.dumps(header)}
    save_file(tensors, path, {"format": "pt", **metadata})
    return path


@torch.no_grad()
def changed(reference, factors: dict[str, Factors], scale: float = 1.0):
    """diffusers' network with W += scale · alpha / r · up @ down."""
    reference = copy.deepcopy(reference)
    for name, f in factors.items():
        reference.get_submodule(name).weight += scale * f.alpha / f.rank * (f.up @ f.down)
    return reference


def layers_of(network) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, LoRALinear)]


# --- the layer -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_lora_changes_no_bit_and_training_it_changes_the_output(kind, dtype):
    network_class, make_reference, inputs, _ = KINDS[kind]
    network = ours(network_class, make_reference()).to(dtype)
    before = network(*inputs())
    add_lora(network, rank=2, seed=1)
    assert torch.equal(network(*inputs()), before)
    train_only_lora(network)
    assert relative_l2(network(*inputs()), before) <= (1e-6 if dtype == torch.float32 else 1e-2)
    for parameter in lora_parameters(network):
        assert parameter.dtype == torch.float32
        parameter += 0.1
    assert relative_l2(network(*inputs()), before) > 1e-2


def test_add_lora_reaches_all_of_attention_and_only_that():
    unet, prior = ours(UNet, reference_unet()), ours(Prior, reference_prior())
    for network, projections in ((unet, OLD + ADDED), (prior, OLD)):
        add_lora(network, rank=2)
        assert layers_of(network) == list(attention_layers(network, projections))
        assert all(p.requires_grad for p in network.parameters())
        assert train_only_lora(network) == lora_parameters(network)
        loras = {id(p) for p in lora_parameters(network)}
        assert {id(p) for p in network.parameters() if p.requires_grad} == loras
        assert len(loras) == 2 * len(attention_layers(network, projections))


def test_released_sizes_have_the_number_of_tensors_of_published_files():
    with torch.device("meta"):
        unet, prior = UNet(), Prior()
    add_lora(unet, rank=1)
    add_lora(prior, rank=1)
    assert (len(lora_parameters(unet)), len(lora_parameters(prior))) == (264, 160)


def test_targets_rank_alpha_and_seed():
    prior = ours(Prior, reference_prior())
    add_lora(prior, rank=3, alpha=6, targets=("to_q", "ff.net.2"), seed=4)
    assert set(layers_of(prior)) == {
        f"transformer_blocks.{i}.{end}" for i in range(3) for end in ("attn1.to_q", "ff.net.2")
    }
    layer = prior.transformer_blocks[1].ff.net[2]
    (lora,) = layer.loras
    assert lora.multiplier == 2 and lora.down.shape == (3, 192) and not lora.up.any()
    bound = 192**-0.5  # uniform: reaches the bounds, does not cross them
    assert 0.97 * bound < lora.down.abs().max() <= bound
    assert abs(lora.down.std() - bound / math.sqrt(3)) < 0.05 * bound
    for seed, same in ((4, True), (5, False)):
        again = ours(Prior, reference_prior())
        add_lora(again, rank=3, targets=("to_q", "ff.net.2"), seed=seed)
        assert torch.equal(again.transformer_blocks[1].ff.net[2].loras[0].down, lora.down) == same
    one = ours(Prior, reference_prior())
    add_lora(one, rank=1, targets="to_v")
    assert len(layers_of(one)) == 3


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"rank": 0}, ValueError, "rank is 0; allowed is 1 and more"),
        ({"rank": 2.0}, TypeError, "rank is 2.0 of type float; an int is needed"),
        ({"rank": 2, "alpha": float("inf")}, ValueError, "alpha is inf; a finite number is needed"),
        ({"rank": 2, "seed": -1}, ValueError, "seed is -1"),
        ({"rank": 2, "targets": ("to_q", "add_k_proj")}, ValueError, "Prior has no Linear called add_k_proj"),
        ({"rank": 2, "targets": ("q",)}, ValueError, "Prior has no Linear called q"),  # names end at a dot
        ({"rank": 2, "targets": ("norm1",)}, ValueError, "Prior has no Linear called norm1"),
    ],
)
def test_add_lora_refuses_and_changes_nothing(arguments, error, message):
    prior = ours(Prior, reference_prior())
    with pytest.raises(error, match=message):
        add_lora(prior, **arguments)
    assert not layers_of(prior) and all(p.requires_grad for p in prior.parameters())


@torch.no_grad()
def test_half_precision_computes_the_change_in_float32():
    layer = torch.nn.Linear(40, 24).bfloat16()
    x, base = randn(5, 40).bfloat16(), copy.deepcopy(layer)
    holder = torch.nn.ModuleDict({"to_q": layer})
    add_lora(holder, rank=2, targets="to_q", alpha=3)
    lora = layer.loras[0]
    lora.up.copy_(randn(24, 2, seed=3))
    expected = base(x).float() + (1.5 * (x.float() @ lora.down.T)) @ lora.up.T
    assert torch.equal(layer(x), expected.bfloat16())
    product = 1.5 * (lora.up @ lora.down)
    merge_lora(holder)
    assert torch.equal(layer.weight, (base.weight.float() + product).bfloat16())
    assert type(layer) is torch.nn.Linear and layer.bias is not None


def test_the_network_can_be_cast_and_copied_and_its_lora_stays_float32():
    unet = ours(UNet, reference_unet())
    add_lora(unet, rank=2)
    twin = copy.deepcopy(unet).to(torch.bfloat16)
    assert {p.dtype for p in lora_parameters(twin)} == {torch.float32} and twin.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in lora_parameters(twin):
            parameter += 1 / 3  # not a bfloat16 number
        twin.half()
    assert all(((p - 1 / 3).abs() < 0.9).all() for p in lora_parameters(twin))
    assert (lora_parameters(twin)[1] == 1 / 3).all()  # an up matrix, zero before
    assert not lora_parameters(unet)[1].any()  # the original has its own


@torch.no_grad()
def test_prepared_forms_work_with_a_lora():
    unet, prior = ours(UNet, reference_unet()), ours(Prior, reference_prior())
    for network in (unet, prior):
        add_lora(network, rank=3)
        for i, parameter in enumerate(lora_parameters(network)):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
    x, t, image_embeds = unet_inputs()
    plan = unet.prepare(image_embeds, [437, 20])
    assert relative_l2(unet.step(x, plan, 1), unet(x, torch.tensor([20, 20]), image_embeds)) <= 1e-5
    x, t, *text = prior_inputs()
    assert relative_l2(prior.step(x, t, prior.prefill(*text)), prior(x, t, *text)) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_a_network_with_a_lora_is_one_graph_to_torch_compile():
    prior = ours(Prior, reference_prior())
    add_lora(prior, rank=2)
    for parameter in lora_parameters(prior):
        parameter += 0.1
    compiled = torch.compile(prior, backend="eager", fullgraph=True)
    assert relative_l2(compiled(*prior_inputs()), prior(*prior_inputs())) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_diffusers_with_peft(kind, tmp_path):
    """Down and up are both nonzero here, so every tensor has a gradient, the added projections' included."""
    network_class, make_reference, inputs, output = KINDS[kind]
    reference = make_reference()
    projections = OLD + (ADDED if kind == "unet" else ())
    write_lora(random_factors(reference, projections), tmp_path / FILE)
    network = ours(network_class, reference)
    load_lora(network, tmp_path / FILE)
    assert train_only_lora(network) == lora_parameters(network)
    reference.load_lora_adapter(tmp_path, weight_name=FILE, prefix=None, adapter_name="default")
    network(*inputs()).square().mean().backward()
    output(reference, *inputs()).square().mean().backward()
    count = 0
    for name, layer in attention_layers(network, projections).items():
        theirs = reference.get_submodule(name)
        for half, factor in ((layer.loras[0].down, theirs.lora_A), (layer.loras[0].up, theirs.lora_B)):
            assert factor["default"].weight.grad.norm() > 0, name
            assert relative_l2(half.grad, factor["default"].weight.grad) <= 1e-4, name
            count += 1
        assert layer.weight.grad is None
    assert count == len(lora_parameters(network))


def test_a_few_steps_of_training_lower_the_loss_and_move_every_tensor():
    unet = ours(UNet, reference_unet())
    add_lora(unet, rank=2)
    x, t, image_embeds = unet_inputs()
    target = randn(2, 8, 4, 8, seed=9)
    before = [p.detach().clone() for p in lora_parameters(unet)]
    optimizer = torch.optim.Adam(train_only_lora(unet), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = (unet(x, t, image_embeds) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(lora_parameters(unet), before))


def kibibytes(name: str) -> int:
    """Of this process: VmRSS is what it holds, VmHWM the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@needs_bfloat16_kernels
@pytest.mark.full_size
@pytest.mark.parametrize("network_class", [UNet, Prior])
def test_a_training_step_at_released_sizes_fits_in_little_memory(network_class):
    """bfloat16 weights, every block recomputed in the backward pass; the decoder at 512 × 512.

    Each alone in a process the decoder peaks at 3.1 GiB and the prior at 2.4 GiB.
    """
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the tests before
    before = kibibytes("VmRSS")
    with torch.device("meta"):
        network = network_class().to(torch.bfloat16)
    network = randomize(network.to_empty(device="cpu"))
    add_lora(network, rank=16)
    parameters = train_only_lora(network)
    for block in network.modules():
        if isinstance(block, (ResnetBlock, AttentionBlock, Block)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    x, d = (randn(1, 4, 64, 64), 1280) if network_class is UNet else (randn(1, 1280), 1280)
    text = () if network_class is UNet else (randn(1, 77, d, seed=2), torch.ones(1, 77, dtype=torch.bool))
    network(x, torch.tensor([500]), randn(1, d, seed=1), *text).square().mean().backward()
    torch.optim.AdamW(parameters).step()
    assert all(up.grad.any() for up in parameters[1::2])
    assert kibibytes("VmHWM") - before < 8 * 2**20


# --- on and off ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loras_add_up_and_come_off_to_the_bit(tmp_path):
    reference = reference_unet()
    one, two = random_factors(reference, OLD + ADDED), random_factors(reference, ADDED, rank=5)
    write_style(one, tmp_path / "one.safetensors", "F1")
    write_style(two, tmp_path / "two.safetensors", "F3")
    unet, inputs = ours(UNet, reference), unet_inputs()
    plain, weights = unet(*inputs), {k: v.clone() for k, v in unet.state_dict().items()}
    load_lora(unet, tmp_path / "one.safetensors", scale=0.5)
    load_lora(unet, tmp_path / "two.safetensors", scale=-2)
    both = unet_output(changed(changed(reference, one, 0.5), two, -2), *inputs)
    assert relative_l2(unet(*inputs), both) <= 1e-5
    assert (
        unet.get_parameter("mid_block.attentions.0.to_q.weight") is unet.mid_block.attentions[0].to_q.weight
    )
    remove_lora(unet)
    assert torch.equal(unet(*inputs), plain) and not layers_of(unet)
    assert unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())
    assert {type(layer) for layer in attention_layers(unet, OLD + ADDED).values()} == {torch.nn.Linear}
    load_lora(unet, tmp_path / "one.safetensors", scale=0.5)
    load_lora(unet, tmp_path / "two.safetensors", scale=-2)
    merge_lora(unet)
    assert relative_l2(unet(*inputs), both) <= 1e-5 and not layers_of(unet)


def test_saving_a_network_with_a_lora_is_refused_and_a_merged_one_loads_in_diffusers(tmp_path):
    reference = reference_unet()
    factors = random_factors(reference, OLD + ADDED)
    unet = ours(UNet, reference)
    load_lora(unet, write_style(factors, tmp_path / FILE, "F3"))
    with pytest.raises(CheckpointError, match=r"merge or undo .* extra down_blocks\.1\..*and 124 more"):
        unet.save_pretrained(tmp_path / "unet")
    assert not (tmp_path / "unet").exists()
    merge_lora(unet)
    unet.save_pretrained(tmp_path / "unet")
    theirs, expected = UNet2DConditionModel.from_pretrained(tmp_path / "unet"), changed(reference, factors)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_convolutions_and_projections_take_loras_too(tmp_path):
    reference = reference_unet()
    names = ["conv_in", "down_blocks.1.resnets.0.conv2", "down_blocks.1.resnets.0.conv_shortcut", "conv_out"]
    names += ["add_embedding.image_proj", "encoder_hid_proj.image_embeds", "time_embedding.linear_1"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names)
    reference.add_adapter(config)
    randomize_adapters(reference)
    reference.save_lora_adapter(tmp_path)
    unet = ours(UNet, reference_unet())
    plain, theirs = unet(*unet_inputs()), unet_output(reference, *unet_inputs())
    load_lora(unet, tmp_path)
    assert relative_l2(theirs, plain) > 0.05 and relative_l2(unet(*unet_inputs()), theirs) <= 1e-5
    merge_lora(unet)
    assert relative_l2(unet(*unet_inputs()), theirs) <= 1e-5
    unet.save_pretrained(tmp_path / "unet")


# --- files -----------------------------------------------------------------------------------------------


@torch.no_grad()
def randomize_adapters(reference) -> None:
    for i, (name, parameter) in enumerate(reference.named_parameters()):
        if "lora_" in name:
            parameter.copy_(randn(*parameter.shape, seed=i) * parameter[0].numel() ** -0.5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style, prefix", [("F1", None), ("F3", None), ("F4", "unet"), ("F4 old", "unet")])
def test_files_that_diffusers_reads_give_its_output(style, prefix, kind, tmp_path):
    network_class, make_reference, inputs, output = KINDS[kind]
    reference = make_reference()
    write_style(random_factors(reference), tmp_path / FILE, style)
    network = ours(network_class, reference)
    plain = network(*inputs())
    load_lora(network, tmp_path / FILE)
    reference.load_lora_adapter(tmp_path, weight_name=FILE, prefix=prefix)
    theirs = output(reference, *inputs())
    assert relative_l2(theirs, plain) > 0.05
    assert relative_l2(network(*inputs()), theirs) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("style", ["mixed", *slow(*STYLES)])
def test_added_projections_of_every_layout_follow_the_rule(style, tmp_path):
    reference, scale = reference_unet(), 0.7
    factors = random_factors(reference, OLD + ADDED)
    # what diffusers' converter leaves: an added projection with peft's names in a file of old ones
    chosen = (lambda name: "F3" if "add_" in name else "F4 old") if style == "mixed" else style
    path = write_style(factors, tmp_path / "adapter_model.safetensors", chosen)
    if style == "F5":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 3}))
    unet, expected = ours(UNet, reference), unet_output(changed(reference, factors, scale), *unet_inputs())
    added_only = changed(reference, {n: f for n, f in factors.items() if "add_" not in n}, scale)
    assert relative_l2(unet_output(added_only, *unet_inputs()), expected) > 1e-2  # they do matter
    load_lora(unet, path, scale)
    assert relative_l2(unet(*unet_inputs()), expected) <= 1e-5


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_each_key_is_read_by_itself(tmp_path_factory, data):
    factors = random_factors(reference_prior())
    styles = {name: data.draw(st.sampled_from(sorted(STYLES))) for name in factors}
    path = tmp_path_factory.mktemp("mixed") / FILE
    write_style(factors, path, styles.__getitem__, {"r": 3, "lora_alpha": 3})
    read = read_lora(path)
    assert list(read) == ["prior"] and read["prior"].keys() == factors.keys()
    for name, (down, up, alpha) in read["prior"].items():
        assert torch.equal(down, factors[name].down) and torch.equal(up, factors[name].up) and alpha == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        *slow({}, {"use_rslora": True, "rank_pattern": {"add_v_proj": 9}}),
        {
            "rank_pattern": {"^mid_block.attentions.0.to_v": 2, "to_v": 5},
            "alpha_pattern": {"mid_block.attentions.0.to_k": 7, "to_k|add_k_proj": 1},
        },
    ],
)
def test_diffusers_own_files_load_with_alpha_and_patterns(changes, tmp_path):
    reference = reference_unet()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    # alpha is small: at 10 the network is chaotic, and diffusers itself is 3e-4 from float64
    reference.add_adapter(peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, **changes))
    randomize_adapters(reference)
    reference.save_lora_adapter(tmp_path)
    theirs = unet_output(reference, *unet_inputs())
    unet = ours(UNet, reference_unet())
    load_lora(unet, tmp_path)
    assert relative_l2(unet(*unet_inputs()), theirs) <= 1e-5
    again = write_again(unet, tmp_path / "again" / FILE)  # and what we write of it, diffusers reads
    assert relative_l2(unet_output(again, *unet_inputs()), theirs) <= 1e-5


def write_again(unet: UNet, path: Path) -> UNet2DConditionModel:
    """Our file of a network's LoRA, read by diffusers."""
    save_lora(unet, path)
    reference = reference_unet()
    reference.load_lora_adapter(path.parent, use_safetensors=True, prefix=None, adapter_name="default")
    return reference


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_diffusers_reads_back_exactly(kind, tmp_path):
    network_class, make_reference, inputs, output = KINDS[kind]
    network = ours(network_class, make_reference())
    add_lora(network, rank=4, alpha=10)
    with torch.no_grad():
        for i, parameter in enumerate(lora_parameters(network)):
            parameter.copy_(0.2 * randn(*parameter.shape, seed=i))
    save_lora(network, tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata().keys() == {"format", HEADER_KEY} and file.metadata()["format"] == "pt"
        assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in file.keys())
    reference = make_reference()
    reference.load_lora_adapter(tmp_path, use_safetensors=True, prefix=None, adapter_name="default")
    for name in layers_of(network):
        theirs, (lora,) = reference.get_submodule(name), network.get_submodule(name).loras
        assert torch.equal(theirs.lora_A["default"].weight, lora.down)
        assert torch.equal(theirs.lora_B["default"].weight, lora.up)
        assert theirs.scaling["default"] == lora.multiplier == 2.5
    with torch.no_grad():
        assert relative_l2(network(*inputs()), output(reference, *inputs())) <= 1e-5
    reference.save_lora_adapter(tmp_path / "theirs")  # and back
    back = ours(network_class, make_reference())
    load_lora(back, tmp_path / "theirs")
    for a, b in zip(lora_parameters(back), lora_parameters(network), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(back(*inputs()), network(*inputs()))


@torch.no_grad()
def test_a_scale_and_several_ranks_survive_saving(tmp_path):
    reference = reference_unet()
    factors = random_factors(reference, OLD) | random_factors(reference, ADDED, rank=5)
    unet = ours(UNet, reference)
    load_lora(unet, write_style(factors, tmp_path / "a.safetensors", "F1"), scale=0.3)
    expected = unet(*unet_inputs())
    theirs = write_again(unet, tmp_path / "again" / FILE)
    assert relative_l2(unet_output(theirs, *unet_inputs()), expected) <= 1e-5
    back = ours(UNet, reference)
    load_lora(back, tmp_path / "again" / FILE)
    assert relative_l2(back(*unet_inputs()), expected) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_gives_pefts_output(kind, tmp_path):
    network_class, make_reference, inputs, output = KINDS[kind]
    targets = ["to_q", "to_k", "to_v", "to_out.0"] + (list(ADDED) if kind == "unet" else [])
    model = peft.get_peft_model(
        make_reference(),
        peft.LoraConfig(r=2, lora_alpha=7, target_modules=targets, alpha_pattern={"to_v": 1}),
    )
    randomize_adapters(model)
    model.save_pretrained(tmp_path)
    theirs = output(model.eval(), *inputs())
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        network = ours(network_class, make_reference())
        load_lora(network, path)
        assert relative_l2(network(*inputs()), theirs) <= 1e-5
    (tmp_path / "adapter_config.json").unlink()
    assert refusal(tmp_path, network) == f"no such file: {tmp_path / 'adapter_config.json'}"


def test_stable_diffusion_helpers_prefix_the_metadata_too(tmp_path):
    factors = random_factors(reference_unet())
    path = write_style(
        factors, tmp_path / FILE, "F4", {"unet.r": 3, "unet.lora_alpha": 12, "unet.bias": "none"}
    )
    assert {f.alpha for f in read_lora(path)["unet"].values()} == {12}


# --- what is refused -------------------------------------------------------------------------------------


@functools.lru_cache
def left_alone() -> UNet:
    return ours(UNet, reference_unet())


def refusal(path, network=None) -> str:
    """The one line with which a file is refused, on a network that it must leave alone."""
    network = network or left_alone()
    layers = layers_of(network)
    with pytest.raises(CheckpointError) as error:
        load_lora(network, path)
    assert "\n" not in str(error.value) and layers_of(network) == layers
    return str(error.value)


def rewritten(tmp_path, edit, style="F3", header=None) -> Path:
    """A good file for the small U-Net, edited."""
    path = write_style(random_factors(left_alone()), tmp_path / FILE, style, header)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"} | ({HEADER_KEY: json.dumps(header)} if header else {}))
    return path


Q = "mid_block.attentions.0.to_q"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_unet_mid_block_attentions_0_to_q.lora_down.weight": 3}, "is a kohya file, which is not read"),
        ({"mid_block_attentions_0_to_q.lora_up.weight": 3}, "is a kohya file, which is not read here (mid"),
        ({f"{Q}.lora_magnitude_vector": 3}, "is a DoRA (use_dora), which is not read here (mid"),
        ({f"{Q}.lora_B.bias": 3}, "is a LoRA with biases (lora_bias), which is not read here (mid"),
        ({f"{Q}.alpha": 3}, f"unknown key {Q}.alpha"),
        ({f"{Q}.weight": 3}, f"unknown key {Q}.weight"),
        ({f"{Q}.lora_A.weight": None}, f"unpaired key {Q}.lora_B.weight"),
        ({f"{Q}.lora_B.weight": None}, f"unpaired key {Q}.lora_A.weight"),
        ({f"unet.{Q}.lora_A.weight": (3, 64)}, f"unet.{Q}.lora_A.weight says the same as {Q}.lora_A.weight"),
        ({f"{Q}.lora_A.weight": (3, 60)}, f"{Q} has down (3, 60), up (64, 3), for a weight of (64, 64)"),
        ({f"{Q}.lora_B.weight": (60, 3)}, f"{Q} has down (3, 64), up (60, 3), for a weight of (64, 64)"),
        ({f"{Q}.lora_B.weight": (64, 2)}, f"{Q} has down (3, 64) and up (64, 2)"),
        ({f"{Q}.lora_A.weight": (0, 64), f"{Q}.lora_B.weight": (64, 0)}, f"{Q} has down (0, 64)"),
        (
            {f"{Q}.lora_A.weight": (3, 64, 1, 1), f"{Q}.lora_B.weight": (64, 3, 1, 1)},
            "for a weight of (64, 64)",
        ),
        (
            {"conv_in.lora_A.weight": (2, 4, 3, 3), "conv_in.lora_B.weight": (32, 2)},
            "conv_in has down (2, 4, 3",
        ),
        (
            {"conv_in.lora_A.weight": (2, 4, 3, 3), "conv_in.lora_B.weight": (32, 2, 3, 3)},
            "conv_in has down (2, 4, 3, 3), up (32, 2, 3, 3), for a weight of (32, 4, 3, 3)",
        ),
        (
            {f"{Q}.lora_A.weight": torch.full((3, 64), math.nan)},
            f"{Q}.lora_A.weight must be floating point and",
        ),
        (
            {f"{Q}.lora_A.weight": torch.ones(3, 64).int()},
            f"{Q}.lora_A.weight must be floating point and finite",
        ),
        (
            {"text_encoder.x.lora_A.weight": 3, "text_encoder.x.lora_B.weight": (3, 3)},
            "neither prior nor decoder",
        ),
        (
            {
                "down_blocks.0.attentions.0.to_q.lora_A.weight": 3,
                "down_blocks.0.attentions.0.to_q.lora_B.weight": 3,
            },
            "this UNet has no layer down_blocks.0.attentions.0.to_q",
        ),
        (
            {
                "mid_block.attentions.0.group_norm.lora_A.weight": 3,
                "mid_block.attentions.0.group_norm.lora_B.weight": 3,
            },
            "mid_block.attentions.0.group_norm is a GroupNorm, which takes no LoRA",
        ),
        ({"mid_block.lora_A.weight": 3, "mid_block.lora_B.weight": 3}, "this UNet has no layer mid_block"),
        (
            {
                "transformer_blocks.0.attn1.to_q.lora_A.weight": 3,
                "transformer_blocks.0.attn1.to_q.lora_B.weight": 3,
            },
            "has a LoRA of the Prior; this network is the UNet",
        ),
    ],
)
def test_a_wrong_key_or_shape_refuses_the_whole_file(changes, message, tmp_path):
    def edit(tensors):
        for key, value in changes.items():
            if value is None:
                del tensors[key]
            elif isinstance(value, torch.Tensor):
                tensors[key] = value
            else:
                tensors[key] = torch.zeros((value, value) if isinstance(value, int) else value)

    path = rewritten(tmp_path, edit)
    line = refusal(path)
    assert str(path) in line and message in line


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora is True, which is not modelled here"),
        ({"lora_bias": True}, "lora_bias is True, which is not modelled here"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save is ['conv_in'], which is not modelled here"),
        ({"a_new_field": 1}, "a_new_field is 1, which is not modelled here"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only 'LORA' can be read"),
        ({"bias": "all"}, "bias is 'all'; only 'none' can be read"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; only True or False or None can be read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; only True or False"),
        ({"r": 4}, "has rank 4 there and 3 in its tensors"),
        ({"rank_pattern": {"mid_block.*to_q": 8}}, f"{Q} has rank 8 there and 3 in its tensors"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern has '(', which is no pattern"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]; an object is needed"),
        ({"lora_alpha": None}, "lora_alpha is None of type NoneType; a number is needed"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf; a finite number is needed"),
        ({"lora_alpha": ...}, "lacks lora_alpha"),
        ({"r": ...}, "lacks r"),
    ],
)
@pytest.mark.parametrize("where", ["header", "adapter_config.json"])
def test_a_config_that_is_not_modelled_is_refused_by_field_and_value(where, changes, message, tmp_path):
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": False, "a_new_field": None, **changes}
    config = {name: value for name, value in config.items() if value is not ...}
    style, header = ("F3", config) if where == "header" else ("F5", None)
    path = rewritten(tmp_path, lambda tensors: None, style, header)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    line = refusal(path)
    source = f"{path}: {HEADER_KEY}" if where == "header" else str(tmp_path / "adapter_config.json")
    assert line.startswith(source) and message in line


@pytest.mark.parametrize("text", ["{not json", "[1]", "[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(text, tmp_path):
    path = tmp_path / FILE
    save_file(
        {f"{Q}.lora_A.weight": randn(3, 64), f"{Q}.lora_B.weight": randn(64, 3)}, path, {HEADER_KEY: text}
    )
    assert f"{path}: {HEADER_KEY}" in refusal(path)


def test_a_header_whose_length_starts_like_a_pickle_is_read(tmp_path):
    path, config = tmp_path / FILE, {"r": 3, "lora_alpha": 3, "revision": ""}
    for _ in range(2):
        write_style(random_factors(reference_prior()), path, "F1", config)
        config["revision"] = "x" * ((0x80 - path.read_bytes()[0]) % 256)
    assert path.read_bytes()[0] == 0x80 and len(read_lora(path)["prior"]) == 12


def test_pickles_and_missing_and_ambiguous_files_are_refused(tmp_path):
    pickle = tmp_path / "pytorch_lora_weights.bin"
    torch.save({f"{Q}.lora_A.weight": torch.zeros(3, 64)}, pickle)
    hidden = Path(shutil.copy(pickle, tmp_path / "hidden.safetensors"))
    for path in (pickle, hidden):
        assert f"{path} is a pickle, which is never loaded here" in refusal(path)
    hidden.unlink()
    assert f"{pickle} is a pickle" in refusal(tmp_path)  # the folder, with nothing else in it
    assert refusal(tmp_path / "gone") == f"no such file: {tmp_path / 'gone'}"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == f"{tmp_path / 'empty'} holds no safetensors file"
    for name in ("a.safetensors", "b.safetensors"):
        write_style(random_factors(reference_unet()), tmp_path / name, "F1")
    assert refusal(tmp_path) == f"{tmp_path} holds a.safetensors, b.safetensors; pass one of them"
    (tmp_path / "a.safetensors").write_bytes(b"<html>not found</html>")
    assert "is not a whole safetensors file" in refusal(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    assert refusal(tmp_path / "none.safetensors") == f"{tmp_path / 'none.safetensors'} holds no tensors"
    with pytest.raises(TypeError, match="path is int; a LoRA file or folder is needed"):
        load_lora(ours(UNet, reference_unet()), 3)


def test_many_problems_make_one_line_with_a_count(tmp_path):
    reference_unet().save_pretrained(tmp_path)  # a whole network instead of a LoRA
    line = refusal(tmp_path)
    assert line.count("unknown key") == 6 and "; and " in line and "more" in line


def test_a_layer_that_both_networks_have_goes_with_the_others(tmp_path):
    layer = {"time_embedding.linear_1": Factors(randn(2, 32), randn(128, 2), 2.0)}
    path = write_style(layer, tmp_path / FILE, "F3")
    assert "is a layer of prior and decoder; its keys do not say of which" in refusal(path)
    write_style(layer | random_factors(reference_unet()), path, "F3")
    load_lora(ours(UNet, reference_unet()), path)


def test_saving_needs_exactly_one_lora(tmp_path):
    unet = ours(UNet, reference_unet())
    with pytest.raises(ValueError, match="this UNet has no LoRA to save"):
        save_lora(unet, tmp_path / FILE)
    add_lora(unet, 2)
    add_lora(unet, 2, targets="to_q")
    with pytest.raises(ValueError, match="several LoRAs are loaded; a file holds one"):
        save_lora(unet, tmp_path / FILE)
    with pytest.raises(ValueError, match="mine.bin: the file is no pickle; give it the suffix .safetensors"):
        one = ours(UNet, reference_unet())
        add_lora(one, 2)
        save_lora(one, tmp_path / "mine.bin")
    assert not list(tmp_path.iterdir())


# --- the pipeline ----------------------------------------------------------------------------------------


@pytest.fixture
def pipe(decoder_folder) -> Kandinsky:
    return Kandinsky.from_pretrained(decoder_folder)


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """One LoRA for each network, in different layouts, with names that say nothing; and both in one file."""
    unet, prior = random_factors(reference_unet(), OLD + ADDED), random_factors(reference_prior())
    files = {"unet": write_style(unet, tmp_path / "a.safetensors", "F1")}
    files["prior"] = write_style(prior, tmp_path / "b.safetensors", "F4")
    files["both"] = write_style(unet | prior, tmp_path / "c.safetensors", "F3", {"r": 3, "lora_alpha": 3})
    return files


def draw(pipe: Kandinsky) -> torch.Tensor:
    sizes = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 16, "width": 32}
    return pipe.text2img("a red cat", seed=3, output_type="latent", **sizes)


def test_a_network_that_is_read_again_gets_the_files_lora_not_the_trained_one(pipe, files):
    pipe.load_lora(files["unet"])
    before = [parameter.clone() for parameter in train_only_lora(pipe.unet)]
    with torch.no_grad():
        for parameter in lora_parameters(pipe.unet):
            parameter.add_(1)
    del pipe.unet
    assert all(map(torch.equal, lora_parameters(pipe.unet), before))


@pytest.mark.parametrize("used_before", [False, True])
def test_pipeline_loads_by_keys_adds_up_and_unloads_exactly(pipe, files, used_before):
    if used_before:
        draw(pipe)
    pipe.load_lora(files["unet"], 0.5)
    pipe.load_lora(str(files["prior"]))
    assert (pipe.loaded("unet") is not None) == used_before  # weights are read when needed
    one_each = draw(pipe)
    assert layers_of(pipe.unet) and layers_of(pipe.prior)
    pipe.load_lora(files["unet"], 0.5)
    twice = draw(pipe)
    pipe.unload_lora()
    assert not layers_of(pipe.unet) and not layers_of(pipe.prior) and not any(pipe.changes.values())
    plain = draw(pipe)
    pipe.load_lora(files["both"])
    assert relative_l2(draw(pipe), twice) <= 1e-5  # half and half make one
    assert relative_l2(one_each, plain) > 1e-2 and relative_l2(twice, one_each) > 1e-2
    pipe.unload_lora()
    pipe.unload_lora()
    assert torch.equal(draw(pipe), plain)


def test_a_file_that_is_loaded_twice_counts_twice_and_goes_with_optimize(pipe, decoder_folder, files):
    for scale in (0.5, 0.5):
        pipe.load_lora(files["both"], scale)
    pipe.optimize()
    other = Kandinsky.from_pretrained(decoder_folder)
    other.load_lora(files["both"])
    assert relative_l2(draw(pipe), draw(other)) <= 1e-4
    pipe.optimize()
    pipe.restore()
    assert sum(map(len, pipe.changes.values())) == 4


def test_unload_takes_off_what_was_added_to_any_network(pipe):
    names = {name: set(getattr(pipe, name).state_dict()) for name in ("movq", "unet")}
    for name in names:
        add_lora(getattr(pipe, name), 2)
        assert set(getattr(pipe, name).state_dict()) > names[name]
    pipe.unload_lora()
    assert {name: set(getattr(pipe, name).state_dict()) for name in names} == names


def test_unloading_leaves_what_else_is_done_to_a_network(pipe, files):
    def kept(network):
        network.was_changed = True

    for name in ("prior", "unet"):
        pipe.change(name, kept)
    pipe.load_lora(files["both"])
    pipe.unload_lora()
    assert pipe.changes == {"prior": [kept], "unet": [kept]}
    pipe.load_lora(files["unet"])
    pipe.merge_lora()
    pipe.load_lora(files["unet"])
    pipe.unload_lora()
    first, attach, merge = pipe.changes["unet"]
    assert first is kept and isinstance(attach, Attach) and merge is merge_lora


def test_unloaded_equals_never_loaded(pipe, decoder_folder, files):
    pipe.load_lora(files["both"])
    draw(pipe)
    pipe.unload_lora()
    assert torch.equal(draw(pipe), draw(Kandinsky.from_pretrained(decoder_folder)))


def test_pipeline_equals_one_with_changed_weights(pipe, files):
    expected = Kandinsky.from_pretrained(pipe.decoder_folder)
    expected.unet = ours(UNet, changed(reference_unet(), random_factors(reference_unet(), OLD + ADDED)))
    expected.prior = ours(Prior, changed(reference_prior(), random_factors(reference_prior())))
    pipe.load_lora(files["both"])
    assert relative_l2(draw(pipe), draw(expected)) <= 1e-4
    pipe.merge_lora()
    assert relative_l2(draw(pipe), draw(expected)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_that_are_freed_get_their_loras_again(decoder_folder, files, dtype):
    pipes = [
        Kandinsky.from_pretrained(decoder_folder, dtype=dtype, keep_loaded=keep) for keep in (True, False)
    ]
    plain = [draw(pipe) for pipe in pipes]
    for step in ("load", "load", "merge", "load", "unload", "load", "merge", "unload"):
        for pipe in pipes:
            {"load": lambda: pipe.load_lora(files["both"], 0.2), "merge": pipe.merge_lora}.get(
                step, pipe.unload_lora
            )()
        kept, freed = (draw(pipe) for pipe in pipes)
        assert torch.equal(kept, freed) and pipes[1].loaded("unet") is None, step
        assert relative_l2(kept, plain[0]) > 1e-3
    assert torch.equal(*plain)


def test_merged_loras_stay_and_are_saved_as_plain_weights(pipe, files, tmp_path):
    pipe.load_lora(files["both"], 0.6)
    with_lora = draw(pipe)
    pipe.merge_lora()
    pipe.unload_lora()
    assert relative_l2(draw(pipe), with_lora) <= 1e-4 and not layers_of(pipe.unet)
    decoder = tmp_path / "kandinsky-2-2-decoder"
    shutil.copytree(pipe.decoder_folder, decoder)
    shutil.copytree(pipe.prior_folder, tmp_path / "kandinsky-2-2-prior")
    pipe.unet.save_pretrained(decoder / "unet")
    pipe.prior.save_pretrained(tmp_path / "kandinsky-2-2-prior" / "prior")
    assert torch.equal(draw(Kandinsky.from_pretrained(decoder)), draw(pipe))


def test_a_trained_lora_can_be_merged_by_the_pipeline(pipe):
    with pytest.raises(ValueError, match="no LoRA is loaded"):
        pipe.merge_lora()
    add_lora(pipe.prior, rank=2)
    pipe.merge_lora()
    assert not layers_of(pipe.prior)


def test_merging_before_the_weights_are_read_merges_once(pipe, files):
    pipe.load_lora(files["both"])
    pipe.merge_lora()
    with pytest.raises(ValueError, match="no LoRA is loaded"):
        pipe.merge_lora()
    assert pipe.loaded("unet") is None and not layers_of(pipe.unet)
    expected = changed(reference_unet(), random_factors(reference_unet(), OLD + ADDED))
    assert relative_l2(pipe.unet(*unet_inputs()), unet_output(expected, *unet_inputs())) <= 1e-5


def test_the_pipelines_dtype_and_device_reach_the_base_only(pipe, files):
    pipe.load_lora(files["both"])
    draw(pipe)
    pipe.to(dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    assert {p.dtype for p in lora_parameters(pipe.unet)} == {torch.float32}
    assert draw(pipe).isfinite().all()


@pytest.mark.parametrize("used_before", [False, True])
def test_a_refused_file_changes_neither_network(pipe, files, used_before):
    if used_before:
        draw(pipe)
    tensors = load_file(files["both"])
    tensors["transformer_blocks.9.attn1.to_q.lora_A.weight"] = torch.zeros(3, 48)
    tensors["transformer_blocks.9.attn1.to_q.lora_B.weight"] = torch.zeros(48, 3)
    save_file(tensors, files["both"])
    with pytest.raises(CheckpointError, match="this Prior has no layer transformer_blocks.9.attn1.to_q"):
        pipe.load_lora(files["both"])
    assert not any(pipe.changes.values()) and not layers_of(pipe.unet) and not layers_of(pipe.prior)


@pytest.mark.parametrize(
    "scale, error", [("1", TypeError), (True, TypeError), (math.nan, ValueError), (math.inf, ValueError)]
)
def test_the_scale_is_a_finite_number(pipe, files, scale, error):
    with pytest.raises(error, match="scale is"):
        pipe.load_lora(files["unet"], scale)
    with pytest.raises(error, match="scale is"):
        load_lora(left_alone(), files["unet"], scale)
    assert not layers_of(left_alone())
    with pytest.raises(TypeError, match=r"load_lora\(\) has no argument 'weight'"):
        pipe.load_lora(files["unet"], weight=1.0)
    assert not any(pipe.changes.values())


def test_a_prior_lora_without_a_prior_says_so(decoder_folder, files, tmp_path):
    shutil.copytree(decoder_folder, tmp_path / "alone")
    pipe = Kandinsky.from_pretrained(tmp_path / "alone")
    pipe.load_lora(files["unet"])
    with pytest.raises(CheckpointError, match="has no prior beside it; pass prior=FOLDER"):
        pipe.load_lora(files["prior"])


@pytest.mark.slow
def test_the_script_draws_with_loras_and_refuses_in_one_line(decoder_folder, files, tmp_path, capsys):
    out, quick = (
        tmp_path / "out.png",
        ["--steps", "2", "--prior-steps", "2", "--height", "16", "--width", "32"],
    )
    given = ["a red cat", "--weights", decoder_folder, "--out", out, "--seed", "3", "--overwrite", *quick]
    pictures = []
    for loras in ([], ["--lora", files["unet"], "--lora", files["prior"], "--lora-scale", "0.5"]):
        assert run("text2img", *given, *loras) == 0
        pictures.append(out.read_bytes())
    pipe = Kandinsky.from_pretrained(decoder_folder)
    pipe.load_lora(files["both"], 0.5)
    sizes = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 16, "width": 32}
    pipe.text2img("a red cat", seed=3, **sizes)[0].save(tmp_path / "expected.png")
    assert pictures[0] != pictures[1]
    levels = [Image.open(path).tobytes() for path in (out, tmp_path / "expected.png")]
    assert max(abs(a - b) for a, b in zip(*levels)) <= 1
    capsys.readouterr()
    assert run("text2img", *given, "--lora", tmp_path / "gone.safetensors") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"no such file: {tmp_path / 'gone.safetensors'}" in error
