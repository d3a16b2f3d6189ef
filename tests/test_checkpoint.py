"""The published layout: what is read, what is refused and how it is said, what is written."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kandinsky.checkpoint import CheckpointError, atomic_file, open_safetensors, read_json, temporaries
from kandinsky.config import (
    HINT_UNET,
    INPAINT_UNET,
    CLIPImageConfig,
    CLIPTextConfig,
    MoVQConfig,
    MultilingualConfig,
    PriorConfig,
    UNetConfig,
    read_config,
)
from kandinsky.encoders import CLIPImageEncoder, CLIPTextEncoder
from kandinsky.movq import TO_ENCODE, MoVQ
from kandinsky.optimize import use_channels_last
from kandinsky.prior import Prior
from kandinsky.unet import UNet
from tests.helpers import SHARED, norms, randn, randomize, relative_l2
from tests.small import (
    ours,
    reference_image_encoder,
    reference_movq,
    reference_prior,
    reference_text_encoder,
    reference_unet,
)
from tests.test_scripts import run

WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = {
    "unet": (UNet, reference_unet, UNet2DConditionModel),
    "prior": (Prior, reference_prior, PriorTransformer),
    "movq": (MoVQ, reference_movq, VQModel),
}
OFFICIAL = {
    "kandinsky-2-2-decoder__unet": (UNet, UNetConfig()),
    "kandinsky-2-2-decoder-inpaint__unet": (UNet, INPAINT_UNET),
    "kandinsky-2-2-controlnet-depth__unet": (UNet, HINT_UNET),
    "kandinsky-2-2-decoder__movq": (MoVQ, MoVQConfig()),
    "kandinsky-2-2-prior__prior": (Prior, PriorConfig()),
    "kandinsky-2-2-prior__text_encoder": (CLIPTextEncoder, CLIPTextConfig()),
    "kandinsky-2-2-prior__image_encoder": (CLIPImageEncoder, CLIPImageConfig()),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small U-Net as diffusers saves it."""
    reference_unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: t.clone() for name, t in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path, network: type = UNet, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        network.from_pretrained(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_what_diffusers_saves_loads_here_and_the_reverse(name, tmp_path):
    network, make_reference, reference_class = NETWORKS[name]
    reference = make_reference()
    reference.save_pretrained(tmp_path / "theirs")
    model = network.from_pretrained(tmp_path / "theirs")
    assert not model.training
    model.save_pretrained(tmp_path / "ours")
    back = reference_class.from_pretrained(tmp_path / "ours")
    assert back.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(back.state_dict()[k], v) for k, v in reference.state_dict().items())
    theirs, again = (json.loads(m.to_json_string()) for m in (reference, back))
    assert all(again[name] == value for name, value in theirs.items() if name[0] != "_")


@pytest.mark.parametrize(
    "network, make_reference",
    [
        *((network, make_reference) for network, make_reference, _ in NETWORKS.values()),
        (CLIPTextEncoder, reference_text_encoder),
        (CLIPImageEncoder, reference_image_encoder),
    ],
)
def test_every_norm_has_the_references_eps_and_groups(network, make_reference):
    reference = make_reference()
    assert norms(ours(network, reference)) == norms(reference) != {}


@torch.no_grad()
def test_sharded_files_load_like_a_single_one(tmp_path):
    reference = reference_unet()
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = UNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in reference.state_dict().items())


def test_weights_are_cast_on_the_way(folder):
    assert {p.dtype for p in UNet.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def predicted_bytes(tensors: dict[str, torch.Tensor], stale: dict[str, list[int]], dtype: str) -> int:
    """Of the safetensors file that holds these, and stale integers by name and shape.

    Such a file is 8 bytes, a JSON header padded to 8 bytes, the tensors by element size, then name.
    """
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    rows = [(key, "I64", shape, 8) for key, shape in sorted(stale.items())]
    size = {"F16": 2, "F32": 4}[dtype]
    rows += [(key, dtype, list(tensor.shape), size) for key, tensor in sorted(tensors.items())]
    for key, kind, shape, width in rows:
        end = offset + width * math.prod(shape)
        entries[key] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-header // 8) * 8 + offset


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_shapes_and_file_sizes_are_the_official_ones(name):
    path = SHARED / "checkpoints" / "keys" / f"{name}.keys.txt"
    if not path.exists():
        pytest.skip("needs the project's documents")
    network, config = OFFICIAL[name]
    with torch.device("meta"):
        tensors = network(config).state_dict()
    lines = path.read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    stale = {row[0]: row for row in rows if row[2] == "I64"}
    official = {row[0]: row[1] for row in rows if row[0] not in stale}
    assert {k: str(list(v.shape)) for k, v in tensors.items()} == official
    assert set(stale) <= {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}

    integers = {key: json.loads(row[1]) for key, row in stale.items()}
    predicted = predicted_bytes(tensors, integers, "F16" if "image_encoder" in name else "F32")
    (sizes,) = [line for line in lines if "official size(s)" in line]
    assert f"official size(s)=[{predicted}]" in sizes


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_are_our_defaults_and_are_written_back_in_meaning(name):
    repository, part = name.split("__")
    path = SHARED / "checkpoints" / "official_small_files" / repository / part / "config.json"
    if not path.exists():
        pytest.skip("needs the project's documents")
    network, config = OFFICIAL[name]
    published = json.loads(path.read_text())
    assert read_config(network.config_class, published) == config
    written = config.published()
    assert {k: v for k, v in written.items() if k != "architectures" and published[k] != v} == {}
    left_out = {k for k in published if k not in written and not k.startswith("_")}
    assert left_out <= network.config_class.IGNORED | {k for k in left_out if published[k] in (None, False)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'; 'UNet2DConditionModel' is needed here"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; this implementation models only 1e-05"),
        (
            {"upcast_attention": True},
            "upcast_attention is True; this implementation models only null or false",
        ),
        ({"a_new_field": 3}, "a_new_field is 3; this implementation models only null or false"),
        ({"addition_embed_type": "text"}, "addition_embed_type is 'text'; this network knows 'image'"),
        ({"layers_per_block": [1, 2, 2]}, r"layers_per_block is [1, 2, 2]; a positive integer is needed"),
        (
            {"block_out_channels": [32, 0]},
            "block_out_channels is [32, 0]; a list of positive integers is needed",
        ),
        ({"block_out_channels": [32, 48]}, "down_block_types is "),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"norm_num_groups": 5}, "config.json: 32 channels do not divide into 5 groups (norm_num_groups)"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_by_field_and_value(folder, changes, message):
    edit_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize("config", [CLIPTextConfig(), CLIPImageConfig(), MultilingualConfig()])
def test_an_encoder_whose_heads_do_not_divide_it_is_refused(config):
    published = config.published() | {"num_attention_heads": 7}
    with pytest.raises(
        CheckpointError, match="x.json: .* channels do not divide into 7 heads .num_attention"
    ):
        read_config(type(config), published, "x.json")


def test_a_movq_whose_groups_do_not_divide_it_is_refused():
    for changes in ({"block_out_channels": [48, 96, 96, 96]}, {"norm_num_groups": 24}):
        with pytest.raises(CheckpointError, match="x.json: .* channels do not divide into .* groups"):
            read_config(MoVQConfig, MoVQConfig().published() | changes, "x.json")


def test_fields_that_change_nothing_are_accepted(folder):
    edit_config(folder, _anything=1, addition_embed_type_num_heads=8, a_new_field=None, another=False)
    UNet.from_pretrained(folder)


@pytest.mark.parametrize("absent", [True, False])
def test_a_movq_whose_codebook_says_no_width_has_the_latents(absent):
    """As diffusers saves a VQModel that was made without `vq_embed_dim`."""
    published = MoVQConfig().published() | {"vq_embed_dim": None}
    if absent:
        del published["vq_embed_dim"]
    assert read_config(MoVQConfig, published) == MoVQConfig()
    with pytest.raises(CheckpointError, match="vq_embed_dim is 8; this implementation models only 4"):
        read_config(MoVQConfig, published | {"vq_embed_dim": 8})


@pytest.mark.parametrize("absent", [True, False])
def test_a_unet_without_sample_size_was_made_for_64(folder, absent):
    edit_config(folder, sample_size=None)
    if absent:
        config = json.loads((folder / "config.json").read_text())
        del config["sample_size"]
        (folder / "config.json").write_text(json.dumps(config))
    assert UNet.from_pretrained(folder).config.sample_size == 64


def test_a_config_without_a_needed_field_is_refused(folder):
    path = folder / "config.json"
    for field in ("in_channels", "resnet_time_scale_shift"):
        config = json.loads(path.read_text())
        del config[field]
        path.write_text(json.dumps(config))
        assert refusal(folder) == f"{path} lacks {field}"
        reference_unet().save_pretrained(folder)


@given(
    st.sampled_from(sorted(UNetConfig().published())), st.sampled_from([-1, 0, 1.5, "", "x", [], {}, [None]])
)
@example("addition_embed_type", [])
@example("addition_embed_type", {})
@example("attention_head_dim", 7)
@settings(max_examples=60, deadline=None)
def test_no_odd_config_value_escapes_a_checkpoint_error(field, value):
    published = {**UNetConfig().published(), field: value}
    try:
        config = read_config(UNetConfig, published)
    except CheckpointError as error:
        assert field in str(error)
        assert "\n" not in str(error)
    else:  # accepted: it means the same
        assert config == UNetConfig()


def test_missing_extra_misshapen_and_integer_tensors_are_listed(folder):
    def edit(tensors):
        del tensors["conv_in.bias"]
        tensors["conv_extra.bias"] = torch.zeros(3)
        tensors["conv_out.weight"] = torch.zeros(8, 32, 1, 1)
        tensors["conv_out.bias"] = torch.zeros(8, dtype=torch.int64)

    edit_weights(folder, edit)
    message = refusal(folder)
    for part in (
        "missing conv_in.bias (32,)",
        "extra conv_extra.bias (3,)",
        "conv_out.weight is (8, 32, 1, 1), needs (8, 32, 3, 3)",
        "conv_out.bias holds I64, needs one of F64, F32, F16, BF16",
    ):
        assert part in message


def test_many_wrong_tensors_make_one_line_with_a_count(folder):
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[:100]])
    assert "and 92 more" in refusal(folder)


def test_a_network_is_read_without_what_is_not_called(tmp_path):
    whole = ours(MoVQ, reference_movq())
    whole.save_pretrained(tmp_path)
    half = MoVQ.from_pretrained(tmp_path, without=TO_ENCODE)
    z = randn(1, 4, 4, 4)
    assert torch.equal(half.decode(z), whole.decode(z))
    assert {name.split(".")[0] for name in half.state_dict()} == {"post_quant_conv", "decoder"}
    for call in (half.encode, half):
        with pytest.raises(RuntimeError, match="this network was read without what is called here; read the"):
            call(randn(1, 3, 16, 16))
    with pytest.raises(
        CheckpointError, match="MoVQ was read without encoder, quant_conv, quantize; read the"
    ):
        half.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    with pytest.raises(ValueError, match="without is 'codebook'; allowed are 'encoder', "):
        MoVQ.from_pretrained(tmp_path, without="codebook")
    with pytest.raises(TypeError, match="without is 3; names of attributes are needed"):
        MoVQ.from_pretrained(tmp_path, without=3)
    MoVQ.from_pretrained(tmp_path, without=["encoder", "encoder"])
    MoVQ.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    edit_weights(tmp_path, lambda tensors: tensors.pop("encoder.conv_in.bias"))
    with pytest.raises(CheckpointError, match="missing encoder.conv_in.bias"):  # still a whole checkpoint
        MoVQ.from_pretrained(tmp_path, without=TO_ENCODE)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    assert f"{folder / WEIGHTS} is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "meta"}, "device 'meta' holds no numbers"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8; allowed are torch.float32"),
    ],
)
def test_a_wrong_device_or_dtype_is_not_taken_for_a_damaged_file(folder, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        UNet.from_pretrained(folder, **wrong)
    assert not isinstance(error.value, CheckpointError) and "\n" not in str(error.value)


def test_a_file_of_another_name_is_pointed_at(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert "there is diffusion_pytorch_model.fp16.safetensors: give it that name" in refusal(folder)


def test_written_files_can_be_read_by_others(tmp_path):
    umask = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_garbage_and_pickles_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"<html>not found</html>" * 100)
    assert "is not a whole safetensors file" in refusal(folder)
    torch.save({"a": torch.zeros(2)}, folder / WEIGHTS)
    assert "is a pickle, which is never loaded here" in refusal(folder)
    for number in range(5 + 1):
        (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}, protocol=number))
        kind = "is a pickle, which is never loaded here" if number > 1 else "is not a whole safetensors file"
        assert kind in refusal(folder)
    (folder / WEIGHTS).write_bytes(
        (0x7180).to_bytes(8, "little") + b'{"a":'
    )  # cut short: begins as pickles do
    assert "is not a whole safetensors file" in refusal(folder)


def test_a_folder_with_only_a_pickle_says_how_to_convert_it(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    message = refusal(folder)
    assert "only the pickle diffusion_pytorch_model.bin" in message and "--convert" in message


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["model-00001-of-00002.bin", "model-00002-of-00002.bin", "model.bin.index.json"],
            "transformers can",
        ),
        (["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"], f"fetch {WEIGHTS}.index.json"),
        (["x.fp16-00001-of-00002.safetensors", f"{WEIGHTS}.index.fp16.json"], f"name {WEIGHTS}.index.json"),
        (["x.pth"], "x.pth --out "),
        (["x.bin", "x.fp16.safetensors"], "there is x.fp16.safetensors: give it that name"),
        (["x.pth", "pytorch_lora_weights.safetensors"], "there is only the pickle x.pth"),
    ],
)
def test_weights_in_another_form_say_what_fits_them(folder, names, message):
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    said = refusal(folder)
    assert said.startswith(f"no such file: {folder / WEIGHTS}; there ") and message in said
    assert ("--convert" in said) == ("x.pth" in names)


def test_the_advice_on_a_pickle_works(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "x.pth")
    (folder / WEIGHTS).unlink()
    command = re.search("`scripts/download_weights.py (.*)`", refusal(folder))[1]
    assert run("download_weights", *command.split()) == 0
    UNet.from_pretrained(folder)


def test_missing_files_and_folders_are_named(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == f"no such file: {folder / WEIGHTS}"
    assert "is not a checkpoint folder of UNet: no config.json in it" in refusal(tmp_path / "nowhere")
    (folder / "config.json").write_text("{not json")
    assert "is not JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "holds a JSON list; an object is needed" in refusal(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refusal(folder)
    for unreadable in ("[" * 100_000, f'{{"in_channels": {"1" * 5000}}}'):
        (folder / "config.json").write_text(unreadable)
        assert f"{folder / 'config.json'} is not JSON (" in refusal(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert refusal(folder) == f"{folder / 'config.json'} is a folder; a file is needed"


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    reference_unet().save_pretrained(tmp_path, max_shard_size="200KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    tensors, twice = load_file(last), next(iter(load_file(first)))
    save_file(tensors | {twice: load_file(first)[twice] + 1}, last)
    assert refusal(tmp_path).startswith(f"{twice} is in two files, ")


def test_an_index_cannot_point_outside_its_folder(folder):
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}))
    assert "points outside its folder: ../elsewhere.safetensors" in refusal(folder)
    for broken in ({}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": [1]}):
        index.write_text(json.dumps(broken))
        assert "has no weight_map" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "gone.safetensors"}}))
    assert refusal(folder) == f"no such file: {folder / 'gone.safetensors'}"


def test_non_finite_weights_are_found_on_request_only(folder):
    edit_weights(folder, lambda tensors: tensors["conv_in.bias"].fill_(float("nan")))
    UNet.from_pretrained(folder)
    assert refusal(folder, finite=True) == "non-finite weights in conv_in.bias"


def test_stale_integer_position_ids_are_dropped_and_float_ones_are_not(folder):
    edit_weights(folder, lambda t: t.update({"embeddings.position_ids": torch.arange(3)}))
    UNet.from_pretrained(folder)
    edit_weights(folder, lambda t: t.update({"embeddings.position_ids": torch.zeros(3)}))
    assert "extra embeddings.position_ids" in refusal(folder)


def test_saving_over_the_file_in_use_leaves_the_model_whole(folder):
    model = UNet.from_pretrained(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(folder)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    again = UNet.from_pretrained(folder).state_dict()
    assert all(torch.equal(t, before[name]) for name, t in again.items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_changing_a_loaded_model_does_not_change_the_file(folder):
    model = UNet.from_pretrained(folder)
    with torch.no_grad():
        model.conv_in.bias.add_(1)
    assert not torch.equal(UNet.from_pretrained(folder).conv_in.bias, model.conv_in.bias)


def test_readers_name_missing_files(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for read in (read_json, open_safetensors):
        for path in (tmp_path / "gone", tmp_path / "file" / "within"):
            with pytest.raises(CheckpointError, match="no such file"):
                read(path)


def test_what_writers_left_is_found_by_the_letter(tmp_path):
    with atomic_file(tmp_path / "[a]b.bin") as temporary:
        temporary.with_name(temporary.name.replace("[a]", "a")).write_text("of ab.bin")
        assert temporaries(tmp_path / "[a]b.bin") == [temporary]
    with atomic_file(tmp_path / ("a" * 251 + ".bin")) as temporary:  # the longest name there is
        assert temporaries(tmp_path / ("a" * 251 + ".bin")) == [temporary]


@torch.no_grad()
def test_a_network_in_channels_last_is_saved_as_any(tmp_path):
    network = ours(UNet, reference_unet())
    assert use_channels_last(network, "cpu") > 0
    network.save_pretrained(tmp_path)
    read = UNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in network.state_dict().items())


def test_networks_that_were_checked_are_told_apart(tmp_path):
    for act in ("gelu", "quick_gelu"):
        reference_text_encoder(hidden_act=act).save_pretrained(tmp_path / act)
    CLIPTextEncoder.check_pretrained(tmp_path / "gelu")
    read = CLIPTextEncoder.from_pretrained(tmp_path / "quick_gelu")
    assert read.config.quick_gelu and read.text_model.encoder.layers[0].mlp.quick_gelu
    one, other = (CLIPTextEncoder.from_pretrained(tmp_path / "gelu") for _ in range(2))
    assert one is not other  # what was checked is given to the first alone


@torch.no_grad()
def test_a_model_built_by_hand_can_be_saved_and_read(tmp_path):
    config = UNetConfig(block_out_channels=(32, 64), layers_per_block=1, embedding_dim=8, context_dim=16)
    model = randomize(UNet(config))
    model.save_pretrained(tmp_path)
    arguments = randn(1, 4, 4, 4), torch.tensor([5]), randn(1, 8)
    read = UNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), model.state_dict().values()))
    assert relative_l2(read(*arguments), model(*arguments)) <= 1e-5  # kernels depend on memory alignment


@pytest.mark.slow
def test_saving_over_shards_leaves_one_set_of_weights(tmp_path):
    reference, other = reference_unet(), reference_unet(seed=1)
    reference.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    ours(UNet, other).save_pretrained(tmp_path / "unet")
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"config.json", WEIGHTS}
    theirs = type(other).from_pretrained(tmp_path / "unet")
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in other.state_dict().items())
    index = tmp_path / "unet" / f"{WEIGHTS}.index.json"
    for weight_map in ({"a": "config.json"}, {"a": WEIGHTS}, {}):  # what is saved is never taken for a piece
        index.write_text(json.dumps({"weight_map": weight_map}))
        ours(UNet, other).save_pretrained(tmp_path / "unet")
        assert {path.name for path in (tmp_path / "unet").iterdir()} == {"config.json", WEIGHTS}
    index.write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert f"holds {WEIGHTS} and {WEIGHTS}.index.json: two sets of weights" in refusal(tmp_path / "unet")


def test_what_users_of_diffusers_write_gets_an_answer(folder):
    with pytest.raises(TypeError, match="from_pretrained.. has no argument 'torch_dtype'; use dtype="):
        UNet.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(TypeError, match="use the network's own folder, as FOLDER/unet"):
        UNet.from_pretrained(folder.parent, subfolder="unet")
    with pytest.raises(ValueError, match="looks like a hub id and is no local folder"):
        UNet.from_pretrained("kandinsky-community/kandinsky-2-2-decoder")
    assert "no config.json in it" in refusal(folder.parent / "kandinsky-2-2-decoder")  # a path


def test_a_network_whose_layers_share_a_weight_is_saved_with_one_for_each(tmp_path):
    unet = ours(UNet, reference_unet())
    first, second = (resnet.conv1 for resnet in unet.mid_block.resnets)
    second.weight = first.weight
    unet.save_pretrained(tmp_path)
    read = UNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in unet.state_dict().items())


def whole_numbers(*shape: int) -> torch.nn.Module:
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
    return torch.nn.ParameterDict({"weight": weight})


@pytest.mark.parametrize(
    "path, other, message",
    [
        ("mid_block.extra", torch.nn.Linear(2, 2), r"extra mid_block.extra.weight \(2, 2\); extra"),
        ("mid_block.attentions.0.to_q", torch.nn.Identity(), r"missing mid_block.attentions.0.to_q.weight"),
        ("conv_out", whole_numbers(8, 32, 3, 3), "conv_out.weight holds torch.int8"),
        ("conv_out", torch.nn.Conv2d(32, 4, 3), r"conv_out.weight is \(4, 32, 3, 3\), needs \(8, 32, 3, 3\)"),
    ],
)
def test_a_network_that_could_not_be_read_again_is_not_saved(tmp_path, path, other, message):
    unet = ours(UNet, reference_unet())
    unet.set_submodule(path, other)
    with pytest.raises(CheckpointError, match=f"this UNet does not fit its config.*{message}"):
        unet.save_pretrained(tmp_path / "unet")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_reading_networks_does_not_import_pytorchs_compiler(decoder_folder):
    """It takes two seconds, and filling an embedding on the meta device imports it."""
    code = "import sys; from kandinsky import Kandinsky; pipe = Kandinsky.from_pretrained(sys.argv[1]); "
    code += "pipe.text_encoder, pipe.prior, pipe.unet, pipe.movq; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(decoder_folder)], check=True)
