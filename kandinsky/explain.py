"""Follows one run from the prompt to the picture, for `page.py` to tell. Two public calls draw it.

prompt ─ tokens ─ prior: clean estimates, read-out's attention ─ decoder: clean estimates, norms, attention
"""

import resource
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kandinsky import arguments, images
from kandinsky.embedding import ImageEmbeds
from kandinsky.encoders import PADDING
from kandinsky.inspection import attention_maps, record
from kandinsky.movq import TO_ENCODE
from kandinsky.pipeline import Kandinsky
from kandinsky.sampling import Step
from kandinsky.unet import NUM_IMAGE_TOKENS_BESIDE_TEXT

MOST_FRAMES = 12
PARTS = ("text_embeds", "timestep", "noisy embedding", "read-out")  # the prior's tokens after the prompt's
BLOCKS = ("*.resnets.?", "*.attentions.?")  # of the U-Net, whose norms are followed

Rows = list[list[float]]  # a value for each position of the picture


@dataclass
class Frame:
    """A decoder step: the timestep it started from, and the picture that its clean estimate stands for."""

    index: int
    t: int
    picture: Image.Image


@dataclass
class Trace:
    """What a run did. Lists by step are as long as the loop."""

    task: str
    settings: dict[str, Any]
    tokens: list[str]
    warnings: list[str] = field(default_factory=list)
    prior_timesteps: list[int] = field(default_factory=list)
    prior_cosines: list[float] = field(default_factory=list)  # of each clean estimate to the result
    prior_path: list[list[float]] = field(default_factory=list)  # each projected to two dimensions
    prior_attention: list[tuple[str, list[float]]] = field(default_factory=list)  # token, share by step
    text_cosine: float = 0.0  # of the text embedding to the image embedding that came out
    frames: list[Frame] = field(default_factory=list)
    decoder_timesteps: list[int] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=dict)  # block -> root mean square by step
    image_share: list[float] = field(default_factory=list)  # of mid_block's attention, by step
    image_maps: list[Rows] = field(default_factory=list)  # the same by position, one for each frame
    word_maps: list[tuple[str, Rows]] = field(default_factory=list)  # 2.1: token, its share in the last step
    parts: list[tuple[str, float, float]] = field(default_factory=list)  # name, seconds, peak MiB so far
    picture: Image.Image | None = None
    reads_words: bool = False  # whether the decoder does: 2.1's


@torch.no_grad()
def trace(
    pipe: Kandinsky,
    prompt: str,
    task: str = "text2img",
    seed: int | None = None,
    negative_prompt: str | None = None,
    prior_num_inference_steps: int = 25,
    prior_guidance_scale: float = 4.0,
    num_inference_steps: int = 50,
    **call: Any,
) -> Trace:
    """Draws one picture in two calls, `embed` and the task with its embeddings, and keeps what they passed.

    Args:
        task: the method that draws: "text2img", "img2img" or "inpaint".
        seed: of both calls; None draws one.
        call: its further arguments (`image`, `mask_image`, `hint`, `strength`, `guidance_scale`, `height` …).

    Raises:
        ValueError: what the two calls raise; no such task; an argument that asks for more than one picture,
            or for other than whole steps.
    """
    for name in ("num_images_per_prompt", "output_type", "embeds", "on_step", "progress", "cache_every"):
        if name in call:
            raise ValueError(f"a trace follows one picture, in whole steps; it takes no {name}")
    settings = {
        "prompt": arguments.text(prompt, "prompt"),
        "negative_prompt": negative_prompt,
        "seed": seed,
        "prior_num_inference_steps": prior_num_inference_steps,
        "prior_guidance_scale": prior_guidance_scale,
        "num_inference_steps": num_inference_steps,
    }
    pipe.check(task, **settings, **call)
    settings |= {name: value for name, value in call.items() if isinstance(value, (int, float, str, tuple))}
    found = Trace(task, settings, [], reads_words=pipe.unet_config.text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        embeds = _trace_prior(pipe, found)
        _trace_decoder(pipe, found, embeds, call)
    found.warnings = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    return found


def _trace_prior(pipe: Kandinsky, found: Trace) -> ImageEmbeds:
    ids, mask = pipe.tokenizer([found.settings["prompt"]])
    found.tokens = pipe.tokenizer.tokens(ids[0, mask[0]].tolist())
    estimates: list[Tensor] = []

    def watch(step: Step) -> None:
        found.prior_timesteps.append(step.t)
        estimates.append(step.x0[:1])

    # the prompt's row comes behind the one it is led away from
    is_guided = found.settings["prior_guidance_scale"] > 1

    def read_out(weights: Tensor) -> Tensor:
        row = min(int(is_guided), len(weights) - 1)  # the prefill has one of equal texts; it is dropped below
        return weights[row, :, -1].mean(dim=0).cpu()

    start = time.perf_counter()
    with (
        pipe.using("prior") as prior,
        record(prior, "embedding_proj", inputs=True) as read,
        attention_maps(prior, "transformer_blocks.*.attn1", read_out) as maps,
    ):
        embeds = pipe.embed(
            found.settings["prompt"],
            found.settings["negative_prompt"],
            num_inference_steps=found.settings["prior_num_inference_steps"],
            guidance_scale=found.settings["prior_guidance_scale"],
            seed=found.settings["seed"],
            on_step=watch,
        )
    found.settings["seed"] = pipe.seeds[0]
    _note_part(pipe, found, f"text tower and prior, {len(estimates)} steps", start)
    clean = prior.denormalize(torch.cat(estimates).float()).cpu()
    result = embeds.image_embeds[:1].float().cpu()
    found.prior_cosines = F.cosine_similarity(clean, result).tolist()
    found.prior_path = project(clean).tolist()
    text_embeds = read["embedding_proj"][0].float().cpu()[-1 if is_guided else 0]
    found.text_cosine = F.cosine_similarity(text_embeds, result[0], dim=0).item()
    by_step = [torch.stack(calls[1:]) for calls in maps.values()]  # the first call was the prefill
    names, shares = [*found.tokens, *PARTS], torch.stack(by_step).mean(dim=0)  # (steps, tokens)
    padding = shares.shape[1] - len(names)
    names[len(found.tokens) : len(found.tokens)] = ["(padding)"] * padding
    found.prior_attention = list(zip(names, shares.T.tolist(), strict=True))
    return embeds


def _trace_decoder(pipe: Kandinsky, found: Trace, embeds: ImageEmbeds, call: dict[str, Any]) -> None:
    estimates: list[Tensor] = []
    if found.reads_words:
        call = {name: found.settings[name] for name in ("prompt", "negative_prompt")} | call
    start = end = time.perf_counter()

    def watch(step: Step) -> None:
        nonlocal end
        end = time.perf_counter()
        found.decoder_timesteps.append(step.t)
        estimates.append(step.x0.clone())

    with (
        pipe.using("unet") as unet,
        record(unet, list(BLOCKS), keep=_size) as norms,
        attention_maps(unet, "mid_block*", _shares_of_further_tokens) as maps,
    ):
        found.picture = getattr(pipe, found.task)(
            embeds=embeds,
            num_inference_steps=found.settings["num_inference_steps"],
            seed=found.settings["seed"],
            on_step=watch,
            **call,
        )[0]
    found.parts.append((f"decoder, {len(estimates)} steps", end - start, _peak(pipe)))
    _note_part(pipe, found, "MoVQ", end)
    found.norms = norms_by_step(norms, len(estimates))
    shares = next(iter(maps.values()))
    found.image_share = [share.sum(dim=1).mean().item() for share in shares]
    chosen = torch.linspace(0, len(estimates) - 1, min(MOST_FRAMES, len(estimates))).round().long().tolist()
    for index in chosen:
        found.image_maps.append(_rows(shares[index].sum(dim=1), estimates[index]))
    if found.reads_words and estimates:
        words = _decoder_tokens(pipe, call["prompt"])
        maps_of_words = shares[-1][:, NUM_IMAGE_TOKENS_BESIDE_TEXT:].T
        found.word_maps = [(word, _rows(share, estimates[-1])) for word, share in zip(words, maps_of_words)]
    if chosen:
        found.frames = _frames(pipe, found, {index: estimates[index] for index in chosen})


def _frames(pipe: Kandinsky, found: Trace, clean: dict[int, Tensor]) -> list[Frame]:
    """What the clean latents of some steps look like."""
    x = torch.cat([z[:1] for z in clean.values()])
    decoded = pipe.in_movq(lambda movq, x: movq.decode(x), x, 1, "a frame", without=TO_ENCODE)
    pixels = images.to_unit_range(decoded)
    pictures = images.to_pil(images.crop_to(pixels, *reversed(found.picture.size)))
    return [Frame(index, found.decoder_timesteps[index], p) for index, p in zip(clean, pictures)]


def _shares_of_further_tokens(weights: Tensor) -> Tensor:
    """(b, heads, n, m), the m beginning with tokens that are no positions -> (n, those), of the guided row"""
    further = weights.shape[3] - weights.shape[2]
    return weights[-1, :, :, :further].mean(dim=0).cpu()


def _rows(values: Tensor, latents: Tensor) -> Rows:
    """(n,) positions of a smaller map -> its rows, by the latents' aspect"""
    height, width = latents.shape[-2:]
    columns = max(1, round((len(values) * width / height) ** 0.5))
    return [row.tolist() for row in values.split(columns)]


def _decoder_tokens(pipe: Kandinsky, prompt: str) -> list[str]:
    """2.1: what the U-Net's own tokenizer makes of a prompt, without the padding."""
    ids = pipe.decoder_tokenizer([prompt])[0]
    return pipe.decoder_tokenizer.tokenizer.convert_ids_to_tokens(ids[ids != PADDING].tolist())


def norms_by_step(norms: dict[str, list[float]], num_steps: int) -> dict[str, list[float]]:
    """Of blocks that were called once a step; what ran otherwise (the hint's network) is left out."""
    return {name: values for name, values in norms.items() if len(values) == num_steps}


def project(points: Tensor) -> Tensor:
    """(n, d) -> (n, 2), along the two directions in which the points differ most, else zeros"""
    centred = points - points.mean(dim=0)
    if len(points) < 2:
        return torch.zeros(len(points), 2)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return F.pad(centred @ directions[:2].T, (0, 2 - len(directions[:2])))


def _size(x: Tensor) -> float:
    """Root mean square."""
    return x.float().square().mean().sqrt().item()


def _note_part(pipe: Kandinsky, found: Trace, name: str, start: float) -> None:
    found.parts.append((name, time.perf_counter() - start, _peak(pipe)))


def _peak(pipe: Kandinsky) -> float:
    """MiB of memory held at most: of the GPU, where one draws, else of this process."""
    if torch.device(pipe.device).type == "cuda":
        return torch.cuda.max_memory_allocated(pipe.device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
