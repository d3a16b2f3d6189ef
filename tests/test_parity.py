"""The parity table: right networks pass in every dtype, a tampered one makes exit code 1."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky import random_weights
from kandinsky.unet import UNet
from tests.test_scripts import load

pytestmark = pytest.mark.slow

QUICK = ["--only", "prior", "--only", "unet", "--only", "text_encoder"]


@pytest.fixture(scope="module")
def parity():
    """The script; what it changes for its whole process is put back."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield load("check_parity")
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("parity")
    random_weights.make(out, "small", say=lambda line: None)
    return out / "kandinsky-2-2-decoder"


def test_everything_agrees_in_float32(parity, tmp_path, capsys):
    assert parity.main(["--json", str(tmp_path / "table.json")]) == 0
    out, table = capsys.readouterr().out, json.loads((tmp_path / "table.json").read_text())
    names = [row["component"] for row in table["rows"]]
    assert len(names) == 21 and len(set(names)) == 21 and all(row["ok"] for row in table["rows"])
    for name in ("unet, hint, prepared", "movq decode", "UnCLIP, 25 steps", "pipeline, combined picture"):
        assert name in names and name in out
    assert "21 of 21 within what is allowed" in out


def test_everything_of_2_1_agrees_too(parity, tmp_path, capsys):
    assert parity.main(["--model", "2.1", "--json", str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    names = {row["component"] for row in table}
    assert len(names) == len(table) and {row["ok"] for row in table} == {True}
    for name in ("multilingual, embedding", "unet, inpaint, prepared", "DDIM, 25 steps"):
        assert name in names
    assert "pipeline, combined picture" in names and "unet, hint" not in names


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision_reports_both_distances(parity, dtype, tmp_path):
    argv = [
        "--dtype",
        dtype,
        "--json",
        str(tmp_path / "table.json"),
        "--only",
        "prior",
        "--only",
        "text_encoder",
    ]
    assert parity.main(argv) == 0
    for row in json.loads((tmp_path / "table.json").read_text())["rows"]:
        assert 1e-4 < row["theirs"] < 0.1 and row["allowed"] == pytest.approx(1.3 * row["theirs"])


def test_a_folder_is_checked_in_place_of_random_networks(parity, folder, capsys):
    assert parity.main(["--weights", str(folder), *QUICK, "--only", "inpaint", "--only", "pipelines"]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out and "unet, prepared" in out and "pipeline, embed" in out
    assert "inpaint" not in out, "the folder has no such network"


def test_a_folder_of_2_1_is_recognized(parity, tmp_path, capsys):
    out = random_weights.make(tmp_path, "small", say=lambda line: None, model="2.1")[1]
    only = ["--only", "unet", "--only", "decoder_text_encoder", "--only", "schedulers"]
    assert parity.main(["--weights", str(out), *only]) == 0
    said = capsys.readouterr().out
    assert "7 of 7 within" in said and "DDIM, 25" in said and "DDPM, 25" in said


def test_a_tampered_network_is_found(parity, monkeypatch, capsys):
    """The input off by a ten-thousandth, in our prepared form alone."""
    step = UNet.step

    def wrong(self, x, plan, index):
        return step(self, x * 1.0001, plan, index)

    monkeypatch.setattr(UNet, "step", wrong)
    assert parity.main(["--only", "unet"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("unet")] == ["ok", "OVER"]
    monkeypatch.setattr(UNet, "step", lambda self, x, plan, index: step(self, x * 1.001, plan, index))
    assert parity.main(["--only", "pipelines"]) == 1


def test_a_tampered_network_is_found_in_half_precision(parity, monkeypatch):
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: forward(self, 1.05 * x, *rest))
    assert parity.main(["--only", "unet", "--dtype", "bfloat16", "--seeds", "2"]) == 1


def test_weights_that_are_not_finite_are_over(parity, folder, tmp_path, capsys):
    out = tmp_path / "kandinsky-2-2-decoder"
    random_weights.make(tmp_path, "small", ("decoder",), say=lambda line: None)
    path = out / "movq" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["post_quant_conv.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert parity.main(["--weights", str(out), "--only", "movq"]) == 1
    assert "OVER" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pixels", "100"], "multiple of 64"),
        (["--weights", "nowhere"], "nowhere"),
        (["--device", "abacus"], "abacus"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_flags_are_one_line(parity, argv, message, capsys):
    assert parity.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
