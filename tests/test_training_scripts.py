"""The training scripts, from nothing to a checkpoint that diffusers draws the same pictures with."""

import json
import runpy
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import train_decoder
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from train_decoder import known_latents

from kandinsky import Kandinsky, MoVQ, Prior, UNet, datasets, decoder_training, random_weights
from kandinsky.cli import WEIGHTS
from kandinsky.datasets import Folder, Shapes, with_holes
from kandinsky.embedding_cache import Cache
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.training import own_device
from tests.helpers import relative_l2
from tests.test_training import write_folder

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SHORT = ["--steps", "2", "--batch-size", "4", "--sample-every", "2", "--save-every", "2", "--warmup", "1"]
TOWERS = [
    "--dim",
    "32",
    "--image-width",
    "32",
    "--image-layers",
    "1",
    "--text-layers",
    "1",
    "--head-dim",
    "16",
]
PRIOR = ["--heads", "2", "--head-dim", "16", "--layers", "1"]
DECODER = ["--channels", "32", "48", "--head-dim", "16", "--context-dim", "16", "--groups", "8"]


def run(script: str, *args) -> int:
    return runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"](list(map(str, args)))


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """The sample pictures of a run take most of these short ones' time."""
    few = partial(decoder_training.draw_latents, num_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_training, "draw_latents", few)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Every network, two steps from nothing, on a folder of eight pictures of 16 pixels."""
    out = tmp_path_factory.mktemp("trained")
    data = ["--data", write_folder(out / "pictures"), "--size", "16", *SHORT]
    small = ["--channels", "32", "32", "--codes", "20", "--save-dtype", "float16"]
    assert run("train_movq", "--out", out / "movq", *small, *data) == 0
    for stage in ("teacher", "text", "image"):
        assert run("train_clip", "--stage", stage, "--out", out / "clip", *TOWERS, *data) == 0
    clip = ["--clip", out / "clip"]
    assert run("train_prior", "--out", out / "mini-prior", *clip, *PRIOR, *data) == 0
    decoder = ["--clip", out / "mini-prior", "--movq", out / "movq", *DECODER]
    assert run("train_decoder", "--out", out / "mini-decoder", *decoder, *data) == 0
    return out


def combined(folder: Path) -> KandinskyV22CombinedPipeline:
    """diffusers' own pipelines with their default arguments, put together."""
    prior = KandinskyV22PriorPipeline.from_pretrained(folder / "mini-prior")
    decoder = KandinskyV22Pipeline.from_pretrained(folder / "mini-decoder")
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    pipeline = KandinskyV22CombinedPipeline(**decoder.components, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_pictures(folder: Path, size: int, steps: int) -> None:
    theirs, ours = combined(folder), Kandinsky.from_pretrained(folder / "mini-decoder")
    prompt = "a red circle above a small blue square on a yellow background"
    for seed in (0, 1):
        settings = {"num_inference_steps": steps, "height": size, "width": size}
        generator = torch.Generator("cpu").manual_seed(seed)
        their_picture = theirs(prompt, generator=generator, **settings).images[0]
        our_picture = ours.text2img(prompt, seed=seed, num_inference_steps=steps)[0]
        assert our_picture.size == (size, size)  # its own size is the default
        levels = np.abs(np.asarray(our_picture).astype(int) - np.asarray(their_picture))
        assert levels.max() <= 1 and np.asarray(our_picture).std() > 0


def test_what_the_scripts_write_draws_the_same_pictures_in_diffusers(trained):
    movq = load_file(trained / "mini-decoder" / "movq" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in movq.values()} == {torch.float16}
    assert_same_pictures(trained, 16, 4)


@pytest.mark.parametrize("task, clips", [("text2img", True), ("inpaint", False)])
def test_a_fine_tune_keeps_the_scheduler_that_it_starts_from(trained, tmp_path, monkeypatch, task, clips):
    init, out = tmp_path / "theirs", tmp_path / "mini-decoder"
    shutil.copytree(trained / "mini-decoder", init)
    settings = {"beta_start": 0.001, "beta_end": 0.02, "clip_sample": True, "steps_offset": 0}
    DDIMScheduler(**settings).save_pretrained(init / "scheduler")
    data = ["--data", trained / "pictures", "--size", "16", *SHORT]
    given = ["--task", task, "--init", init, "--clip", trained / "mini-prior", "--movq", init]
    assert run("train_decoder", "--out", out, *given, *data) == 0
    ours = Kandinsky.from_pretrained(out).scheduler
    assert type(ours).__name__ == "DDIMScheduler" and ours.clip_sample == clips
    assert (ours.beta_start, ours.beta_end, ours.steps_offset) == (0.001, 0.02, 0)
    theirs = DiffusionPipeline.from_pretrained(out).scheduler
    assert type(theirs) is DDIMScheduler and theirs.config.beta_end == 0.02
    with monkeypatch.context() as patch:
        objectives = []
        train = "kandinsky.training_cli.train"
        patch.setattr(train, lambda objective, *_, **around: objectives.append(objective))
        assert train_decoder.main([*map(str, given), "--out", str(out), *map(str, data)]) == 0
    trained_on = objectives[0].scheduler
    assert torch.equal(trained_on.alphas_cumprod, ours.alphas_cumprod) and trained_on.clip_sample == clips


@pytest.mark.parametrize("more", [[], ["--lora", "2"]])
@pytest.mark.parametrize("settings", [{"_class_name": "EulerDiscreteScheduler"}, {"beta_start": 0.001}])
def test_a_scheduler_that_is_not_known_is_refused_before_anything_is_written(
    trained, tmp_path, capsys, settings, more
):
    init, out = tmp_path / "theirs", tmp_path / "mine"
    shutil.copytree(trained / "mini-decoder", init)
    (init / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    given = ["--init", init, "--clip", trained / "mini-prior", "--movq", init, "--out", out, *more]
    assert run("train_decoder", *given, "--data", trained / "pictures", "--size", "16", *SHORT) == 2
    assert "_class_name is" in capsys.readouterr().err and not out.exists()


def test_a_folder_is_scanned_and_encoded_once(trained, tmp_path, capsys):
    folder = shutil.copytree(trained / "pictures", tmp_path / "pictures")
    (folder / "0.png").write_bytes(b"")
    data, clip = ["--data", folder, "--size", "16", *SHORT], ["--clip", trained / "clip"]
    for script, places in (
        ("train_movq", ["--channels", "32", "32", "--codes", "20"]),
        ("train_clip", TOWERS),
        ("train_prior", [*clip, *PRIOR]),
        ("train_decoder", [*clip, "--movq", trained / "movq", *DECODER]),
    ):
        assert run(script, "--out", tmp_path / script, *places, *data) == 0
        assert capsys.readouterr().err.count("0.png cannot be read") == 1, script
    assert not (tmp_path / "train_prior" / "training" / "embeddings-fresh.safetensors").exists()


def test_a_finished_run_changes_nothing_when_started_again(trained):
    weights = trained / "mini-prior" / "prior" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    data = ["--data", trained / "pictures", "--size", "16", *SHORT]
    assert run("train_prior", "--out", trained / "mini-prior", "--clip", trained / "clip", *PRIOR, *data) == 0
    assert weights.read_bytes() == before


def test_a_further_run_starts_from_what_was_trained(trained, tmp_path):
    """Fine-tuning at a rate of zero gives the weights that it was given."""
    data = ["--data", trained / "pictures", "--size", "16", *SHORT, "--learning-rate", "0"]
    places = ["--clip", trained / "mini-prior", "--movq", trained / "mini-decoder"]
    start = ["--init", trained / "mini-decoder"]
    assert run("train_decoder", "--out", tmp_path / "tuned", *start, *places, *data) == 0
    for name in ("unet", "movq"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "tuned" / file).read_bytes() == (trained / "mini-decoder" / file).read_bytes()


def test_inpainting_starts_from_a_text_to_image_decoder(trained, tmp_path, capsys):
    data = ["--data", trained / "pictures", "--size", "16", *SHORT]
    places = ["--clip", trained / "mini-prior", "--movq", trained / "mini-decoder", "--task", "inpaint"]
    assert run("train_decoder", "--out", tmp_path / "fails", *places, *data) == 2
    assert "needs --init" in capsys.readouterr().err
    start = ["--init", trained / "mini-decoder"]
    assert run("train_decoder", "--out", tmp_path / "inpaint", *start, *places, *data) == 0
    assert Kandinsky.from_pretrained(tmp_path / "inpaint").unet_config.in_channels == 9
    cache = Cache.read(tmp_path / "inpaint" / "training" / "latents.safetensors")
    assert len(cache) == 8 * len(list((trained / "pictures").glob("*.png")))  # so many holes in each
    assert set(cache["known"][:, 4].unique().tolist()) == {0, 1}


def test_a_cache_of_another_task_is_refused(trained, tmp_path, capsys):
    data = ["--data", trained / "pictures", "--size", "16", *SHORT, "--out", tmp_path / "out"]
    places = ["--clip", trained / "mini-prior", "--movq", trained / "mini-decoder"]
    start = ["--init", trained / "mini-decoder"]
    assert run("train_decoder", *start, *places, *data) == 0
    capsys.readouterr()
    assert run("train_decoder", *start, *places, *data, "--task", "inpaint") == 2
    assert "is not known to be made from the same task, count; delete it" in capsys.readouterr().err


@torch.no_grad()
def test_known_latents_tell_nothing_of_what_is_to_be_painted(trained, monkeypatch):
    monkeypatch.setattr(datasets, "OBJECT_HOLES", 1)
    movq, data = MoVQ.from_pretrained(trained / "mini-decoder" / "movq"), Shapes(1, 16).load([0, 1, 2, 3])
    samples = with_holes(data, Random(0))
    other = replace(data, pixels=torch.where(samples.holes > 0, 0.5, data.pixels))
    known, kept = known_latents(movq, samples), known_latents(movq, samples)[:, 4:]
    assert torch.equal(known, known_latents(movq, with_holes(other, Random(0)))) and 0 < kept.mean() < 1
    assert torch.equal(known[:, :4], kept * movq.encode(samples.before))


def test_2_1_is_trained_on_its_captions(tmp_path, capsys):
    """Prior, decoder, a LoRA and an inpainting decoder, from random weights of 2.1."""
    weights = tmp_path / "weights"
    prior, decoder = random_weights.make(weights, "small", say=lambda line: None, model="2.1")
    data = ["--data", write_folder(tmp_path / "pictures"), "--size", "32", *SHORT]
    clip, movq = ["--clip", prior, "--init"], ["--movq", decoder]
    assert run("train_prior", "--out", tmp_path / "kandinsky-2-1-prior", *clip, prior, *data) == 0
    assert run("train_decoder", "--out", tmp_path / "kandinsky-2-1", *clip, decoder, *movq, *data) == 0
    index = json.loads((tmp_path / "kandinsky-2-1-prior" / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyPriorPipeline"
    before, after = (UNet.from_pretrained(path / "unet") for path in (decoder, tmp_path / "kandinsky-2-1"))
    reads = "encoder_hid_proj.text_proj.weight"
    assert not torch.equal(before.state_dict()[reads], after.state_dict()[reads].float())
    sizes = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 32, "width": 32}
    for scheduler in ("scheduler", "ddpm_scheduler"):
        pipe = Kandinsky.from_pretrained(tmp_path / "kandinsky-2-1", scheduler=scheduler)
        assert len(pipe.text2img("a red cat", seed=0, **sizes)) == 1
    inpaint = ["--task", "inpaint", "--out", tmp_path / "inpaint"]
    assert run("train_decoder", *inpaint, *clip, decoder, *movq, *data) == 0
    tuned = Kandinsky.from_pretrained(tmp_path / "inpaint", tmp_path / "kandinsky-2-1-prior")
    assert tuned.unet_config.text and tuned.unet_config.in_channels == 9
    assert run("train_decoder", "--lora", "2", "--out", tmp_path / "lora", *clip, decoder, *movq, *data) == 0
    pipe.load_lora(tmp_path / "lora" / "unet-lora.safetensors")
    assert not (tmp_path / "lora" / "text_encoder").exists()
    assert (
        run("train_decoder", "--task", "hint", "--out", tmp_path / "hint", *clip, decoder, *movq, *data) == 2
    )
    assert "is of 2.1, which takes no hints" in capsys.readouterr().err


def test_a_decoder_is_trained_on_what_the_prior_draws(trained, tmp_path, capsys):
    data = ["--data", trained / "pictures", "--size", "16", *SHORT, "--seed", "5"]
    places = ["--clip", trained / "clip", "--movq", trained / "mini-decoder", "--task", "inpaint"]
    prior, start = ["--prior", trained / "mini-prior"], ["--init", trained / "mini-decoder"]
    assert run("train_decoder", "--out", tmp_path / "out", *start, *prior, *places, *data) == 0
    kept = load_file(tmp_path / "out" / "training" / "latents.safetensors")["image_embeds"]
    captions = Folder(trained / "pictures", 16, seed=5).captions(list(range(8)))
    pipe = Kandinsky.from_pretrained(trained / "mini-decoder", trained / "mini-prior")
    drawn = pipe.embed(captions, seed=list(range(5, 13))).image_embeds
    assert relative_l2(kept[:8].float(), drawn) <= 1e-3, "half precision"
    assert run("train_decoder", "--out", tmp_path / "no", *prior, *places[:4], *data) == 2
    assert "--prior needs --init" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["prior", "unet"])
@pytest.mark.parametrize("precision", [[], ["--bf16", "--checkpointing"]])
def test_a_lora_is_trained_alone_and_loads(trained, tmp_path, network, precision):
    out = tmp_path / "lora"
    flags = ["--data", trained / "pictures", "--size", "16", *SHORT, "--lora", "2", *precision]
    if network == "prior":
        script, places = "train_prior", ["--clip", trained / "clip", "--init", trained / "mini-prior"]
    else:
        script = "train_decoder"
        places = [
            "--clip",
            trained / "mini-prior",
            "--movq",
            trained / "movq",
            "--init",
            trained / "mini-decoder",
        ]
    assert run(script, "--out", out, *places, *flags) == 0
    assert {path.name for path in out.iterdir()} == {"training", f"{network}-lora.safetensors"}
    pipe = Kandinsky.from_pretrained(trained / "mini-decoder")
    draw = lambda: pipe.text2img("a red circle", seed=0, num_inference_steps=2, output_type="latent")  # noqa: E731
    before = draw()
    pipe.load_lora(out / f"{network}-lora.safetensors")
    assert not torch.equal(draw(), before)
    pipe.unload_lora()
    assert torch.equal(draw(), before)


def test_a_text_tower_is_trained_with_its_prior(trained, tmp_path, capsys):
    out, flags = tmp_path / "prior", ["--data", trained / "pictures", "--size", "16", *SHORT, "--train-text"]
    places = ["--clip", trained / "clip", "--init", trained / "mini-prior"]
    assert run("train_prior", "--out", out, *places, *flags) == 0
    towers = [CLIPTextEncoder.from_pretrained(f / "text_encoder") for f in (out, trained / "mini-prior")]
    weights = [tower.text_projection.weight for tower in towers]
    assert weights[0].isfinite().all() and not torch.equal(*weights)
    assert run("train_prior", "--out", out, *places, *flags) == 0  # there is nothing more to do
    kept = CLIPTextEncoder.from_pretrained(out / "text_encoder")
    assert torch.equal(kept.text_projection.weight, weights[0])
    assert run("train_prior", "--out", tmp_path / "no", *places, *flags, "--lora", "2") == 2
    assert "--train-text goes without it" in capsys.readouterr().err


def test_each_process_encodes_on_its_own_gpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [own_device(d) for d in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == "cuda:3"


def test_layers_are_added_to_a_prior(trained, tmp_path, capsys):
    flags = ["--data", trained / "pictures", "--size", "16", *SHORT, "--clip", trained / "clip"]
    more = ["--init", trained / "mini-prior", "--add-layers", "2"]
    assert run("train_prior", "--out", tmp_path / "out", *flags, *more) == 0
    assert len(Prior.from_pretrained(tmp_path / "out" / "prior").transformer_blocks) == 3
    for wrong, message in (
        (["--add-layers", "1"], "--add-layers adds to --init's prior, and goes without --lora"),
        ([*more, "--lora", "2"], "--add-layers adds to --init's prior, and goes without --lora"),
        (
            ["--object-weights", "1", "2", "3"],
            "--object-weights is for kandinsky.shapes",
        ),
        (["--device", "cuda:77"], "cuda:77"),
    ):
        assert run("train_prior", "--out", tmp_path / "no", *flags, *wrong) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_the_numbers_of_objects_are_checked_before_anything_is_written(trained, tmp_path, capsys):
    flags = ["--clip", trained / "clip", "--out", tmp_path / "no", "--object-weights", "0", "0", "0"]
    assert run("train_prior", *flags) == 2
    assert "object_weights are (0.0, 0.0, 0.0)" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_lora_needs_a_network_to_change(trained, tmp_path, capsys):
    places = ["--clip", trained / "clip", "--out", tmp_path / "lora", "--lora", "2"]
    assert run("train_prior", *places) == 2
    assert "--lora needs --init" in capsys.readouterr().err and not (tmp_path / "lora").exists()
    places += ["--movq", trained / "movq", "--init", trained / "mini-decoder"]
    assert run("train_decoder", *places, "--task", "hint") == 2
    message = "--lora with --task hint needs an --init of that task, which"
    assert message in capsys.readouterr().err and not (tmp_path / "lora").exists()


def test_a_hint_network_is_trained_on_a_folder_with_hints(trained, tmp_path, capsys):
    pictures = write_folder(tmp_path / "pictures", 3)
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"hint_file_name": "0.hint.png"}
    (pictures / "metadata.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(pictures / "0.hint.png")
    data = ["--data", pictures, "--size", "16", *SHORT]
    places = ["--clip", trained / "mini-prior", "--movq", trained / "movq", "--task", "hint"]
    start = ["--init", trained / "mini-decoder"]
    assert run("train_decoder", "--out", tmp_path / "hint", *start, *places, *data) == 0
    assert capsys.readouterr().err.count("has no hint") == 2
    assert Kandinsky.from_pretrained(tmp_path / "hint").unet_config.hint


@pytest.mark.skipif(not (WEIGHTS / "mini-decoder").is_dir(), reason="no embedded checkpoint")
def test_the_embedded_checkpoint_draws_the_same_pictures_in_diffusers():
    assert_same_pictures(WEIGHTS, 64, 50)


@pytest.mark.skipif(not (WEIGHTS / "mini-decoder").is_dir(), reason="no embedded checkpoint")
def test_the_embedded_checkpoint_is_small():
    files = [path for name in ("mini-prior", "mini-decoder") for path in (WEIGHTS / name).rglob("*")]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20


@pytest.mark.parametrize(
    "task, folder", [("inpaint", "mini-decoder-inpaint"), ("hint", "mini-controlnet-depth")]
)
def test_the_embedded_tasks_are_measured(task, folder, tmp_path, capsys):
    if not (WEIGHTS / folder).is_dir():
        pytest.skip("no embedded checkpoint")
    out = tmp_path / f"{task}.json"
    quick = ["--cases", "12", "--batch-size", "12", "--sampler", "dpm++", "--steps", "12"]
    assert run("evaluate_mini", "--task", task, *quick, "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["all, number"] == 12 and found["all"] >= 0.75
    assert task == "hint" or found["rest untouched"] == 1
    assert Image.open(out.with_suffix(".png")).width > 12 * 64
