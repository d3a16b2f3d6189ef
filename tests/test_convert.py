"""Pickles into safetensors: files with published names, the authors' own layouts, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from safetensors.torch import load_file

from kandinsky import CLIPImageEncoder, CLIPTextEncoder, MoVQ, Prior, UNet
from kandinsky.checkpoint import CheckpointError
from kandinsky.convert import convert, expected_tensors
from tests.small import (
    reference_image_encoder,
    reference_movq,
    reference_prior,
    reference_text_encoder,
    reference_unet,
)
from tests.test_scripts import load

NETWORKS = {
    "unet": (UNet, reference_unet),
    "inpaint": (UNet, lambda: reference_unet(9)),
    "hint": (UNet, lambda: reference_unet(8, hint=True)),
    "prior": (Prior, reference_prior),
    "movq": (MoVQ, reference_movq),
    "text_encoder": (CLIPTextEncoder, reference_text_encoder),
    "image_encoder": (CLIPImageEncoder, reference_image_encoder),
}

UNETS = {"unet": (4, False), "inpaint": (9, False), "hint": (8, True)}
WIDE = {"block_out_channels": (64, 96, 128), "norm_num_groups": 32}  # nothing in a file tells the groups


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    written = load_file(path)
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_pickle_of_a_folder_becomes_the_file_that_is_loaded(kind, tmp_path, capsys):
    network, make = NETWORKS[kind]
    model = make()
    model.save_pretrained(tmp_path)
    (tmp_path / network.weights_name).unlink()
    tensors = model.state_dict()
    if kind == "text_encoder":  # old transformers saved it, and it is dropped
        old = tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = tmp_path / network.weights_name.replace("model.safetensors", "pytorch_model.bin", 1)
    path = path.with_name("pytorch_model.bin" if "encoder" in kind else "diffusion_pytorch_model.bin")
    torch.save(old if kind == "text_encoder" else tensors, path)
    assert load("download_weights").main(["--convert", str(path)]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / network.weights_name
    same(tmp_path / network.weights_name, tensors)
    network.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ("unet", "inpaint", "hint", "prior", "movq"))
def test_without_a_config_the_tensors_say_which_network_it_is(kind, tmp_path):
    """A head of 64 channels and 32 norm groups are what they cannot say: there the released value stands."""
    network, make = NETWORKS[kind]
    model = make() if network is not UNet else reference_unet(*UNETS[kind], **WIDE)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tune.bin")
    head_dim = getattr(model.config, "attention_head_dim", 64)
    target = convert(tmp_path / "tune.bin", head_dim=head_dim)
    assert target == tmp_path / "tune" / network.weights_name
    same(target, model.state_dict())
    written, original = json.loads((target.parent / "config.json").read_text()), model.config
    for name in (
        "block_out_channels",
        "layers_per_block",
        "in_channels",
        "addition_embed_type",
        "num_layers",
    ):
        if name in written:
            value = original[name]
            assert written[name] == (list(value) if isinstance(value, tuple) else value), name


def heads_together(tensors: dict, names: list[str], head_dim: int) -> torch.Tensor:
    """The rows of head 0 of every part, then those of head 1, and so on."""
    parts = [tensors.pop(name) for name in names]
    heads = parts[0].shape[0] // head_dim
    rows = [part[head * head_dim : (head + 1) * head_dim] for head in range(heads) for part in parts]
    return torch.cat(rows)


def renamed(tensors: dict, names: list[tuple[str, str]]) -> dict:
    """Published module names at a name's start, or between dots, to the authors'."""
    out = {}
    for name, tensor in tensors.items():
        for ours, theirs in names:
            name = re.sub(rf"(^|(?<=\.)){ours}(?=\.|$)", theirs, name)
        out[name] = tensor
    return out


def original_prior(model: PriorTransformer) -> tuple[dict, tuple]:
    """The authors' prior, and the pair of statistics that they keep in a file of its own."""
    tensors = dict(model.state_dict())
    stats = (tensors.pop("clip_mean")[0], tensors.pop("clip_std")[0])
    for i in range(model.config.num_layers):
        attn = f"transformer_blocks.{i}.attn1"
        for kind in ("weight", "bias"):
            parts = [f"{attn}.to_{p}.{kind}" for p in "qkv"]
            joined = heads_together(tensors, parts, model.config.attention_head_dim)
            tensors[f"transformer.resblocks.{i}.attn.c_qkv.{kind}"] = joined
    names = [
        ("transformer_blocks", "transformer.resblocks"),
        (r"attn1\.to_out\.0", "attn.c_proj"),
        (r"ff\.net\.0\.proj", "mlp.c_fc"),
        (r"ff\.net\.2", "mlp.c_proj"),
        ("norm1", "ln_1"),
        ("norm3", "ln_2"),
        (r"time_embedding\.linear_1", "time_embed.0"),
        (r"time_embedding\.linear_2", "time_embed.2"),
        ("proj_in", "clip_img_proj"),
        ("embedding_proj", "text_emb_proj"),
        ("encoder_hidden_states_proj", "text_enc_proj"),
        ("prd_embedding", "prd_emb"),
        ("norm_out", "final_ln"),
        ("proj_to_clip_embeddings", "out_proj"),
    ]
    out = {f"model.{name}": tensor for name, tensor in renamed(tensors, names).items()}
    return out, stats


def original_movq(model: VQModel) -> dict:
    levels = len(model.config.block_out_channels)
    out = {}
    for name, tensor in model.state_dict().items():
        is_attention = ".attentions." in name
        name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
        name = name.replace("encoder.down_blocks.", "encoder.down.")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = name.replace(".group_norm.", ".norm.").replace(".spatial_norm.", ".norm.")
        name = re.sub(r"\.to_([qkv])\.", r".\1.", name).replace(".to_out.0.", ".proj_out.")
        if is_attention and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a 1 × 1 convolution there
        out[name] = tensor
    return out


def original_unet(config: dict, tensors: dict) -> dict:
    """The authors' decoder of 2.1: blocks are counted through, resampling is a residual block."""
    tensors, depth, levels = dict(tensors), config["layers_per_block"], len(config["block_out_channels"])
    for attention in {name.rpartition(".to_q.")[0] for name in tensors if ".to_q." in name}:
        for kind in ("weight", "bias"):
            for joined, parts in (("qkv", "to_q to_k to_v"), ("encoder_kv", "add_k_proj add_v_proj")):
                parts = [f"{attention}.{part}.{kind}" for part in parts.split()]
                rows = heads_together(tensors, parts, config["attention_head_dim"])
                tensors[f"{attention}.{joined}.{kind}"] = rows[..., None] if kind == "weight" else rows
            output = f"{attention}.to_out.0.{kind}"
            rows = tensors.pop(output)
            tensors[f"{attention}.proj_out.{kind}"] = rows[..., None] if kind == "weight" else rows
    places = [("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    count = 1
    for level in range(levels):
        for block in range(depth):
            places.append((rf"down_blocks\.{level}\.resnets\.{block}", f"input_blocks.{count}.0"))
            places.append((rf"down_blocks\.{level}\.attentions\.{block}", f"input_blocks.{count}.1"))
            count += 1
        if level < levels - 1:
            places.append((rf"down_blocks\.{level}\.downsamplers\.0", f"input_blocks.{count}.0"))
            count += 1
    count = 0
    for level in range(levels):
        for block in range(depth + 1):
            attends = f"up_blocks.{level}.attentions.{block}.qkv.weight" in tensors
            places.append((rf"up_blocks\.{level}\.resnets\.{block}", f"output_blocks.{count}.0"))
            places.append((rf"up_blocks\.{level}\.attentions\.{block}", f"output_blocks.{count}.1"))
            if block == depth:
                above = f"output_blocks.{count}.{1 + attends}"
                places.append((rf"up_blocks\.{level}\.upsamplers\.0", above))
            count += 1
    places += [(r"mid_block\.resnets\.0", "middle_block.0"), (r"mid_block\.resnets\.1", "middle_block.2")]
    places += [(r"mid_block\.attentions\.0", "middle_block.1"), ("group_norm", "norm")]
    places += [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1")]
    places += [("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]
    places += [(r"time_embedding\.linear_1", "time_embed.0"), (r"time_embedding\.linear_2", "time_embed.2")]
    places += [(r"add_embedding\.text_norm", "ln_model_n"), (r"add_embedding\.text_proj", "proj_n")]
    places += [
        (r"add_embedding\.image_proj", "img_layer"),
        (r"encoder_hid_proj\.text_proj", "to_model_dim_n"),
    ]
    places += [(r"encoder_hid_proj\.image_embeds", "clip_to_seq")]
    return renamed(tensors, places)


def test_the_authors_prior_becomes_the_published_one(tmp_path):
    model = reference_prior()
    tensors, stats = original_prior(model)
    torch.save(tensors | {"causal_mask": torch.ones(81, 81)}, tmp_path / "prior.ckpt")
    torch.save(stats, tmp_path / "stats.th")
    target = convert(tmp_path / "prior.ckpt", clip_stats=tmp_path / "stats.th", head_dim=16)
    same(target, model.state_dict())
    PriorTransformer.from_pretrained(target.parent)
    with pytest.raises(CheckpointError, match="--clip-stats"):
        convert(tmp_path / "prior.ckpt", tmp_path / "b", head_dim=16)


@pytest.mark.parametrize("levels", (2, 3, 4))
def test_the_authors_movq_becomes_the_published_one(levels, tmp_path):
    model = reference_movq(levels)
    torch.save(original_movq(model), tmp_path / "movq.ckpt")
    target = convert(tmp_path / "movq.ckpt")
    same(target, model.state_dict())
    assert MoVQ.read_config(target.parent).block_out_channels == tuple(model.config.block_out_channels)


def reference_unet_2_1(in_channels: int = 4) -> UNet2DConditionModel:
    """2.1's decoder takes texts beside the image embedding."""
    config = dict(reference_unet(in_channels, attention_head_dim=16, **WIDE).config)
    changes = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"}
    changes |= {"encoder_hid_dim": 40, "cross_attention_dim": 768}  # diffusers fixes the image's width here
    model = UNet2DConditionModel.from_config({**config, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.mark.parametrize("in_channels", (4, 9))
def test_the_authors_decoder_becomes_the_published_one(in_channels, tmp_path):
    model = reference_unet_2_1(in_channels)
    torch.save(original_unet(model.config, model.state_dict()), tmp_path / "decoder.ckpt")
    target = convert(tmp_path / "decoder.ckpt", head_dim=16)
    same(target, model.state_dict())
    written = json.loads((target.parent / "config.json").read_text())
    assert written["in_channels"] == in_channels and written["addition_embed_type"] == "text_image"


def test_what_a_config_expects_is_what_diffusers_has(tmp_path):
    model = reference_unet_2_1()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in expected_tensors(config).items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


class Hostile:
    """Unpickled by Python's own loader, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", (False, True))
def test_a_hostile_pickle_is_refused_and_does_nothing(legacy, tmp_path, capsys):
    path, mark = tmp_path / "evil.bin", tmp_path / "ran"
    torch.save({"conv_in.weight": Hostile(mark)}, path, _use_new_zipfile_serialization=not legacy)
    assert load("download_weights").main(["--convert", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no plain pickle of tensors" in error
    assert not mark.exists() and not (tmp_path / "evil").exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the pickle was harmless, and the test shows nothing"


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds a dict"),
        ({"a": torch.zeros(1), "step": 3}, "more than tensors: step"),
        ({"a": torch.zeros(1)}, "no known network"),
        ({"prd_embedding": torch.zeros(1)}, "proj_in.weight"),
    ],
)
def test_what_is_no_network_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.bin")


def test_a_network_with_wrong_tensors_is_refused_with_their_names(tmp_path):
    tensors = dict(reference_movq().state_dict())
    del tensors["post_quant_conv.bias"]
    tensors["quant_conv.bias"] = torch.zeros(5)
    tensors["encoder.conv_in.bias"] = torch.zeros(64, dtype=torch.int64)
    tensors["surplus"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "x.bin")
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "x.bin")
    for piece in ("missing post_quant_conv.bias", "extra surplus", "quant_conv.bias is (5,)", "torch.int64"):
        assert piece in str(error.value)
    assert not (tmp_path / "x").exists()


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    torch.save(reference_movq().state_dict(), tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="no plain pickle"):
        convert(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "y.bin")


def test_an_existing_file_is_kept_unless_it_may_be_replaced(tmp_path):
    torch.save(reference_movq().state_dict(), tmp_path / "x.bin")
    target = convert(tmp_path / "x.bin")
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="is there already; give --overwrite"):
        convert(tmp_path / "x.bin")
    assert target.read_bytes() == b"mine"
    same(convert(tmp_path / "x.bin", overwrite=True), reference_movq().state_dict())


def test_tensors_that_share_memory_are_written_once_each(tmp_path):
    tensors = dict(reference_movq().state_dict())
    tensors["encoder.mid_block.resnets.1.conv1.bias"] = tensors["encoder.mid_block.resnets.0.conv1.bias"]
    torch.save(tensors, tmp_path / "x.bin")
    same(convert(tmp_path / "x.bin"), tensors)
