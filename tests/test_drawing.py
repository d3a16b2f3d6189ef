"""What the scripts draw in batches: every picture as by itself, and each batch written before the next."""

import functools
import itertools

import numpy as np
import pytest
from PIL import Image

from kandinsky import ImageEmbeds, Kandinsky, drawing, metadata
from tests.helpers import picture
from tests.test_scripts import run

QUICK = ["--steps", "1", "--prior-steps", "1"]
CALL = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "height": 16, "width": 16}


@pytest.fixture
def files(tmp_path):
    """A folder with three pictures and three prompts."""
    for i, name in enumerate("abc"):
        picture(16, 16, seed=i).save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("a red cat\nan\na blue dog")
    return tmp_path


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_batches_hold_every_image_once_and_in_order():
    for num_prompts, each, size in itertools.product(range(1, 6), range(1, 6), range(1, 8)):
        seeds, rows = list(range(100, 100 + num_prompts * each)), []
        for batch in drawing.batches(num_prompts, each, seeds, size):
            own = batch.of([f"prompt {i}" for i in range(num_prompts)])
            assert len(own) * batch.images_per_prompt == len(batch.seeds) <= size
            assert batch.of(["one for all"]) == ["one for all"]
            rows += zip([prompt for prompt in own for _ in range(batch.images_per_prompt)], batch.seeds)
        assert rows == [(f"prompt {i // each}", seed) for i, seed in enumerate(seeds)]


def test_every_batch_has_all_loras_and_its_own_pictures():
    whole = {
        "call": {"prompt": ["a", "b"]},
        "inputs": {"image": [1, 2], "hint": [3], "lora": [4, 5]},
        "more": 6,
    }
    _, last = drawing.batches(2, 1, [7, 8], size=1)
    call = {"prompt": ["b"], "num_images_per_prompt": 1, "seed": [8]}
    assert last.settings(whole) == {
        "call": call,
        "inputs": {"image": [2], "hint": [3], "lora": [4, 5]},
        "more": 6,
    }


def test_a_batch_is_a_call_by_itself(pipe, decoder_folder, files):
    """So its pictures are made again without the others, from the files that are its own."""
    pictures = [flag for name in "abc" for flag in ("--image", files / f"{name}.png")]
    given = ["--prompts", files / "prompts.txt", *pictures, "--seed", "3", "--strength", "1", *QUICK]
    given += ["--weights", decoder_folder, "--batch-size", "2"]
    assert run("img2img", *given, "--out", files / "out.png") == 0
    settings = {"strength": 1.0, **CALL}
    first = pipe.img2img(["a red cat", "an"], [picture(16, 16), picture(16, 16, seed=1)], seed=3, **settings)
    (last,) = pipe.img2img("a blue dog", picture(16, 16, seed=2), seed=5, **settings)
    for i, wanted in enumerate([*first, last]):
        assert np.array_equal(pixels(files / f"out-{i}.png"), np.array(wanted))
    told = metadata.read(files / "out-2.png")
    assert (told["index"], told["call"]["prompt"], told["call"]["seed"]) == (0, ["a blue dog"], [5])
    assert [file["name"] for file in told["inputs"]["image"]] == ["c.png"]
    again = ["--from-png", files / "out-2.png", "--image", files / "c.png", "--weights", decoder_folder]
    assert run("img2img", *again, "--out", files / "again.png") == 0
    assert (files / "again.png").read_bytes() == (files / "out-2.png").read_bytes()


def test_as_many_files_are_given_again_as_a_picture_was_made_from(decoder_folder, files, capsys):
    """A picture's batch had two; with one there would be another call, or none."""
    two = [flag for name in "ab" for flag in ("--image", files / f"{name}.png")]
    at = ["--weights", decoder_folder, "--out", files / "out.png"]
    assert run("img2img", "a cat", *two, *at, *QUICK) == 0
    capsys.readouterr()
    for given in two[2:], two + two[2:]:
        assert run("img2img", "--from-png", files / "out-1.png", *given, *at) == 2
        told = capsys.readouterr().err
        assert "was made from --image (a.png, b.png); give the same again" in told and told.count("\n") == 1


def test_more_pictures_of_a_prompt_than_a_batch_holds(pipe, decoder_folder, files):
    size = ["--height", "16", "--width", "16", "--seed", "3", "--weights", decoder_folder, *QUICK]
    size += ["--num-images", "3", "--batch-size", "2"]
    assert run("mix", "a red cat", "an", *size, "--out", files / "mixed.png") == 0
    assert run("text2img", "--image", files / "a.png", *size, "--out", files / "varied.png") == 0
    mixed = [
        pipe.mix(["a red cat", "an"], [0.5, 0.5], num_inference_steps=1, seed=seeds, num_images_per_prompt=n)
        for n, seeds in ((2, [3, 4]), (1, [5]))
    ]
    call = {name: value for name, value in CALL.items() if name != "prior_num_inference_steps"}
    wanted = [
        p for e, seeds in zip(mixed, ([3, 4], [5])) for p in pipe.text2img(embeds=e, seed=seeds, **call)
    ]
    shown = ImageEmbeds(pipe.embed_image(picture(16, 16)))
    varied = [
        p
        for n, s in ((2, 3), (1, 5))
        for p in pipe.text2img(embeds=shown, seed=s, num_images_per_prompt=n, **call)
    ]
    for i in range(3):
        assert np.array_equal(pixels(files / f"mixed-{i}.png"), np.array(wanted[i]))
        assert np.array_equal(pixels(files / f"varied-{i}.png"), np.array(varied[i]))


def test_a_run_that_is_stopped_keeps_the_batches_before(decoder_folder, files, monkeypatch, capsys):
    draw, calls = Kandinsky.text2img, []

    @functools.wraps(draw)
    def stopped_at_the_second(pipe, prompt, **call):
        calls.append(prompt)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(pipe, prompt, **call)

    monkeypatch.setattr(Kandinsky, "text2img", stopped_at_the_second)
    given = ["--prompts", files / "prompts.txt", "--batch-size", "2", "--height", "16", "--width", "16"]
    given += QUICK
    assert run("text2img", *given, "--weights", decoder_folder, "--out", files / "out.png") == 130
    assert calls == [["a red cat", "an"], ["a blue dog"]] and capsys.readouterr().out.count("seed") == 2
    assert sorted(path.name for path in files.glob("out*")) == ["out-0.png", "out-1.png"]


@pytest.mark.parametrize(
    "script, given, message",
    [
        ("img2img", ["--prompts", "prompts.txt", "--image", "b.png"], "2 --image, 3 prompts: lists"),
        ("img2img", ["a cat", "--image", "b.png", "--image", "c.png", "--image", "wide.png"], "sizes differ"),
        ("text2img", ["a cat", "--num-images", "0"], "--num-images is 0"),
        ("text2img", ["a cat", "--seed", "-1"], "seed is -1"),
        ("text2img", ["a cat", "--batch-size", "0"], "argument --batch-size: value is 0"),
        ("text2img", ["--from-png", "a.png", "--batch-size", "2"], "it takes no batch-size beside it"),
    ],
)
def test_what_is_wrong_with_the_whole_call_is_told_before_a_batch(
    script, given, message, decoder_folder, files, monkeypatch, capsys
):
    picture(32, 16).save(files / "wide.png")
    monkeypatch.chdir(files)
    more = ["--image", "a.png"] if script == "img2img" else []
    size = [] if "--batch-size" in given else ["--batch-size", "2"]  # what differs is in the second
    assert run(script, *given, *more, *size, "--weights", decoder_folder, "--out", "out.png") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not list(files.glob("out*"))


def test_pictures_of_different_sizes_are_drawn_one_by_one(decoder_folder, files):
    picture(48, 16).save(files / "wide.png")
    given = ["a cat", "--image", files / "a.png", "--image", files / "wide.png", "--strength", "1", *QUICK]
    given += ["--weights", decoder_folder, "--batch-size", "1"]
    assert run("img2img", *given, "--out", files / "out.png") == 0
    assert [pixels(files / f"out-{i}.png").shape for i in range(2)] == [(16, 16, 3), (16, 48, 3)]


def test_batches_are_as_equal_as_may_be():
    for (num_prompts, each), sizes in {
        (9, 1): [5, 4],
        (1, 12): [6, 6],
        (3, 4): [8, 4],
        (2, 9): [5, 4] * 2,
    }.items():
        made = drawing.batches(num_prompts, each, list(range(num_prompts * each)), 8)
        assert [len(batch.seeds) for batch in made] == sizes
