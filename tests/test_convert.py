"""Pickles made into safetensors: every network, the authors' own layouts, and what is refused.

The authors' layouts are written here from the published names by walking the networks in the order in which
their code builds them, so that the rules in `kandinsky.convert` are held against something that shares no
pattern with them.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from safetensors.torch import load_file
from torch import Tensor, nn

from kandinsky.checkpoint import CheckpointError
from kandinsky.convert import convert, infer_config
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from kandinsky.movq import MoVQ
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from tests.helpers import SHARED, largest_file, randomize, slow
from tests.small import (
    EMBEDDING_DIM,
    reference_image_encoder,
    reference_movq,
    reference_prior,
    reference_text_encoder,
    reference_unet,
)
from tests.test_scripts import run

Tensors = dict[str, Tensor]
SAFETENSORS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
NETWORKS: dict[str, tuple[type, Callable[[], nn.Module]]] = {
    "prior": (Prior, reference_prior),
    "unet": (UNet, reference_unet),
    "inpaint": (UNet, lambda: reference_unet(9)),
    "hint": (UNet, lambda: reference_unet(8, hint=True)),
    "movq": (MoVQ, reference_movq),
    "text_encoder": (CLIPTextEncoder, reference_text_encoder),
    "image_encoder": (CLIPImageEncoder, reference_image_encoder),
}


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def pickled(folder: Path, reference: nn.Module, **options) -> Path:
    """The reference's folder with a pickle in place of its safetensors; returns the pickle."""
    reference.save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    path = weights.with_name(weights.name.replace("model.safetensors", "model.bin"))
    path = path.with_name("pytorch_model.bin") if path.name == "model.bin" else path
    torch.save(reference.state_dict(), path, **options)
    return path


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("is_zip", [True, *slow(False)])
def test_a_pickle_beside_its_config_becomes_a_safetensors_file_that_loads(name, is_zip, tmp_path, capsys):
    network, make_reference = NETWORKS[name]
    reference = make_reference()
    path = pickled(tmp_path / "part", reference, _use_new_zipfile_serialization=is_zip)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert run("download_weights", "--convert", path) == 0
    target = path.parent / network.weights_name
    assert capsys.readouterr().out == f"{target}\n"
    assert_same(load_file(target), reference.state_dict())
    assert_same(network.from_pretrained(path.parent).state_dict(), reference.state_dict())
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file != target} == before


def test_shards_beside_a_pickle_are_weights_that_are_there_already(tmp_path, capsys):
    reference = reference_movq()
    path = pickled(tmp_path / "movq", reference)
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert run("download_weights", "--convert", path) == 2
    assert f"{index} is there already; give --overwrite" in one_line(capsys)
    assert run("download_weights", "--convert", path, "--overwrite") == 0 and not index.exists()
    assert_same(MoVQ.from_pretrained(path.parent).state_dict(), reference.state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_stays_and_a_state_dict_may_be_wrapped(tmp_path, wrapped):
    reference = reference_movq().half()
    path = pickled(tmp_path / "movq", reference)
    if wrapped:
        torch.save({"state_dict": reference.state_dict()}, path)
    assert_same(load_file(convert(path)), reference.state_dict())


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    reference = reference_movq()
    tensors = reference.state_dict()
    both = torch.randn(2, *tensors["quant_conv.weight"].shape)
    tensors |= {"quant_conv.weight": both[0], "post_quant_conv.weight": both[1]}
    tensors["quant_conv.bias"] = tensors["post_quant_conv.bias"]
    path = pickled(tmp_path / "movq", reference)
    torch.save(tensors, path)
    assert_same(load_file(convert(path)), tensors)


def test_stale_position_ids_are_left_out(tmp_path):
    reference = reference_text_encoder()
    path = pickled(tmp_path / "text_encoder", reference)
    torch.save(reference.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    assert_same(load_file(convert(path)), reference.state_dict())


def test_a_fine_tune_of_any_name_gets_a_folder_beside_it_or_the_one_given(tmp_path, capsys):
    reference = reference_movq()
    config = json.loads(reference.to_json_string())
    torch.save(reference.state_dict(), tmp_path / "anime.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("download_weights", "--convert", tmp_path / "anime.bin") == 0
    assert run("download_weights", "--convert", tmp_path / "anime.bin", "--out", tmp_path / "there") == 0
    for folder in (tmp_path / "anime", tmp_path / "there"):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", SAFETENSORS]
        assert_same(MoVQ.from_pretrained(folder).state_dict(), reference.state_dict())
    (tmp_path / "anime.bin").rename(tmp_path / "anime_without_suffix")
    assert run("download_weights", "--convert", tmp_path / "anime_without_suffix") == 2
    assert "give --out FOLDER" in one_line(capsys)


RELEASED = {
    "kandinsky-2-2-prior__prior": (PriorTransformer, "prior"),
    "kandinsky-2-2-decoder__unet": (UNet2DConditionModel, "unet"),
    "kandinsky-2-2-decoder-inpaint__unet": (UNet2DConditionModel, "unet"),
    "kandinsky-2-2-controlnet-depth__unet": (UNet2DConditionModel, "unet"),
    "kandinsky-2-2-decoder__movq": (VQModel, "movq"),
    "kandinsky-2-1-prior__prior": (PriorTransformer, "prior"),
    "kandinsky-2-1__unet": (UNet2DConditionModel, "unet"),
    "kandinsky-2-1-inpaint__unet": (UNet2DConditionModel, "unet"),
    "kandinsky-2-1__movq": (VQModel, "movq"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_without_a_config_names_and_shapes_tell_the_released_network(name):
    path = SHARED / "checkpoints" / "configs" / f"{name}.json"
    if not path.exists():
        pytest.skip("needs the project's documents")
    published = json.loads(path.read_text())
    keys = (SHARED / "checkpoints" / "keys" / f"{name}.keys.txt").read_text().splitlines()
    rows = [line.split("\t") for line in keys if not line.startswith("#")]
    tensors = {row[0]: torch.empty(json.loads(row[1]), device="meta") for row in rows}
    with torch.device("meta"):
        again = RELEASED[name][0].from_config(infer_config(tensors)).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in tensors.items()}
    inferred = {k: v for k, v in infer_config(tensors).items() if k[0] != "_" and k in published}
    inferred |= {k: list(v) for k, v in inferred.items() if isinstance(v, tuple)}
    # of the same meaning: what FACTS lists as off either way
    assert {
        k: (v, published[k]) for k, v in inferred.items() if v != published[k] and (v or published[k])
    } == {}


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused_and_never_runs(how, tmp_path, capsys):
    path, trace = tmp_path / "fine-tune.bin", tmp_path / "trace"
    content = {"conv_in.weight": torch.zeros(2), "x": Bomb(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    assert run("download_weights", "--convert", path) == 2
    assert "is no plain pickle of tensors, and was not loaded" in one_line(capsys)
    assert list(tmp_path.iterdir()) == [path]
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert trace.read_text() == "it ran"  # the bomb is live


@pytest.mark.parametrize(
    "content, what",
    [
        ([], "a list; a dictionary"),
        ({}, "an empty dictionary; a dictionary"),
        ({"state_dict": {}}, "an empty dictionary; a dictionary"),
        (torch.zeros(2), "a Tensor; a dictionary"),
        ({"a": 3}, "more than tensors: a"),
        ({3: torch.zeros(2)}, "more than tensors: 3"),
        ("text", "a str; a dictionary"),
    ],
)
def test_other_contents_are_one_line(content, what, tmp_path, capsys):
    torch.save(content, tmp_path / "x.bin")
    assert run("download_weights", "--convert", tmp_path / "x.bin") == 2
    assert f"x.bin holds {what}" in one_line(capsys) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "garbage", "folder"])
def test_a_damaged_pickle_is_one_line(damage, tmp_path, capsys):
    path = tmp_path / "x.bin"
    torch.save(reference_movq().state_dict(), path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"empty": b"", "truncated": whole[:-5000], "garbage": b"<html>" * 99}[damage])
    assert run("download_weights", "--convert", path) == 2
    assert str(path) in one_line(capsys) and not (tmp_path / "x").exists()


def test_wrong_tensors_are_listed_and_nothing_is_written(tmp_path, capsys):
    path = pickled(tmp_path / "movq", reference_movq())
    tensors = torch.load(path, weights_only=True)
    del tensors["quant_conv.bias"]
    tensors["extra.weight"] = torch.zeros(3)
    tensors["quant_conv.weight"] = torch.zeros(1, 2, 3)
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"].to(torch.float8_e4m3fn)
    tensors["post_quant_conv.bias"] = torch.zeros(4, dtype=torch.int64)
    torch.save(tensors, path)
    assert run("download_weights", "--convert", path) == 2
    err = one_line(capsys)
    for problem in (
        "missing quant_conv.bias (4,)",
        "extra extra.weight (3,)",
        "quant_conv.weight is (1, 2, 3), needs (4, 4, 1, 1)",
        "post_quant_conv.bias holds torch.int64, needs one of F64, F32, F16, BF16",
        "post_quant_conv.weight holds torch.float8_e4m3fn, needs one of F64",
    ):
        assert problem in err
    assert not (path.parent / SAFETENSORS).exists()


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a": torch.zeros(2)}, "tensors like a are of no known network"),
        ({"prd_embedding": torch.zeros(2)}, "a network without 'proj_in.weight'"),
        (
            {
                "prd_embedding": torch.zeros(2),
                "proj_in.weight": torch.zeros(2, 2),
                "positional_embedding": torch.zeros(3),
            },
            "a tensor has fewer dimensions than in any known network",
        ),
        (
            {"conv_norm_out.weight": torch.zeros(2)},
            "a network without 'encoder_hid_proj.image_embeds.weight'",
        ),
        (
            {
                "model.prd_emb": torch.zeros(2),
                "model.transformer.resblocks.0.attn.c_qkv.weight": torch.tensor(1.0),
            },
            "() does not divide into heads of 64",
        ),
    ],
)
def test_an_unknown_network_without_config_is_one_line(tensors, message, tmp_path, capsys):
    torch.save(tensors, tmp_path / "x.bin")
    assert run("download_weights", "--convert", tmp_path / "x.bin") == 2
    assert message in one_line(capsys)


def test_the_config_of_another_network_is_refused(tmp_path, capsys):
    path = pickled(tmp_path / "movq", reference_movq())
    (path.parent / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert run("download_weights", "--convert", path) == 2
    assert "is of 'AutoencoderKL'; known are PriorTransformer" in one_line(capsys)


def test_what_the_reader_refuses_of_a_config_is_refused_before_anything_is_written(tmp_path, capsys):
    path = pickled(tmp_path / "unet", text_image_unet(4, block_out_channels=(32, 64, 96), layers_per_block=2))
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | {"encoder_hid_dim_type": "image_proj"}))
    assert run("download_weights", "--convert", path) == 2
    assert "addition_embed_type is 'text_image'" in one_line(capsys)
    assert not (path.parent / SAFETENSORS).exists()


def test_what_is_there_stays_unless_asked(tmp_path, capsys):
    path = pickled(tmp_path / "movq", reference_movq())
    target = path.parent / SAFETENSORS
    target.write_bytes(b"mine")
    assert run("download_weights", "--convert", path) == 2
    assert "is there already; give --overwrite" in one_line(capsys) and target.read_bytes() == b"mine"
    assert run("download_weights", "--convert", path, "--overwrite") == 0
    assert_same(load_file(target), reference_movq().state_dict())


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, capsys):
    path = pickled(tmp_path / "movq", reference_movq())
    before = sorted(path.parent.iterdir())
    with largest_file(100_000):
        assert run("download_weights", "--convert", path) == 2
    assert f"{path.parent / SAFETENSORS} was not written" in one_line(capsys)
    assert sorted(path.parent.iterdir()) == before


# The authors' layouts, from the published names.

HEAD_DIM = 8


def packed(parts: list[Tensor], head_dim: int) -> Tensor:
    """One matrix or bias of all parts: head by head, and in a head part by part."""
    heads = range(parts[0].shape[0] // head_dim)
    return torch.cat([part[head_dim * i : head_dim * (i + 1)] for i in heads for part in parts])


def moved(tensors: Tensors, old: str, new: str, dims: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias of a module under another name; `dims` more axes make a linear layer a convolution."""
    for kind in ("weight", "bias"):
        if f"{old}.{kind}" in tensors:
            tensor = tensors.pop(f"{old}.{kind}")
            yield f"{new}.{kind}", tensor.reshape(*tensor.shape, *[1] * dims) if kind == "weight" else tensor


def joined(
    tensors: Tensors, old: str, names: tuple[str, ...], new: str, head_dim: int, dims: int = 0
) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        tensor = packed([tensors.pop(f"{old}.{name}.{kind}") for name in names], head_dim)
        yield f"{new}.{kind}", tensor.reshape(*tensor.shape, *[1] * dims) if kind == "weight" else tensor


def original_prior(published: Tensors, head_dim: int) -> tuple[Tensors, tuple[Tensor, Tensor]]:
    """The authors' prior, and the statistics that they keep apart."""
    left, out = dict(published), {}
    stats = left.pop("clip_mean")[0], left.pop("clip_std")[0]
    out["model.positional_embedding"] = left.pop("positional_embedding")
    out["model.prd_emb"] = left.pop("prd_embedding")
    outer = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    outer |= {"proj_in": "clip_img_proj", "embedding_proj": "text_emb_proj", "norm_out": "final_ln"}
    outer |= {"encoder_hidden_states_proj": "text_enc_proj", "proj_to_clip_embeddings": "out_proj"}
    for old, new in outer.items():
        out |= moved(left, old, f"model.{new}")
    inner = {"attn1.to_out.0": "attn.c_proj", "ff.net.0.proj": "mlp.c_fc", "ff.net.2": "mlp.c_proj"}
    inner |= {"norm1": "ln_1", "norm3": "ln_2"}
    block = 0
    while f"transformer_blocks.{block}.norm1.weight" in left:
        old, new = f"transformer_blocks.{block}", f"model.transformer.resblocks.{block}"
        out |= joined(left, f"{old}.attn1", ("to_q", "to_k", "to_v"), f"{new}.attn.c_qkv", head_dim)
        for a, b in inner.items():
            out |= moved(left, f"{old}.{a}", f"{new}.{b}")
        block += 1
    assert not left
    return out, stats


def original_unet(published: Tensors, levels: int, layers: int, head_dim: int) -> Tensors:
    """The authors' decoder: all levels' blocks counted through, down and up, the samplers among them."""
    left, out = dict(published), {}
    outer = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    outer |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    outer |= {"add_embedding.text_norm": "ln_model_n", "add_embedding.text_proj": "proj_n"}
    outer |= {"add_embedding.image_proj": "img_layer", "encoder_hid_proj.image_embeds": "clip_to_seq"}
    outer |= {"encoder_hid_proj.text_proj": "to_model_dim_n"}
    for old, new in outer.items():
        out |= moved(left, old, new)

    def resnet(old: str, new: str) -> None:
        names = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
        names |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
        for a, b in names.items():
            out.update(moved(left, f"{old}.{a}", f"{new}.{b}"))

    def attention(old: str, new: str) -> None:
        out.update(moved(left, f"{old}.group_norm", f"{new}.norm"))
        out.update(joined(left, old, ("to_q", "to_k", "to_v"), f"{new}.qkv", head_dim, dims=1))
        out.update(joined(left, old, ("add_k_proj", "add_v_proj"), f"{new}.encoder_kv", head_dim, dims=1))
        out.update(moved(left, f"{old}.to_out.0", f"{new}.proj_out", dims=1))

    place = 1
    for level in range(levels):
        for layer in range(layers):
            resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{place}.0")
            if level:
                attention(f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{place}.1")
            place += 1
        if level < levels - 1:
            resnet(f"down_blocks.{level}.downsamplers.0", f"input_blocks.{place}.0")
            place += 1
    for old, new in (("resnets.0", "0"), ("resnets.1", "2")):
        resnet(f"mid_block.{old}", f"middle_block.{new}")
    attention("mid_block.attentions.0", "middle_block.1")
    place = 0
    for level in range(levels):
        has_attention = level < levels - 1
        for layer in range(layers + 1):
            resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{place}.0")
            if has_attention:
                attention(f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{place}.1")
            if layer == layers and level < levels - 1:
                resnet(f"up_blocks.{level}.upsamplers.0", f"output_blocks.{place}.{1 + has_attention}")
            place += 1
    assert not left, sorted(left)
    return out


def original_movq(published: Tensors, levels: int, layers: int) -> Tensors:
    """The authors' MoVQ: the decoder's levels counted from the finest, attention by 1×1 convolutions."""
    left, out = dict(published), {}
    for name in ("quant_conv", "post_quant_conv", "quantize.embedding"):
        out |= moved(left, name, name)
    for side in ("encoder", "decoder"):
        for name in ("conv_in", "conv_out"):
            out |= moved(left, f"{side}.{name}", f"{side}.{name}")

    def norm(side: str, old: str, new: str) -> None:
        for inner in [""] if side == "encoder" else [".norm_layer", ".conv_y", ".conv_b"]:
            out.update(moved(left, old + inner, new + inner))

    def resnet(side: str, old: str, new: str) -> None:
        for name in ("norm1", "norm2"):
            norm(side, f"{side}.{old}.{name}", f"{side}.{new}.{name}")
        for a, b in {"conv1": "conv1", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}.items():
            out.update(moved(left, f"{side}.{old}.{a}", f"{side}.{new}.{b}"))

    def attention(side: str, old: str, new: str) -> None:
        kind = "group_norm" if side == "encoder" else "spatial_norm"
        norm(side, f"{side}.{old}.{kind}", f"{side}.{new}.norm")
        for a, b in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            out.update(moved(left, f"{side}.{old}.{a}", f"{side}.{new}.{b}", dims=2))

    for side, kind, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        norm(side, f"{side}.conv_norm_out", f"{side}.norm_out")
        for i in (0, 1):
            resnet(side, f"mid_block.resnets.{i}", f"mid.block_{i + 1}")
        attention(side, "mid_block.attentions.0", "mid.attn_1")
        for level in range(levels):
            place = level if side == "encoder" else levels - 1 - level
            for layer in range(layers + (side == "decoder")):
                resnet(side, f"{kind}_blocks.{level}.resnets.{layer}", f"{kind}.{place}.block.{layer}")
                if place == levels - 1:
                    attention(
                        side, f"{kind}_blocks.{level}.attentions.{layer}", f"{kind}.{place}.attn.{layer}"
                    )
            old = f"{side}.{kind}_blocks.{level}.{sampler}rs.0.conv"
            out.update(moved(left, old, f"{side}.{kind}.{place}.{sampler}.conv"))
    assert not left, sorted(left)
    return out


def text_image_unet(in_channels: int, **sizes) -> UNet2DConditionModel:
    """2.1's decoder, small: ten image tokens, and the texts of a tower of another width."""
    settings = {"attention_head_dim": HEAD_DIM, "cross_attention_dim": EMBEDDING_DIM, **sizes}
    attended = len(settings["block_out_channels"]) - 1
    return randomize(
        UNet2DConditionModel(
            in_channels=in_channels,
            out_channels=8,
            down_block_types=["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * attended,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=["SimpleCrossAttnUpBlock2D"] * attended + ["ResnetUpsampleBlock2D"],
            encoder_hid_dim=20,
            encoder_hid_dim_type="text_image_proj",
            addition_embed_type="text_image",
            resnet_time_scale_shift="scale_shift",
            **settings,
        )
    )


def test_the_authors_prior_gives_the_published_tensors(tmp_path):
    reference = reference_prior()
    original, stats = original_prior(reference.state_dict(), 16)
    original |= {"causal_mask": torch.zeros(1, 81, 81), "cf_mask": torch.ones(1, 77, dtype=torch.bool)}
    torch.save(original, tmp_path / "prior.ckpt")
    torch.save(stats, tmp_path / "stats.th")
    target = convert(tmp_path / "prior.ckpt", clip_stats=tmp_path / "stats.th", head_dim=16)
    assert target == tmp_path / "prior" / SAFETENSORS
    assert_same(load_file(target), reference.state_dict())
    assert_same(Prior.from_pretrained(target.parent).state_dict(), reference.state_dict())


def test_the_authors_prior_needs_its_statistics(tmp_path, capsys):
    original, stats = original_prior(reference_prior().state_dict(), 16)
    torch.save(original, tmp_path / "prior.ckpt")
    assert run("download_weights", "--convert", tmp_path / "prior.ckpt") == 2
    assert "head" in one_line(capsys)  # the released heads are of 64
    with pytest.raises(CheckpointError, match="give ViT-L-14_stats.th as --clip-stats"):
        convert(tmp_path / "prior.ckpt", head_dim=16)
    for wrong in (stats[0], [stats[0]], {"mean": stats[0]}, [1.0, 2.0]):
        torch.save(wrong, tmp_path / "stats.th")
        with pytest.raises(CheckpointError, match="does not hold a pair of tensors, mean and deviation"):
            convert(tmp_path / "prior.ckpt", clip_stats=tmp_path / "stats.th", head_dim=16)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("in_channels", [4, *slow(9)])
@pytest.mark.parametrize("channels, layers", [((32, 64, 96), 2), *slow(((32, 64, 96, 128), 3))])
def test_the_authors_decoder_gives_the_published_tensors(in_channels, channels, layers, tmp_path):
    reference = text_image_unet(in_channels, block_out_channels=channels, layers_per_block=layers)
    original = original_unet(reference.state_dict(), len(channels), layers, HEAD_DIM)
    torch.save(original, tmp_path / "decoder.ckpt")
    target = convert(tmp_path / "decoder.ckpt", head_dim=HEAD_DIM)
    assert_same(load_file(target), reference.state_dict())
    config = json.loads((target.parent / "config.json").read_text())
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert again.config.in_channels == in_channels


@pytest.mark.parametrize("levels", [3, *slow(2, 4)])
def test_the_authors_movq_gives_the_published_tensors(levels, tmp_path):
    reference = reference_movq(levels)
    torch.save(original_movq(reference.state_dict(), levels, 1), tmp_path / "movq.ckpt")
    (tmp_path / "config.json").write_text('{"_class_name": "of something else"}')
    target = convert(tmp_path / "movq.ckpt")
    assert_same(load_file(target), reference.state_dict())
    assert_same(MoVQ.from_pretrained(target.parent).state_dict(), reference.state_dict())


@pytest.mark.parametrize("name", ["kandinsky-2-1-prior__prior", "kandinsky-2-1__movq", "kandinsky-2-1__unet"])
def test_the_authors_layouts_at_released_sizes_give_the_published_names(name):
    path = SHARED / "checkpoints" / "keys" / f"{name}.keys.txt"
    if not path.exists():
        pytest.skip("needs the project's documents")
    from kandinsky.convert import published

    rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    tensors = {row[0]: torch.empty(json.loads(row[1]), device="meta") for row in rows}
    if name.endswith("prior"):
        original, stats = original_prior(tensors, 64)
        original |= {"clip_mean": stats[0][None], "clip_std": stats[1][None]}
    elif name.endswith("movq"):
        original = original_movq(tensors, 4, 2)
    else:
        original = original_unet(tensors, 4, 3, 64)
    assert not original.keys() <= tensors.keys()
    again = published(original)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in tensors.items()}
