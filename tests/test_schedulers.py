"""Schedulers against diffusers, bit for bit, in every official configuration."""

import json

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky import schedulers
from kandinsky.checkpoint import CheckpointError
from kandinsky.scheduler_files import from_config, load_scheduler, to_config
from kandinsky.schedulers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from tests.helpers import SHARED, randn

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
DECODER = {**LINEAR, "_class_name": "DDPMScheduler", "steps_offset": 1, "set_alpha_to_one": False}
OFFICIAL = {
    "2.2 decoder": {**DECODER, "clip_sample": True, "prediction_type": "epsilon", "thresholding": False},
    "2.2 inpaint": {**DECODER, "clip_sample": False, "prediction_type": "epsilon", "thresholding": False},
    "2.1": {**DECODER, "_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": False},
    "2.1 ddpm": {
        **LINEAR,
        "_class_name": "DDPMScheduler",
        "clip_sample": False,
        "clip_sample_range": 2.0,
        "thresholding": True,
        "sample_max_value": 2.0,
        "dynamic_thresholding_ratio": 0.995,
        "variance_type": "learned_range",
        "trained_betas": None,
    },
    "prior": {
        "_class_name": "UnCLIPScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "sample",
        "variance_type": "fixed_small_log",
        "clip_sample": True,
        "clip_sample_range": 10.0,
    },
}
VARIANTS = {
    "ddim to one": {
        **OFFICIAL["2.1"],
        "set_alpha_to_one": True,
        "clip_sample": True,
        "clip_sample_range": 0.7,
    },
    "ddim thresholded": {**OFFICIAL["2.1"], "thresholding": True, "sample_max_value": 1.5, "steps_offset": 0},
    "ddpm bare": {"_class_name": "DDPMScheduler"},
    "ddim bare": {"_class_name": "DDIMScheduler"},
    "narrow range": {**OFFICIAL["2.2 decoder"], "clip_sample_range": 0.5},
    "wide range": {**OFFICIAL["2.1"], "clip_sample": True, "clip_sample_range": 2.0},
    "unclip unclipped": {**OFFICIAL["prior"], "clip_sample": False},
    "unclip default range": {k: v for k, v in OFFICIAL["prior"].items() if k != "clip_sample_range"},
}
ALL = {**OFFICIAL, **VARIANTS}


def reference(config: dict):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def shape_of(ours) -> tuple[int, ...]:
    return (2, 32) if isinstance(ours, UnCLIPScheduler) else (2, 4, 6, 5)


@pytest.mark.parametrize("name", ALL)
def test_timesteps_are_diffusers(name):
    ours, theirs = from_config(ALL[name]), reference(ALL[name])
    # the others' timesteps are those of one of these
    for n in range(1, 1001) if name in {*OFFICIAL, "ddim thresholded"} else (1, 2, 3, 50, 333, 999, 1000):
        if isinstance(ours, UnCLIPScheduler) and n == 1:
            assert ours.timesteps(1) == [(999, -1)]  # diffusers divides by zero
            continue
        theirs.set_timesteps(n)
        # diffusers leaves its table at 1000 steps
        wanted = np.minimum(theirs.timesteps.numpy(), 999).tolist()
        assert [t for t, _ in ours.timesteps(n)] == wanted


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 25, 50, 100, 333, 500, 501, 999, 1000])
@pytest.mark.parametrize("name", ALL)
def test_steps_are_diffusers_bit_for_bit_from_the_same_noise(name, n):
    ours, theirs = from_config(ALL[name]), reference(ALL[name])
    timesteps = ours.timesteps(n)
    unclip, ddim = isinstance(ours, UnCLIPScheduler), isinstance(ours, DDIMScheduler)
    if unclip and n == 1:
        out, x = randn(*shape_of(ours)), randn(*shape_of(ours), seed=1)
        x_prev, x0 = ours.step(out, x, *timesteps[0])
        assert x0.abs().max() <= ours.clip_sample_range or not ours.clip_sample
        torch.testing.assert_close(x_prev, x0, atol=1e-6, rtol=1e-6)
        return
    theirs.set_timesteps(n)
    chosen = range(n) if n <= 50 else sorted({0, 1, 2, n // 3, n // 2, n - 2, n - 1})
    for index in chosen:
        (t, t_prev), their_t = timesteps[index], int(theirs.timesteps[index])
        if their_t > 999 or (n == 1000 and not unclip and index <= 1 and t == 999):
            continue  # outside diffusers' table, defined below
        x, out, variance = (randn(*shape_of(ours), seed=3 * index + i) * 1.5 for i in range(3))
        generator = torch.Generator().manual_seed(index)
        if unclip:
            their_prev = None if index == n - 1 else theirs.timesteps[index + 1]
            wanted = theirs.step(
                out, theirs.timesteps[index], x, prev_timestep=their_prev, generator=generator
            )
        elif ddim:
            wanted = theirs.step(out, their_t, x)
        else:
            full = torch.cat([out, variance.clamp(-1, 1)], 1) if ours.predicts_variance else out
            wanted = theirs.step(full, theirs.timesteps[index], x, generator=generator)
        draws = ours.draws_noise(t, t_prev)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index)) if draws else None
        moved = not torch.equal(generator.get_state(), torch.Generator().manual_seed(index).get_state())
        assert draws == moved
        extra = () if unclip else (variance.clamp(-1, 1),)
        x_prev, x0 = ours.step(out, x, t, t_prev, noise, *extra)
        assert torch.equal(x_prev, wanted.prev_sample) and torch.equal(x0, wanted.pred_original_sample)


def test_a_thousand_steps_start_twice_from_the_last_timestep():
    assert DDPMScheduler().timesteps(1000)[:3] == [(999, 999), (999, 998), (998, 997)]
    assert DDIMScheduler().timesteps(1000)[:3] == [(999, 999), (999, 998), (998, 997)]
    x = randn(1, 4, 3, 3)
    stays, _ = DDPMScheduler().step(x * 0.5, x, 999, 999, randn(1, 4, 3, 3, seed=1))
    torch.testing.assert_close(stays, x, atol=1e-6, rtol=1e-6)  # no way to go: nothing moves


@pytest.mark.parametrize("name", ["2.2 decoder", "2.1", "prior"])
def test_add_noise_is_diffusers(name):
    ours, theirs = from_config(ALL[name]), reference(ALL[name])
    x0, noise = randn(2, 4, 3, 5), randn(2, 4, 3, 5, seed=1)
    for t in (0, 1, 20, 437, 999):
        assert torch.equal(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, torch.tensor([t, t])))


@pytest.mark.parametrize("name", ALL)
def test_what_we_write_means_the_same_to_diffusers(name):
    ours = from_config(ALL[name])
    written = json.loads(json.dumps(to_config(ours)))
    again, wanted = dict(reference(written).config), dict(reference(ALL[name]).config)
    assert {k: v for k, v in again.items() if k[0] != "_"} == {k: wanted[k] for k in again if k[0] != "_"}
    assert vars(from_config(written)).keys() == vars(ours).keys()


def test_official_files_load_and_our_defaults_are_theirs():
    folder = SHARED / "checkpoints" / "official_small_files"
    if not folder.exists():
        pytest.skip("needs the project's documents")
    files = sorted(folder.glob("*/*scheduler/scheduler_config.json"))
    assert len(files) == 8
    loaded = {str(f.parent.relative_to(folder)): to_config(load_scheduler(f.parent)) for f in files}
    assert loaded["kandinsky-2-2-decoder/scheduler"] == to_config(DDPMScheduler())
    assert loaded["kandinsky-2-2-decoder-inpaint/scheduler"] == to_config(DDPMScheduler(clip_sample=False))
    assert loaded["kandinsky-2-1/scheduler"] == to_config(DDIMScheduler())
    assert loaded["kandinsky-2-2-prior/scheduler"] == to_config(UnCLIPScheduler())
    assert loaded["kandinsky-2-1/ddpm_scheduler"] == to_config(from_config(OFFICIAL["2.1 ddpm"]))


@pytest.mark.parametrize(
    "base, changes, message",
    [
        (
            "2.2 decoder",
            {"_class_name": "PNDMScheduler"},
            "_class_name is 'PNDMScheduler'; allowed are DDPMSch",
        ),
        ("2.2 decoder", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; only linear is supported"),
        (
            "2.2 decoder",
            {"prediction_type": "sample"},
            "prediction_type is 'sample'; only epsilon is supported",
        ),
        ("2.2 decoder", {"timestep_spacing": "trailing"}, "timestep_spacing is 'trailing'"),
        (
            "2.2 decoder",
            {"variance_type": "fixed_large"},
            "variance_type is 'fixed_large'; allowed are 'fixed_small'",
        ),
        (
            "2.2 decoder",
            {"trained_betas": [0.1]},
            r"trained_betas is \[0.1\]; only null or false is supported",
        ),
        ("2.2 decoder", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("2.2 decoder", {"_class_name": []}, r"_class_name is \[\]; allowed are DDPM"),
        ("2.2 decoder", {"num_train_timesteps": -1}, "num_train_timesteps is -1; allowed is 1 to"),
        ("2.2 decoder", {"beta_start": float("nan")}, "beta_start is nan; allowed is"),
        ("2.2 decoder", {"beta_end": 1.5}, "beta_end is 1.5; allowed is"),
        ("2.2 decoder", {"prediction_type": False}, "prediction_type is False; only epsilon is supported"),
        ("2.1 ddpm", {"sample_max_value": 0.5}, "sample_max_value is 0.5; allowed is"),
        ("2.2 decoder", {"steps_offset": -5}, "steps_offset is -5; allowed is 0"),
        ("2.1 ddpm", {"dynamic_thresholding_ratio": 3.0}, "dynamic_thresholding_ratio is 3.0; allowed is"),
        ("2.2 decoder", {"steps_offset": "1"}, "steps_offset is '1'; a int is needed"),
        ("2.2 decoder", {"clip_sample": None}, "clip_sample is None; a bool is needed"),
        ("2.1", {"something_new": 2}, "something_new is 2; only null or false is supported"),
        ("prior", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'; only sample is supported"),
        ("prior", {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
    ],
)
def test_what_is_not_modelled_is_refused_by_field_and_value(base, changes, message):
    with pytest.raises(CheckpointError, match=message):
        from_config({**ALL[base], **changes})


def test_an_unclip_file_without_prediction_type_means_epsilon_and_is_refused():
    with pytest.raises(CheckpointError, match="lacks prediction_type, which then means 'epsilon'"):
        from_config({"_class_name": "UnCLIPScheduler"})


@given(num_steps=st.integers(1, 1000), offset=st.integers(0, 999))
def test_no_offset_leads_out_of_the_table(num_steps, offset):
    for kind in (DDPMScheduler, DDIMScheduler):
        scheduler = kind(steps_offset=offset)
        steps = scheduler.timesteps(num_steps)
        assert len(steps) == num_steps and all(
            0 <= t <= 999 and -1000 <= t_prev <= 999 for t, t_prev in steps
        )
        _ = [scheduler.alpha_bar(t_prev) for _, t_prev in steps[:3]]


def test_switching_to_ddim_the_way_diffusers_does_loads(tmp_path):
    ddpm = diffusers.DDPMScheduler.from_config(ALL["2.2 decoder"])
    diffusers.DDIMScheduler.from_config(ddpm.config).save_pretrained(tmp_path)
    assert isinstance(load_scheduler(tmp_path), DDIMScheduler)


def test_learned_variance_is_finite_in_the_first_of_a_thousand_steps():
    x, variance = randn(1, 4, 3, 3), torch.full((1, 4, 3, 3), -1.01)
    ours = DDPMScheduler(variance_type="learned_range").step(x, x, 999, 999, x, variance)
    assert all(out.isfinite().all() for out in ours)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file: .*scheduler_config.json"):
        load_scheduler(tmp_path)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler(), UnCLIPScheduler()])
def test_numbers_of_steps_outside_the_range_are_refused(scheduler):
    for n in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"steps is {n}; allowed is 1 to 1000"):
            scheduler.timesteps(n)
    for n in (2.0, "5", True, None):
        with pytest.raises(TypeError, match="an int is needed"):
            scheduler.timesteps(n)


@given(n=st.integers(1, 999), kind=st.sampled_from([DDPMScheduler, DDIMScheduler, UnCLIPScheduler]))
@settings(max_examples=60, deadline=None)
def test_timesteps_fall_and_each_leads_to_the_next(n, kind):
    steps = kind().timesteps(n)
    assert len(steps) == n and all(999 >= t > t_prev for t, t_prev in steps)
    assert all(a[1] == b[0] for a, b in zip(steps, steps[1:]))
    assert steps[-1][1] < 0 or (kind is DDIMScheduler and steps[-1][1] == 0)


@given(n=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_true_noise_in_clean_sample_out(n, seed):
    scheduler = DDIMScheduler(set_alpha_to_one=True)
    clean, noise = randn(1, 4, 3, 3, seed=seed), randn(1, 4, 3, 3, seed=seed + 1)
    timesteps = scheduler.timesteps(n)
    x = scheduler.add_noise(clean, noise, timesteps[0][0])
    for t, t_prev in timesteps:
        x, x0 = scheduler.step(noise, x, t, t_prev)
        torch.testing.assert_close(x0, clean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(x, clean, atol=1e-3, rtol=1e-3)


@given(n=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_prior_that_knows_the_clean_sample_arrives_there(n, seed):
    scheduler, clean, x = UnCLIPScheduler(), randn(2, 16, seed=seed), randn(2, 16, seed=seed + 1)
    for i, (t, t_prev) in enumerate(scheduler.timesteps(n)):
        noise = randn(2, 16, seed=seed + 2 + i) if scheduler.draws_noise(t, t_prev) else None
        x, _ = scheduler.step(clean, x, t, t_prev, noise)
    # the last beta is 4e-5, known to 1e-7 as the float32 difference from one
    torch.testing.assert_close(x, clean, atol=1e-4, rtol=3e-3)


@given(t=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_noising_keeps_unit_variance(t):
    for scheduler in (DDPMScheduler(), UnCLIPScheduler()):
        x = scheduler.add_noise(randn(40_000), randn(40_000, seed=1), t)
        assert abs(x.var().item() - 1) < 0.05


def test_tables_are_float32_on_the_cpu():
    for scheduler in (DDPMScheduler(), schedulers.DDIMScheduler(), UnCLIPScheduler()):
        assert (
            scheduler.alphas_cumprod.dtype == torch.float32 and scheduler.alphas_cumprod.device.type == "cpu"
        )
