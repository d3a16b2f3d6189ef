"""Samples that the prior's own steps lead to, in training."""

import pytest
import torch

from kandinsky import Prior, prior_training
from kandinsky.encoders import CLIPTextEncoder
from kandinsky.own_steps import earlier_than, noised, own_noise
from kandinsky.prior_training import PriorObjective
from kandinsky.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky.training import Draws, Settings, Trainer
from tests.helpers import randn, relative_l2
from tests.small import EMBEDDING_DIM, ours, reference_prior, reference_text_encoder
from tests.test_scripts import run
from tests.test_training import small_cache


@pytest.mark.parametrize("scheduler", [UnCLIPScheduler(), DDPMScheduler(), DDPMScheduler(clip_sample=False)])
def test_the_sample_is_what_the_samplers_step_makes(scheduler):
    x0, guess, x, noise = (randn(3, 4, 2, 2, seed=i) for i in range(4))
    earlier, t = torch.tensor([999, 500, 40]), torch.tensor([500, 480, 0])
    made = noised(scheduler, x0, own_noise(scheduler, x0, guess, x, earlier, t, noise), t)
    for i, (before, after) in enumerate(zip(earlier.tolist(), t.tolist())):
        told = guess[i]
        if isinstance(scheduler, DDPMScheduler):  # is told the noise instead
            alpha_bar = scheduler.alphas_cumprod[before]
            told = (x[i] - alpha_bar.sqrt() * told) / (1 - alpha_bar).sqrt()
        stepped, _ = scheduler.step(told, x[i], before, after, noise[i])
        assert relative_l2(made[i], stepped) <= 1e-5


def test_a_sample_that_no_step_leads_to_keeps_its_noise():
    x0, noise, t = randn(2, 8), randn(2, 8, seed=1), torch.tensor([999, 300])
    x = noised(UnCLIPScheduler(), x0, noise, t)
    same = own_noise(UnCLIPScheduler(), x0, randn(2, 8, seed=2), x, t, t, randn(2, 8, seed=3))
    torch.testing.assert_close(same, noise, rtol=1e-4, atol=1e-5)


def test_an_earlier_timestep_is_a_stride_before_or_more():
    t, u = torch.arange(1000).repeat(50), torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    earlier = earlier_than(t, UnCLIPScheduler(), u)
    assert earlier.max() == 999 and (earlier >= (t + 40).clamp(max=999)).all() and earlier[:40].max() > 900


def objective_of(share: float) -> PriorObjective:
    cache = small_cache()
    networks = ours(Prior, reference_prior()), UnCLIPScheduler(), cache, cache
    return PriorObjective(*networks, num_noises=2, own_steps=share)


@pytest.fixture
def noises(monkeypatch) -> list[dict]:
    """What `own_noise` is given, and what the loss then gets as noise."""
    seen, real = [], prior_training.own_noise

    def spy(scheduler, x0, guess, x, earlier, t, noise):
        made = real(scheduler, x0, guess, x, earlier, t, noise)
        seen.append({"x0": x0, "guess": guess, "x": x, "earlier": earlier, "t": t, "made": made})
        return made

    monkeypatch.setattr(prior_training, "own_noise", spy)
    return seen


def test_the_guess_is_the_priors_own_guided_away_from_the_empty_prompt(noises):
    objective = objective_of(1.0)
    objective.loss(objective.batch([0]), Draws("2", slice(None), 1))
    (given,), batch, empty = noises, objective.batch([0]), objective.cache.empty_text
    known = [batch[f"text_{name}"] for name in ("embeds", "states", "mask")]
    assert given["x0"].shape == (2, EMBEDDING_DIM) and not torch.equal(given["earlier"], given["t"])
    for i in range(2):
        args = given["x"][i : i + 1], given["earlier"][i : i + 1]
        cond = objective.prior(*args, *known)
        uncond = objective.prior(*args, *(empty[name] for name in ("embeds", "states", "mask")))
        scale = ((given["guess"][i] - uncond) / (cond - uncond)).median()
        assert (
            1 <= scale <= 5
            and relative_l2(uncond + scale * (cond - uncond), given["guess"][i : i + 1]) < 1e-3
        )


def test_own_steps_go_with_a_text_tower_in_training(noises):
    objective = objective_of(1.0)
    objective.text_encoder = tower = ours(CLIPTextEncoder, reference_text_encoder(0))
    objective.loss(objective.batch([0, 1, 2]), Draws("2", slice(None), 3))[0].backward()
    assert len(noises) == 3 and tower.text_projection.weight.grad.abs().sum() > 0


def test_the_share_of_rows_is_as_asked_and_the_others_are_left_as_they_are(monkeypatch):
    taken, real = [], prior_training.prior_loss

    def loss(prior, scheduler, x0, noise, *others):
        taken.append(noise)
        return real(prior, scheduler, x0, noise, *others)

    monkeypatch.setattr(prior_training, "prior_loss", loss)
    with torch.no_grad():
        for share in (0.0, 0.5, 1.0):
            objective = objective_of(share)
            objective.loss(objective.batch(list(range(12)) * 4), Draws("0", slice(None), 48))
    none, half, all_ = (torch.cat(taken[4 * i : 4 * i + 4]) for i in range(3))
    changed = [(other != none).any(dim=1).float().mean().item() for other in (half, all_)]
    assert 0.25 < changed[0] < 0.75 and changed[1] > 0.9  # at the last timestep there is no earlier one


def test_two_processes_take_the_steps_of_one():
    objective, n = objective_of(0.5), 2
    t = torch.randint(1000, (8, n), generator=torch.Generator().manual_seed(0))
    whole = objective._draw_steps(t, Draws("3", slice(None), 8))
    halves = [objective._draw_steps(t[rows], Draws("3", rows, 8)) for rows in (slice(0, 4), slice(4, 8))]
    assert all(torch.equal(whole[name], torch.cat([half[name] for half in halves])) for name in whole)


def test_weights_get_gradients_after_a_step_of_their_own_under_autocast(tmp_path):
    objective = objective_of(1.0)
    trainer = Trainer(objective, Settings(batch_size=2, bf16=True), tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.weights.items()}
    trainer.train_step([objective.batch([0, 1])])
    assert not [name for name, p in trainer.weights.items() if torch.equal(p, before[name])]


def test_a_share_that_is_none_is_refused_in_one_line(capsys, tmp_path):
    given = ["--clip", tmp_path, "--out", tmp_path / "out"]
    assert run("train_prior", *given, "--own-steps", "1.5") == 2
    assert capsys.readouterr().err.strip().endswith("value is 1.5; allowed is 0 to 1; see --help")
