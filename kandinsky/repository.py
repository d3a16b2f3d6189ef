"""Writes whole repositories in the published layout around networks that were trained here."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from kandinsky.checkpoint import CheckpointError, atomic_file, read_json, write_json, write_safetensors
from kandinsky.images import CLIP_MEAN, CLIP_STD
from kandinsky.zero_image import zero_image_embeds

DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
}
UNCLIP = {
    "_class_name": "UnCLIPScheduler",
    "clip_sample": True,
    "clip_sample_range": 10.0,
    "num_train_timesteps": 1000,
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
}
PRIOR_INDEX = {
    "_class_name": "KandinskyV22PriorPipeline",
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
    "prior": ["diffusers", "PriorTransformer"],
    "scheduler": ["diffusers", "UnCLIPScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
DECODER_INDEX = {
    "_class_name": "KandinskyV22Pipeline",
    "movq": ["diffusers", "VQModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
CLIP_PARTS = ("image_encoder", "image_processor", "text_encoder", "tokenizer")


def preprocessor(image_size: int) -> dict[str, Any]:
    """`preprocessor_config.json`: what `images.clip_pixels` does."""
    return {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,  # bicubic
        "size": image_size,
    }


def write_image_constants(folder: Path, image_encoder: nn.Module) -> None:
    """The image tower's preprocessing, and its embedding of the zero image."""
    settings = preprocessor(image_encoder.config.image_size)
    write_json(settings, folder / "image_processor" / "preprocessor_config.json")
    embeds = zero_image_embeds(image_encoder).cpu()
    write_safetensors({"zero_image_embeds": embeds}, folder / "zero_image_embeds.safetensors")


def write_prior_repository(folder: Path, clip: Path, trained: tuple[str, ...] = ()) -> None:
    """All of a prior's folder but the prior itself; the CLIP pair's parts are copied. A teacher's pupil, the
    image tower, may be trained later; the next call copies it. trained: parts that are not written over."""
    if Path(folder).resolve() != Path(clip).resolve():
        waits = {"image_encoder"} if (Path(clip) / "teacher").is_dir() else set()
        for part in CLIP_PARTS:
            if part in waits and not (Path(clip) / part).is_dir():
                continue
            if part in trained and (Path(folder) / part).is_dir():
                continue
            copy_folder(Path(clip) / part, Path(folder) / part)
        copy_file(
            Path(clip) / "zero_image_embeds.safetensors", Path(folder) / "zero_image_embeds.safetensors"
        )
    write_json(UNCLIP, Path(folder) / "scheduler" / "scheduler_config.json")
    index, known = PRIOR_INDEX, Path(clip) / "model_index.json"
    if known.exists():  # another prior's: 2.1's calls itself otherwise
        index = index | {"_class_name": read_json(known)["_class_name"]}
    write_json(index, Path(folder) / "model_index.json")


def decoder_scheduler(known: Path | None, inpaint: bool) -> dict[str, Any]:
    """The scheduler's file of a decoder: of the one that it is made from (known), or as published. Inpainting
    neither clips, as published, nor thresholds."""
    has_one = known is not None and (known / "scheduler").is_dir()
    settings = read_json(known / "scheduler" / "scheduler_config.json") if has_one else DDPM
    return {**settings, "clip_sample": False, "thresholding": False} if inpaint else settings


def write_decoder_repository(
    folder: Path, movq: Path, scheduler: dict[str, Any] = DDPM, inpaint: bool = False, hint: bool = False
) -> None:
    """All of a decoder's folder but the U-Net; the MoVQ is copied. scheduler: see `decoder_scheduler`"""
    if movq.resolve() != (folder / "movq").resolve():
        copy_folder(movq, folder / "movq")
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    kind = "Inpaint" if inpaint else "Controlnet" if hint else ""
    names = {
        "_class_name": f"KandinskyV22{kind}Pipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_json(DECODER_INDEX | names, folder / "model_index.json")


def write_decoder_repository_2_1(folder: Path, movq: Path, known: Path) -> None:
    """All of a 2.1 decoder's folder but the U-Net: the MoVQ, and the rest from the decoder it starts from."""
    if movq.resolve() != (folder / "movq").resolve():
        copy_folder(movq, folder / "movq")
    parts = ("text_encoder", "tokenizer", "scheduler", "ddpm_scheduler")
    for part in parts:
        if part != "ddpm_scheduler" or (known / part).is_dir():  # the inpainting repository has none
            copy_folder(known / part, folder / part)
    copy_file(known / "model_index.json", folder / "model_index.json")


def copy_folder(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"no such folder: {source}")
    for file in sorted(p for p in source.iterdir() if p.is_file()):
        copy_file(file, target / file.name)


def copy_file(source: Path, target: Path) -> None:
    if not source.exists():
        raise CheckpointError(f"no such file: {source}")
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)
