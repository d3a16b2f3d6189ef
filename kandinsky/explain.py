"""Follows one run from the prompt to the picture, for `page.py` to tell.

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

from kandinsky import images
from kandinsky.embedding import ImageEmbeds
from kandinsky.inspection import attention_maps, record
from kandinsky.pipeline import Kandinsky
from kandinsky.sampling import Step

MOST_FRAMES = 12
PARTS = ("text_embeds", "timestep", "noisy embedding", "read-out")  # the prior's tokens after the prompt's
BLOCKS = ("*.resnets.?", "*.attentions.?")  # of the U-Net, whose norms are followed


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
    prior_attention: list[tuple[str, float]] = field(default_factory=list)  # token, share of the first step
    frames: list[Frame] = field(default_factory=list)
    decoder_timesteps: list[int] = field(default_factory=list)
    norms: dict[str, list[float]] = field(default_factory=dict)  # block -> root mean square by step
    image_share: list[float] = field(default_factory=list)  # of mid_block's attention, by step
    image_map: list[list[float]] = field(default_factory=list)  # the same in the last step, by position
    parts: list[tuple[str, float, float]] = field(default_factory=list)  # name, seconds, peak MiB so far
    picture: Image.Image | None = None


def trace(
    pipe: Kandinsky,
    prompt: str,
    task: str = "text2img",
    seed: int = 0,
    negative_prompt: str | None = None,
    prior_num_inference_steps: int = 25,
    num_inference_steps: int = 50,
    **call: Any,
) -> Trace:
    """Draws one picture in two calls, `embed` and the task with its embeddings, and keeps what they passed.

    Args:
        task: the method that draws: "text2img", "img2img" or "inpaint".
        call: its further arguments (`image`, `mask_image`, `hint`, `strength`, `height` …).

    Raises:
        ValueError: as the two calls do; a task that is none.
    """
    if task not in ("text2img", "img2img", "inpaint"):
        raise ValueError(f"task is {task!r}; allowed are text2img, img2img, inpaint")
    settings = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
    steps = {"prior_num_inference_steps": prior_num_inference_steps}
    steps["num_inference_steps"] = num_inference_steps
    told = {name: value for name, value in call.items() if isinstance(value, (int, float, str))}
    found = Trace(task, settings | steps | told, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        embeds = _trace_prior(pipe, found)
        _trace_decoder(pipe, found, embeds, call)
    found.warnings = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    return found


def _trace_prior(pipe: Kandinsky, found: Trace) -> ImageEmbeds:
    ids, mask = pipe.tokenizer([found.settings["prompt"]])
    found.tokens = pipe.tokenizer.tokenizer.convert_ids_to_tokens(ids[0, mask[0]].tolist())
    estimates: list[Tensor] = []

    def watch(step: Step) -> None:
        found.prior_timesteps.append(step.t)
        estimates.append(step.x0[0].float().cpu())

    start = time.perf_counter()
    with attention_maps(pipe.prior, "transformer_blocks.*.attn1") as maps:
        embeds = pipe.embed(
            found.settings["prompt"],
            found.settings["negative_prompt"],
            num_inference_steps=found.settings["prior_num_inference_steps"],
            seed=found.settings["seed"],
            on_step=watch,
        )
    _note_part(found, f"text tower and prior, {len(estimates)} steps", start)
    with pipe.using("prior") as prior:
        clean = prior.denormalize(torch.stack(estimates).to(pipe.device)).cpu()
    result = embeds.image_embeds[0].float().cpu()
    found.prior_cosines = F.cosine_similarity(clean, result[None]).tolist()
    found.prior_path = project(clean).tolist()
    # a module's first call is the prefill, its second the first step; the guided half comes second
    first = [calls[1][len(calls[1]) // 2, :, -1].mean(dim=0) for calls in maps.values() if calls]
    if first:
        names, share = [*found.tokens, *PARTS], torch.stack(first).mean(dim=0)
        padding = len(share) - len(names)
        names[len(found.tokens) : len(found.tokens)] = ["(padding)"] * padding
        found.prior_attention = list(zip(names, share.tolist(), strict=True))
    return embeds


def _trace_decoder(pipe: Kandinsky, found: Trace, embeds: ImageEmbeds, call: dict[str, Any]) -> None:
    estimates: list[Tensor] = []
    ends: list[float] = []

    def watch(step: Step) -> None:
        found.decoder_timesteps.append(step.t)
        estimates.append(step.x0[-1:].clone())
        ends.append(time.perf_counter())

    prompt = (found.settings["prompt"],) if pipe.unet_config.text else ()  # 2.1's decoder reads it too
    start = time.perf_counter()
    with (
        record(pipe.unet, list(BLOCKS), keep=_size) as norms,
        attention_maps(pipe.unet, "mid_block*") as maps,
    ):
        found.picture = getattr(pipe, found.task)(
            *prompt,
            embeds=embeds,
            num_inference_steps=found.settings["num_inference_steps"],
            seed=found.settings["seed"],
            on_step=watch,
            **call,
        )[0]
    found.parts.append((f"decoder, {len(ends)} steps", ends[-1] - start, _peak()))
    _note_part(found, "MoVQ", ends[-1])
    found.norms = norms_by_step(norms, len(ends))
    _note_attention(found, next(iter(maps.values())), estimates[0].shape[-2:])
    chosen = torch.linspace(0, len(estimates) - 1, min(MOST_FRAMES, len(estimates))).round().long().tolist()
    for index in chosen:
        pixels = images.to_unit_range(pipe.movq.decode(estimates[index]))
        found.frames.append(Frame(index, found.decoder_timesteps[index], images.to_pil(pixels)[0]))


def _note_attention(found: Trace, calls: list[Tensor], size: torch.Size) -> None:
    """calls: (b, heads, n, m) by step, of whose m the further tokens come first and then the n positions"""
    shares = [call[-1, :, :, : call.shape[3] - call.shape[2]].sum(dim=-1).mean(dim=0) for call in calls]
    found.image_share = [share.mean().item() for share in shares]
    if shares:
        width = max(1, round((len(shares[-1]) * size[1] / size[0]) ** 0.5))
        found.image_map = [row.tolist() for row in shares[-1].split(width)]


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


def _note_part(found: Trace, name: str, start: float) -> None:
    found.parts.append((name, time.perf_counter() - start, _peak()))


def _peak() -> float:
    """MiB of memory that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
