"""The mean of networks, and what cannot be averaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky import Prior
from tests.small import reference_prior
from tests.test_scripts import run

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folders(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        reference_prior(seed).save_pretrained(tmp_path / name)
    tensors = {key: x.half() for key, x in load_file(tmp_path / "a" / FILE).items()}
    save_file(tensors, tmp_path / "a" / FILE)
    return tmp_path


def test_the_mean_of_three_networks_loads(folders):
    config = json.loads((folders / "b" / "config.json").read_text())
    (folders / "b" / "config.json").write_text(json.dumps(config | {"_name_or_path": "somewhere"}))
    (folders / "c" / ".diffusion_pytorch_mo.x1y2z3.safetensors").write_bytes(b"of a killed save")
    given = [folders / name for name in "abc"]
    assert run("average_weights", *map(str, given), "--out", str(folders / "mean")) == 0
    mean, parts = load_file(folders / "mean" / FILE), [load_file(folder / FILE) for folder in given]
    assert mean.keys() == parts[0].keys()
    for key, tensor in mean.items():
        wanted = torch.stack([part[key].double() for part in parts]).mean(dim=0)
        assert tensor.dtype == torch.float16 and (tensor - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert Prior.from_pretrained(folders / "mean").config == Prior.read_config(folders / "a")


def test_a_network_that_is_there_is_written_over_only_where_that_is_asked_for(folders, capsys):
    given = [str(folders / "b"), str(folders / "c"), "--out", str(folders / "a")]
    written = folders / "a" / FILE
    before = written.read_bytes()
    assert run("average_weights", *given) == 2 and written.read_bytes() == before
    told = capsys.readouterr().err
    assert f"--out {folders / 'a'} holds a network; --overwrite replaces it" in told and told.count("\n") == 1
    assert run("average_weights", *given, "--overwrite") == 0 and written.read_bytes() != before


def test_what_cannot_be_averaged_is_refused_in_one_line(folders, capsys):
    config = json.loads((folders / "b" / "config.json").read_text())
    (folders / "b" / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    tensors = load_file(folders / "c" / FILE)
    save_file(dict(list(tensors.items())[1:]), folders / "c" / FILE)
    reference_prior(3).save_pretrained(folders / "whole")
    tensors = load_file(folders / "whole" / FILE)
    save_file(tensors | {"position_ids": torch.arange(3)}, folders / "whole" / FILE)
    reference_prior(3).save_pretrained(folders / "two")
    save_file(tensors, folders / "two" / "other.safetensors")
    (folders / "none").mkdir()
    (folders / "none" / "config.json").write_text("{}")
    for others, message in (
        ([], "there is nothing to average it with"),
        (["b"], "b has another config.json than"),
        (["c"], "c has other tensors than"),
        (["gone"], "no such file"),
        (["whole"], "holds position_ids, whole numbers"),
        (["two"], "holds 2 safetensors files; one is needed"),
    ):
        given = [str(folders / name) for name in ("a", *others)]
        assert run("average_weights", *given, "--out", str(folders / "mean")) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (folders / "mean").exists()
    assert run("average_weights", str(folders / "a"), str(folders / "b"), "--out", str(folders / "a")) == 2
    assert "is one of the folders to average" in capsys.readouterr().err
    assert run("average_weights", *[str(folders / "none")] * 2, "--out", str(folders / "mean")) == 2
    assert "holds 0 safetensors files; one is needed" in capsys.readouterr().err
