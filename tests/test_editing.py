"""What only ours does with pictures: every combination works, batches are single runs, the kept part stays.

Where diffusers 0.42 fails, the case says how.
"""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky import CheckpointError, ImageEmbeds, Kandinsky, images, lora, masks
from tests.helpers import half_mask, picture, randn, relative_l2, slow
from tests.small import EMBEDDING_DIM
from tests.test_pipeline import NEGATIVE, OTHER, PROMPT

HEIGHT, WIDTH = 16, 32
QUICK = {"num_inference_steps": 2, "prior_num_inference_steps": 2}
TASKS = ["text2img", "img2img", "inpaint", "hint", "hint img2img", "mix", "embed_from"]


@pytest.fixture(scope="module")
def shared_pipes(decoder_folder, inpaint_folder, hint_folder) -> dict[str, Kandinsky]:
    """By task; for tests that change nothing in them."""
    return open_pipes(decoder_folder, inpaint_folder, hint_folder)


@pytest.fixture
def pipes(decoder_folder, inpaint_folder, hint_folder) -> dict[str, Kandinsky]:
    return open_pipes(decoder_folder, inpaint_folder, hint_folder)


def open_pipes(decoder_folder, inpaint_folder, hint_folder) -> dict[str, Kandinsky]:
    folders = dict.fromkeys(TASKS, decoder_folder) | {"inpaint": inpaint_folder}
    folders |= {"hint": hint_folder, "hint img2img": hint_folder}
    loaded = {folder: Kandinsky.from_pretrained(folder) for folder in set(folders.values())}
    return {task: loaded[folder] for task, folder in folders.items()}


def call(pipes, task: str, **settings) -> torch.Tensor:
    """Latents, or the prior's image embeddings."""
    pipe = pipes[task]
    if task in ("mix", "embed_from"):
        of_prior = {"num_inference_steps": 3}
        of_prior |= {"guidance_scale": settings.pop("prior_guidance_scale", 4.0)}
        return getattr(pipe, task)(**of_prior, **settings).image_embeds
    method = getattr(pipe, {"hint": "text2img", "hint img2img": "img2img"}.get(task, task))
    size = {"height": HEIGHT, "width": WIDTH} if task in ("text2img", "hint") else {}
    return method(**{"output_type": "latent", **QUICK, **size, **settings})


def inputs(task: str, i: int | None) -> dict:
    """The pictures that a task needs: the i-th, or a list of two."""
    both = {
        "image": [picture(WIDTH, HEIGHT, seed=seed) for seed in (1, 2)],
        "mask_image": [half_mask(), 1 - half_mask()],
        "hint": [picture(WIDTH, HEIGHT, "L", seed) for seed in (3, 4)],
    }
    names = {"img2img": ("image",), "inpaint": ("image", "mask_image"), "hint": ("hint",)}
    names |= {"hint img2img": ("image", "hint"), "embed_from": ("image",)}
    given = {name: both[name] if i is None else both[name][i] for name in names.get(task, ())}
    strengths = {"img2img": 0.5, "hint img2img": 0.5, "embed_from": 0.7}
    return given | ({"strength": strengths[task]} if task in strengths else {})


@pytest.mark.slow
@pytest.mark.parametrize("negative", [False, True], ids=["", "negative"])
@pytest.mark.parametrize("own_latents", [False, True], ids=["", "latents"])
@pytest.mark.parametrize("lists", [False, True], ids=["one", "lists"])
@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_every_combination_works(
    shared_pipes, task, guidance_scale, num_images, lists, own_latents, negative
):
    """diffusers crashes with guidance off and several images (every decoder), and with two prompts and one
    negative prompt (every prior); pastes the first picture into every row (inpaint); and has no `latents` in
    img2img and emb2emb."""
    rows = num_images * (2 if lists and task != "mix" else 1)
    given = inputs(task, None if lists else 0)
    of_prior = task in ("mix", "embed_from")
    if task == "mix":
        given = {"images_and_prompts": [PROMPT, picture(9, 9), OTHER][: 3 if lists else 1]}
        given["weights"] = [0.5, 0.25, 0.25] if lists else [1.0]
    else:
        given["prompt"] = [PROMPT, OTHER] if lists else PROMPT
    shape = (rows, EMBEDDING_DIM) if of_prior else (rows, 4, HEIGHT // 4, WIDTH // 4)
    if own_latents:
        given["latents"] = randn(*shape, seed=8)
    if negative:
        given["negative_prompt"] = NEGATIVE
    given["prior_guidance_scale" if of_prior else "guidance_scale"] = guidance_scale
    out = call(shared_pipes, task, num_images_per_prompt=num_images, seed=3, **given)
    assert out.shape == shape and out.isfinite().all()
    assert shared_pipes[task].seeds == list(range(3, 3 + rows))
    for i in range(1, rows):
        assert relative_l2(out[i], out[0]) > 1e-3  # no row is another's copy


@pytest.mark.parametrize("task", TASKS[1:5] + TASKS[6:])
def test_a_batch_equals_the_single_runs(shared_pipes, task):
    """diffusers' inpainting pastes the first picture's kept area into every row."""
    prompts, negatives, seeds = [PROMPT, OTHER], [NEGATIVE, ""], [7, 99, 3, 50]
    random_state = torch.get_rng_state()
    settings = {"prompt": prompts, "negative_prompt": negatives, "num_images_per_prompt": 2, "seed": seeds}
    together = call(shared_pipes, task, **inputs(task, None), **settings)
    for row, seed in enumerate(seeds):
        i = row // 2
        single = {"prompt": prompts[i], "negative_prompt": negatives[i], "seed": seed}
        alone = call(shared_pipes, task, **inputs(task, i), **single)
        assert relative_l2(together[row : row + 1], alone) <= 1e-5
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("task", TASKS[1:5])
def test_one_picture_goes_with_every_prompt_and_one_prompt_with_every_picture(shared_pipes, task):
    prompts = call(shared_pipes, task, prompt=[PROMPT, OTHER], seed=3, **inputs(task, 0))
    pictures = call(shared_pipes, task, prompt=PROMPT, seed=3, **inputs(task, None))
    for i, prompt in enumerate((PROMPT, OTHER)):
        alone = call(shared_pipes, task, prompt=prompt, seed=3 + i, **inputs(task, 0))
        assert relative_l2(prompts[i : i + 1], alone) <= 1e-5
        alone = call(shared_pipes, task, prompt=PROMPT, seed=3 + i, **inputs(task, i))
        assert relative_l2(pictures[i : i + 1], alone) <= 1e-5


@pytest.mark.parametrize("task", TASKS[1:5])
def test_embeds_stand_in_for_prompts(shared_pipes, task):
    pipe = shared_pipes[task]
    embeds = pipe.embed(PROMPT, NEGATIVE, num_inference_steps=2, seed=0)
    out = call(shared_pipes, task, embeds=embeds, num_images_per_prompt=2, seed=5, **inputs(task, None))
    alone = call(shared_pipes, task, embeds=embeds, seed=7, **inputs(task, 1))
    assert relative_l2(out[2:3], alone) <= 1e-5
    doubled = ImageEmbeds(*(rows.repeat(2, 1) for rows in embeds))
    each = call(shared_pipes, task, embeds=doubled, num_images_per_prompt=2, seed=5, **inputs(task, None))
    assert out.shape[0] == 4 and torch.equal(out, each)


@pytest.mark.parametrize("task", TASKS[1:5])
def test_own_noise_is_used_and_inputs_are_left_alone(shared_pipes, task):
    given = inputs(task, None)
    rest = {"prompt": [PROMPT, OTHER], "seed": 1}
    if "strength" in given:
        rest["strength"] = given.pop("strength")
    tensors = {
        name: torch.stack([masks.mask(x) if name == "mask_image" else images.picture(x) for x in value])
        for name, value in given.items()
    }
    tensors = {name: x[:, None] if name == "mask_image" else x for name, x in tensors.items()}
    noise = randn(2, 4, HEIGHT // 4, WIDTH // 4, seed=5)
    tensors["latents"] = noise
    before = {name: x.clone() for name, x in tensors.items()}
    first = call(shared_pipes, task, **tensors, **rest)
    assert all(torch.equal(before[name], x) for name, x in tensors.items())
    again = call(shared_pipes, task, **{**given, "latents": noise.half()}, **rest)  # PIL and numpy: the same
    assert relative_l2(again, first) < 1e-2
    assert relative_l2(call(shared_pipes, task, **{**tensors, "latents": -noise}, **rest), first) > 1e-2


@pytest.mark.slow
def test_the_processs_default_dtype_and_device_change_no_bit(decoder_folder, inpaint_folder):
    """In float64 diffusers draws another picture. What is made without a device's name fails on meta."""

    def drawn() -> list[torch.Tensor]:
        pipe, inpainter = (Kandinsky.from_pretrained(folder) for folder in (decoder_folder, inpaint_folder))
        image, mask, settings = picture(WIDTH, HEIGHT), half_mask(HEIGHT, WIDTH), {"seed": 1, **QUICK}
        settings["output_type"] = "pt"
        pipe.optimize()
        lora.add_lora(pipe.unet, 2)
        embeds = pipe.mix([PROMPT, image], [0.5, 0.5], num_inference_steps=2, seed=3)
        redrawn = pipe.img2img(embeds=embeds, image=image, strength=0.5, sampler="dpm++", **settings)
        repaired = inpainter.inpaint(PROMPT, image, mask, grow_mask=1, feather_mask=2, **settings)
        return [*embeds[:1], redrawn, repaired, *(p.detach() for p in lora.lora_parameters(pipe.unet))]

    before = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            after = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before))


def test_every_form_of_a_picture_gives_the_same_result(pipe, inpainter):
    image, mask = picture(WIDTH, HEIGHT), half_mask()
    forms = [image, np.array(image), np.array(image) / 255, images.picture(image), image.convert("RGBA")]
    mask_forms = [
        mask,
        torch.from_numpy(mask),
        Image.fromarray((mask * 255).astype(np.uint8)),
        mask > 0,
        mask,
    ]
    settings = {"seed": 2, "output_type": "pt", **QUICK}
    first = inpainter.inpaint(PROMPT, image=image, mask_image=mask, **settings)
    redrawn = pipe.img2img(PROMPT, image=image, strength=0.5, **settings)
    embedded = pipe.embed_image(image)
    for form, mask_form in zip(forms[1:], mask_forms[1:]):
        out = inpainter.inpaint(PROMPT, image=form, mask_image=mask_form, **settings)
        assert torch.equal(out, first)
        assert torch.equal(pipe.img2img(PROMPT, image=form, strength=0.5, **settings), redrawn)
        assert torch.equal(pipe.embed_image(form), embedded)


def test_inpaintings_in_a_row_leave_the_kept_part_bit_identical(inpainter):
    image, mask = picture(50, 37), half_mask(37, 50)
    kept = np.array(image)[mask == 0]
    before = image.copy()
    for seed in range(4):
        (after,) = inpainter.inpaint(PROMPT, image=image, mask_image=mask, seed=seed, **QUICK)
        assert after.size == (50, 37) and np.array_equal(np.array(after)[mask == 0], kept)
        assert not np.array_equal(np.array(after)[mask == 1], np.array(image)[mask == 1])
        assert seed or image == before
        image = after
    (raw,) = inpainter.inpaint(PROMPT, image=image, mask_image=mask, keep_unmasked=False, seed=0, **QUICK)
    assert not np.array_equal(np.array(raw)[mask == 0], kept)  # what diffusers does to it


def test_levels_between_those_of_a_file_are_kept_to_the_bit(inpainter):
    image, mask = randn(3, HEIGHT, WIDTH).sigmoid(), half_mask(HEIGHT, WIDTH)
    (out,) = inpainter.inpaint(PROMPT, image, mask, output_type="pt", **QUICK)
    assert torch.equal(out[:, mask == 0], image[:, mask == 0])


def test_pasting_compares_with_the_picture_after_the_resize(inpainter):
    image, mask = picture(131, 77), Image.fromarray((half_mask(77, 131) * 255).astype(np.uint8))
    settings = {"image": image, "mask_image": mask, "height": 33, "width": 46, "seed": 1, **QUICK}
    (out,) = inpainter.inpaint(PROMPT, **settings)
    small = np.array(image.resize((46, 33), Image.Resampling.BICUBIC, reducing_gap=1))
    black = np.array(mask.resize((46, 33), Image.Resampling.LANCZOS)) < 128
    assert 100 < black.sum() < 46 * 33 - 100
    assert np.array_equal(np.array(out)[black], small[black])
    assert (np.array(out)[~black] != small[~black]).mean() > 0.9
    raw = inpainter.inpaint(PROMPT, keep_unmasked=False, **settings)[0]
    assert np.array_equal(np.array(raw)[~black], np.array(out)[~black])


def test_white_is_repainted_and_inverting_swaps(inpainter):
    image, left = picture(WIDTH, HEIGHT), np.zeros((HEIGHT, WIDTH))
    left[:, : WIDTH // 2] = 1
    settings = {"image": image, "seed": 1, **QUICK}
    changed = np.array(inpainter.inpaint(PROMPT, mask_image=left, **settings)[0]) != np.array(image)
    assert changed[:, : WIDTH // 2].mean() > 0.9 and not changed[:, WIDTH // 2 :].any()
    for grow in (0, 4):
        settings["grow_mask"] = grow
        one = inpainter.inpaint(PROMPT, mask_image=left, invert_mask=True, **settings)[0]
        other = inpainter.inpaint(PROMPT, mask_image=1 - left, **settings)[0]
        assert np.array_equal(np.array(one), np.array(other))
        assert not (np.array(one) != np.array(image))[:, : WIDTH // 2 - grow].any()


def test_an_empty_mask_returns_the_picture_and_a_full_one_keeps_nothing(inpainter):
    image, shape = picture(WIDTH, HEIGHT), (HEIGHT, WIDTH)
    settings = {"image": image, "seed": 1, **QUICK}
    (same,) = inpainter.inpaint(PROMPT, mask_image=np.zeros(shape), **settings)
    assert np.array_equal(np.array(same), np.array(image))
    (raw,) = inpainter.inpaint(PROMPT, mask_image=np.zeros(shape), keep_unmasked=False, **settings)
    x = 2 * images.picture(image)[None] - 1
    through_movq = images.to_unit_range(inpainter.movq.decode(inpainter.movq.encode(x)))
    assert np.array_equal(np.array(raw), np.array(images.to_pil(through_movq)[0]))
    full = {"mask_image": np.ones(shape), **settings}
    ours, raw = (inpainter.inpaint(PROMPT, keep_unmasked=keep, **full)[0] for keep in (True, False))
    assert np.array_equal(np.array(ours), np.array(raw))


def test_the_pictures_may_be_given_by_position(pipe, inpainter):
    image, mask, settings = picture(WIDTH, HEIGHT), half_mask(HEIGHT, WIDTH), {"seed": 1, **QUICK}
    assert (
        pipe.img2img(PROMPT, image, 0.5, **settings)[0]
        == (pipe.img2img(PROMPT, image=image, strength=0.5, **settings)[0])
    )
    given = {"image": image, "mask_image": mask, "keep_unmasked": False}
    assert inpainter.inpaint(PROMPT, image, mask, False, **settings) == (
        inpainter.inpaint(PROMPT, **given, **settings)
    )


def test_a_mask_of_another_size_is_resized_to_the_picture(inpainter):
    image, mask = picture(WIDTH, HEIGHT), np.zeros((4, 6))
    mask[:, 3:] = 1
    settings = {"image": image, "mask_image": mask, "seed": 1, **QUICK}
    changed = np.array(inpainter.inpaint(PROMPT, **settings)[0]) != np.array(image)
    assert not changed[:, :15].any() and changed[:, 17:].mean() > 0.9


def test_growing_and_feathering_change_what_is_pasted(inpainter):
    image, mask = picture(WIDTH, HEIGHT), np.zeros((HEIGHT, WIDTH))
    mask[10:22, 12:30] = 1
    settings = {"image": image, "mask_image": mask, "seed": 1, "output_type": "pt", **QUICK}
    original = images.picture(image)
    grown = inpainter.inpaint(PROMPT, grow_mask=3, **settings)[0] != original
    assert grown[:, 7:25, 9:33].any(dim=0).all() and grown.sum() == grown[:, 7:25, 9:33].sum()
    hard = inpainter.inpaint(PROMPT, **settings)[0]
    soft = inpainter.inpaint(PROMPT, feather_mask=4, **settings)[0]
    assert torch.equal(soft[:, mask == 0], original[:, mask == 0])
    assert torch.equal(soft[:, 15:17, 18:24], hard[:, 15:17, 18:24])  # deep inside
    edge = original[:, 10, 12:30] + (hard - original)[:, 10, 12:30] / 5
    torch.testing.assert_close(soft[:, 10, 12:30], edge)


def test_a_masks_numbers_may_be_numpys(inpainter):
    settings = {"image": picture(16, 16), "mask_image": half_mask(16, 16), "seed": 1, **QUICK}
    numbers = {"grow_mask": 3, "feather_mask": 255}
    own, numpys = (
        np.array(inpainter.inpaint(PROMPT, **settings, **{k: kind(n) for k, n in numbers.items()})[0])
        for kind in (int, np.uint8)
    )
    assert np.array_equal(own, numpys)


def test_a_scratch_between_the_latents_is_repainted_when_grown(inpainter):
    mask = np.zeros((HEIGHT, WIDTH))
    mask[:, 18] = 1  # the mask is read at every fourth pixel
    repaint = [m[None, None] for m in (masks.mask(mask), masks.grow(masks.mask(mask)[None], 4)[0])]
    thin, grown = (1 - masks.keep_latents(m, 4) for m in repaint)
    assert thin.sum() == 0 and grown.sum() > 0


def test_outpainting_keeps_the_picture(inpainter):
    image = picture(30, 20)
    canvas, mask = images.expand_canvas(image, left=11, bottom=9)
    (out,) = inpainter.inpaint("", image=canvas, mask_image=mask, seed=1, **QUICK)
    assert out.size == (41, 29) and np.array_equal(np.array(out)[:20, 11:], np.array(image))


@pytest.mark.parametrize("width, height", [(130, 20), *slow((1, 1), (7, 90))])
def test_any_size_works(pipe, inpainter, width, height):
    """diffusers crashes at sizes that are no multiples of f²."""
    image, mask = picture(width, height), np.ones((height, width))
    settings = {"num_inference_steps": 1, "prior_num_inference_steps": 1, "seed": 0}
    for out in (
        pipe.img2img(PROMPT, image=image, strength=1.0, **settings),
        inpainter.inpaint(PROMPT, image=image, mask_image=mask, **settings),
    ):
        assert [p.size for p in out] == [(width, height)]
    assert pipe.embed_image(image).shape == (1, EMBEDDING_DIM)


def test_odd_sizes_are_padded_by_their_edge_and_come_back_in_place(pipe):
    image = picture(41, 29)
    x = images.pad_to(2 * images.picture(image) - 1, 32, 48)
    wanted = images.crop_to(images.to_unit_range(pipe.movq.decode(pipe.movq.encode(x[None]))), 29, 41)
    out = pipe.img2img(PROMPT, image=image, strength=0.0, output_type="pt", **QUICK)
    assert relative_l2(out, wanted) <= 1e-6
    assert torch.equal(x[:, 0, 3:44], x[:, 1, 3:44]) and not torch.equal(x[:, 1, 3:44], x[:, 2, 3:44])
    assert all(torch.equal(x[:, :, i], x[:, :, 3]) for i in range(3))


def test_odd_sizes_equal_the_padded_picture_cropped(inpainter, hinted):
    """Pictures and hints are padded by their edge, masks with black."""
    image, mask, hint = picture(21, 13), np.ones((13, 21)), picture(21, 13, "L", seed=1)
    whole = images.to_pil(images.pad_to(images.picture(image), 16, 32)[None])[0]
    black = images.pad_to(masks.mask(mask)[None], 16, 32, "constant")[0]
    settings = {"seed": 1, "output_type": "latent", **QUICK}
    odd = inpainter.inpaint(PROMPT, image=image, mask_image=mask, **settings)
    padded = inpainter.inpaint(PROMPT, image=whole, mask_image=black, **settings)
    assert torch.equal(odd, padded) and black[1, 5] == 1 and not black[0].any() and not black[:, 4].any()
    big_hint = images.pad_to(images.resize(images.picture(hint), 26, 42), 32, 64)
    odd = hinted.text2img(PROMPT, hint=hint, height=13, width=21, **settings)
    padded = hinted.text2img(PROMPT, hint=big_hint, height=16, width=32, **settings)
    assert torch.equal(odd, padded)


@pytest.mark.parametrize("strength, steps", [(0.0, 5), (0.19, 5), (0.5, 1)])
def test_too_little_strength_only_encodes_and_decodes(pipe, strength, steps):
    """diffusers crashes at int(steps × strength) = 0."""
    image, seen = picture(WIDTH, HEIGHT), []
    settings = {"num_inference_steps": steps, "on_step": seen.append, "output_type": "pt"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = pipe.img2img(PROMPT, image=image, strength=strength, **settings)
        own = pipe.embed_from(
            image, PROMPT, strength=strength, negative_prompt=NEGATIVE, num_inference_steps=steps
        )
    none = f"strength {strength} of {steps} steps is none: the picture"
    results = (
        [] if strength == 0 else [f"{none} is only encoded and decoded", f"{none}'s own embedding comes back"]
    )
    assert [(str(w.message), w.filename) for w in told] == [(result, __file__) for result in results]
    x = 2 * images.picture(image)[None] - 1
    assert torch.equal(out, images.to_unit_range(pipe.movq.decode(pipe.movq.encode(x)))) and not seen
    assert "unet" not in pipe._loaded and "prior" not in pipe._loaded
    assert torch.equal(own.image_embeds, pipe.embed_image(image)) and own.negative_image_embeds is None


def test_strength_is_the_share_of_steps_and_grows_away_from_the_picture(pipe):
    image, distances = picture(WIDTH, HEIGHT), []
    z = pipe.movq.encode(2 * images.picture(image)[None] - 1)
    for strength, count in ((0.1, 1), (0.29, 2), (0.5, 5), (1.0, 10)):
        seen = []
        out = pipe.img2img(
            PROMPT,
            image=image,
            strength=strength,
            seed=1,
            num_inference_steps=10,
            prior_num_inference_steps=2,
            output_type="latent",
            on_step=seen.append,
        )
        assert len(seen) == count and seen[-1].t == 1
        distances.append(relative_l2(out, z))
    assert distances == sorted(distances) and distances[0] < 0.5 < distances[-1]


def test_the_first_sample_has_the_noise_of_the_first_timestep(pipe):
    """Read off the step: with x0 and noise known, x at t is the published mixture."""
    image, noise, seen = picture(WIDTH, HEIGHT), randn(1, 4, HEIGHT // 4, WIDTH // 4, seed=1), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0][-1:].clone()))
    rest = {"num_inference_steps": 10, "prior_num_inference_steps": 2, "seed": 0}
    pipe.img2img(PROMPT, image=image, strength=0.4, latents=noise, **rest)
    z = pipe.movq.encode(2 * images.picture(image)[None] - 1)
    t = pipe.scheduler.timesteps(10)[6][0]
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000).double(), 0)[t]
    wanted = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
    assert len(seen) == 4 and relative_l2(seen[0], wanted) <= 1e-6


def test_gray_hints_and_hints_of_other_sizes_are_taken(hinted):
    gray = picture(WIDTH, HEIGHT, "L", seed=5)
    settings = {"height": HEIGHT, "width": WIDTH, "seed": 1, "output_type": "latent", **QUICK}
    first = hinted.text2img(PROMPT, hint=gray, **settings)
    levels = np.array(gray)
    for form in (levels, levels / 255, torch.from_numpy(levels / 255)[None], gray.convert("RGB")):
        assert torch.equal(hinted.text2img(PROMPT, hint=form, **settings), first)
    doubled = gray.convert("RGB").resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC, reducing_gap=1)
    assert torch.equal(hinted.text2img(PROMPT, hint=doubled, **settings), first)
    other = hinted.text2img(PROMPT, hint=picture(9, 99, "L", seed=6), **settings)
    assert relative_l2(other, first) > 1e-3


def test_mix_of_one_is_that_one(pipe):
    image = picture(20, 30)
    embeds = pipe.mix([PROMPT], [1], negative_prompt=None, seed=4, num_inference_steps=2)
    assert embeds.negative_image_embeds is None
    assert relative_l2(embeds.image_embeds, pipe.embed(PROMPT, seed=4, num_inference_steps=2)[0]) <= 1e-6
    assert torch.equal(pipe.mix([image], [1.0]).image_embeds, pipe.embed_image(image))
    row = randn(EMBEDDING_DIM)
    for form in (row, row[None], row.double()):
        assert torch.equal(pipe.mix([form], [1.0]).image_embeds, row[None])
    assert pipe.mix([row], [1.0]).negative_image_embeds is None


def test_mix_adds_up_whatever_the_order_of_pictures(pipe):
    a, b, row = picture(20, 30), picture(8, 8, seed=1), randn(EMBEDDING_DIM)
    out = pipe.mix([a, b, row], [0.5, -1.5, 2], num_images_per_prompt=2).image_embeds
    embedded = pipe.embed_image([a, b])
    assert relative_l2(out, (0.5 * embedded[:1] - 1.5 * embedded[1:] + 2 * row).expand(2, -1)) <= 1e-6
    assert relative_l2(pipe.mix([row, b, a], [2, -1.5, 0.5]).image_embeds, out[:1]) <= 1e-6
    assert not {"prior", "text_encoder"} & set(pipe._loaded)  # no prompt: the prior is not read


def test_all_prompts_of_a_mix_share_one_run_of_the_prior(pipe):
    rows = []
    pipe.prior.proj_in.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    settings = {"num_inference_steps": 3, "num_images_per_prompt": 2, "negative_prompt": NEGATIVE}
    pipe.mix([PROMPT, OTHER, PROMPT], [0.5, 0.25, 0.25], **settings)
    assert rows == [2 * 2 * 4] * 3  # guidance × images × (three prompts and the negative one), three steps


def test_weights_that_do_not_sum_to_one_are_used_with_a_warning(pipe):
    row = randn(EMBEDDING_DIM)
    with pytest.warns(UserWarning, match="the weights sum to 1.5, not to 1; they are used as given") as seen:
        out = pipe.mix([row, row], [1, 0.5])
    assert seen[0].filename == __file__  # the caller's line
    assert torch.equal(out.image_embeds, 1.5 * row[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.mix([row] * 3, [1 / 3] * 3)
        pipe.mix([row] * 10, [0.1] * 10)


def test_own_noise_of_embed_from_is_used(pipe):
    image, noise = picture(9, 9), randn(1, EMBEDDING_DIM, seed=5)
    settings = {"strength": 1.0, "num_inference_steps": 3, "seed": 0}
    one, other = (pipe.embed_from(image, PROMPT, latents=x, **settings)[0] for x in (noise, -noise))
    assert relative_l2(one, other) > 1e-2


def test_pictures_and_embeddings_may_lie_in_one_list(pipe):
    row, image = randn(EMBEDDING_DIM), picture(9, 9)
    settings = {"strength": 0.7, "num_inference_steps": 3}
    both = pipe.embed_from([row, image, row[None]], [PROMPT, OTHER, PROMPT], seed=[1, 2, 1], **settings)[0]
    alone = [
        pipe.embed_from(row, PROMPT, seed=1, **settings)[0],
        pipe.embed_from(image, OTHER, seed=2, **settings)[0],
    ]
    assert relative_l2(both, torch.cat([*alone, alone[0]])) <= 1e-5


def test_steps_of_embed_from_mix_and_inpaint_are_seen_and_can_stop(pipe, inpainter):
    seen = []
    pipe.embed_from(picture(9, 9), PROMPT, strength=0.5, num_inference_steps=6, on_step=seen.append)
    assert [step.t for step in seen] == [400, 200, 0]
    inpainter.inpaint(PROMPT, picture(16, 16), half_mask(16, 16), on_step=seen.append, **QUICK)
    assert [(step.index, step.num_steps, step.t) for step in seen[3:]] == [(0, 2, 501), (1, 2, 1)]
    assert pipe.embed_from(picture(9, 9), PROMPT, on_step=lambda step: False) is None
    assert pipe.mix([PROMPT], [1], on_step=lambda step: False) is None


def test_noise_for_a_prior_that_does_not_run_is_refused(pipe):
    with pytest.raises(ValueError, match="latents is the prior's noise, .* there is no prompt to mix"):
        pipe.mix([randn(EMBEDDING_DIM)], [1.0], latents=randn(1, EMBEDDING_DIM))


def test_keep_loaded_false_edits_too(inpaint_folder, inpainter):
    light = Kandinsky.from_pretrained(inpaint_folder, keep_loaded=False)
    given = {"image": picture(WIDTH, HEIGHT), "mask_image": half_mask(), "seed": 1, "output_type": "pt"}
    assert torch.equal(light.inpaint(PROMPT, **given, **QUICK), inpainter.inpaint(PROMPT, **given, **QUICK))
    assert not light._loaded


GOOD = {"image": picture(16, 16), "mask_image": np.ones((16, 16))}
EMBEDS = ImageEmbeds(torch.zeros(1, EMBEDDING_DIM))
TWO, THREE = [picture(16, 16)] * 2, [picture(16, 16)] * 3
BAD_CALLS = [
    ("img2img", {"strength": 1.01}, ValueError, "strength is 1.01; allowed is 0 to 1"),
    ("img2img", {"strength": -0.1}, ValueError, "strength is -0.1; allowed is 0 to 1"),
    ("img2img", {"strength": "0.5"}, TypeError, "strength is '0.5' of type str; a number is needed"),
    ("img2img", {"strength": float("nan")}, ValueError, "strength is nan; a finite number is needed"),
    ("img2img", {"image": None}, TypeError, "image is a NoneType; needed is a PIL picture"),
    ("img2img", {"image": "cat.png"}, TypeError, "open files with images.open_image"),
    ("img2img", {"image": []}, ValueError, "image is an empty list"),
    ("img2img", {"image": [picture(16, 16), 3]}, TypeError, "image is a int"),
    ("img2img", {"image": torch.full((3, 8, 8), -1.0)}, ValueError, "image has values from -1 to -1"),
    (
        "img2img",
        {"image": [picture(9, 8), picture(8, 9)]},
        ValueError,
        r"sizes differ \(9×8, 8×9\); give height",
    ),
    ("img2img", {"image": [picture(9, 8), picture(8, 9)], "height": 8}, ValueError, "sizes differ"),
    (
        "img2img",
        {"prompt": ["a"] * 3, "image": TWO},
        ValueError,
        "3 prompts, 2 pictures: lists must be of equal",
    ),
    (
        "img2img",
        {"prompt": None, "embeds": ImageEmbeds(torch.zeros(2, EMBEDDING_DIM)), "image": THREE},
        ValueError,
        "2 embeds, 3 pictures: lists must be of equal length; one alone goes with all",
    ),
    (
        "img2img",
        {"latents": torch.zeros(1, 4, 8, 8)},
        ValueError,
        r"latents is \(1, 4, 8, 8\); needs \(1, 4, 4, 4\)",
    ),
    ("img2img", {"prior_guidance_scale": "4"}, TypeError, "prior_guidance_scale is '4'"),
    ("img2img", {"prior_num_inference_steps": 0}, ValueError, "^prior_num_inference_steps is 0"),
    (
        "img2img",
        {"hint": picture(8, 8)},
        CheckpointError,
        "takes no hint; use kandinsky-2-2-controlnet-depth for",
    ),
    ("img2img", {"mask_image": 1}, TypeError, r"img2img\(\) has no argument 'mask_image'; use one of prompt"),
    ("inpaint", {"mask_image": None}, TypeError, "mask_image is a NoneType; needed is a PIL picture"),
    ("inpaint", {"mask_image": np.full((4, 4), 2.0)}, ValueError, "mask_image has values from 2 to 2"),
    ("inpaint", {"mask_image": np.zeros((4, 4, 3))}, ValueError, r"mask_image has the shape \(4, 4, 3\)"),
    (
        "inpaint",
        {"mask_image": TWO, "image": THREE},
        ValueError,
        "1 prompts, 3 pictures, 2 masks: lists must",
    ),
    ("inpaint", {"grow_mask": -1}, ValueError, "grow_mask is -1; allowed is 0 to 4096"),
    ("inpaint", {"feather_mask": 4097}, ValueError, "feather_mask is 4097; allowed is 0 to 4096"),
    (
        "inpaint",
        {"feather_mask": 3, "keep_unmasked": False},
        ValueError,
        "feather_mask is 3, and keep_unmasked False: only over a picture that is kept",
    ),
    ("inpaint", {"keep_unmasked": "no"}, TypeError, "keep_unmasked is 'no'; True or False is needed"),
    ("inpaint", {"invert_mask": None}, TypeError, "invert_mask is None; True or False is needed"),
    ("inpaint", {"feather_mask": 1.5}, TypeError, "feather_mask is 1.5 of type float; an int is needed"),
    ("inpaint", {"num_inference_steps": 0}, ValueError, "^num_inference_steps is 0"),
    ("inpaint", {"generator": 1}, TypeError, r"inpaint\(\) has no argument 'generator'; use seed="),
    ("inpaint", {"strength": 0.5}, TypeError, "has no argument 'strength'"),
    ("hint", {"hint": torch.full((3, 8, 8), 2.0)}, ValueError, "hint has values from 2 to 2"),
    ("hint", {"hint": "depth.png"}, TypeError, "hint is a str; .*open files with images.open_image"),
    ("hint", {"hint": torch.zeros(2, 4, 4)}, ValueError, r"hint has the shape \(2, 4, 4\)"),
    (
        "hint",
        {"hint": TWO, "prompt": ["a"] * 3},
        ValueError,
        "3 prompts, 2 hints: lists must be of equal length",
    ),
    ("mix", {"images_and_prompts": "a cat"}, TypeError, "are str and list; two lists are needed"),
    ("mix", {"weights": [0.5]}, ValueError, "2 items and 1 weights; give one weight for each item"),
    ("mix", {"images_and_prompts": [], "weights": []}, ValueError, "0 items and 0 weights"),
    ("mix", {"weights": [1, "2"]}, TypeError, r"weights\[1\] is '2' of type str; a number is needed"),
    ("mix", {"weights": [1, float("inf")]}, ValueError, r"weights\[1\] is inf; a finite number"),
    (
        "mix",
        {"images_and_prompts": ["a", torch.zeros(5)]},
        ValueError,
        r"item 1 is \(1, 5\); this checkpoint needs",
    ),
    ("mix", {"images_and_prompts": ["a", 5]}, TypeError, "item 1 is a int; needed is a PIL picture"),
    (
        "mix",
        {"images_and_prompts": ["a", EMBEDS]},
        TypeError,
        "item 1 is an ImageEmbeds; pass its image_embeds",
    ),
    (
        "mix",
        {"images_and_prompts": ["a", torch.zeros(2, EMBEDDING_DIM)]},
        ValueError,
        "item 1 holds 2 pictures",
    ),
    (
        "mix",
        {"negative_prompt": ["a", "b"]},
        TypeError,
        "negative_prompt is a list; one string is needed",
    ),
    ("mix", {"negative_prior_prompt": 3}, TypeError, "negative_prior_prompt is a int; one string is needed"),
    ("mix", {"latents": torch.zeros(2, EMBEDDING_DIM)}, ValueError, r"needs \(1, 32\)"),
    ("embed_from", {"image": EMBEDS}, TypeError, "image is an ImageEmbeds; pass its image_embeds"),
    ("embed_from", {"image": [EMBEDS]}, TypeError, "image is an ImageEmbeds; pass its image_embeds"),
    ("embed_from", {"image": []}, ValueError, "image is an empty list"),
    ("embed_from", {"image": [[picture(9, 9)]]}, TypeError, "image is a list; needed is a PIL picture"),
    ("embed_from", {"image": [torch.zeros(2, 3, 9, 9)]}, ValueError, r"image has the shape \(2, 3, 9, 9\)"),
    ("embed_from", {"strength": 2}, ValueError, "strength is 2; allowed is 0 to 1"),
    (
        "embed_from",
        {"image": torch.zeros(1, 7)},
        ValueError,
        r"image is \(1, 7\); this checkpoint needs \(b, 32\)",
    ),
    (
        "embed_from",
        {"image": TWO, "prompt": ["a"] * 3},
        ValueError,
        "3 prompts, 2 images: lists must be of equal",
    ),
    ("embed_from", {"prompt": None}, TypeError, "prompt is a NoneType; a string or a list of strings"),
    ("embed_from", {"latents": torch.zeros(1, 7)}, ValueError, r"latents is \(1, 7\); needs \(1, 32\)"),
]


@pytest.mark.parametrize("task, changes, error, message", BAD_CALLS)
def test_bad_input_is_refused_in_one_line_before_any_weight_is_read(pipes, task, changes, error, message):
    pipe = pipes[task]
    good = {
        "img2img": {"prompt": PROMPT, "image": GOOD["image"]},
        "inpaint": {"prompt": PROMPT, **GOOD},
        "hint": {"prompt": PROMPT, "hint": GOOD["image"]},
        "mix": {"images_and_prompts": [PROMPT, OTHER], "weights": [0.5, 0.5]},
        "embed_from": {"prompt": PROMPT, "image": GOOD["image"]},
    }[task]
    with pytest.raises(error, match=message) as caught:
        getattr(pipe, "text2img" if task == "hint" else task)(**{**good, **changes})
    assert "\n" not in str(caught.value) and not pipe._loaded


def test_each_checkpoint_does_its_tasks_and_names_the_one_for_others(pipe, inpainter, hinted):
    cases = [
        (pipe, "inpaint", GOOD, "is not for inpainting; use kandinsky-2-2-decoder-inpaint for inpaint"),
        (hinted, "inpaint", GOOD, "is not for inpainting; use kandinsky-2-2-decoder-inpaint for inpaint"),
        (inpainter, "inpaint", GOOD | {"hint": GOOD["image"]}, "no checkpoint takes a hint for inpainting"),
        (
            inpainter,
            "text2img",
            {"hint": GOOD["image"]},
            "is for inpainting; use kandinsky-2-2-controlnet-depth",
        ),
        (inpainter, "img2img", {"image": GOOD["image"]}, "is for inpainting; use kandinsky-2-2-decoder for"),
        (inpainter, "text2img", {}, "is for inpainting; use kandinsky-2-2-decoder for text2img"),
        (
            hinted,
            "text2img",
            {},
            r"needs a hint; pass hint= \(--hint\), or use kandinsky-2-2-decoder for text2img",
        ),
        (hinted, "img2img", {"image": GOOD["image"]}, "needs a hint; pass hint="),
        (pipe, "text2img", {"hint": GOOD["image"]}, "takes no hint; use kandinsky-2-2-controlnet-depth"),
    ]
    for pipeline, task, given, message in cases:
        with pytest.raises(CheckpointError, match=message):
            getattr(pipeline, task)(PROMPT, **given)


def test_a_few_pictures_at_a_time_go_through_movq(pipe, monkeypatch):
    rows, size = [], {"height": 14, "width": 30}  # padded to 16 × 32
    given = {"prompt": PROMPT, "image": [picture(16, 16, seed=i) for i in range(3)], "strength": 0, **size}
    given |= {"num_images_per_prompt": 2, "output_type": "pt"}
    at_once = pipe.img2img(**given)
    for half in (pipe.movq.encoder, pipe.movq.decoder):
        half.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for pixels, wanted in ((2 * 16 * 32 + 1, [2, 1, 2, 2, 2]), (100, [1] * 9)):
        monkeypatch.setattr("kandinsky.pipeline.PIXELS_IN_MOVQ", pixels)
        rows.clear()
        assert relative_l2(pipe.img2img(**given), at_once) <= 1e-5 and rows == wanted
