"""What the benchmark prints, and that it measures what it says."""

import argparse
import json
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kandinsky import Prior
from kandinsky.cli import WEIGHTS
from kandinsky.random_weights import SIZES, randomize
from tests.test_scripts import load, run


@pytest.mark.slow
def test_the_benchmark_measures_imports(capsys):
    assert run("benchmark", "import", "--runs", "1", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    for what in ("seconds", "gib"):
        assert results[what].keys() == {"torch", "kandinsky", "kandinsky, a model built", "diffusers"}
        assert all(len(runs) == 1 and runs[0] > 0.05 for runs in results[what].values())
    assert run("benchmark", "import", "--runs", "0") == 2


def test_the_benchmark_measures_the_mask(capsys):
    assert run("benchmark", "mask", "--pixels", "256", "--runs", "2", "--json") == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert seconds.keys() == {"diffusers", "kandinsky"} and min(map(min, seconds.values())) > 0
    for refused in (["256", "512"], ["100"]):
        assert run("benchmark", "mask", "--pixels", *refused) == 2


@pytest.mark.slow
def test_the_benchmark_measures_parts_beside_their_distance(capsys):
    small = ["parts", "--size", "small", "--pixels", "32", "--runs", "3"]
    assert run("benchmark", *small, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    whole = results.pop("whole picture")["seconds"]
    assert list(results) == ["text_encoder", "zero_image", "prior", "unet", "movq"]
    once = min(results["unet"]["prepare"]["ours"]) + min(results["movq"]["seconds"]["ours"])
    assert whole["ours"][0] > 50 * min(results["unet"]["seconds"]["ours"]) + once
    for name, part in results.items():
        assert [*part["seconds"]] == [*part["relative_l2"]]  # printed side by side
        assert part["relative_l2"].pop("diffusers") == 0
        assert part["relative_l2"].keys() - {"ours"} == (
            {"ours, optimized"} if name != "zero_image" else set()
        )
        assert all(distance <= 1e-5 for distance in part["relative_l2"].values())
        assert all(len(runs) == 3 and min(runs) > 0 for runs in part["seconds"].values())
        assert 0 <= part["floor"] < min(part["seconds"]["ours"])
    several = [*small[:3], "--pixels", "32", "64", "--parts", "unet", "--quick"]
    assert run("benchmark", *several) == 0
    shown = capsys.readouterr().out
    assert "unet 32, small" in shown and "unet 64, small" in shown
    row = r"\d s  \(.* × diffusers  .*e[-+]\d\d from float32  .*% of roofline"
    assert len([line for line in shown.splitlines() if re.search(row, line)]) == 6


def test_the_roofline_counts_each_product_and_what_it_moves():
    conv, norm = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)
    linear, x, y = nn.Linear(16, 4), torch.zeros(2, 8, 5, 5), torch.zeros(2, 4, 6, 16)
    with torch.no_grad(), load("roofline").Work() as work:
        norm(conv(x)), linear(torch.zeros(3, 16)), F.scaled_dot_product_attention(y, y, y)
    convolved, product = 2 * 2 * 16 * 25 * 8 * 9, 2 * 3 * 16 * 4
    assert [flop for flop, _ in work.layers] == [convolved, 0, product, 2 * 2 * 2 * 4 * 6 * 6 * 16]
    assert work.layers[0][1] == 4 * (x.numel() + conv.weight.numel() + 16 + 2 * 16 * 25)
    assert work.layers[1][1] == 4 * 2 * 16 * 25
    assert work.seconds(peak=1.0, bandwidth=1e30) == sum(flop for flop, _ in work.layers)
    assert work.seconds(peak=1e30, bandwidth=2.0) == sum(size for _, size in work.layers) / 2


@pytest.mark.slow
def test_what_a_gpu_is_asked_comes_line_by_line_until_the_time_is_spent(capsys, monkeypatch):
    module = load("benchmark")
    monkeypatch.setattr(
        module, "measure_part", lambda args, name: {"seconds": {"ours": [1.0]}, "prepare": {}, "of": [name]}
    )
    monkeypatch.setattr(module, "measure_convolutions", lambda args: iter([("convolution 64 at 32", {})]))
    for measured in ("ladder", "kernels", "pipeline"):
        monkeypatch.setattr(module, f"measure_{measured}", lambda *args, **given: {"of": [args[-1]]})
    args = ["cuda", "--size", "small", "--weights", str(WEIGHTS / "mini-decoder-inpaint")]
    assert module.main(args) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [name for line in lines for name in line]
    assert "torch" in lines[0]["machine"] and names[1] == "unet, bfloat16, 512 px"
    assert {"convolutions": {"convolution 64 at 32": {}}} in lines and len(names) == len(set(names))
    pictures = [name.removeprefix("pictures, ") for name in names if name.startswith("pictures")]
    compared = ["diffusers", "kandinsky", "kandinsky, optimized", "diffusers, compiled"]
    assert pictures[:4] == [f"{name}, 1 of 512 px" for name in compared] and len(pictures) == 8
    order = ["movq, bfloat16, 512 px", "whole picture, bfloat16, 512 px", f"pictures, {pictures[3]}"]
    order += ["unet, bfloat16, 1024 px", "kernels of unet", f"pictures, {pictures[4]}", "ladder of unet"]
    order += ["unet, float32, 512 px", "zero_image, bfloat16, 512 px"]
    assert [name for name in names if name in order] == order
    assert module.main(["cuda", "--size", "small", "--budget", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setattr(module, "measure_part", lambda args, name: 1 / 0)
    assert module.main(["cuda", "--size", "small"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = {name: result["error"] for line in lines for name, result in line.items() if "error" in result}
    assert failed["unet, bfloat16, 512 px"] == "ZeroDivisionError: division by zero" and len(failed) > 10
    assert "whole" not in str(lines) and "pictures" not in str(lines), (
        "of the embedded checkpoint none are asked"
    )
    assert run("benchmark", "cuda", "--quick") == 2


def test_a_reference_has_our_weights_and_its_own_buffers_and_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with torch.device("meta"):
        prior = Prior(SIZES["small"].prior)
    prior = randomize(prior.to_empty(device="cpu"))
    reference = load("reference").reference_for(prior)
    for name, parameter in reference.named_parameters():
        assert parameter.data_ptr() == prior.get_parameter(name).data_ptr(), name
    assert not any(buffer.is_meta for buffer in reference.buffers())
    assert not nn.Linear(1, 1).weight.is_meta


def test_what_a_measurement_warns_of_stands_in_its_line():
    def measure(args, name):
        for _ in range(2):
            warnings.warn("UNet runs without a graph: no memory")
        return {"seconds": 1 / name}

    attempt = load("benchmark").attempt
    warned = {"warnings": ["UserWarning: UNet runs without a graph: no memory"]}
    assert attempt(measure, None, 1) == {"seconds": 1.0} | warned
    assert attempt(measure, None, 0) == {"error": "ZeroDivisionError: division by zero"} | warned
    assert attempt(lambda args, name: {}, None, 1) == {}


def test_nothing_is_asked_of_a_gpu_that_is_beyond_repair(capsys, monkeypatch):
    module, states = load("benchmark"), iter([None, RuntimeError("CUDA error: illegal memory access")])

    def synchronize(device) -> None:
        if error := next(states):
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    rows = [("no memory", {"error": "1"}), ("well", {}), ("broken", {"error": "2"}), ("later", {})]
    monkeypatch.setattr(module, "measure_cuda", lambda args: iter(rows))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        module.run_cuda(argparse.Namespace(device=torch.device("cuda"), budget=60))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [name for line in lines for name in line] == ["no memory", "well", "broken"]


def test_whose_networks_are_compiled_is_named_behind_the_kind(capsys):
    module = load("benchmark")
    given = {(): None, ("--compile",): "both", ("--compile", "diffusers"): "diffusers"}
    assert {flags: module.parse_args(["parts", *flags]).compile for flags in given} == given
    assert run("benchmark", "pictures", "--compile", "ours") == 2
    assert "--compile ours goes with parts" in capsys.readouterr().err


def test_convolutions_are_timed_in_both_orders(monkeypatch):
    networks = load("benchmark_networks")

    def fastest(call, device, calls) -> float:
        assert call().ndim == 4
        return 1e-6

    monkeypatch.setattr(networks.roofline, "fastest", fastest)
    given = load("benchmark").parse_args(["parts", "--size", "small"])
    rates = dict(networks.measure_convolutions(given))
    orders = {"contiguous_format", "channels_last"}
    kinds = orders | {f"{order}, cuDNN's fastest" for order in orders}
    assert len(rates) == 6 and rates["convolution 32 at 128"].keys() == kinds
    assert rates["convolution 64 at 32"]["channels_last"] == round(
        2 * 9 * 2 * 64 * 64 * 32 * 32 / 1e-6 / 1e12, 2
    )


def test_the_kernels_that_a_network_spends_its_time_in(capsys):
    module, args = load("benchmark"), ["parts", "--size", "small", "--pixels", "32"]
    given = module.parse_args(args)
    given.side = 32
    measured = load("benchmark_networks").measure_kernels(given, "unet")
    kernels = measured["kernels"]
    times, counts = zip(*kernels.values())
    assert (
        measured["all kernels"] >= sum(times) - 0.02 > 0 and measured["number of kernels"] > sum(counts) > 50
    )
    assert measured["clock"] > 0 and measured["in a row"] > 0
    assert list(times) == sorted(times, reverse=True) and len(kernels) == 20
    assert any("convolution" in name for name in kernels)
    name = "void at::native::(anonymous namespace)::vectorized_kernel<4, at::native::Add>"
    assert load("benchmark_networks").shortened(name) == "vectorized_kernel<4, Add>"


def test_the_memory_taken_from_the_device_is_told_too(monkeypatch):
    """It is allocated in the first picture, with the capture, and then no more."""
    pictures, drawn = load("benchmark_pictures"), []
    monkeypatch.setattr(
        pictures, "pipelines", lambda args: {"ours": lambda: lambda *size: drawn.append(size)}
    )
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name, gib in (("allocated", 6), ("reserved", 8)):
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda device, gib=gib: gib * 2**30)
    args = argparse.Namespace(device=torch.device("cuda"), runs=1)
    result = pictures.measure_pipeline(args, "ours", [(512, 1)])
    assert result["gib"] == {"1 of 512 px": 6} and result["gib taken"] == {"1 of 512 px": 8}
    assert drawn == 3 * [(512, 1)]


@pytest.mark.parametrize(
    "args", [["pictures", "--num-images", "0"], ["cuda", "--weights", "no"], ["parts", "--weights", "no"]]
)
def test_wrong_arguments_end_in_one_line_before_anything_is_measured(args, capsys):
    assert run("benchmark", *args) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


@pytest.mark.slow
def test_whole_pictures_are_timed_by_size(capsys, monkeypatch):
    args = ["pictures", "--runs", "1", "--steps", "2", "--prior-steps", "2", "--pixels", "32"]
    assert run("benchmark", *args, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["diffusers", "kandinsky", "kandinsky, optimized", "kandinsky, --low-memory"]
    assert results["kandinsky"]["first"] > 0 and len(results["kandinsky"]["seconds"]["1 of 32 px"]) == 1
    module = load("benchmark")
    monkeypatch.setattr(
        module,
        "measure_pipeline",
        lambda args, name, sizes: {
            "first": 2.0,
            "seconds": {f"{n} of {side} px": [1.0] for side, n in sizes},
        },
    )
    assert module.main([*args, "48", "--num-images", "1", "2"]) == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n")]
    sizes = ["1 of 32 px", "1 of 48 px", "2 of 32 px", "2 of 48 px"]
    assert [table[0] for table in tables] == ["first picture", *sizes]
    assert all([line.split("  ")[0] for line in table[1:]] == list(results) for table in tables)


@pytest.mark.slow
def test_the_benchmark_measures_each_rewrite_alone_and_in_sum(capsys):
    ladder = ["ladder", "--size", "small", "--pixels", "32", "--runs", "2", "--parts", "unet", "movq"]
    assert run("benchmark", *ladder, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    rungs = ["plain", "merged upsampling", "packed weights", "up to packed weights"]
    assert list(results["unet"]["seconds"]) == rungs and len(results["movq"]["seconds"]) == 10
    for part in results.values():
        away = part["relative_l2"]
        assert away.pop("plain") == away.pop("row bands", 0) == 0  # small maps are not cut
        assert all(0 < distance <= 1e-5 for distance in away.values())
        assert all(len(runs) == 2 for runs in part["seconds"].values())


@pytest.mark.slow
def test_the_benchmark_measures_a_whole_process_and_its_memory(capsys, random_folder):
    small = ["--weights", random_folder / "kandinsky-2-2-decoder", "--steps", "2", "--prior-steps", "2"]
    assert run("benchmark", "start", "--runs", "1", *small) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    names = ["kandinsky ", "kandinsky, --low-memory", "diffusers"]
    assert all(line.startswith(name) for line, name in zip(lines, names * 2, strict=True))
    assert [" s  (" in line for line in lines] == [True] * 3 + [False] * 3 and "GiB" in lines[-1]
    with pytest.raises(ValueError, match="ended with 3: it broke"):
        load("benchmark").process(
            sys.executable, "-c", "import sys; print('it broke', file=sys.stderr); exit(3)"
        )()


def test_the_benchmarks_table_shows_ratios_of_medians():
    lines = load("benchmark").table({"theirs": [4.0, 1.0, 9.0], "ours": [2.0, 2.0, 90.0]}, "theirs")
    assert lines[1].split() == "ours 2 s (2 to 90) 0.50 × theirs".split()
