"""DPM-Solver++(2M) for the decoder against diffusers' solver made from the same file."""

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from kandinsky import ImageEmbeds
from kandinsky.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverScheduler, from_config
from tests.helpers import randn, relative_l2
from tests.small import EMBEDDING_DIM
from tests.test_images import picture
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


@pytest.mark.parametrize("n", [1, 2, 3, 5, 14, 15, 20, 50, 333])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_whole_loops_equal_diffusers(n, first):
    """From any step on: img2img starts in the middle, at first order."""
    if first >= n:
        pytest.skip("starts behind the last step")
    ours, theirs = solvers()
    theirs.set_timesteps(n)
    theirs.set_begin_index(first)
    mine = yours = randn(2, 4, 6, 5)
    earlier = None
    for (t, t_prev), their_t in list(zip(ours.timesteps(n), theirs.timesteps))[first:]:
        eps = randn(2, 4, 6, 5, seed=t)
        assert not ours.draws_noise(t, t_prev)
        mine, x0 = ours.step(eps, mine, t, t_prev, earlier=earlier)
        yours, earlier = theirs.step(eps, their_t, yours).prev_sample, (t, x0)
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


@pytest.mark.parametrize("task", ["text2img", "img2img", "inpaint", "hint", "hint img2img"])
def test_pipelines_equal_diffusers(pipe, inpainter, hinted, task):
    """Without clipping random weights blow latents up, and rounding with them: few steps, low guidance."""
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
        settings = {"num_inference_steps": 5, "guidance_scale": 1.5}
        out = theirs(
            **embeds._asdict(), generator=stream, output_type="np", **size, **settings, **more
        ).images
        ours = method(
            embeds=embeds,
            seed=seed,
            sampler="dpm++",
            height=HEIGHT,
            width=WIDTH,
            **{**OURS, **settings, **more, **ours_only},
        )
        assert relative_l2(ours, torch.from_numpy(out).permute(0, 3, 1, 2)) <= 1e-4


def test_a_batch_equals_single_runs_and_other_names_are_refused(pipe):
    settings = {"sampler": "dpm++", "num_inference_steps": 4, "prior_num_inference_steps": 2}
    settings |= {"output_type": "latent", "height": 32, "width": 32, "guidance_scale": 1.5}
    batch = pipe.text2img([PROMPT, NEGATIVE], seed=[3, 9], **settings)
    for row, prompt, seed in zip(batch, (PROMPT, NEGATIVE), (3, 9)):
        assert relative_l2(row[None], pipe.text2img(prompt, seed=seed, **settings)) <= 1e-5
    with pytest.raises(ValueError, match="sampler is 'euler'; allowed are 'dpm\\+\\+'"):
        pipe.text2img(PROMPT, sampler="euler")
