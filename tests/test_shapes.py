"""The data set of the embedded checkpoint and its judge: every claim that the two modules make, measured."""

import io
import math
import re
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from functools import lru_cache
from itertools import combinations, permutations
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from kandinsky import captions, shapes, training_cli
from kandinsky.captions import Claim, ObjectClaim, caption, parse
from kandinsky.datasets import Shapes
from kandinsky.judge import Verdict, compare, hard_negative, judge, see, shows
from kandinsky.shapes import Object, Scene, random_scene, render

NUM_SCENES = 120  # for each number of objects
ONLY = {1: (1, 0, 0), 2: (0, 1, 0), 3: (0, 0, 1)}
CHECKS = ("objects", "colour", "shape", "size", "place", "relation", "background")


@lru_cache
def sample(num_objects: int) -> list[tuple[Scene, np.ndarray, str]]:
    rng = Random(num_objects)
    scenes = [random_scene(11, index, object_weights=ONLY[num_objects]) for index in range(NUM_SCENES)]
    return [(scene, render(scene), caption(scene, rng)) for scene in scenes]


def anything(call):
    """A scene of either split, from any seed and index."""
    scenes = st.builds(
        random_scene,
        st.integers(0, 2**40),
        st.integers(0, 2**40),
        st.sampled_from(["train", "held_out"]),
        st.sampled_from(list(ONLY.values())),
    )
    return settings(max_examples=60, deadline=None)(given(scenes, st.randoms(use_true_random=False))(call))


def test_there_are_enough_colours_shapes_and_held_out_pairs():
    assert len(shapes.OBJECT_COLORS) >= 10 and len(shapes.SHAPES) >= 8 and len(shapes.HELD_OUT) >= 6
    assert all(c in shapes.OBJECT_COLORS and s in shapes.SHAPES for c, s in shapes.HELD_OUT)
    nearest = min(np.linalg.norm(np.subtract(a, b)) for a, b in combinations(shapes.COLORS.values(), 2))
    assert nearest > 80  # twice the farthest shade, 16 a channel, is 55


def test_training_never_shows_a_held_out_pair_and_the_other_split_always_does():
    trained = [[(o.color, o.shape) for o in random_scene(0, i).objects] for i in range(1500)]
    tested = [[(o.color, o.shape) for o in random_scene(0, i, "held_out").objects] for i in range(400)]
    assert not shapes.HELD_OUT & {pair for pairs in trained for pair in pairs}
    assert all(shapes.HELD_OUT & set(pairs) for pairs in tested)
    assert {pair for pairs in tested for pair in pairs} > shapes.HELD_OUT
    assert len({pair for pairs in trained for pair in pairs}) == 80 - len(shapes.HELD_OUT)
    counts = Counter(map(len, trained))
    assert abs(counts[1] - counts[2]) < 150 and 100 < counts[3] < 250
    busy = Counter(len(random_scene(3, index, object_weights=(0, 1, 3)).objects) for index in range(400))
    assert 0.2 < busy[2] / 400 < 0.3 and busy[2] + busy[3] == 400


def test_every_value_occurs_about_equally_often():
    objects = [item for index in range(1500) for item in random_scene(2, index).objects]
    for values, expected in (
        ([o.shape for o in objects], shapes.SHAPES),
        ([o.color for o in objects], shapes.OBJECT_COLORS),
        ([o.place for o in objects], shapes.PLACES),
        ([o.size for o in objects], shapes.RADII),
    ):
        counts = Counter(values)
        assert set(counts) == set(expected)
        assert min(counts.values()) > 0.6 * len(objects) / len(expected)


@pytest.mark.slow
def test_a_scene_is_the_same_in_another_process_and_leaves_global_random_state_alone():
    code = (
        "import hashlib; from random import Random; from kandinsky.shapes import *;"
        "from kandinsky.captions import caption; from kandinsky.judge import hard_negative, see;"
        "scenes = [random_scene(7, i, s) for i in range(20) for s in ('train', 'held_out')];"
        "words = [(caption(s, Random(1)), hard_negative(s, Random(1)), str(see(render(s)))) for s in scenes];"
        "print(hashlib.sha256(repr((scenes, words)).encode()).hexdigest())"
    )
    root = Path(__file__).parents[1]
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Shapes(0).load(range(3))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_scenes_differ_by_seed_index_and_split():
    scenes = [
        random_scene(*key) for key in ((0, 1), (1, 0), (0, 0), (1, 1), (1, 11), (11, 1), (0, 1, "held_out"))
    ]
    assert len(set(scenes)) == len(scenes)


@anything
def test_objects_lie_apart_inside_the_picture_and_differ_from_the_ground(scene: Scene, _rng: Random):
    masks = shapes.object_masks(scene, 128)
    assert len(masks) == len(scene.objects) and all(mask.any() for mask in masks)
    for mask in masks:
        assert not (mask[[0, -1]].any() or mask[:, [0, -1]].any())
    for a, b in combinations(masks, 2):
        grown = np.asarray(Image.fromarray(a).convert("L").filter(ImageFilter.MaxFilter(13)))
        assert not (b & (grown > 0)).any()  # six of 128 pixels apart at least
    assert scene.background not in {item.color for item in scene.objects}
    assert len({(item.color, item.shape) for item in scene.objects}) == len(scene.objects)


@anything
def test_what_a_caption_says_can_be_read_back_and_is_true(scene: Scene, rng: Random):
    claim = captions.describe(scene, rng)
    assert parse(captions.say(claim, rng)) == claim
    assert compare(claim, scene).right
    said = Counter((item.color, item.shape) for item in claim.objects)
    assert said == Counter((item.color, item.shape) for item in scene.objects)
    placed = [item.place is not None for item in claim.objects]
    assert claim.relations or all(placed) or not any(placed)


@anything
def test_a_hard_negative_is_a_readable_caption_that_is_wrong(scene: Scene, rng: Random):
    claim = parse(hard_negative(scene, rng))
    assert not compare(claim, scene).right and len(claim.objects) == len(scene.objects)
    pairs = {(item.color, item.shape) for item in claim.objects}
    if not shapes.HELD_OUT & {(item.color, item.shape) for item in scene.objects}:
        assert not shapes.HELD_OUT & pairs


def test_hard_negatives_are_of_every_kind():
    rng = Random(0)
    wrong = Counter()
    exchanged = 0
    for scene, *_ in sample(2):
        claim = parse(hard_negative(scene, rng))
        verdict = compare(claim, scene)
        wrong.update(name for name in CHECKS if not getattr(verdict, name))
        exchanged += verdict.right is False and Counter(o.color for o in claim.objects) == Counter(
            o.color for o in scene.objects
        )
    assert set(wrong) == set(CHECKS) - {"objects"}
    assert exchanged > 0.3 * NUM_SCENES


def test_captions_vary():
    rng = Random(0)
    for scene, *_ in sample(2)[:5]:
        assert len({caption(scene, rng) for _ in range(60)}) > 45
    claims = [parse(text) for n in (1, 2, 3) for *_, text in sample(n)]
    assert 0.6 < np.mean([claim.background is not None for claim in claims]) < 0.8
    assert 0.3 < np.mean([item.size is not None for claim in claims for item in claim.objects]) < 0.5
    assert 0.3 < np.mean([item.place is not None for claim in claims for item in claim.objects]) < 0.6
    assert 0.3 < np.mean([len(claim.relations) for claim in claims if len(claim.objects) > 1]) < 0.6


def test_every_word_is_understood():
    for table, pattern, field in (
        (captions.SHAPE_WORDS, "a red {}", "shape"),
        (captions.COLOR_WORDS, "a {} ring", "color"),
        (captions.SIZE_WORDS, "a {} red ring", "size"),
        (captions.PLACE_WORDS, "a red ring {}", "place"),
    ):
        for meaning, words in table.items():
            for word in words:
                assert getattr(parse(pattern.format(word)).objects[0], field) == meaning
    for meaning, words in captions.RELATION_WORDS.items():
        for word in words:
            assert parse(f"a red ring {word} a blue star").relations == ((0, meaning, 1),)
    assert set(captions.PLACE_WORDS) == set(shapes.PLACES) and set(captions.RELATION_WORDS) == set(
        captions.RELATIONS
    )


def test_the_readme_caption_is_read_as_meant():
    assert parse("A red circle above a small blue square on a yellow background.") == Claim(
        (ObjectClaim("circle", "red"), ObjectClaim("square", "blue", "small")), ((0, "above", 1),), "yellow"
    )
    assert parse("in the upper left a red star, and in the middle an orange half circle") == Claim(
        (ObjectClaim("star", "red", None, "top left"), ObjectClaim("semicircle", "orange", None, "centre"))
    )
    third = parse("a red star left of a red ring, plus a grey disc at the bottom").objects[2]
    assert third == ObjectClaim("circle", "grey", None, "bottom")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat on a mat",
        "a circle",
        "two red circles",
        "a red circle above",
        "above a red circle",
        "a red circle above and",
        "a yellow background",
        "a red circle at the top at the left",
        "a red circle on a blue background on a white background",
        "a red circle at the top left of",
    ],
)
def test_other_captions_are_refused(text: str):
    with pytest.raises(ValueError):
        parse(text)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="validation"):
        random_scene(0, 0, "validation")
    for weights in ((0, 0, 0), (1, -1, 1), (1, 1), (1, 1, math.nan), (1, 1, math.inf)):
        with pytest.raises(ValueError, match=re.escape(f"object_weights are {weights}; three are needed")):
            random_scene(0, 0, object_weights=weights)
    with pytest.raises(ValueError, match="float32"):
        see(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="64 × 32"):
        see(np.zeros((32, 64, 3), np.uint8))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_scene_looks_the_same_at_every_size(size: int):
    for scene, picture, text in sample(3)[:15]:
        other = render(scene, size)
        assert other.shape == (size, size, 3) and other.dtype == np.uint8
        resized = np.asarray(Image.fromarray(other).resize((64, 64), Image.Resampling.BOX), float)
        assert np.abs(resized - picture).mean() < 2.5
        assert judge(Image.fromarray(other), text).right


def test_masks_and_hint_agree_with_the_picture():
    for scene, *_ in sample(3)[:30]:
        picture, masks, hint = (
            render(scene, 128),
            shapes.object_masks(scene, 128),
            shapes.depth_hint(scene, 128),
        )
        for item, mask in zip(scene.objects, masks):
            inside = np.median(picture[mask], axis=0)
            assert np.abs(inside - item.rgb).max() <= 1
            expected = shapes.geometry(item.shape).area * item.radius**2
            assert abs(mask.mean() / expected - 1) < 0.08
        levels = [int(np.unique(hint[mask]).item()) for mask in masks]
        assert levels[0] == 255 and levels == sorted(levels, reverse=True) and len(set(levels)) == len(levels)
        ground = ~np.any(masks, axis=0)
        assert not hint[ground].any()
        assert np.abs(np.median(picture[ground], axis=0) - scene.rgb).max() <= 1


def test_edges_are_soft_and_cover_the_true_area():
    for shape in shapes.SHAPES:
        item = Object(shape, "black", 0.43, 0.52, 0.14, (0, 0, 0))
        window, alpha = shapes.coverage(item, 64)
        assert ((alpha > 0) & (alpha < 1)).sum() > 15
        area = shapes.geometry(shape).area * (item.radius * 64) ** 2
        assert abs(alpha.sum() / area - 1) < 0.02, shape


def test_a_batch_holds_the_rendered_scenes():
    batch = Shapes(3).load(range(5, 9))
    pixels, scenes = batch.pixels, batch.scenes
    assert pixels.shape == (4, 3, 64, 64) and pixels.dtype == torch.float32
    assert scenes == [random_scene(3, index) for index in range(5, 9)]
    back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for picture, scene, text in zip(back, scenes, batch.captions):
        assert (picture == render(scene)).all() and compare(parse(text), scene).right
    again = Shapes(3).load([8])
    assert torch.equal(again.pixels[0], pixels[3]) and again.captions == batch.captions[3:]
    assert Shapes(3, 32, "held_out").load([0]).pixels.shape == (1, 3, 32, 32)


def test_the_flag_for_the_numbers_of_objects_is_what_is_drawn():
    parser = ArgumentParser()
    training_cli.add_training_flags(parser)
    args = parser.parse_args(["--out", "no", "--object-weights", "0", "1", "0"])
    scenes = training_cli.data_of(args).load(list(range(20))).scenes
    assert {len(scene.objects) for scene in scenes} == {2}


def clean(picture):
    return picture


def noisy(picture, sigma=6):
    noise = np.random.default_rng(int(picture.sum())).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def blurred(picture, radius=0.8):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def shifted(picture):
    shift = np.random.default_rng(int(picture.sum())).choice([-6, 6], 3)
    return np.clip(picture + shift, 0, 255).astype(np.uint8)


def resized(picture, side=40):
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))


def compressed(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=85)
    return np.asarray(Image.open(file))


def everything(picture):
    return noisy(shifted(blurred(picture)))


@pytest.mark.slow
@pytest.mark.parametrize("num_objects", [1, 2, 3])
@pytest.mark.parametrize("spoil", [clean, noisy, blurred, shifted, resized, compressed, everything])
def test_true_pairs_are_right(spoil, num_objects: int):
    """Of 3000 for each number of objects 100.0 % are right, and 98.5 % after JPEG at quality 75."""
    right = [judge(spoil(picture), text).right for _, picture, text in sample(num_objects)]
    assert np.mean(right) >= 0.99


def test_held_out_pairs_are_seen_as_well_as_others():
    scenes = [random_scene(4, index, "held_out") for index in range(NUM_SCENES)]
    assert np.mean([judge(render(scene), caption(scene, Random(0))).right for scene in scenes]) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_shuffled_captions_are_right_by_chance_only(num_objects: int):
    """Colour and shape alone: one in 74 for a single object, if it stood anywhere on any ground."""
    data = sample(num_objects)
    pairs = [(data[i][1], data[i - shift][2]) for i in range(NUM_SCENES) for shift in (1, 2, 3)]
    assert np.mean([judge(*pair).right for pair in pairs]) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_hard_negatives_are_wrong(num_objects: int):
    rng = Random(5)
    data = sample(num_objects)
    assert (
        np.mean([judge(everything(picture), hard_negative(s, rng)).right for s, picture, _ in data]) <= 0.03
    )


def test_each_part_of_the_verdict_answers_for_its_own_words():
    items = (
        Object("circle", "red", 0.5, 0.22, 0.2, shapes.COLORS["red"]),
        Object("star", "blue", 0.22, 0.78, 0.14, shapes.COLORS["blue"]),
    )
    picture = render(Scene("white", shapes.COLORS["white"], items))
    assert judge(picture, "a red circle at the top and a blue star in the lower left").right
    assert judge(picture, "a small blue star below a large red circle on a white background").right
    for text, wrong in (
        ("a red circle", {"objects"}),
        ("a red circle, a blue star and a green ring", set(CHECKS) - {"background"}),
        ("a red circle and a green star", {"colour"}),
        ("a red circle and a blue cross", {"shape"}),
        ("a small red circle and a blue star", {"size"}),
        ("a red circle and a blue star at the bottom", {"place"}),
        ("a red circle at the top left and a blue star", {"place"}),
        ("a red circle below a blue star", {"relation"}),
        ("a red circle to the left of a blue star", {"relation"}),
        ("a red circle and a blue star on a grey background", {"background"}),
        ("a blue circle and a red star", {"colour"}),
    ):
        verdict = judge(picture, text)
        assert {name for name in CHECKS if not getattr(verdict, name)} == wrong, text
        assert not verdict.right


def test_what_is_seen_is_the_scene():
    for scene, picture, _ in sample(3)[:60]:
        seen = see(noisy(picture))
        assert seen.background == scene.background and len(seen.objects) == len(scene.objects)
        for item in scene.objects:
            found = min(seen.objects, key=lambda other: abs(other.x - item.x) + abs(other.y - item.y))
            assert (found.shape, found.color) == (item.shape, item.color)
            assert abs(found.x - item.x) < 0.01 and abs(found.y - item.y) < 0.01
            assert abs(found.radius / item.radius - 1) < 0.06


def test_pictures_of_nothing_in_particular_show_no_object():
    rng = np.random.default_rng(0)
    rows = np.linspace(0, 255, 64)[:, None, None] * np.ones((1, 64, 3))
    for picture in (np.full((64, 64, 3), 200), rng.integers(0, 256, (64, 64, 3)), rows):
        verdict = judge(picture.astype(np.uint8), "a red circle")
        assert not verdict.right and not verdict.shape


def test_objects_whose_soft_edges_touch_are_two():
    black = shapes.COLORS["black"]
    items = tuple(Object("square", "black", x, 0.5, 0.14, black) for x in (0.345, 0.655))  # 3.7 pixels apart
    seen = see(blurred(render(Scene("white", shapes.COLORS["white"], items)), 1.5))
    assert [(item.shape, item.color) for item in seen.objects] == [("square", "black")] * 2


def test_blots_have_no_shape():
    y, x = (np.mgrid[:64, :64] + 0.5) / 64 - 0.5
    blots = [
        (x / 0.3) ** 2 + (y / 0.1) ** 2 < 1,
        (abs(x) < 0.3) & (abs(y) < 0.06),
        (abs(np.hypot(x, y) - 0.2) < 0.04) & (x < 0.1),
        (np.hypot(x - 0.18, y) < 0.1) | (np.hypot(x + 0.18, y) < 0.1) | ((abs(x) < 0.2) & (abs(y) < 0.03)),
        (abs(x + y) < 0.1) & (abs(x) < 0.25),
    ]
    for blot in blots:
        picture = np.where(blot[..., None], (212, 38, 42), (250, 247, 238)).astype(np.uint8)
        assert [item.shape for item in see(picture).objects] == [""]


def test_one_shape_is_not_taken_for_another_however_small_and_wherever():
    """As small as the smallest, at every subpixel offset, under noise and blur."""
    rng = Random(0)
    for shape in shapes.SHAPES:
        for _ in range(25):
            x, y = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)
            item = Object(shape, "orange", x, y, 0.13, shapes.COLORS["orange"])
            (found,) = see(everything(render(Scene("yellow", shapes.COLORS["yellow"], (item,))))).objects
            assert (found.shape, found.color, found.size) == (shape, "orange", "small")


def test_the_claimed_objects_are_matched_in_any_order():
    scene, picture, _ = sample(3)[0]
    claims = [ObjectClaim(o.shape, o.color, o.size, o.place) for o in scene.objects]
    for order in permutations(claims):
        assert compare(Claim(order), see(picture)) == Verdict(*[True] * 7)


def test_making_and_judging_are_quick():
    """Measured 0.1 ms for a scene, 0.1 for its picture, 2.5 for a verdict; slow machines may take longer."""
    data = [sample(n)[i] for n in (1, 2, 3) for i in range(40)]
    start = time.process_time()
    for index in range(len(data)):
        render(random_scene(0, index))
    made = time.process_time()
    for _, picture, text in data:
        judge(picture, text)
    judged = time.process_time()
    assert (made - start) / len(data) < 0.001 and (judged - made) / len(data) < 0.01


def test_another_object_is_seen_in_its_place_and_fits_the_mask():
    right = 0
    for index in range(120):
        before, rng = random_scene(4, index), Random(index)
        after, changed = shapes.with_another_object(before, rng)
        old, new = before.objects[changed], after.objects[changed]
        assert (old.place, old.radius) == (new.place, new.radius)
        assert max(abs(old.x - new.x), abs(old.y - new.y)) < 0.15
        assert old.color != new.color and old.shape != new.shape
        assert (new.color, new.shape) not in shapes.HELD_OUT
        others = [o for i, o in enumerate(after.objects) if i != changed]
        assert [o for i, o in enumerate(before.objects) if i != changed] == others
        box = shapes.box_mask(old) | shapes.box_mask(new)
        pair = np.stack([render(before), render(after)]).astype(int)
        assert not (np.abs(pair[0] - pair[1]).max(axis=-1) > 0)[~box].any()
        right += shows(render(after), after) and not shows(render(before), after)
    assert right >= 0.99 * 120
