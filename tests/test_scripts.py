"""The scripts as a user starts them, and what importing the package brings along."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kandinsky
from kandinsky import CLIPImageEncoder, CLIPTextEncoder, Kandinsky, Prior, UNet, cli, training_cli
from kandinsky.checkpoint import write_json, write_safetensors
from kandinsky.clip_training import ConvEncoder, load_image_encoder
from kandinsky.embedding_cache import digest
from tests.test_training import write_folder

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
QUICK = ["--steps", "2", "--prior-steps", "2", "--height", "16", "--width", "24", "--seed", "7"]
SMALL_TOWERS = ["--image-width", "32", "--image-layers", "1", "--text-layers", "1", "--dim", "32"]
SMALL_TOWERS += ["--head-dim", "16"]
SMALL_UNET = ["--channels", "32", "48", "--head-dim", "16", "--context-dim", "16", "--groups", "8"]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *argv: str) -> int:
    """The script's exit code, called in process."""
    try:
        return load(name).main([str(a) for a in argv])
    except SystemExit as exit:  # argparse
        return exit.code


def sources(script: str, clip: Path, movq: Path) -> list:
    """The flags without which a training script does not start, but --out."""
    of_decoder = ["--clip", clip, "--movq", movq]
    return {"train_prior": of_decoder[:2], "train_decoder": of_decoder}.get(script, [])


def test_a_prompt_goes_in_and_a_picture_comes_out(decoder_folder, tmp_path, capsys):
    out = tmp_path / "cat.png"
    assert run("text2img", "a red cat", "--weights", decoder_folder, "--out", out, *QUICK) == 0
    assert capsys.readouterr().out == f"{out} (seed 7)\n"
    pipe = Kandinsky.from_pretrained(decoder_folder)
    sizes = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 16, "width": 24}
    expected = pipe.text2img("a red cat", seed=7, **sizes)[0]
    with Image.open(out) as picture:
        assert np.array_equal(np.array(picture), np.array(expected))


@pytest.mark.slow
def test_the_whole_command_in_a_process_of_its_own(decoder_folder, tmp_path):
    out = tmp_path / "a folder with spaces" / "кот.webp"
    command = [sys.executable, SCRIPTS / "text2img.py", "cat", "--weights", decoder_folder, "--out", out]
    done = subprocess.run([*command, *QUICK, "--dtype", "bfloat16", "--low-memory"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert out.exists()


def test_nothing_is_overwritten_unless_asked(decoder_folder, tmp_path):
    out = tmp_path / "cat.png"
    given = ["cat", "--weights", decoder_folder, "--out", out, *QUICK]
    assert run("text2img", *given, "--num-images", "2") == 0
    assert run("text2img", *given) == run("text2img", *given) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cat-0.png", "cat-1.png", "cat-2.png", "cat.png"]  # -2: cat.png was there
    first = out.read_bytes()
    assert run("text2img", *given[:-1], "8", "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == names and out.read_bytes() != first


def test_a_drawn_seed_is_printed_and_repeats_the_picture(decoder_folder, tmp_path, capsys):
    given = ["cat", "--weights", decoder_folder, *QUICK[:-2]]
    assert run("text2img", *given, "--out", tmp_path / "a.png") == 0
    seed = re.search(r"\(seed (\d+)\)", capsys.readouterr().out)[1]
    assert run("text2img", *given, "--out", tmp_path / "b.png", "--seed", seed) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give a prompt, --prompts FILE or --from-png FILE; see --help"),
        (["cat", "--steps", "many"], "argument --steps: invalid int value: 'many'; see --help"),
        (["cat", "--colour", "red"], "unrecognized arguments: --colour red; see --help"),
        (["cat", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["a \udcff cat", "--weights", "DECODER"], "prompt is 'a \\udcff cat', which is no text"),
        (
            ["cat", "--negative-prompt", "\udcff", "--weights", "DECODER"],
            "negative_prompt is '\\udcff', which",
        ),
        (["cat", "--out", "picture.gif"], "picture.gif: cannot write .gif; use .png, .jpg, .jpeg, .webp"),
        (["cat", "--out", "DECODER/unet/config.json/out.png"], "is not a folder that can be written to"),
        (["cat", "--weights", "nowhere"], "decoder: no folder at 'nowhere'"),
        (["cat", "--weights", "2.1"], "python scripts/download_weights.py 2.1"),
        (["cat", "--weights", "2.2"], "python scripts/download_weights.py 2.2"),
        (["cat", "--weights", "DECODER", "--prior", "nowhere"], "prior: no folder at 'nowhere'"),
        (["cat", "--weights", "DECODER", "--steps", "0"], "num_inference_steps is 0; allowed is 1 to 1000"),
        (["cat", "--weights", "DECODER", "--height", "-3"], "height is -3; allowed is 1 to 65536"),
        (["cat", "--weights", "DECODER", "--seed", "-1"], "seed is -1"),
        (["cat", "--weights", "DECODER", "--guidance-scale", "nan"], "guidance_scale is nan"),
        (["cat", "--weights", "DECODER", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(decoder_folder, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path / "weights")
    argv = [a.replace("DECODER", str(decoder_folder)) for a in argv]
    assert run("text2img", *argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["text2img", "mix"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--steps", "0"], "num_inference_steps is 0; allowed is 1"),
        (["--height", "0"], "height is 0; allowed is 1"),
        (["--cache-every", "0"], "cache_every is 0; allowed is 1"),
        (["--prior-steps", "0"], "prior_num_inference_steps is 0; allowed is 1"),
        (["--weights", "NO MOVQ"], "no such file"),
        (["--weights", "INPAINT"], "is for inpainting; use kandinsky-2-2-decoder for text2img"),
    ],
)
def test_the_decoders_flags_are_checked_before_a_picture_is_embedded(
    decoder_folder, inpaint_folder, tmp_path, monkeypatch, capsys, script, wrong, message
):
    without = tmp_path / decoder_folder.name
    shutil.copytree(decoder_folder, without)
    (without / "movq" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "kandinsky-2-2-prior").symlink_to(decoder_folder.parent / "kandinsky-2-2-prior")
    wrong = [{"NO MOVQ": without, "INPAINT": inpaint_folder}.get(flag, flag) for flag in wrong]
    monkeypatch.setattr(Kandinsky, "embed_image", lambda *_: 1 / 0)
    monkeypatch.setattr(Kandinsky, "mix", lambda *_, **__: 1 / 0)
    Image.new("RGB", (24, 24)).save(tmp_path / "cat.png")
    given = ["--image", tmp_path / "cat.png", "--weights", decoder_folder, "--out", tmp_path / "out.png"]
    assert run(script, *given, *wrong) == 2
    assert message in capsys.readouterr().err


def test_rooms_of_the_second_ring_are_attributes_of_the_package():
    assert all(getattr(kandinsky, name).__name__ == f"kandinsky.{name}" for name in kandinsky._LATER)
    with pytest.raises(AttributeError, match="module 'kandinsky' has no attribute 'magic'"):
        _ = kandinsky.magic


def test_a_lack_of_memory_is_one_line(capsys):
    @cli.one_line_errors
    def main(error):
        raise error

    assert main(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "out of memory; a smaller batch or size, half precision" in err
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(RuntimeError("a fault of ours"))


def test_a_folder_as_the_pictures_name_is_refused_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "out.png").mkdir()
    assert run("text2img", "cat", "--out", tmp_path / "out.png") == 2
    assert "is a folder; give the file's name too" in capsys.readouterr().err


def test_without_any_checkpoint_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "WEIGHTS", tmp_path)
    assert run("text2img", "cat") == 2
    assert "get the official one with `python scripts/download_weights.py 2.2`" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing", "config"])
def test_a_damaged_checkpoint_is_one_line_and_no_picture(decoder_folder, tmp_path, capsys, damage):
    shutil.copytree(decoder_folder.parent, tmp_path / "checkpoints")
    decoder = tmp_path / "checkpoints" / decoder_folder.name
    weights = decoder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save({}, weights)
    elif damage == "missing":
        weights.unlink()
    else:
        (decoder / "unet" / "config.json").write_text("{")
    assert run("text2img", "cat", "--weights", decoder, "--out", tmp_path / "out.png", *QUICK) == 2
    err = capsys.readouterr().err  # before any step: no progress bar stands before it
    assert err.count("\n") == 1
    expected = {
        "truncated": "is not a whole safetensors file",
        "pickle": "is a pickle, which is never loaded",
    }
    assert {"missing": "no such file", "config": "is not JSON", **expected}[damage] in err
    assert "unet" in err and not (tmp_path / "out.png").exists()


def test_a_cut_prompt_is_warned_of_in_one_line(decoder_folder, tmp_path, capsys):
    given = ["--weights", decoder_folder, "--out", tmp_path / "out.png", *QUICK]
    assert run("text2img", "cat " * 80, *given) == 0
    lines = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    lines = [line for line in lines if not re.match(r"(prior|decoder):", line)]
    assert len(lines) == 1 and "warning: the prompt is longer" in lines[0]


@pytest.mark.parametrize(
    "script, more",
    [
        ("text2img", "--prompts --image --hint"),
        ("img2img", "--prompts --image --hint --strength"),
        ("inpaint", "--prompts --image --mask --invert-mask --grow-mask --feather-mask --no-keep-unmasked"),
        ("mix", "--image --mix-weights --frames --animation --negative-prior-prompt"),
    ],
)
def test_help_explains_every_flag(capsys, script, more):
    assert run(script, "--help") == 0
    flags = (
        """--negative-prompt --seed --num-images --steps --prior-steps --guidance-scale --height --width
        --prior-guidance-scale --out --overwrite --device --dtype --weights --prior --from-png --no-metadata
        --low-memory --optimize --batch-size""".split()
        + more.split()
    )
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {flag}( |$)", shown, re.MULTILINE) for flag in flags)
    assert "decoder steps (default: 50)" in shown


@pytest.mark.parametrize("script", ["text2img", "img2img", "inpaint", "mix", "explain_run"])
def test_a_scale_without_a_lora_is_refused(monkeypatch, capsys, script):
    monkeypatch.setattr(Kandinsky, "from_pretrained", None)
    pictures = ["--image", "cat.png"] if script in ("img2img", "inpaint") else []
    assert run(script, "a cat", *pictures, "--lora-scale", "0.5") == 2
    told = capsys.readouterr().err
    assert "--lora-scale means nothing without --lora; see --help" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (
            "mix",
            ["a dog", "--frames", "3", "--batch-size", "3"],
            "--batch-size is of mixtures without --frames",
        ),
    ],
)
def test_a_flag_that_another_makes_idle_is_refused(monkeypatch, capsys, script, flags, message):
    monkeypatch.setattr(Kandinsky, "from_pretrained", None)
    assert run(script, "a cat", *flags) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


@pytest.mark.parametrize("flag", ["image", "mask", "hint"])
def test_a_page_follows_one_picture(monkeypatch, capsys, flag):
    monkeypatch.setattr(Kandinsky, "from_pretrained", None)
    assert run("explain_run", "a cat", f"--{flag}", "a.png", f"--{flag}", "b.png") == 2
    told = capsys.readouterr().err
    assert f"--{flag} is given 2 times; a page follows one picture" in told and told.count("\n") == 1


def test_what_there_is_nothing_of_is_told_and_not_passed(monkeypatch, capsys):
    parity = load("check_parity")
    monkeypatch.setattr(parity, "quiet_libraries", lambda: None)
    monkeypatch.setattr(parity, "check_schedulers", lambda _: iter([parity.Row("DDIM", 0.0, 0.0, 0.0)]))
    given, nothing = ["--model", "2.1", "--only", "hint"], "nothing of hint in random weights of 2.1, small"
    assert parity.main(given) == 2
    told = capsys.readouterr()
    assert nothing in told.err and told.err.count("\n") == 1 and "0 of 0" not in told.out
    assert parity.main([*given, "--only", "schedulers"]) == 0
    told = capsys.readouterr()
    assert nothing in told.err and "1 of 1 within what is allowed" in told.out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--weights", "nowhere", "--size", "small"], "--size is of random networks, not of --weights"),
        (["--weights", "nowhere", "--model", "2.2"], "--model is of random networks, not of --weights"),
        (["--prior", "nowhere"], "--prior means nothing without --weights"),
        (["--json", "table.csv"], "table.csv: cannot write .csv; use .json"),
    ],
)
def test_a_check_of_parity_ignores_no_flag(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run("check_parity", *flags) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_help_keeps_paragraphs_and_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert run("draw_readme", "--help") == run("evaluate_mini", "--help") == 0
    shown = capsys.readouterr().out
    assert re.search("\n\nrecipes  runs .*\ntasks    one picture .*\n\n", shown)
    assert "\n\n--task hint: " in shown and max(map(len, shown[shown.index("Measures") :].splitlines())) <= 60


@pytest.mark.slow
def test_importing_the_package_brings_neither_transformers_nor_diffusers():
    code = "import sys, kandinsky; print(*sorted({m.split('.')[0] for m in sys.modules})); "
    code += "assert 'kandinsky.optimize' not in sys.modules and kandinsky.optimize.optimize"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "diffusers", "tokenizers", "huggingface_hub"} & set(done.stdout.split())


@pytest.mark.slow
def test_using_the_pipeline_imports_neither_transformers_nor_diffusers(decoder_folder):
    code = (
        "import sys; from kandinsky import Kandinsky; p = Kandinsky.from_pretrained(sys.argv[1]);"
        "p.text2img('cat', num_inference_steps=1, prior_num_inference_steps=1, height=8, width=8);"
        "print({'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(decoder_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("flag", ["--seen", "--held-out", "--pictures", "--cases", "--batch-size"])
def test_nothing_can_be_measured_on_no_pictures(capsys, flag):
    assert run("evaluate_mini", flag, "0") == 2
    assert f"argument {flag}: value is 0; allowed is 1 and more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task, flag, of",
    [
        ("text2img", "--cases", "--task inpaint and hint"),
        ("inpaint", "--seen", "--task text2img"),
        ("hint", "--held-out", "--task text2img"),
        ("hint", "--true", "--task text2img"),
    ],
)
def test_a_measurement_ignores_no_flag(monkeypatch, capsys, task, flag, of):
    monkeypatch.setattr(Kandinsky, "from_pretrained", None)
    assert run("evaluate_mini", "--task", task, flag, "5") == 2
    told = capsys.readouterr().err
    assert f"{flag} is of {of}" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "command, name, message",
    [
        (["evaluate_mini"], "figures.png", "cannot write .png; use .json"),  # where its grid would go
        (["evaluate_mini"], "file/figures.json", "is not a folder that can be written to"),
        (["draw_readme", "tasks"], "file/tasks.png", "is not a folder that can be written to"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_drawn(tmp_path, monkeypatch, capsys, command, name, message):
    monkeypatch.setattr(Kandinsky, "from_pretrained", None)
    (tmp_path / "file").touch()
    assert run(*command, "--out", tmp_path / name) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_true_embeddings_are_made_at_the_towers_own_size(decoder_folder, tmp_path):
    pipe = Kandinsky.from_pretrained(decoder_folder)
    tower = CLIPImageEncoder.read_config(pipe.need_prior() / "image_encoder")
    size = pipe.unet_config.sample_size * pipe.movq_config.downscale
    assert tower.image_size != size
    few = [f"--{name}=1" for name in ("seen", "held-out", "true", "batch-size", "steps")]
    out = ["--out", tmp_path / "figures.json"]
    assert run("evaluate_mini", "--weights", decoder_folder, *few, "--pictures", "2", *out) == 0
    with Image.open(tmp_path / "figures.png") as grid:  # two rows of a picture each, and white
        assert grid.size == (12 * (size + 2), 2 * (size + 2))
        pixels = np.array(grid)
    assert (pixels[:, size + 2 :] == 255).all() and (pixels[: size + 2, : size + 2] != 255).any()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "24"], "--size is 24; this MoVQ and U-Net need a multiple of 16"),
        (["--size", "24", "--init", "DECODER"], "--size is 24; this MoVQ and U-Net need a multiple of 16"),
        (["--channels", "33", "48", "--groups", "1"], "--channels are 33, 48; multiples of --groups, 1"),
        (["--channels", "32", "48", "--groups", "32"], "multiples of --groups, 32, are needed, the first"),
        (["--channels", "32", "40"], "40 channels do not divide into heads of 16"),
    ],
)
def test_a_decoders_sizes_are_checked_before_anything_is_written(
    decoder_folder, tmp_path, capsys, flags, message
):
    flags = [str(decoder_folder) if flag == "DECODER" else flag for flag in flags]
    sizes = ["--size", "32", *([] if "--init" in flags else ["--groups", "8"]), *flags]
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    places = ["--clip", prior, "--movq", decoder_folder, "--out", tmp_path / "no"]
    assert run("train_decoder", *places, *sizes) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "script, flag",
    [
        *(("train_movq", flag) for flag in ("--channels", "--layers", "--codes")),
        *(("train_clip", flag) for flag in ("--dim", "--text-layers", "--patch")),
        *(("train_prior", flag) for flag in ("--heads", "--head-dim", "--layers")),
        *(("train_decoder", flag) for flag in ("--channels", "--context-dim", "--groups")),
    ],
)
def test_sizes_beside_those_of_init_are_refused(tmp_path, capsys, script, flag):
    places = sources(script, tmp_path, tmp_path)
    assert run(script, *places, "--init", tmp_path, "--out", tmp_path / "no", flag, "32") == 2
    told = capsys.readouterr().err
    assert f"{flag} is of a network from nothing; --init's has its own sizes" in told
    assert told.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.parametrize("script", ["train_prior", "train_decoder"])
def test_a_precision_beside_a_lora_is_refused(tmp_path, capsys, script):
    places = sources(script, tmp_path, tmp_path)
    flags = ["--init", tmp_path, "--out", tmp_path / "no", "--lora", "2", "--save-dtype", "float16"]
    assert run(script, *places, *flags) == 2
    told = capsys.readouterr().err
    assert "--save-dtype is of a whole network; a LoRA is written in float32" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stage", "teacher", "--caption-weight", "2"], "--caption-weight is of a head that --stage tea"),
        (["--stage", "text", "--picture-weight", "2"], "--picture-weight is of a head that --stage text"),
        (["--stage", "image", "--scene-weight", "2"], "--scene-weight is of a head that --stage image"),
        (["--data", ".", "--scene-weight", "2"], "--scene-weight is of kandinsky.shapes; of --data no sc"),
    ],
)
def test_weights_of_heads_that_are_not_trained_are_refused(tmp_path, capsys, flags, message):
    assert run("train_clip", "--init", tmp_path, "--out", tmp_path / "no", *flags) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_samples_of_what_draws_none_are_refused(tmp_path, capsys):
    places = ["--clip", tmp_path, "--movq", tmp_path, "--init", tmp_path, "--out", tmp_path / "no"]
    assert run("train_decoder", *places, "--task", "inpaint", "--samples", "12") == 2
    told = capsys.readouterr().err
    assert "--samples is of text2img, 2.2" in told and told.count("\n") == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("script, other", [("train_prior", "unet"), ("train_decoder", "prior")])
def test_a_repository_of_another_kind_is_not_written_over(decoder_folder, capsys, script, other):
    prior = decoder_folder.with_name("kandinsky-2-2-prior")
    before = {path: path.stat().st_mtime_ns for path in decoder_folder.parent.rglob("*")}
    places = sources(script, prior, decoder_folder)
    out = decoder_folder if script == "train_prior" else prior
    assert run(script, *places, "--out", out, "--steps", "1", "--count", "1") == 2
    told = capsys.readouterr().err
    assert f"has a {other}, whose scheduler and index would be written over" in told
    assert told.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in decoder_folder.parent.rglob("*")}


@pytest.mark.parametrize(
    "script, wrong, message",
    [
        ("train_prior", ["--add-layers", "1"], "--add-layers adds to"),
        ("train_decoder", ["--size", "31"], "--size is 31"),
    ],
)
def test_a_lora_may_lie_in_a_repository(decoder_folder, capsys, script, wrong, message):
    """What is refused is what is checked after the place."""
    prior = decoder_folder.with_name("kandinsky-2-2-prior")
    init = prior if script == "train_prior" else decoder_folder
    places = sources(script, prior, decoder_folder)
    for out in (decoder_folder, prior):
        assert run(script, *places, "--init", init, "--out", out, "--lora", "2", *wrong) == 2
        assert message in capsys.readouterr().err


def test_a_folder_of_repositories_is_not_one(decoder_folder, tmp_path, capsys):
    """`--out mine` beside `mine/prior`, a whole repository by that name."""
    prior = decoder_folder.with_name("kandinsky-2-2-prior")
    shutil.copytree(prior, tmp_path / "prior")
    places = ["--clip", tmp_path / "prior", "--movq", decoder_folder, "--out", tmp_path]
    assert run("train_decoder", *places, "--size", "31") == 2
    assert "--size is 31" in capsys.readouterr().err  # what is checked after the place


@pytest.mark.parametrize("script", ["train_prior", "train_decoder"])
def test_a_folder_is_encoded_whole(tmp_path, capsys, script):
    places = sources(script, tmp_path, tmp_path)
    assert run(script, *places, "--out", tmp_path / "no", "--data", tmp_path, "--count", "1") == 2
    told = capsys.readouterr().err
    assert "--count is of kandinsky.shapes; of --data all is encoded" in told and told.count("\n") == 1


@pytest.mark.parametrize("script", ["train_movq", "train_clip", "train_prior", "train_decoder"])
def test_what_a_training_starts_from_is_not_written_over(decoder_folder, capsys, script):
    """A run is continued by the same command, whose --init is another folder."""
    prior = decoder_folder.parent / "kandinsky-2-2-prior"
    init = prior if script in ("train_clip", "train_prior") else decoder_folder
    before = {path: path.stat().st_mtime_ns for path in decoder_folder.parent.rglob("*")}
    places = [*sources(script, prior, decoder_folder), "--init", init]
    assert run(script, *places, "--out", init / "training" / "..", "--steps", "1") == 2
    told = capsys.readouterr().err
    assert "is --init, whose weights would be written over; choose another" in told and told.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in decoder_folder.parent.rglob("*")}


@pytest.mark.parametrize("script", ["train_movq", "train_clip", "train_prior", "train_decoder"])
def test_where_nothing_can_be_written_nothing_is_encoded(tmp_path, capsys, script):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "new"):
        assert run(script, *sources(script, tmp_path, tmp_path), "--out", out) == 2
        told = capsys.readouterr().err
        assert f"{out} cannot be written: {tmp_path / 'file'} is not a folder" in told
        assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_beside_init_need_not_divide_into_the_patches_of_a_new_tower(tmp_path, capsys):
    assert run("train_clip", "--init", tmp_path, "--out", tmp_path / "no", "--size", "100") == 2
    assert "no such folder" in capsys.readouterr().err  # what is looked for after the numbers are checked


def test_every_stage_of_a_clip_pair_starts_from_what_init_holds(tmp_path, monkeypatch):
    """At a rate of zero each writes the weights that it was given, on the teacher's embeddings."""
    first, data = tmp_path / "first", ["--data", write_folder(tmp_path / "pictures", 2), "--size", "16"]
    short = ["--steps", "1", "--learning-rate", "0", "--batch-size", "2", *data]
    assert run("train_clip", "--stage", "both", "--out", first, *SMALL_TOWERS, *short, "--seed", "5") == 0
    assert run("train_clip", "--stage", "teacher", "--out", first, *SMALL_TOWERS, *short, "--seed", "5") == 0
    stages = {"teacher": "teacher", "text": "text_encoder", "image": "image_encoder"}
    trained, train = [], training_cli.train

    def train_and_keep(objective, *given, **named) -> None:
        trained.append(objective)
        train(objective, *given, **named)

    monkeypatch.setattr(training_cli, "train", train_and_keep)
    for stage, part in stages.items():
        out = tmp_path / stage
        assert run("train_clip", "--stage", stage, "--init", first, "--out", out, *short) == 0
        file = f"{part}/model.safetensors"
        assert (out / file).read_bytes() == (first / file).read_bytes(), stage
    teacher = load_image_encoder(first)
    for found in (trained[0].image_encoder, trained[1].image_encoder, trained[2].teacher):
        assert isinstance(found, ConvEncoder) and digest(found) == digest(teacher)


@pytest.mark.parametrize("stage", ["both", "text"])
def test_a_batch_of_contrast_is_no_larger_than_its_folder(tmp_path, capsys, monkeypatch, stage):
    given = [
        "--data",
        write_folder(tmp_path / "pictures", 3),
        "--out",
        tmp_path / "no",
        "--size",
        "8",
        "--steps",
        "1",
    ]
    assert run("train_clip", "--stage", stage, *given, "--batch-size", "4") == 2
    assert "--batch-size is 4; contrast on these 3 pictures allows 1 to 3" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("train_clip", "--stage", stage, *given, "--batch-size", "2") == 2
    assert "--batch-size is 2; contrast on these 3 pictures allows 1 to 1" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (
            "train_prior",
            ["--add-layers", "-1"],
            "argument --add-layers: value is -1; allowed is 0 and",
        ),
        ("train_prior", ["--count", "0"], "argument --count: value is 0; allowed is 1 and more"),
        ("train_prior", ["--workers", "-1"], "argument --workers: value is -1; allowed is 0 and more"),
        ("train_prior", ["--noises", "0"], "argument --noises: value is 0; allowed is 1 and more"),
        ("train_prior", ["--lora", "0"], "argument --lora: value is 0; allowed is 1 and more"),
        ("train_movq", ["--ema", "nan"], "argument --ema: value is nan; a finite number is needed"),
        ("train_movq", ["--ema", "2"], "argument --ema: value is 2.0; allowed is 0 to 1"),
        (
            "train_movq",
            ["--learning-rate", "-1"],
            "argument --learning-rate: value is -1.0; allowed is 0 and more",
        ),
        ("train_movq", ["--max-norm", "0"], "argument --max-norm: value is 0.0; allowed is 1e-09"),
        ("train_movq", ["--weight-decay", "inf"], "argument --weight-decay: value is inf"),
        ("train_movq", ["--steps", "-1"], "argument --steps: value is -1; allowed is 1 and more"),
        ("train_movq", ["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        ("train_movq", ["--channels", "16", "0"], "argument --channels: value is 0; allowed is 1 and"),
        ("train_movq", ["--size", "31"], "--size is 31; this MoVQ needs a multiple of 4"),
        ("train_movq", ["--size", "32", "--crop", "64"], "--crop is 64; allowed are multiples of 4 up to"),
        ("train_movq", ["--size", "32", "--crop", "6"], "--crop is 6; allowed are multiples of 4 up to"),
        (
            "train_decoder",
            ["--accumulate", "0"],
            "argument --accumulate: value is 0; allowed is 1 and",
        ),
        ("train_decoder", ["--samples", "7"], "argument --samples: invalid choice: 7"),
        (
            "train_decoder",
            ["--save-every", "0"],
            "argument --save-every: value is 0; allowed is 1 and",
        ),
        ("train_movq", ["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        ("train_clip", ["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        ("train_movq", ["--object-weights", "0", "0", "0"], "object_weights are (0.0, 0.0, 0.0)"),
        (
            "train_movq",
            ["--adversarial", "0.1", "--crop", "4"],
            "--crop is 4; the discriminator of --adversarial needs 8 pixels",
        ),
        ("train_movq", ["--adversarial", "0.1", "--size", "4"], "--size is 4; the discriminator of"),
        (
            "train_clip",
            ["--stage", "teacher", "--picture-weight", "0", "--scene-weight", "0"],
            "none of them is above 0",
        ),
        ("train_movq", ["--freeze-encoder"], "--freeze-encoder means nothing without --init"),
        ("train_prior", ["--heads", "3", "--head-dim", "5"], "--head-dim is 15; an even number is needed"),
        ("train_clip", ["--stage", "text"], "--stage text needs a teacher or an image tower to learn from"),
        ("train_clip", ["--head-dim", "7"], "--dim is 160; it must divide into heads of --head-dim, 7"),
        ("train_clip", ["--patch", "64", "--size", "32"], "--size is 32; it must divide into patches of"),
    ],
)
def test_numbers_that_train_nothing_are_refused_before_anything_is_made(
    script, flags, message, tmp_path, capsys
):
    assert run(script, *sources(script, tmp_path, tmp_path), "--out", tmp_path / "no", *flags) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.parametrize("script", ["train_prior", "train_decoder"])
def test_a_run_whose_cache_is_refused_leaves_the_repository_as_it_is(
    script, decoder_folder, tmp_path, capsys
):
    name = {"train_prior": "embeddings-train", "train_decoder": "latents"}[script]
    kept = tmp_path / "out" / "training" / f"{name}.safetensors"
    write_safetensors({"image_embeds": torch.zeros(1, 1)}, kept)
    prior = decoder_folder.with_name("kandinsky-2-2-prior")
    movq = ["--movq", decoder_folder, *SMALL_UNET] if script == "train_decoder" else []
    data = ["--data", write_folder(tmp_path / "pictures", 1), "--size", "16"]
    assert run(script, "--clip", prior, *movq, *data, "--out", tmp_path / "out") == 2
    assert "is not known to be made from the same" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [kept]


@pytest.mark.parametrize("script", ["train_prior", "train_decoder"])
def test_a_run_whose_state_is_of_another_training_leaves_the_repository_as_it_is(
    script, decoder_folder, tmp_path, capsys
):
    """Without --train-text, --clip's text tower was written over the one that a run with it had trained."""
    out, prior = tmp_path / "out", decoder_folder.with_name("kandinsky-2-2-prior")
    write_safetensors({"weights.x": torch.zeros(1)}, out / "training" / "state.safetensors", {"step": "1"})
    movq = ["--movq", decoder_folder, *SMALL_UNET] if script == "train_decoder" else []
    data = ["--data", write_folder(tmp_path / "pictures", 1), "--size", "16"]
    assert run(script, "--clip", prior, *movq, *data, "--out", out) == 2
    assert "state.safetensors is of another model" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["training"]


@pytest.mark.parametrize(
    "script, init, flags, message",
    [
        ("train_prior", "gone", [], "no config.json in it"),
        ("train_prior", "other", [], "--init's prior is for embeddings of 24 numbers, --clip's have 32"),
        ("train_decoder", "other", [], "--init's U-Net is for embeddings of 24 numbers, --clip's have 32"),
        ("train_decoder", "inpaint", [], "--task text2img starts from a text-to-image decoder"),
        ("train_decoder", "hint", ["--task", "inpaint"], "from a text-to-image decoder, or one of inpaint"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_encoded(
    script, init, flags, message, decoder_folder, tmp_path, capsys
):
    entrance = {"inpaint": {"in_channels": 9}, "hint": {"in_channels": 8, "hint": True}}.get(init, {})
    prior, unet = decoder_folder.with_name("kandinsky-2-2-prior"), UNet.read_config(decoder_folder / "unet")
    if init != "gone":
        width = {"embedding_dim": 24} if init == "other" else {}
        write_json(replace(unet, **width, **entrance).published(), tmp_path / init / "unet" / "config.json")
        of_prior = replace(Prior.read_config(prior / "prior"), **width)
        write_json(of_prior.published(), tmp_path / init / "prior" / "config.json")
    movq = ["--movq", decoder_folder] if script == "train_decoder" else []
    given = ["--clip", prior, *movq, "--init", tmp_path / init, *flags, "--count", "1", "--steps", "1"]
    assert run(script, *given, "--out", tmp_path / "o") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_prior_is_trained_on_a_cache_of_its_own_tokenizer_and_of_any_text_tower(
    decoder_folder, tmp_path, capsys
):
    clip, out = tmp_path / "clip", tmp_path / "out"
    shutil.copytree(decoder_folder.with_name("kandinsky-2-2-prior"), clip)
    write_safetensors({"zero_image_embeds": torch.zeros(1, 32)}, clip / "zero_image_embeds.safetensors")
    data = ["--data", write_folder(tmp_path / "pictures", 1), "--size", "16", "--steps", "1"]
    given = ["--clip", clip, "--out", out, "--batch-size", "1", "--layers", "1", *data]
    assert run("train_prior", *given) == 0
    kept = (out / "training" / "embeddings-train.safetensors").stat().st_mtime_ns
    (out / "training" / "state.safetensors").unlink()
    tower = CLIPTextEncoder.from_pretrained(clip / "text_encoder").requires_grad_(False)
    tower.text_projection.weight.mul_(2)
    tower.save_pretrained(clip / "text_encoder")
    assert run("train_prior", *given, "--train-text") == 0
    assert (out / "training" / "embeddings-train.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    merges = clip / "tokenizer" / "merges.txt"
    *lines, one, other = merges.read_text().splitlines()
    merges.write_text("\n".join([*lines, other, one, ""]))
    assert run("train_prior", *given, "--train-text", "--bf16") == 2
    assert "is not known to be made from the same bf16, tokenizer; delete" in capsys.readouterr().err


@pytest.fixture
def clip_flags(tmp_path) -> list:
    """One step on two pictures, learning nothing."""
    data = ["--data", write_folder(tmp_path / "pictures", 2), "--size", "16", "--batch-size", "2"]
    return ["--steps", "1", "--learning-rate", "0", *data]


def test_an_image_tower_needs_a_teacher_of_its_own_width(tmp_path, clip_flags, capsys):
    pair, out, image = tmp_path / "pair", tmp_path / "out", ["--stage", "image"]
    assert run("train_clip", "--out", pair, *SMALL_TOWERS, *clip_flags) == 0
    capsys.readouterr()
    for place in (["--out", pair, *SMALL_TOWERS], ["--init", pair, "--out", out]):
        assert run("train_clip", *image, *place, *clip_flags) == 2
        message = f"--stage image needs a teacher to learn from, and {pair} has none\n"
        assert message in capsys.readouterr().err and not out.exists()
    assert run("train_clip", "--stage", "teacher", "--out", out, *SMALL_TOWERS, *clip_flags) == 0
    capsys.readouterr()
    for stage in ("image", "text"):
        wider = [*SMALL_TOWERS, "--dim", "48"]
        assert run("train_clip", "--stage", stage, "--out", out, *wider, *clip_flags) == 2
        message = f"--stage {stage} learns embeddings of 32 numbers, and its tower gives 48; choose --dim 32"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["teacher", "image"])
def test_a_stage_without_texts_keeps_the_tokenizer_that_is_there(tmp_path, clip_flags, stage):
    first, out = tmp_path / "first", tmp_path / "out"
    assert run("train_clip", "--stage", "teacher", "--out", first, *SMALL_TOWERS, *clip_flags) == 0
    assert run("train_clip", "--out", first, *SMALL_TOWERS, *clip_flags) == 0
    shutil.copytree(first / "tokenizer", out / "tokenizer")
    vocabulary = out / "tokenizer" / "vocab.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    kept = vocabulary.read_bytes()
    assert run("train_clip", "--stage", stage, "--init", first, "--out", out, *clip_flags) == 0
    assert vocabulary.read_bytes() == kept
