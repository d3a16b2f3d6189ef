"""CLIP's preprocessing against transformers' PIL processor; the way out to PIL and files."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from kandinsky import cli, images
from kandinsky.checkpoint import atomic_file
from tests.helpers import picture


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("width, height", [(224, 224), (640, 480), (97, 301), (225, 224), (50, 33), (1, 7)])
def test_clip_pixels_equal_transformers_pil_processor(width, height, mode):
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    image = picture(width, height, mode)
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    assert (images.clip_pixels(image) - theirs).abs().max() <= 1e-6


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_clip_pixels_have_the_towers_size_whatever_the_pictures(width, height, size):
    pixels = images.clip_pixels(Image.new("RGB", (width, height), (255, 0, 0)), size)
    assert pixels.shape == (3, size, size) and pixels.std(dim=(1, 2), correction=0).max() < 1e-5


def test_levels_survive_the_way_out():
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    out = images.to_pil(images.to_unit_range(levels / 127.5 - 1))
    assert np.array_equal(np.array(out[0])[..., 0].ravel(), np.arange(256))
    beyond = images.to_pil(
        images.to_unit_range(torch.tensor([-5.0, 5.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))
    )
    assert np.array(beyond[0]).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_the_middle_is_kept():
    x = torch.arange(7 * 6).reshape(7, 6)
    assert torch.equal(images.crop_to(x, 4, 3), x[1:5, 1:4])


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_the_suffix_names_the_format(tmp_path, suffix):
    path = tmp_path / f"new folder/pïcture{suffix}"
    images.save_image(picture(8, 5), path)
    with Image.open(path) as read:
        assert read.size == (8, 5) and read.format == images.SUFFIXES[suffix.lower()]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_existing_file_is_kept_unless_overwriting(tmp_path):
    path = tmp_path / "out.png"
    images.save_image(picture(8, 5), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name or allow overwriting"):
        images.save_image(picture(8, 5, seed=1), path)
    assert path.read_bytes() == before
    images.save_image(picture(8, 5, seed=1), path, overwrite=True)
    assert path.read_bytes() != before


def test_a_file_that_appears_while_a_picture_is_written_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    save = Image.Image.save

    def save_slowly(self, file, **settings):
        save(self, file, **settings)
        path.write_bytes(b"another process's")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_slowly)
        with pytest.raises(FileExistsError):
            images.save_image(picture(8, 5), path)
        assert path.read_bytes() == b"another process's" and [*tmp_path.iterdir()] == [path]
        path.unlink()
        assert (
            cli.write_free(path, False, partial(images.save_image, picture(8, 5))) == tmp_path / "out-1.png"
        )
    assert path.read_bytes() == b"another process's" and Image.open(tmp_path / "out-1.png").size == (8, 5)


def test_a_link_to_nowhere_is_a_name_that_is_taken(tmp_path):
    path = tmp_path / "out.png"
    path.symlink_to(tmp_path / "nowhere")
    assert cli.free_name(path) == tmp_path / "out-1.png"
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        images.save_image(picture(8, 5), path)
    assert path.is_symlink() and [*tmp_path.iterdir()] == [path]


def test_without_links_a_name_is_taken_as_well(tmp_path, monkeypatch):
    def no_links(*names):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    images.save_image(picture(8, 5), tmp_path / "out.png")
    with pytest.raises(FileExistsError):
        images.save_image(picture(8, 5), tmp_path / "out.png")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "late.png", overwrite=False) as temporary:
        temporary.write_text("ours")
        (tmp_path / "late.png").write_text("another process's")
    assert (tmp_path / "late.png").read_text() == "another process's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.png", "out.png"]


def test_a_long_name_is_written_or_refused_before_the_work(tmp_path):
    longest = tmp_path / f"{'ü' * 118}.png"  # 240 bytes
    images.check_writable(longest)
    images.save_image(picture(8, 5), longest)
    assert cli.free_name(longest).name.endswith("-1.png")
    for long in ("ü" * 119, "a" * 237, "a" * 300):  # the last is longer than systems allow, too
        with pytest.raises(OSError, match="its name is longer than 240 bytes"):
            images.check_writable(tmp_path / f"{long}.png")
    images.check_writable(tmp_path / "folders" / "to come" / "out.png")
    if Path("/proc/self").exists():
        with pytest.raises(OSError, match="/proc is not a folder that can be written to"):
            images.check_writable(Path("/proc/out.png"))
    assert [*tmp_path.iterdir()] == [longest]


def test_the_longest_side_that_a_format_has_is_written_in_it():
    assert images.fitting_name(Path("a.webp"), (2, 16383)) == Path("a.webp")
    with pytest.warns(UserWarning, match="up to 16383 pixels a side, this picture 16384×2; it is written as"):
        assert images.fitting_name(Path("a.webp"), (16384, 2)) == Path("a.png")


@pytest.mark.parametrize("name", ["out", "out.bmp", "out.png.gz"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="use .png, .jpg, .jpeg, .webp"):
        images.save_image(picture(2, 2), tmp_path / name)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        images.save_image(picture(2, 2, "RGBA"), tmp_path / "out.jpg")  # JPEG has no alpha
    assert not list(tmp_path.iterdir())
