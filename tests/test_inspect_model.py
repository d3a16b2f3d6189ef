"""The architecture's tree: totals as the official files have them, operations as PyTorch counts them."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kandinsky import UNet
from kandinsky.config import UNetConfig
from kandinsky.inspection import attention_maps
from tests.helpers import randn
from tests.test_scripts import load, run

COUNTS = {  # parameters of the published files
    "prior": 1_026_225_920,
    "unet": 1_253_057_288,
    "inpaint": 1_253_074_568,
    "hint": 1_253_429_212,
    "unet-2.1": 1_228_661_768,
    "inpaint-2.1": 1_228_679_048,
    "decoder_text_encoder-2.1": 560_677_632,
    "prior-2.1": 1_022_030_080,
    "text_encoder-2.1": 123_650_304,
    "image_encoder-2.1": 303_966_208,
    "movq": 67_832_495,
    "text_encoder": 694_659_840,
    "image_encoder": 1_844_907_264,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_totals_are_those_of_the_published_files(name, capsys):
    assert run("inspect_model", name, "--json") == 0
    (lines,) = json.loads(capsys.readouterr().out).values()
    root, named = lines[0], {line["name"]: line for line in lines}
    assert root["parameters"] == COUNTS[name] and root["flops"] > 0
    own = sum(torch.Size(shape).numel() for line in lines for shape in line["shapes"].values())
    assert own == COUNTS[name]
    top = [line for line in lines[1:] if "." not in line["name"]]
    assert sum(line["flops"] for line in top) == root["flops"]
    assert all(named[line["name"]]["flops"] <= root["flops"] for line in lines)


@pytest.mark.slow
@torch.no_grad()
def test_operations_and_outputs_are_those_of_a_real_call(decoder_folder, capsys):
    assert run("inspect_model", decoder_folder, "--pixels", "32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["movq", "unet"]
    unet, lines = UNet.from_pretrained(decoder_folder / "unet"), {x["name"]: x for x in found["unet"]}
    with FlopCounterMode(display=False) as counter, attention_maps(unet, "*") as maps:
        out = unet(randn(1, 4, 8, 8), torch.tensor([0]), randn(1, 32))
    # torch has no count for the CPU's fused attention; the maps' own products are counted: q times k, once
    widths = {name: unet.get_submodule(name).to_q.out_features for name in maps}
    weighed = sum(2 * one[0, 0].numel() * widths[name] for name, values in maps.items() for one in values)
    assert lines[""]["flops"] == counter.get_total_flops() + weighed
    assert lines[""]["output"] == list(out.shape)
    assert lines["conv_in"]["flops"] == 2 * 4 * 32 * 9 * 64 and lines["conv_in"]["output"] == [1, 32, 8, 8]
    assert lines["down_blocks"]["flops"] == sum(lines[f"down_blocks.{i}"]["flops"] for i in range(3))


def test_the_tree_can_be_cut_and_searched(capsys):
    assert run("inspect_model", "unet", "--depth", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 9 and "UNet" in lines[1] and "1,253,057,288" in lines[1]
    assert run("inspect_model", "unet", "--match", "mid_block.attentions.0.*") == 0
    out = capsys.readouterr().out
    assert "to_q Linear" in out and "weight 1536×1536, bias 1536" in out and "conv_in" not in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nothing"], "nothing is neither a folder with a config.json nor one of prior, unet"),
        (["unet", "--match", "x"], "no module of unet is called 'x'"),
        (["unet", "--pixels", "0"], "--pixels is at least 1"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    try:
        code = run("inspect_model", *argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_config_of_another_network_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    message = "is of a AutoencoderKL; known are PriorTransformer"
    assert run("inspect_model", tmp_path) == 2
    assert message in capsys.readouterr().err
    unet = UNetConfig(block_out_channels=(32, 64), layers_per_block=1, head_dim=16)
    for name, config in (("unet", unet.published()), ("vae", {"_class_name": "AutoencoderKL"})):
        (tmp_path / "whole" / name).mkdir(parents=True)
        (tmp_path / "whole" / name / "config.json").write_text(json.dumps(config))
    assert run("inspect_model", tmp_path / "whole", "--json") == 0
    out, error = capsys.readouterr()
    assert list(json.loads(out)) == ["unet"] and message in error and error.count("\n") == 1
    assert load("inspect_model").networks_of("movq")["movq"].config.downscale == 8


def test_only_what_depends_on_the_pictures_size_is_said_to_be_of_one(decoder_folder, capsys):
    for place in (decoder_folder, decoder_folder.with_name("kandinsky-2-2-prior")):
        assert run("inspect_model", place, "--pixels", "32", "--depth", "0") == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if "one row" in line]
    assert {line.partition(":")[0] for line in heads if line.endswith(" at 32 px")} == {"movq", "unet"}
    assert {line.partition(":")[0] for line in heads if line.endswith(" row")} == {
        "image_encoder",
        "prior",
        "text_encoder",
    }
