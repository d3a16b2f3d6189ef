"""Pictures, masks and hints in every form that users bring, the files they lie in, and what is refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting import (
    prepare_mask,
    prepare_mask_and_masked_image,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kandinsky import images, masks
from tests.helpers import picture

LEVELS = np.random.default_rng(3).integers(0, 256, (20, 31, 3), dtype=np.uint8)
WANTED = torch.from_numpy(LEVELS).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray(LEVELS),
        Image.fromarray(LEVELS).convert("RGBA"),
        LEVELS,
        LEVELS / 255,
        (LEVELS / 255).astype(np.float32),
        torch.from_numpy(LEVELS).permute(2, 0, 1),
        torch.from_numpy(LEVELS).permute(2, 0, 1) / 255,
        torch.from_numpy(LEVELS).permute(2, 0, 1).double() / 255,
    ],
    ids=["PIL", "RGBA", "uint8", "float64", "float32", "levels tensor", "tensor", "double tensor"],
)
def test_the_same_picture_is_the_same_tensor_in_every_form(form):
    before = form.copy() if isinstance(form, (np.ndarray, Image.Image)) else form.clone()
    x = images.picture(form)
    assert torch.equal(x, WANTED) and x.is_contiguous()
    x.zero_()  # in memory of its own
    assert before == form if isinstance(form, Image.Image) else (before == form).all()


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_does_not_take_and_tensors_with_a_gradient_are_read():
    frozen, backwards = LEVELS.copy(), LEVELS[::-1, :, ::-1]  # the colours too, as OpenCV has them
    frozen.setflags(write=False)
    assert torch.equal(images.picture(frozen), WANTED)
    assert torch.equal(images.picture(backwards), WANTED.flip(0, 1))
    assert torch.equal(masks.mask((LEVELS[..., 2] / 255)[::-1]), masks.mask(WANTED[2].flip(0)))
    assert not images.picture(WANTED.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGB"])
def test_modes_without_alpha_are_pillows_rgb(mode):
    image = Image.fromarray(LEVELS).convert(mode)
    assert torch.equal(images.picture(image), images.picture(image.convert("RGB")))


def test_alpha_lies_over_white():
    for mode, pixel, wanted in (
        ("RGBA", (10, 20, 30, 0), 1.0),
        ("LA", (0, 0), 1.0),
        ("La", (0, 0), 1.0),
        ("RGBa", (0, 0, 0, 0), 1.0),
        ("PA", (0, 0), 1.0),
        ("LA", (51, 255), 0.2),
        ("RGBA", (51, 51, 51, 255), 0.2),
    ):
        x = images.picture(Image.new(mode, (3, 2), pixel))
        torch.testing.assert_close(x, torch.full((3, 2, 3), wanted), msg=mode)
    half = images.picture(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert half.max() == 127 / 255
    palette = Image.new("P", (2, 1), 5)
    palette.info["transparency"] = 5
    assert images.picture(palette).min() == 1


def test_sixteen_bits_are_kept():
    levels = np.array([[0, 1, 300], [32768, 65534, 65535]], dtype=np.uint16)
    wanted = torch.from_numpy(levels.astype(np.float32) / 65535).expand(3, -1, -1)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert image.mode.startswith("I") and torch.equal(images.picture(image), wanted)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format="PNG")
    assert torch.equal(images.picture(Image.open(file)), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_pictures_and_files(tmp_path, orientation):
    image = Image.fromarray(LEVELS)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    turned = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]  # Pillow's Transpose that EXIF asks for
    wanted = image if turned is None else image.transpose(Image.Transpose(turned))
    opened = images.open_image(tmp_path / "turned.png")
    assert torch.equal(images.picture(opened), images.picture(wanted))
    with Image.open(tmp_path / "turned.png") as lazy:
        assert torch.equal(images.picture(lazy), images.picture(wanted))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_three_formats_are_opened_whatever_the_file_is_called(tmp_path, suffix):
    images.save_image(picture(9, 5), tmp_path / f"a{suffix}")
    (tmp_path / f"a{suffix}").rename(tmp_path / "a.data")
    assert images.open_image(tmp_path / "a.data").size == (9, 5)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims to be that large."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, format="PNG")
    data = file.getvalue()
    chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def test_files_that_are_no_such_picture_are_refused_in_one_line(tmp_path):
    picture(9, 5).save(tmp_path / "a.bmp")
    (tmp_path / "bomb.png").write_bytes(png_header(8001, 8000))
    (tmp_path / "big.png").write_bytes(png_header(10_000, 10_000))
    (tmp_path / "huge.png").write_bytes(png_header(100_000, 100_000))
    (tmp_path / "text.png").write_text("no picture")
    whole = io.BytesIO()
    picture(90, 50).save(whole, format="PNG")
    for length in (60, 3000, len(whole.getvalue()) - 30):
        (tmp_path / f"cut{length}.png").write_bytes(whole.getvalue()[:length])
    damaged = bytearray(whole.getvalue())
    damaged[60:64] = b"\0\1\2\3"
    (tmp_path / "damaged.png").write_bytes(damaged)
    messages = {
        "a.bmp": "is not a PNG, JPEG or WEBP picture",
        "text.png": "is not a PNG, JPEG or WEBP picture",
        "bomb.png": "is 8001×8000 pixels; at most 64 megapixels are read",
        "big.png": "is 10000×10000 pixels; at most 64 megapixels",
        "huge.png": "is larger than 64 megapixels",
        "gone.png": "no such file",
        ".": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                images.open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    for path in [*tmp_path.glob("cut*"), tmp_path / "damaged.png"]:
        with pytest.raises(ValueError, match="is a broken picture|is not a PNG"):
            images.open_image(path)


BAD_PICTURES = [
    ("cat.png", TypeError, "image is a str; needed is a PIL picture, .*; open files with images.open_image"),
    (None, TypeError, "image is a NoneType; needed is a PIL picture"),
    (LEVELS[..., :2], ValueError, r"image has the shape \(20, 31, 2\); needed is"),
    (LEVELS[..., 0], ValueError, r"image has the shape \(20, 31\)"),
    (torch.zeros(1, 4, 5), ValueError, r"image has the shape \(1, 4, 5\)"),
    (torch.zeros(3, 0, 5), ValueError, r"image has the shape \(3, 0, 5\); at least one pixel"),
    (np.zeros((0, 4, 3)), ValueError, "at least one pixel is needed"),
    (
        torch.full((3, 2, 2), -0.5),
        ValueError,
        r"from -0.5 to -0.5; needed is \[0, 1\]; \(x \+ 1\) / 2 brings",
    ),
    (torch.full((3, 2, 2), 2.0), ValueError, r"image has values from 2 to 2; needed is \[0, 1\]$"),
    (torch.full((3, 2, 2), -2.0), ValueError, r"image has values from -2 to -2; needed is \[0, 1\]$"),
    (torch.full((3, 2, 2), float("nan")), ValueError, "image has values from nan to nan"),
    (torch.zeros(3, 2, 2, dtype=torch.int64), TypeError, "image holds torch.int64; needed are uint8 levels"),
    (Image.new("F", (2, 2)), ValueError, "image has the mode F, whose colours are unknown here"),
    (Image.new("I", (2, 2), 70000), ValueError, "image has 32-bit levels up to 70000; at most 65535"),
    (Image.new("I", (2, 2), -1), ValueError, "image has 32-bit levels"),
    (Image.new("RGB", (0, 2)), ValueError, "image is 0×2 pixels; at least 1×1 is needed"),
    (Image.new("1", (8001, 8000)), ValueError, "image is 8001×8000 pixels; at most 64 megapixels"),
]


@pytest.mark.parametrize("value, error, message", BAD_PICTURES)
def test_bad_pictures_are_refused_in_one_line(value, error, message):
    with pytest.raises(error, match=message) as caught:
        images.picture(value)
    assert "\n" not in str(caught.value)


def test_lists_and_batches_are_taken_apart():
    batch = torch.stack([WANTED, 1 - WANTED])
    for value in ([WANTED, 1 - WANTED], (Image.fromarray(LEVELS), 255 - LEVELS), batch):
        assert torch.allclose(torch.stack(images.pictures(value)), batch, atol=1e-7)
    assert len(images.pictures(LEVELS[None])) == len(images.pictures(LEVELS)) == 1
    with pytest.raises(ValueError, match="image is an empty list; at least one picture is needed"):
        images.pictures([])


def test_hints_have_one_channel_or_three():
    gray = LEVELS[..., 0]
    wanted = torch.from_numpy(gray).float().div(255).expand(3, -1, -1)
    tensor = torch.from_numpy(gray) / 255
    for value in (gray, gray[..., None], tensor, tensor[None], tensor[None, None], Image.fromarray(gray)):
        (hint,) = images.hints(value)
        assert torch.equal(hint, wanted)
    assert torch.equal(images.hints(WANTED)[0], WANTED)
    with pytest.raises(ValueError, match=r"hint has values from -1 to -1; needed is \[0, 1\]"):
        images.hints(torch.full((1, 3, 4, 4), -1.0))


@pytest.mark.parametrize("size", [(31, 20), (62, 40), (15, 10), (100, 7), (7, 90), (1, 1)])
def test_resizing_equals_diffusers_image_processor(size):
    width, height = size
    processor = VaeImageProcessor(vae_scale_factor=1, resample="bicubic", reducing_gap=1)
    theirs = processor.preprocess(Image.fromarray(LEVELS), height, width)[0] / 2 + 0.5
    ours = images.resize(WANTED, height, width)
    assert ours.shape == (3, height, width) and (ours - theirs).abs().max() <= 1e-6
    plain = Image.fromarray(LEVELS).resize(size, Image.Resampling.BICUBIC)
    if size == (15, 10):  # the quick reduction changes the result
        assert (images.picture(plain) - ours).abs().max() > 0.01


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_padding_is_undone_by_cropping(height, width, more_rows, more_columns):
    x = torch.arange(3 * height * width).reshape(3, height, width).float()
    padded = images.pad_to(x, height + more_rows, width + more_columns)
    assert torch.equal(images.crop_to(padded, height, width), x)
    assert torch.equal(padded[:, 0, 0], x[:, 0, 0]) and torch.equal(padded[:, -1, -1], x[:, -1, -1])


MASK = (np.random.default_rng(5).random((20, 31)) > 0.6).astype(np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray(MASK * 255),
        Image.fromarray(MASK * 255).convert("1"),
        Image.fromarray(MASK * 255).convert("RGB"),
        MASK.astype(np.float32),
        MASK.astype(bool),
        MASK,
        MASK * 255,
        MASK[..., None] * 1.0,
        torch.from_numpy(MASK) == 1,
        torch.from_numpy(MASK).double(),
        torch.from_numpy(MASK).float()[None],
        torch.from_numpy(MASK).long(),
        MASK.astype(np.uint16),
    ],
)
def test_the_same_mask_is_the_same_tensor_in_every_form(form):
    x = masks.mask(form)
    assert torch.equal(x, torch.from_numpy(MASK).float())
    x.fill_(0.25)
    assert torch.equal(masks.mask(form), torch.from_numpy(MASK).float())


def test_a_mask_of_one_row_is_not_turned():
    row = np.array([[[0], [1], [1]]], dtype=np.uint8)  # numpy: (h, w, 1)
    assert masks.mask(row).shape == (1, 3) and masks.mask(torch.from_numpy(row)).shape == (3, 1)


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("mask.png", TypeError, "mask_image is a str; needed is .*; open files with images.open_image"),
        (np.zeros((2, 3, 4)), ValueError, r"mask_image has the shape \(2, 3, 4\)"),
        (np.full((2, 2), -0.1), ValueError, "mask_image has values from -0.1 to -0.1"),
        (torch.full((2, 2), 1.5), ValueError, r"mask_image has values from 1.5 to 1.5; needed is \[0, 1\]"),
        (np.full((2, 2), 255), TypeError, "mask_image holds torch.int64"),
        (torch.zeros(0, 3), ValueError, "at least one pixel is needed"),
    ],
)
def test_bad_masks_are_refused_in_one_line(value, error, message):
    with pytest.raises(error, match=message) as caught:
        masks.mask(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(31, 20), (64, 48), (16, 16), (90, 11)])
def test_masks_are_resized_as_diffusers_does(size):
    soft = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 31), dtype=np.uint8))
    keep, _ = prepare_mask_and_masked_image(Image.new("RGB", (31, 20)), soft, size[1], size[0])
    assert torch.equal(masks.resize(masks.mask(soft), size[1], size[0]), 1 - keep[0, 0])


def test_masks_are_repainted_from_the_middle_level_on():
    for level, repainted in ((0.5, 1), (0.49, 0)):
        assert (masks.resize(torch.full((2, 2), level), 2, 2) == repainted).all()
    for level, repainted in ((127.6, 1), (127.4, 0)):  # rounded to eight bits
        assert (masks.resize(torch.full((4, 4), level / 255), 2, 2) == repainted).all()


def test_a_mask_in_colours_is_its_luminance():
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90)):
        image = Image.new("RGB", (1, 1), colour)
        assert masks.mask(image).item() == pytest.approx(image.convert("L").getpixel((0, 0)) / 255, abs=2e-3)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(0.02, 0.5))
@settings(max_examples=60, deadline=None)
def test_the_kept_latents_equal_diffusers_loops(height, width, seed, share):
    repaint = torch.rand(2, 1, 4 * height, 4 * width, generator=torch.Generator().manual_seed(seed)) < share
    keep = 1 - repaint.float()
    theirs = prepare_mask(torch.nn.functional.interpolate(keep, (height, width), mode="nearest").clone())
    assert torch.equal(masks.keep_latents(repaint.float(), 4), theirs)


def test_growing_and_feathering():
    x = torch.zeros(1, 11, 11)
    x[:, 4:7, 4:7] = 1
    grown = masks.grow(x, 2)
    assert grown.sum() == 49 and grown[0, 2:9, 2:9].all() and torch.equal(masks.grow(x, 0), x)
    soft = masks.feather(grown, 3)
    assert (soft[grown == 0] == 0).all() and (soft[grown == 1] > 0).all()
    assert soft[0, 5].tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]
    assert torch.equal(masks.feather(torch.ones(1, 5, 5), 4), torch.ones(1, 5, 5))  # the border is no edge


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 9),
    st.sampled_from([0.02, 0.3, 0.9]),
    st.integers(0, 999),
)
def test_growing_and_feathering_are_what_pooling_says(height, width, pixels, share, seed):
    x = (torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed)) < share).float()

    def pooled(x, pixels):
        return torch.nn.functional.max_pool2d(x, 2 * pixels + 1, stride=1, padding=pixels)

    assert torch.equal(masks.grow(x, pixels), pooled(x, pixels))
    eroded = [1 - pooled(1 - x, n) for n in range(pixels + 1)]
    assert torch.equal(masks.feather(x, pixels), sum(eroded) / (pixels + 1))


def test_pasting_keeps_and_takes_to_the_last_bit():
    pixels, original = torch.rand(2, 1, 3, 50, 50, generator=torch.Generator().manual_seed(0)) ** 3
    share = (torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    out = masks.paste(pixels, original, share)
    assert torch.equal(out, torch.where(share == 1, pixels, original))


def test_the_canvas_grows_by_the_edge_and_the_mask_says_where():
    image, mask = images.expand_canvas(Image.fromarray(LEVELS), left=3, bottom=5)
    assert image.size == mask.size == (34, 25)
    x, where = images.picture(image), masks.mask(mask)
    assert torch.equal(x[:, :20, 3:], WANTED) and not where[:20, 3:].any()
    assert where[:, :3].all() and where[20:].all() and torch.equal(x[:, 7, 0], WANTED[:, 7, 0])
    same, empty = images.expand_canvas(WANTED)
    assert torch.equal(images.picture(same), WANTED) and not masks.mask(empty).any()
    with pytest.raises(ValueError, match="left is -1; allowed is 0 and more"):
        images.expand_canvas(LEVELS, left=-1)
    with pytest.raises(ValueError, match="the canvas would be 31×4000020; at most 64 megapixels"):
        images.expand_canvas(LEVELS, top=4_000_000)


def test_animations_and_grids(tmp_path):
    frames = [Image.new("RGB", (6, 4), (40 * i, 0, 0)) for i in range(5)]
    for suffix in (".gif", ".webp"):
        images.save_animation(frames, tmp_path / f"strip{suffix}")
        with Image.open(tmp_path / f"strip{suffix}") as read:
            assert read.n_frames == 8 and read.size == (6, 4)  # there and back, ends once
    images.save_animation(frames, tmp_path / "slow.gif", seconds=0.5)
    with Image.open(tmp_path / "slow.gif") as read:
        assert read.info["duration"] == 500 and read.info["loop"] == 0
    with pytest.raises(FileExistsError):
        images.save_animation(frames, tmp_path / "strip.gif")
    with pytest.raises(ValueError, match="use .gif, .webp"):
        images.save_animation(frames, tmp_path / "strip.png")
    sheet = images.grid(frames, 3)
    assert sheet.size == (18, 8) and sheet.getpixel((7, 5)) == (160, 0, 0)
    assert images.grid(frames[:2], 3).size == (12, 4)
