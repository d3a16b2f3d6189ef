"""DPM-Solver++(2M) for the decoder against diffusers' solver made from the same file."""

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from kandinsky import ImageEmbeds
from kandinsky.scheduler_files import from_config
from kandinsky.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler, cosine_betas
from tests.helpers import picture, randn, relative_l2
from tests.small import EMBEDDING_DIM
from tests.test_pipeline import NEGATIVE, PROMPT
from tests.test_schedulers import OFFICIAL
from tests.test_tasks import HEIGHT, OURS, WIDTH, decoder_pipeline, half_mask

FILE = OFFICIAL["2.2 decoder"]


def solvers() -> tuple[DPMSolverScheduler, DPMSolverMultistepScheduler]:
    official = getattr(diffusers, FILE["_class_name"]).from_config(FILE)
    return DPMSolverScheduler.of(from_config(FILE)), DPMSolverMultistepScheduler.from_config(official.config)


def test_timesteps_are_diffusers_for_every_number_of_steps():
    ours, theirs = solvers()
    for n in range(1, 1000):
        theirs.set_timesteps(n)
        assert [t for t, _ in ours.timesteps(n)] == theirs.timesteps.tolist(), n
    theirs.set_timesteps(1000)  # diffusers takes one step twice, and divides by zero there
    assert [t for t, _ in ours.timesteps(1000)] == list(dict.fromkeys(theirs.timesteps.tolist()))


@pytest.mark.parametrize("num_train_steps", [1, 2, 50, 1000])
def test_as_many_steps_as_there_are_stay_finite(num_train_steps):
    solver = DPMSolverScheduler(num_train_steps)
    x, earlier = randn(1, 4, 3, 3), None
    for t, t_prev in solver.timesteps(num_train_steps):
        x, x0 = solver.step(randn(1, 4, 3, 3, seed=t), x, t, t_prev, earlier=earlier)
        earlier = (t, x0)
        assert x.isfinite().all(), t


LOOPS = [(n, first) for n in (1, 2, 3, 5, 14, 15, 20, 50, 333) for first in (0, 1, 4) if first < n]


@pytest.mark.parametrize("n, first", LOOPS)
def test_whole_loops_equal_diffusers(n, first):
    """From any step on: img2img starts in the middle, at first order."""
    ours, theirs = solvers()
    theirs.set_timesteps(n)
    theirs.set_begin_index(first)
    mine = yours = randn(2, 4, 6, 5)
    earlier = None
    for (t, t_prev), their_t in list(zip(ours.timesteps(n), theirs.timesteps))[first:]:
        eps = randn(2, 4, 6, 5, seed=t)
        assert not ours.draws_noise(t, t_prev)
        mine, x0 = ours.step(eps, mine, t, t_prev, earlier=earlier)
        earlier = (t, x0)
        yours = theirs.step(eps, their_t, yours).prev_sample
        assert relative_l2(mine, yours) <= 1e-5
    assert torch.equal(mine, x0)


def test_added_noise_equals_diffusers():
    ours, theirs = solvers()
    theirs.set_timesteps(8)
    x0, noise = randn(1, 4, 6, 5), randn(1, 4, 6, 5, seed=1)
    for t, _ in ours.timesteps(8):
        wanted = theirs.add_noise(x0, noise, torch.tensor([t]))
        assert relative_l2(ours.add_noise(x0, noise, t), wanted) <= 1e-5


def test_a_learned_variance_is_refused_and_other_schedules_are_taken_over():
    with pytest.raises(ValueError, match="dpm\\+\\+ has no use for a learned variance"):
        DPMSolverScheduler.of(DDPMScheduler(variance_type="learned_range"))
    other = DDIMScheduler(num_train_steps=500, beta_start=0.001, beta_end=0.02)
    solver = DPMSolverScheduler.of(other)
    assert torch.equal(solver.alphas_cumprod, other.alphas_cumprod) and not solver.clip_sample
    assert solver.timesteps(2) == [(499, 250), (250, -1)]  # 249.5 goes to the even one
    other.alphas_cumprod = torch.cumprod(1 - cosine_betas(500), dim=0)  # as a subclass may have it
    assert torch.equal(DPMSolverScheduler.of(other).alphas_cumprod, other.alphas_cumprod)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint", "hint", "hint img2img"])
def test_pipelines_equal_diffusers(pipe, inpainter, hinted, task):
    """On latents: without clipping those of random weights leave MoVQ's range, and show only rounding."""
    classes = {
        "text2img": diffusers.KandinskyV22Pipeline,
        "img2img": diffusers.KandinskyV22Img2ImgPipeline,
        "inpaint": diffusers.KandinskyV22InpaintPipeline,
        "hint": diffusers.KandinskyV22ControlnetPipeline,
        "hint img2img": diffusers.KandinskyV22ControlnetImg2ImgPipeline,
    }
    mine = {"inpaint": inpainter, "hint": hinted, "hint img2img": hinted}.get(task, pipe)
    theirs = decoder_pipeline(classes[task], mine.decoder_folder)
    theirs.scheduler = solvers()[1]
    handed = []
    decode = theirs.movq.decode
    theirs.movq.decode = lambda z, **more: (handed.append(z), decode(z, **more))[1]
    more, ours_only = {}, {}
    if task != "text2img" and task != "hint":
        more["image"] = picture(WIDTH, HEIGHT)
    if "img2img" in task:
        more["strength"] = 0.8
    if task == "inpaint":
        more["mask_image"], ours_only["keep_unmasked"] = half_mask(), False
    if "hint" in task:
        hint = randn(1, 3, 2 * HEIGHT, 2 * WIDTH, seed=9).sigmoid()
        more["hint"] = hint
    size = {"height": WIDTH, "width": HEIGHT} if "img2img" in task else {"height": HEIGHT, "width": WIDTH}
    method = mine.inpaint if task == "inpaint" else mine.img2img if "img2img" in task else mine.text2img
    embeds = ImageEmbeds(randn(1, EMBEDDING_DIM), randn(1, EMBEDDING_DIM, seed=1))
    for seed in (0, 7, 123):
        stream = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": 5}
        theirs(**embeds._asdict(), generator=stream, **size, **settings, **more)
        ours = method(
            embeds=embeds,
            seed=seed,
            sampler="dpm++",
            height=HEIGHT,
            width=WIDTH,
            **{**OURS, **settings, **more, **ours_only, "output_type": "latent"},
        )
        assert relative_l2(ours, handed[-1]) <= 1e-5


def test_a_batch_equals_single_runs_and_other_names_are_refused(pipe):
    settings = {"sampler": "dpm++", "num_inference_steps": 4, "prior_num_inference_steps": 2}
    settings |= {"output_type": "latent", "height": 32, "width": 32, "guidance_scale": 1.5}
    batch = pipe.text2img([PROMPT, NEGATIVE], seed=[3, 9], **settings)
    for row, prompt, seed in zip(batch, (PROMPT, NEGATIVE), (3, 9)):
        assert relative_l2(row[None], pipe.text2img(prompt, seed=seed, **settings)) <= 1e-5
    with pytest.raises(ValueError, match="sampler is 'euler'; allowed are 'dpm\\+\\+'"):
        pipe.text2img(PROMPT, sampler="euler")
