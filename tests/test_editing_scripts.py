"""img2img, inpaint and mix as a user starts them, and the settings that pictures carry."""

import functools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kandinsky import ImageEmbeds, Kandinsky, cli, drawing, images, lora, metadata
from tests.helpers import half_mask, picture
from tests.test_inputs import png_header
from tests.test_scripts import run

slow = pytest.mark.slow  # what draws

QUICK = ["--steps", "2", "--prior-steps", "2"]
CALL = {"num_inference_steps": 2, "prior_num_inference_steps": 2}


@pytest.fixture
def files(tmp_path):
    """A folder with a picture, another, a mask and a hint."""
    picture(32, 16).save(tmp_path / "cat.png")
    picture(32, 16, seed=1).save(tmp_path / "dog.png")
    Image.fromarray((half_mask(16, 32) * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    picture(32, 16, "L", seed=2).save(tmp_path / "depth.png")
    (tmp_path / "prompts.txt").write_text("a red cat\n\n  кот \n", encoding="utf-8")
    return tmp_path


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@slow
def test_img2img(pipe, decoder_folder, files, capsys):
    out = files / "out.png"
    given = ["a red cat", "--image", files / "cat.png", "--strength", "0.6", "--seed", "3"]
    assert run("img2img", *given, "--weights", decoder_folder, "--out", out, *QUICK) == 0
    assert capsys.readouterr().out == f"{out} (seed 3)\n"
    (wanted,) = pipe.img2img("a red cat", image=picture(32, 16), strength=0.6, seed=3, **CALL)
    assert np.array_equal(pixels(out), np.array(wanted))


@slow
def test_inpaint(inpainter, inpaint_folder, files):
    given = ["a red cat", "--image", files / "cat.png", "--mask", files / "mask.png", "--seed", "3"]
    given += ["--weights", inpaint_folder, *QUICK]
    assert run("inpaint", *given, "--out", files / "out.png") == 0
    settings = {"image": picture(32, 16), "mask_image": half_mask(16, 32), "seed": 3, **CALL}
    (wanted,) = inpainter.inpaint("a red cat", **settings)
    assert np.array_equal(pixels(files / "out.png"), np.array(wanted))
    more = ["--invert-mask", "--grow-mask", "1", "--feather-mask", "2", "--height", "20", "--width", "30"]
    assert run("inpaint", *given, *more, "--out", files / "more.png") == 0
    more = {"invert_mask": True, "grow_mask": 1, "feather_mask": 2, "height": 20, "width": 30}
    assert np.array_equal(
        pixels(files / "more.png"), np.array(inpainter.inpaint("a red cat", **settings, **more)[0])
    )
    assert run("inpaint", *given, "--no-keep-unmasked", "--out", files / "raw.png") == 0
    (raw,) = inpainter.inpaint("a red cat", keep_unmasked=False, **settings)
    assert np.array_equal(pixels(files / "raw.png"), np.array(raw))


@slow
def test_text2img_with_a_hint_and_variations_of_a_picture(pipe, hinted, decoder_folder, hint_folder, files):
    size = ["--height", "16", "--width", "32", "--seed", "3", *QUICK]
    given = ["--hint", files / "depth.png", "--weights", hint_folder, "--out", files / "out.png"]
    assert run("text2img", "a red cat", *given, *size) == 0
    settings = {"height": 16, "width": 32, "seed": 3, "num_inference_steps": 2}
    hint = picture(32, 16, "L", seed=2)
    (wanted,) = hinted.text2img("a red cat", hint=hint, prior_num_inference_steps=2, **settings)
    assert np.array_equal(pixels(files / "out.png"), np.array(wanted))
    given = ["--image", files / "cat.png", "--weights", decoder_folder, "--out", files / "varied.png"]
    assert run("text2img", *given, *size, "--num-images", "2") == 0
    embeds = ImageEmbeds(pipe.embed_image(picture(32, 16)))
    wanted = pipe.text2img(embeds=embeds, num_images_per_prompt=2, **settings)
    for i in range(2):
        assert np.array_equal(pixels(files / f"varied-{i}.png"), np.array(wanted[i]))


@slow
def test_prompts_come_from_a_file_a_line_each(pipe, decoder_folder, files, capsys):
    given = ["--prompts", files / "prompts.txt", "--image", files / "cat.png", "--image", files / "dog.png"]
    given += ["--seed", "3", "--weights", decoder_folder, "--strength", "0.6", *QUICK]
    assert run("img2img", *given, "--out", files / "out.png") == 0
    assert capsys.readouterr().out.count("seed") == 2
    pictures = [picture(32, 16), picture(32, 16, seed=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model knows no Russian
        wanted = pipe.img2img(["a red cat", "кот"], image=pictures, strength=0.6, seed=3, **CALL)
    for i in range(2):
        assert np.array_equal(pixels(files / f"out-{i}.png"), np.array(wanted[i]))


@slow
def test_mix(pipe, decoder_folder, files):
    given = ["a red cat", "--image", files / "cat.png", "--mix-weights", "1.25", "-0.25", "--num-images", "2"]
    given += ["--negative-prompt", "bad", "--height", "16", "--width", "16", "--seed", "3", *QUICK]
    assert run("mix", *given, "--weights", decoder_folder, "--out", files / "out.png") == 0
    settings = {"negative_prompt": "bad", "num_images_per_prompt": 2, "num_inference_steps": 2, "seed": 3}
    embeds = pipe.mix(["a red cat", picture(32, 16)], [1.25, -0.25], **settings)
    wanted = pipe.text2img(embeds=embeds, height=16, width=16, num_inference_steps=2, seed=3)
    for i in range(2):
        assert np.array_equal(pixels(files / f"out-{i}.png"), np.array(wanted[i]))


@slow
def test_frames_lead_from_one_item_to_the_other(pipe, decoder_folder, files, capsys):
    given = ["a red cat", "--image", files / "cat.png", "--frames", "3", "--seed", "3", *QUICK]
    given += ["--height", "16", "--width", "16", "--weights", decoder_folder, "--out", files / "strip.png"]
    assert run("mix", *given) == 0
    assert capsys.readouterr().out.split() == [
        str(files / "strip.png"),
        "(seed",
        "3)",
        str(files / "strip.gif"),
    ]
    sheet = pixels(files / "strip.png")
    with Image.open(files / "strip.gif") as animation:
        assert sheet.shape == (32, 32, 3) and animation.n_frames == 4 and animation.size == (16, 16)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "seed": 3}
    for i, weights in enumerate(([1, 0], [0.5, 0.5], [0, 1])):
        embeds = pipe.mix(["a red cat", picture(32, 16)], weights, num_inference_steps=2, seed=3)
        (wanted,) = pipe.text2img(embeds=embeds, **size)
        frame = sheet[16 * (i // 2) :, 16 * (i % 2) :][:16, :16].astype(int)
        assert np.abs(frame - np.array(wanted)).max() <= 1
    assert run("mix", *given, "--animation", files / "other.webp") == 0
    assert (files / "other.webp").exists() and (files / "strip-1.png").exists()


@slow
def test_a_stopped_strip_keeps_the_frames_that_there_are(decoder_folder, files, capsys, monkeypatch):
    drawn, draw = [], Kandinsky.text2img

    @functools.wraps(draw)
    def stopped(pipe, **call):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(draw(pipe, **call))
        return drawn[-1]

    monkeypatch.setattr(Kandinsky, "text2img", stopped)
    given = ["a red cat", "a dog", "--frames", "5", "--height", "16", "--width", "16", *QUICK]
    assert run("mix", *given, "--weights", decoder_folder, "--out", files / "strip.png") == 130
    assert capsys.readouterr().out == f"{files / 'strip.gif'}\n" and not (files / "strip.png").exists()
    with Image.open(files / "strip.gif") as animation:
        assert animation.n_frames == 2


def test_a_picture_too_wide_for_its_format_is_written_as_png(decoder_folder, files, capsys, monkeypatch):
    monkeypatch.setitem(images.LONGEST_SIDES, "WEBP", 20)
    given = ["a", "--width", "24", "--height", "2", "--steps", "1", "--prior-steps", "1", "--seed", "0"]
    assert run("text2img", *given, "--weights", decoder_folder, "--out", files / "wide.webp") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{files / 'wide.png'} (seed 0)\n"
    assert "a WEBP has up to 20 pixels a side, this picture 24×2; it is" in captured.err
    assert pixels(files / "wide.png").shape == (2, 24, 3)
    given += ["--weights", decoder_folder, "--overwrite", "--out", files / "wide.webp"]
    assert run("text2img", *given) == 0 and capsys.readouterr().out == f"{files / 'wide-1.png'} (seed 0)\n"
    strip = ["a", "b", "--frames", "2", *given[1:], "--animation", files / "strip.webp"]
    assert run("mix", *strip) == 0 and (files / "strip.gif").exists()


CASES = {
    "text2img": ["кот and a \"red\" cat", "--height", "16", "--width", "24", "--negative-prompt", "плохо"],
    "variations": ["--image", "cat.png", "--height", "16", "--width", "16"],
    "img2img": ["cat", "--image", "cat.png", "--strength", "0.6", "--dtype", "bfloat16"],
    "inpaint": ["cat", "--image", "cat.png", "--mask", "mask.png", "--feather-mask", "2", "--grow-mask", "1"],
    "hint": ["cat", "--hint", "depth.png", "--height", "16", "--width", "32"],
    "hint variations": ["--image", "cat.png", "--hint", "depth.png", "--height", "16", "--width", "16"],
    "mix": ["cat", "dog", "--image", "cat.png", "--mix-weights", "0.5", "0.7", "-0.2", "--height", "16",
            "--width", "16", "--negative-prior-prompt", "bad"],
    "frames": ["cat", "dog", "--frames", "2", "--height", "16", "--width", "16"],
}  # fmt: skip


def test_a_strength_of_no_step_is_told(decoder_folder, files, capsys):
    given = ["cat", "--image", files / "cat.png", "--weights", decoder_folder, *QUICK]
    for strength, is_none in (("0.4", True), ("0.5", False)):
        assert run("img2img", *given, "--strength", strength, "--out", files / "out.png") == 0
        warned = "warning: strength 0.4 of 2 steps is none: the picture is only encoded and decoded"
        assert (warned in capsys.readouterr().err) == is_none


@slow
@pytest.mark.parametrize("case", CASES)
def test_a_picture_made_again_from_its_settings_has_the_same_bytes(
    case, decoder_folder, inpaint_folder, hint_folder, files, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    folder = {"inpaint": inpaint_folder, "hint": hint_folder}.get(case.split()[0], decoder_folder)
    script = {"variations": "text2img", "hint": "text2img", "frames": "mix"}.get(case.split()[0], case)
    count = [] if case == "frames" else ["--num-images", "3"]
    where = ["--weights", folder]
    assert run(script, *CASES[case], *where, *QUICK, *count, "--out", "first.png") == 0
    made = ["first.png"] if case == "frames" else ["first-0.png", "first-2.png"]
    again = [flag for i, flag in enumerate(CASES[case]) if flag in ("--image", "--mask", "--hint")
             or CASES[case][i - 1] in ("--image", "--mask", "--hint")]  # fmt: skip
    for name in made:
        assert run(script, "--from-png", name, *again, *where, "--out", f"again-{name}") == 0
        assert (files / f"again-{name}").read_bytes() == (files / name).read_bytes()
    assert "warning" not in "".join(line for line in capsys.readouterr().err.splitlines() if "bits" in line)


@slow
def test_what_a_picture_says_of_itself(decoder_folder, files):
    given = ["--prompts", files / "prompts.txt", "--negative-prompt", "bad, really", "--seed", "5"]
    given += ["--num-images", "2", "--height", "16", "--width", "24", "--weights", decoder_folder, *QUICK]
    assert run("text2img", *given, "--out", files / "out.png") == 0
    with Image.open(files / "out-2.png") as image:
        texts = dict(image.text)
    assert set(texts) == {"kandinsky", "parameters"}
    settings = json.loads(texts["kandinsky"])
    assert settings == metadata.read(files / "out-2.png")
    assert settings["call"]["prompt"] == ["a red cat", "кот"] and settings["call"]["seed"] == [5, 6, 7, 8]
    assert settings["index"] == 2 and settings["task"] == "text2img" and settings["dtype"] == "float32"
    assert settings["threads"] == torch.get_num_threads()
    assert settings["versions"]["torch"] == torch.__version__
    decoder = settings["checkpoint"]["decoder"]
    assert decoder == {"name": "kandinsky-2-2-decoder", "hash": metadata.checkpoint_hash(decoder_folder)}
    assert texts["parameters"] == (
        "кот\nNegative prompt: bad, really\nSteps: 2, Sampler: DDPM, CFG scale: 4.0, Seed: 7, Size: 24x16, "
        f"Model hash: {decoder['hash'][:10]}, Model: kandinsky-2-2-decoder"
    )
    assert run("text2img", *given, "--no-metadata", "--out", files / "bare.png") == 0
    with Image.open(files / "bare-0.png") as image:
        assert not image.text
    assert np.array_equal(pixels(files / "bare-2.png"), pixels(files / "out-2.png"))


def test_every_flag_that_changes_a_picture_is_in_its_settings():
    """A flag added later must be repeated by --from-png, or be named here as one that changes nothing."""
    from tests.test_scripts import load

    named = {"num_images": "num_images_per_prompt", "steps": "num_inference_steps", "mask": "mask_image"}
    named |= {"prior_steps": "prior_num_inference_steps", "no_keep_unmasked": "keep_unmasked"}
    named |= {
        "batch_size": "num_images_per_prompt",
        "optimize": "optimisation",
        "mix_weights": "weights",
        "weights": "checkpoint",
        "prior": "checkpoint",
        "prompts": "prompt",
    }
    unchanging = {"help", "out", "overwrite", "no_metadata", "from_png", "low_memory", "animation"}
    for script in metadata.CALLS:
        known = metadata.CALLS[script].keys() | metadata.INPUTS | {"dtype", "device", "checkpoint"}
        known |= {"lora_scale", "optimisation"}
        flags = {action.dest for action in load(script).make_parser()._actions} - unchanging
        assert {named.get(flag, flag) for flag in flags} <= known, script


@slow
def test_a_lora_is_given_again_and_repeats_with_its_scale(decoder_folder, files, capsys):
    pipe = Kandinsky.from_pretrained(decoder_folder)
    lora.add_lora(pipe.unet, rank=2)
    for name, parameter in pipe.unet.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(0))
    lora.save_lora(pipe.unet, files / "mine.safetensors")
    given = ["--weights", decoder_folder, "--lora", files / "mine.safetensors"]
    size = ["--height", "16", "--width", "16", "--seed", "1", *QUICK]
    assert run("text2img", "cat", *given, "--lora-scale", "0.5", *size, "--out", files / "a.png") == 0
    assert run("text2img", "cat", *given[:2], *size, "--out", files / "plain.png") == 0
    assert not np.array_equal(pixels(files / "a.png"), pixels(files / "plain.png"))
    assert run("text2img", "--from-png", files / "a.png", *given, "--out", files / "b.png") == 0
    assert (files / "a.png").read_bytes() == (files / "b.png").read_bytes()
    assert run("text2img", "--from-png", files / "a.png", *given[:2], "--out", files / "c.png") == 2
    assert "was made from --lora (mine.safetensors); give the same again" in capsys.readouterr().err


@slow
def test_an_optimized_picture_is_made_again_optimized(decoder_folder, files, capsys):
    given = ["--weights", decoder_folder]
    size = ["--height", "16", "--width", "16", "--seed", "1", "--sampler", "dpm++", *QUICK]
    assert run("text2img", "cat", *given, *size, "--optimize", "--out", files / "fast.png") == 0
    assert metadata.read(files / "fast.png")["optimisation"] == "exact"
    assert run("text2img", "--from-png", files / "fast.png", *given, "--out", files / "again.png") == 0
    assert (files / "fast.png").read_bytes() == (files / "again.png").read_bytes()
    assert run("text2img", "--from-png", files / "fast.png", *given, "--optimize") == 2
    assert "takes no optimize beside it" in capsys.readouterr().err


def test_a_call_is_repeated_on_as_many_threads():
    before = torch.get_num_threads()
    with drawing._threads({"threads": before + 1}):
        assert torch.get_num_threads() == before + 1
    with drawing._threads(None):
        assert torch.get_num_threads() == before


def test_a_checkpoints_hash_tells_weights_apart(decoder_folder, inpaint_folder, tmp_path):
    first = metadata.checkpoint_hash(decoder_folder)
    assert first == metadata.checkpoint_hash(decoder_folder) != metadata.checkpoint_hash(inpaint_folder)
    (tmp_path / "big.safetensors").write_bytes(bytes(2**25))
    before = metadata.checkpoint_hash(tmp_path)
    with open(tmp_path / "big.safetensors", "r+b") as file:
        file.seek(2**24 + 5)
        file.write(b"x" * 2**19)
    edited = metadata.checkpoint_hash(tmp_path)
    (tmp_path / "big.safetensors").rename(tmp_path / "other.safetensors")
    assert len({before, edited, metadata.checkpoint_hash(tmp_path)}) == 3


def saved(path, settings, key="kandinsky"):
    info = PngInfo()
    info.add_text(key, settings if isinstance(settings, str) else json.dumps(settings))
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    return path


@pytest.fixture
def settings(decoder_folder):
    pipe = Kandinsky.from_pretrained(decoder_folder)
    call = {"prompt": ["a cat"], "negative_prompt": None, "num_images_per_prompt": 1, "guidance_scale": 4.0}
    call |= {
        "num_inference_steps": 1,
        "sampler": None,
        "guidance_interval": [0.0, 1.0],
        "cache_every": 1,
        "prior_num_inference_steps": 1,
        "prior_guidance_scale": 4.0,
    }
    call |= {"seed": [3], "height": 16, "width": 16}
    return metadata.describe(pipe, "text2img", call, 0, {}, 1.0)


def test_what_viewers_read_is_of_this_picture_of_the_call(settings):
    call = {"prompt": ["a cat", "a dog"], "negative_prompt": ["bad", "ugly"], "num_images_per_prompt": 2}
    settings["call"] |= call | {"seed": [3, 4, 5, 6]}
    settings["index"], settings["checkpoint"]["decoder"] = 2, {"name": "mine: the second", "hash": "0" * 64}
    assert metadata.texts(settings, (24, 16))["parameters"] == (
        "a dog\nNegative prompt: ugly\nSteps: 1, Sampler: DDPM, CFG scale: 4.0, Seed: 5, Size: 24x16, "
        'Model hash: 0000000000, Model: "mine: the second"'
    )
    settings["call"]["strength"] = 0.4
    assert metadata.texts(settings, (24, 16))["parameters"].endswith('second", Denoising strength: 0.4')


def changed(settings, path, value):
    settings = json.loads(json.dumps(settings))
    *parents, last = path.split("/")
    inner = settings
    for name in parents:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return settings


FORGED = [
    ("format", 2, "format is '2', which is not allowed"),
    ("task", "embed", "task is 'embed'"),
    ("task", "img2img", "call: missing 'strength'"),
    ("task", ["x"], "task is"),
    ("index", 1, "index is 1 of 1 pictures"),
    ("index", -1, "index is '-1'"),
    pytest.param("lora_scale", 10**400, "lora_scale is '1000", id="beyond floats"),
    ("extra", 1, "settings: unknown 'extra'"),
    ("dtype", KeyError, "settings: missing 'dtype'"),
    ("dtype", "int8", "dtype is 'int8'"),
    ("device", "meta", "device is 'meta'"),
    ("device", "cuda:0; rm", "device is"),
    ("device", "cuda:100", "device is 'cuda:100'"),
    ("threads", 0, "threads is '0'"),
    ("threads", 10**9, "threads is"),
    ("optimisation", "eval", "optimisation is 'eval'"),
    ("call", [], r"call is '\[\]'"),
    ("call/prompt", "a cat", "prompt is 'a cat'"),
    ("call/prompt", [1], r"prompt is '\[1\]'"),
    ("call/prompt", ["x" * 20_001], "prompt is"),
    ("call/prompt", ["x"] * 1001, "prompt is"),
    ("call/seed", [], r"seed is '\[\]'"),
    ("call/seed", [-1], "seed is"),
    ("call/seed", [True], "seed is"),
    ("call/height", 10**6, "height is '1000000'"),
    ("call/height", 16.0, "height is '16.0'"),
    ("call/guidance_scale", "4", "guidance_scale is '4'"),
    ("call/guidance_scale", float("nan"), "guidance_scale is 'nan'"),
    ("call/guidance_scale", True, "guidance_scale is 'True'"),
    ("call/num_inference_steps", 1001, "num_inference_steps is '1001'"),
    ("call/num_images_per_prompt", 10**9, "num_images_per_prompt is"),
    ("call/output_type", "pt", "call: unknown 'output_type'"),
    ("call/image", "/etc/passwd", "call: unknown 'image'"),
    ("inputs/image", "/etc/passwd", "inputs: image is not a list of files"),
    ("inputs/image", [{"name": "/etc/passwd"}], "image: missing 'sha256'"),
    ("inputs/weights", [], "inputs is"),
    ("inputs/lora", [], "inputs: lora is not a list of files"),
    ("lora_scale", "1", "lora_scale is"),
    ("checkpoint/decoder", None, "decoder is a NoneType, not an object"),
    ("checkpoint/decoder/hash", "abc", "hash is 'abc'"),
    ("checkpoint/path", "/tmp", "checkpoint: unknown 'path'"),
    ("versions", "2.13", "versions is '2.13'"),
    ("call/cache_every", 0, "cache_every is '0'"),
    ("call/guidance_interval", [0.5, 0.2], "guidance_interval is"),
    ("versions/torch", 2, "versions is"),
]


@pytest.mark.parametrize("path, value, message", FORGED)
def test_settings_of_a_stranger_are_checked(settings, tmp_path, path, value, message):
    metadata.read(saved(tmp_path / "good.png", settings))
    with pytest.raises(metadata.SettingsError, match=message) as caught:
        metadata.read(saved(tmp_path / "forged.png", changed(settings, path, value)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["sampler", "guidance_interval", "cache_every"])
def test_settings_from_before_there_was_a_choice_are_read(settings, tmp_path, name):
    older = saved(tmp_path / "older.png", changed(settings, f"call/{name}", KeyError))
    assert metadata.read(older) == settings


def test_settings_that_are_too_large_too_deep_or_none_are_refused(settings, tmp_path):
    large = changed(settings, "call/height", None) | {"call": {"x": "y" * metadata.MAX_LENGTH}}
    wide = changed(changed(settings, "call/height", 2**14), "call/width", 2**14)
    cases = [
        (saved(tmp_path / "large.png", large), "characters; at most 262144 are read"),
        (saved(tmp_path / "deep.png", "[" * 100_000 + "]" * 100_000), "are not JSON"),
        (saved(tmp_path / "list.png", "[]"), "settings is a list, not an object"),
        (saved(tmp_path / "text.png", "{"), "are not JSON"),
        (saved(tmp_path / "digits.png", "1" * 100_000), "are not JSON"),
        (saved(tmp_path / "wide.png", wide), "16384×16384 pixels are more than 64 megapixels"),
        (saved(tmp_path / "other.png", settings, key="prompt"), "holds no settings of this package"),
    ]
    picture(4, 4).save(tmp_path / "cat.jpg")
    cases.append((tmp_path / "cat.jpg", "is not a whole PNG picture"))
    (tmp_path / "huge.png").write_bytes(png_header(100_000, 100_000))
    cases.append((tmp_path / "huge.png", "is not a whole PNG picture"))
    for path, message in cases:
        with pytest.raises(metadata.SettingsError, match=message):
            metadata.read(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        metadata.read(tmp_path / "gone.png")


@slow
def test_what_would_not_be_read_back_is_not_written_and_the_picture_is(decoder_folder, files, capsys):
    given = ["--weights", decoder_folder, "--height", "16", "--width", "16", *QUICK]
    for flags, problem in (
        (["cat " * 6000], "call: prompt is .* which is not allowed"),
        (["cat", "--cache-every", "1001"], "call: cache_every is '1001', which is not allowed"),
    ):
        assert run("text2img", *flags, *given, "--out", files / "out.png", "--overwrite") == 0
        shown = capsys.readouterr().err
        warning = re.search(f"warning: the picture cannot be made again from its PNG: {problem}", shown)
        assert warning
        with pytest.raises(metadata.SettingsError, match="holds no settings"):
            metadata.read(files / "out.png")
        with Image.open(files / "out.png") as drawn:
            assert "Steps: 2" in drawn.info["parameters"]
    settings = metadata.describe(Kandinsky.from_pretrained(decoder_folder), "text2img", {}, 0, {}, 1.0)
    assert "characters; at most" in metadata.problem(settings | {"task": "x" * metadata.MAX_LENGTH})


@slow
def test_a_picture_is_kept_when_what_it_was_made_of_goes_meanwhile(decoder_folder, files, monkeypatch):
    draw = Kandinsky.img2img

    def drawn_meanwhile(*given, **named):
        (files / "cat.png").unlink()
        return draw(*given, **named)

    monkeypatch.setattr(Kandinsky, "img2img", drawn_meanwhile)
    given = ["cat", "--image", files / "cat.png", "--weights", decoder_folder, "--out", files / "out.png"]
    assert run("img2img", *given, "--strength", "0.6", *QUICK) == 0
    assert metadata.read(files / "out.png")["inputs"]["image"][0]["name"] == "cat.png"


def test_a_picture_of_another_device_says_that_one_may_be_given(settings, tmp_path, capsys, decoder_folder):
    there = saved(tmp_path / "there.png", changed(settings, "device", "cuda:77"))
    given = ["--from-png", there, "--weights", decoder_folder, "--out", tmp_path / "out.png"]
    assert run(settings["task"], *given) == 2
    err = capsys.readouterr().err
    assert "'cuda:77' cannot be used here" in err and "another --device may be given" in err
    assert err.count("\n") == 1


@slow
def test_nothing_that_settings_name_is_opened(decoder_folder, inpaint_folder, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    given = ["--image", "cat.png", "--weights", decoder_folder]
    assert run("img2img", "cat", *given, "--strength", "0.6", *QUICK, "--out", "out.png") == 0
    capsys.readouterr()
    again = ["--from-png", "out.png", "--out", "again.png"]
    shown = []
    for argv in (
        [*again, "--weights", decoder_folder],
        [*again, "--weights", inpaint_folder, "--image", "cat.png"],
        [*again, "--weights", decoder_folder, "--image", "cat.png", "--seed", "3"],
        [*again, "another prompt", "--weights", decoder_folder, "--image", "cat.png"],
    ):
        assert run("img2img", *argv) == 2
        shown.append(capsys.readouterr().err)
        assert shown[-1].count("\n") == 1 and not (files / "again.png").exists()
    assert "the picture was made from --image (cat.png); give the same again" in shown[0]
    assert "made with the decoder kandinsky-2-2-decoder" in shown[1] and "pass its folder" in shown[1]
    assert "--from-png repeats a whole call; it takes no seed beside it" in shown[2]
    assert "it takes no prompt beside it" in shown[3]
    assert run("text2img", "--from-png", "out.png", "--weights", decoder_folder) == 2
    assert "out.png was made by img2img.py" in capsys.readouterr().err
    argv = [*again, "--weights", decoder_folder, "--image", "dog.png"]
    assert run("img2img", *argv) == 0
    assert "--image is another file than the picture was made from" in capsys.readouterr().err
    assert run("text2img", "cat", "--weights", decoder_folder, *QUICK, "--out", "plain.png") == 0
    assert run("text2img", "--from-png", "plain.png", "--weights", decoder_folder, "--image", "cat.png") == 2
    assert "made from no other file; leave --image out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, argv, message",
    [
        ("img2img", ["cat"], "give --image FILE, the picture to redraw; see --help"),
        ("img2img", ["--image", "cat.png"], "give a prompt, --prompts FILE or --from-png FILE"),
        ("img2img", ["cat", "--image", "gone.png"], "no such file: gone.png"),
        ("img2img", ["cat", "--image", "prompts.txt"], "prompts.txt is not a PNG, JPEG or WEBP picture"),
        ("img2img", ["cat", "--image", "cat.png", "--strength", "2"], "strength is 2.0; allowed is 0 to 1"),
        (
            "img2img",
            ["cat", "--prompts", "prompts.txt", "--image", "cat.png"],
            "a prompt or --prompts FILE, not",
        ),
        ("img2img", ["--prompts", "cat.png", "--image", "cat.png"], "cat.png is not UTF-8 text"),
        ("img2img", ["--prompts", "gone.txt", "--image", "cat.png"], "--prompts: no file gone.txt; a"),
        ("img2img", ["--prompt", "a cat", "--image", "cat.png"], "unrecognized arguments: --prompt"),
        ("img2img", ["--prompts", "empty.txt", "--image", "cat.png"], "empty.txt holds no prompt"),
        ("img2img", ["--from-png", "cat.png"], "cat.png holds no settings of this package"),
        ("inpaint", ["cat", "--image", "cat.png"], "give --image FILE and --mask FILE; see --help"),
        ("inpaint", ["cat", "--image", "cat.png", "--mask", "mask.png"], "is not for inpainting; use"),
        ("text2img", ["cat", "--hint", "depth.png"], "takes no hint; use kandinsky-2-2-controlnet-depth"),
        ("text2img", ["cat", "--image", "cat.png"], "give a prompt or --image, not both"),
        (
            "text2img",
            ["--image", "cat.png", "--negative-prompt", "x"],
            "--negative-prompt goes with a prompt; var",
        ),
        ("mix", [], "give prompts or --image FILE to mix; see --help"),
        ("mix", ["a", "b", "--mix-weights", "1"], "2 items and 1 weights; give one weight for each item"),
        ("mix", ["a", "--frames", "3"], "--frames leads from one item to another: two items"),
        ("mix", ["a", "b", "--frames", "1"], "--frames is 1; allowed is 2 to 1000"),
        ("mix", ["a", "\udcff"], "item 1 is '\\udcff', which is no text"),
        ("mix", ["a", "b", "--frames", "100000"], "--frames is 100000; allowed is 2 to 1000"),
        ("mix", ["a", "b", "--animation", "a.gif"], "--animation is made of --frames; give their number"),
        ("mix", ["a", "b", "--frames", "2", "--animation", "a.png"], "use .gif, .webp"),
        ("mix", ["a", "b", "--frames", "2", "--out", "s.webp", "--animation", "s.webp"], "both name s.webp"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
    decoder_folder, files, monkeypatch, capsys, script, argv, message
):
    monkeypatch.chdir(files)
    (files / "empty.txt").write_text("\n \n")
    before = sorted(files.iterdir())
    assert run(script, *argv, "--weights", decoder_folder, *([] if "--from-png" in argv else QUICK)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and sorted(files.iterdir()) == before


@pytest.mark.parametrize(
    "script, folder",
    [("img2img", "mini-decoder"), ("inpaint", "mini-decoder-inpaint"), ("text2img", "mini-controlnet-depth")],
)
def test_without_weights_the_tasks_own_checkpoint_is_looked_for(files, monkeypatch, capsys, script, folder):
    monkeypatch.chdir(files)
    monkeypatch.setattr(cli, "WEIGHTS", files / "weights")
    pictures = ["--hint", "depth.png"] if script == "text2img" else ["--image", "cat.png"]
    assert run(script, "cat", *pictures, *(["--mask", "mask.png"] if script == "inpaint" else [])) == 2
    assert f"no checkpoint at {files / 'weights' / folder};" in capsys.readouterr().err


@slow
def test_other_formats_carry_no_settings(decoder_folder, files):
    for suffix in (".jpg", ".webp"):
        out = files / f"out{suffix}"
        given = ["cat", "--weights", decoder_folder, "--height", "16", "--width", "16", "--out", out]
        assert run("text2img", *given, *QUICK) == 0
        assert images.open_image(out).size == (16, 16)
