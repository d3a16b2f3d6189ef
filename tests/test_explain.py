"""The page of a run: its numbers are the run's, and a browser shows it without a fault."""

import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kandinsky import Kandinsky, explain, inspection
from kandinsky.page import page
from tests.helpers import half_mask, picture
from tests.test_scripts import run

slow = pytest.mark.slow

PROMPT = "a red cat, 4k photo"
STEPS = {"prior_num_inference_steps": 4, "num_inference_steps": 5}
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def pipe(random_folder):
    return Kandinsky.from_pretrained(random_folder / "kandinsky-2-2-decoder")


def test_numbers_and_picture_are_the_runs(pipe):
    found = explain.trace(pipe, PROMPT, seed=3, height=32, width=48, **STEPS)
    estimates = []
    embeds = pipe.embed(
        PROMPT, num_inference_steps=4, seed=3, on_step=lambda step: estimates.append(step.x0[:1])
    )
    with inspection.record(pipe.unet, "mid_block.resnets.1") as seen:
        alone = pipe.text2img(embeds=embeds, num_inference_steps=5, seed=3, height=32, width=48)[0]
    assert found.picture.tobytes() == alone.tobytes()
    cosines = [F.cosine_similarity(pipe.prior.denormalize(x), embeds.image_embeds).item() for x in estimates]
    assert found.prior_cosines == pytest.approx(cosines, abs=1e-6)
    assert cosines[0] < 0.999 and cosines[-1] == pytest.approx(1, abs=1e-3)
    sizes = [x.square().mean().sqrt().item() for x in seen["mid_block.resnets.1"]]
    assert found.norms["mid_block.resnets.1"] == pytest.approx(sizes, rel=1e-6) and len(sizes) == 5
    assert found.decoder_timesteps == [t for t, _ in pipe.scheduler.timesteps(5)]
    assert found.frames[-1].picture.size == (48, 32)
    assert [frame.index for frame in found.frames] == [0, 1, 2, 3, 4]


def test_attention_is_shared_out_among_the_tokens(pipe):
    found = explain.trace(pipe, PROMPT, height=32, width=48, **STEPS)
    names = [name for name, _ in found.prior_attention]
    assert names[0] == "<|startoftext|>" and names[-1] == "read-out"
    assert len(names) == len(found.tokens) + 4
    shares = torch.tensor([values for _, values in found.prior_attention])  # (tokens, steps)
    assert shares.shape[1] == 4 and torch.allclose(shares.sum(dim=0), torch.ones(4), atol=1e-5)
    assert not torch.allclose(shares[:, 0], shares[:, 1], atol=1e-4)
    assert len(found.image_share) == 5 and all(0 < share < 1 for share in found.image_share)
    maps = torch.tensor(found.image_maps)
    assert maps.shape == (5, 2, 3), "the middle block's positions, in each of the frames' steps"
    assert maps.mean(dim=(1, 2)).tolist() == pytest.approx(found.image_share, abs=1e-6)
    assert found.word_maps == []


def test_a_prompt_may_be_what_it_is_led_away_from(pipe):
    """The prior runs such a text once; it is what an empty prompt always is."""
    sizes = {"height": 16, "width": 16, "num_inference_steps": 1, "prior_num_inference_steps": 2, "seed": 3}
    for prompt, negative in ("", None), ("a red cat", "a red cat"):
        found = explain.trace(pipe, prompt, negative_prompt=negative, **sizes)
        shares = torch.tensor([values for _, values in found.prior_attention])
        assert torch.allclose(shares.sum(dim=0), torch.ones(2), atol=1e-5)


@slow
def test_what_the_text_embedding_says_is_the_runs(pipe):
    found = explain.trace(pipe, PROMPT, negative_prompt="a", seed=3, height=32, width=48, **STEPS)
    text = pipe.text_encoder(pipe.tokenizer([PROMPT])[0])[1]
    image = pipe.embed(PROMPT, "a", num_inference_steps=4, seed=3).image_embeds
    assert found.text_cosine == pytest.approx(F.cosine_similarity(text, image).item(), abs=1e-5)


@slow
def test_without_guidance_what_is_told_is_the_prompts_too(pipe):
    call = {"prior_guidance_scale": 1.0, "seed": 3, "height": 32, "width": 32, **STEPS}
    with_negative, without = (explain.trace(pipe, PROMPT, negative_prompt=n, **call) for n in ("a", None))
    assert with_negative.text_cosine == pytest.approx(
        F.cosine_similarity(
            pipe.text_encoder(pipe.tokenizer([PROMPT])[0])[1],
            pipe.embed(PROMPT, "a", num_inference_steps=4, guidance_scale=1.0, seed=3).image_embeds,
        ).item(),
        abs=1e-5,
    )
    names, shares = zip(*with_negative.prior_attention)
    assert names == tuple(name for name, _ in without.prior_attention), "no padding: the prompt is longer"
    assert torch.tensor(shares).shape == (len(names), 4)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"height": -1}, ValueError, "height is -1"),
        ({"sampler": "x"}, ValueError, "sampler is 'x'"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale is nan"),
        ({"task": "img2img"}, TypeError, "image is a NoneType"),
        ({"foo": 3}, TypeError, r"text2img\(\) has no argument 'foo'"),
        ({"prior_guidance_scale": "4"}, TypeError, "prior_guidance_scale is '4'"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt is a int"),
        ({"prompt": ["a", "b"]}, TypeError, "prompt is a list; one string is needed"),
    ],
)
def test_what_is_wrong_is_said_before_any_weight_is_read(random_folder, wrong, error, message):
    pipe = Kandinsky.from_pretrained(random_folder / "kandinsky-2-2-decoder")
    with pytest.raises(error, match=message):
        explain.trace(pipe, **{"prompt": PROMPT, **STEPS, **wrong})
    assert not pipe._loaded and pipe.seeds == []


@slow
def test_2_1_reads_each_word_somewhere(random_folder):
    pipe = Kandinsky.from_pretrained(random_folder / "kandinsky-2-1")
    with inspection.attention_maps(pipe.unet, "mid_block*") as maps:
        found = explain.trace(pipe, PROMPT, seed=1, height=32, width=48, **STEPS)
    tokenizer = pipe.decoder_tokenizer.tokenizer
    known = tokenizer.convert_ids_to_tokens(tokenizer(PROMPT).input_ids)
    assert [word for word, _ in found.word_maps] == known and len(known) > 4
    last = next(iter(maps.values()))[-1][-1].mean(dim=0)  # (positions, 10 + 77 + positions)
    for place, (_, rows) in enumerate(found.word_maps):
        assert torch.allclose(torch.tensor(rows).flatten(), last[:, 10 + place], atol=1e-6)
    assert "reads each token" in page(found)


def test_points_are_projected_onto_where_they_differ():
    points = torch.zeros(5, 7)
    points[:, 2], points[:, 4] = torch.tensor([0.0, 1, 2, 3, 4]), torch.tensor([0.0, 1, 0, 1, 0])
    flat = explain.project(points)
    wanted = torch.cdist(points, points)
    assert torch.allclose(torch.cdist(flat, flat), wanted, atol=1e-5)
    assert explain.project(points[:1]).tolist() == [[0, 0]]


@slow
@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint", "hint", "2.1"])
def test_every_task_has_a_page_that_needs_nothing_else(random_folder, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    picture(16, 16).save("cat.png")
    Image.fromarray((255 * half_mask(16, 16)).astype("uint8")).save("mask.png")
    weights = {"inpaint": "kandinsky-2-2-decoder-inpaint", "hint": "kandinsky-2-2-controlnet-depth"}
    weights = random_folder / weights.get(task, "kandinsky-2-1" if task == "2.1" else "kandinsky-2-2-decoder")
    given = {
        "img2img": ["--image", "cat.png", "--strength", "0.5"],
        "inpaint": ["--image", "cat.png", "--mask", "mask.png", "--negative-prompt", "a"],
        "2.1": ["--negative-prompt", "a"],
        "hint": ["--hint", "cat.png"],
    }.get(task, [])
    short = ["--steps", "4", "--prior-steps", "2", "--height", "32", "--width", "32"]
    assert run("explain_run", "<b>a & cat", "--weights", weights, *given, *short) == 0
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text) and "<script" not in text and "<b>" not in text
    steps = 2 if task == "img2img" else 4
    assert text.count("clean estimate of step") == steps and text.count("<h2>") == 7
    assert all(re.search(r' alt="[^"]', tag) for tag in re.findall("<img[^>]*>", text))
    told = {"inpaint": {"image": "cat.png", "mask_image": "mask.png"}, "hint": {"hint": "cat.png"}}
    always = {"weights": weights.name, "optimized": "False", "sampler": "DDIM" if task == "2.1" else "DDPM"}
    for name, value in (always | told.get(task, {})).items():
        assert f"<th>{name}</th><td>{value}</td>" in text
    assert len(text) < 5e6 and ("decoder sees no words" in text) == (task != "2.1")
    assert run("explain_run", "a cat", "--weights", weights, *given, *short) == 0
    assert (tmp_path / "run-1.html").exists(), "nothing is overwritten"


@slow
def test_2_1_is_led_away_from_the_negative_prompt_in_both_networks(random_folder):
    pipe, size = Kandinsky.from_pretrained(random_folder / "kandinsky-2-1"), {"height": 32, "width": 32}
    found = explain.trace(pipe, PROMPT, seed=1, negative_prompt="a", **size, **STEPS)
    embeds = pipe.embed(PROMPT, "a", num_inference_steps=4, seed=1)
    call = {"embeds": embeds, "num_inference_steps": 5, "seed": 1, **size}
    assert found.picture.tobytes() == pipe.text2img(PROMPT, negative_prompt="a", **call)[0].tobytes()
    assert found.picture.tobytes() != pipe.text2img(PROMPT, **call)[0].tobytes()


def test_where_no_step_runs_the_page_says_so(pipe):
    found = explain.trace(pipe, PROMPT, "img2img", image=picture(20, 20), strength=0.01, **STEPS)
    assert found.frames == [] and "No step ran" in page(found)


@slow
def test_frames_have_the_pictures_size_and_hold_no_graph(pipe):
    found = explain.trace(pipe, PROMPT, height=20, width=24, **STEPS)
    assert {frame.picture.size for frame in found.frames} == {found.picture.size} == {(24, 20)}
    assert found.frames[-1].picture.tobytes() == found.picture.tobytes(), "the last estimate is the result"


@slow
def test_memory_phases_hold(random_folder):
    pipe = Kandinsky.from_pretrained(random_folder / "kandinsky-2-2-decoder", keep_loaded=False)
    explain.trace(pipe, PROMPT, height=32, width=32, **STEPS)
    assert not any(pipe.loaded(name) for name in ("prior", "unet", "movq", "text_encoder"))


@pytest.mark.parametrize("name", ["num_images_per_prompt", "output_type", "embeds", "cache_every"])
def test_what_would_draw_otherwise_is_refused(pipe, name):
    with pytest.raises(ValueError, match=f"takes no {name}"):
        explain.trace(pipe, PROMPT, **{name: 2})


@slow
def test_what_was_cut_is_said(pipe):
    found = explain.trace(pipe, "red cat " * 60, height=32, width=32, **STEPS)
    assert len(found.tokens) == 77 and any("longer than 77 tokens" in text for text in found.warnings)
    assert "longer than 77 tokens" in page(found)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "a.txt"], "cannot write .txt; use .html"),
        (["--mask", "a.png"], "--mask needs --image"),
        (["--steps", "0"], "num_inference_steps is 0; allowed is 1 to 1000"),
        (["--strength", "0.5"], "--strength is of img2img"),
        (["--hint", "a.png", "--mask", "b.png", "--image", "c.png"], "give --hint or --mask, not both"),
        (["--out", "."], "cannot write"),
    ],
)
def test_mistakes_are_one_line(random_folder, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run("explain_run", "a", "--weights", random_folder / "kandinsky-2-2-decoder", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and list(tmp_path.iterdir()) == []


@slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_a_fault(pipe, tmp_path, width):
    path, copy = tmp_path / "run.html", tmp_path / "measured.html"
    text = page(explain.trace(pipe, PROMPT, height=32, width=32, **STEPS))
    path.write_text(text, encoding="utf-8")
    measure = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    copy.write_text(text.replace("</body>", f"<script>{measure}</script></body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]

    def browse(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([CHROMIUM, *flags, *more], capture_output=True, text=True, timeout=120)

    shown = browse(f"--screenshot={tmp_path / 'page.png'}", path.as_uri())
    assert shown.returncode == 0 and "CONSOLE" not in shown.stderr, shown.stderr
    assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(2**24)) > 50, "something is drawn"
    needed, there = re.search(r"<title>(\d+) of (\d+)", browse("--dump-dom", copy.as_uri()).stdout).groups()
    assert int(needed) <= int(there), "nothing hangs over the edge"
