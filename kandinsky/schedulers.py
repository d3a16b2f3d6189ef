"""DDPM, DDIM, DPM-Solver++ and UnCLIP: the constants of a diffusion process and one stateless step each.

A scheduler turns a network's prediction at timestep t into the sample at t_prev. It holds no state of the
loop and draws no noise. Tables are float32 by the published expressions and stay on the CPU: a lookup is a
scalar there, so a step never waits for a GPU. A t_prev below zero is the clean sample.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kandinsky import arguments

# of every table, whatever the process has for defaults
TABLE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

Timesteps = list[tuple[int, int]]  # (t, t_prev), most noise first
Earlier = tuple[int, Tensor] | None  # timestep and predicted clean sample of the step before


class Prediction(NamedTuple):
    """What is known at t, from which a decoder's scheduler moves on."""

    x0: Tensor  # the clean sample that eps stands for, kept in range
    eps: Tensor
    variance: Tensor | None
    earlier: Earlier


def linear_betas(num_train_steps: int, beta_start: float, beta_end: float) -> Tensor:
    return torch.linspace(beta_start, beta_end, num_train_steps, **TABLE)


def cosine_betas(num_train_steps: int) -> Tensor:
    """arXiv:2102.09672, eq. 17, each beta at most 0.999."""

    def level(i: int) -> float:
        return math.cos((i / num_train_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - level(i + 1) / level(i), 0.999) for i in range(num_train_steps)], **TABLE)


class Scheduler:
    """What all share: the table of signal levels, and noising. A subclass also defines `timesteps`,
    `draws_noise`, and a `step` as NoiseScheduler's or UnCLIPScheduler's."""

    predicts_variance = False  # whether `step` reads a variance of the network

    def __init__(self, betas: Tensor):
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    @property
    def num_train_steps(self) -> int:
        return len(self.betas)

    def alpha_bar(self, t: int) -> Tensor:
        """The signal's share of the variance at t; 1 for the clean sample."""
        return self.alphas_cumprod[t] if t >= 0 else torch.tensor(1.0, **TABLE)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int) -> Tensor:
        """The sample at t of a clean one (arXiv:2006.11239, eq. 4). x0, noise: (b, …) -> (b, …)"""
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise

    def timesteps(self, num_steps: int) -> Timesteps:
        """The pairs (t, t_prev) of a loop of so many steps, 1 to num_train_steps."""
        raise NotImplementedError

    def draws_noise(self, t: int, t_prev: int) -> bool:
        """Whether `step` needs noise there."""
        raise NotImplementedError

    def _check_num_steps(self, num_steps: int) -> None:
        arguments.whole(num_steps, "the number of inference steps", 1, self.num_train_steps)


class NoiseScheduler(Scheduler):
    """What the decoder's share: a linear schedule, predicted noise, leading timesteps, clipping, `step`."""

    def __init__(
        self,
        num_train_steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        steps_offset: int = 1,
    ):
        super().__init__(linear_betas(num_train_steps, beta_start, beta_end))
        self.beta_start, self.beta_end = beta_start, beta_end
        self.clip_sample, self.clip_sample_range = clip_sample, clip_sample_range
        self.thresholding, self.dynamic_thresholding_ratio = thresholding, dynamic_thresholding_ratio
        self.sample_max_value, self.steps_offset = sample_max_value, steps_offset

    def predict_clean(self, eps: Tensor, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """The clean sample that a predicted noise stands for (arXiv:2006.11239, eq. 15), kept in range."""
        x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        if self.thresholding:
            return dynamic_threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)
        return x0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x0

    def step(
        self,
        eps: Tensor,
        x: Tensor,
        t: int,
        t_prev: int,
        noise: Tensor | None = None,
        variance: Tensor | None = None,
        earlier: Earlier = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            eps, x: (b, c, h, w) predicted noise, and the sample at t.
            noise: like x; needed where `draws_noise`.
            variance: like eps, in [-1, 1], the network's second half; used by DDPM's learned_range.
            earlier: of the step before; used by DPM-Solver++.

        Returns:
            the sample at t_prev, and the clean sample as predicted.
        """
        x0 = self.predict_clean(eps, x, self.alphas_cumprod[t])
        return self._move(Prediction(x0, eps, variance, earlier), x, t, t_prev, noise), x0

    def _move(self, said: Prediction, x: Tensor, t: int, t_prev: int, noise: Tensor | None) -> Tensor:
        """The sample at t_prev; arguments as `step`'s."""
        raise NotImplementedError

    def _leading(self, num_steps: int) -> tuple[int, list[int]]:
        """Stride and evenly spaced timesteps, counted from the clean end and kept inside the table."""
        self._check_num_steps(num_steps)
        stride, last = self.num_train_steps // num_steps, self.num_train_steps - 1
        return stride, [min(stride * i + self.steps_offset, last) for i in reversed(range(num_steps))]


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Scales a sample back until `ratio` of its values lie in [-1, 1] (arXiv:2205.11487 §2.3)"""
    s = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(1, max_value)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


class DDPMScheduler(NoiseScheduler):
    """Ancestral sampling (arXiv:2006.11239) with predicted noise. Defaults: the 2.2 decoder's file.

    variance_type: "fixed_small" adds the posterior's variance; "learned_range" interpolates with the second
    half of the network's channels (arXiv:2102.09672, eq. 15).
    """

    def __init__(self, *, clip_sample: bool = True, variance_type: str = "fixed_small", **settings: Any):
        if variance_type not in ("fixed_small", "learned_range"):
            given = f"variance_type is {variance_type!r}"
            raise ValueError(f"{given}; allowed are 'fixed_small', 'learned_range'")
        super().__init__(clip_sample=clip_sample, **settings)
        self.variance_type = variance_type

    @property
    def predicts_variance(self) -> bool:
        return self.variance_type == "learned_range"

    def timesteps(self, num_steps: int) -> Timesteps:
        """Evenly spaced; where the offset leaves the table (1000 steps), t = 1000 is clamped to 999."""
        _, ts = self._leading(num_steps)
        return list(zip(ts, [*ts[1:], -1]))

    def draws_noise(self, t: int, t_prev: int) -> bool:
        return t > 0  # also in the last step, at a standard deviation of 1e-10

    def _move(self, said: Prediction, x: Tensor, t: int, t_prev: int, noise: Tensor | None) -> Tensor:
        """arXiv:2006.11239, eq. 7"""
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha = alpha_bar / alpha_bar_prev
        mean = posterior_mean(said.x0, x, alpha, 1 - alpha, alpha_bar, alpha_bar_prev)
        if not self.draws_noise(t, t_prev):
            return mean
        smallest = ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)).clamp(min=1e-20)
        if self.predicts_variance:
            largest = (1 - alpha).clamp(min=1e-20)  # zero where t = t_prev, the first of 1000 steps
            share = (said.variance + 1) / 2
            return mean + (0.5 * (share * largest.log() + (1 - share) * smallest.log())).exp() * noise
        return mean + smallest**0.5 * noise


class DDIMScheduler(NoiseScheduler):
    """Deterministic DDIM (arXiv:2010.02502, eq. 12 with sigma = 0). Defaults: the 2.1 decoder's file."""

    def __init__(self, *, set_alpha_to_one: bool = False, **settings: Any):
        super().__init__(**settings)
        self.set_alpha_to_one = set_alpha_to_one

    def alpha_bar(self, t: int) -> Tensor:
        # the official file ends at the first training step instead of the clean sample
        return super().alpha_bar(t if self.set_alpha_to_one else max(t, 0))

    def timesteps(self, num_steps: int) -> Timesteps:
        """Evenly spaced, each t_prev one stride below; 999 where an offset leads beyond the table."""
        stride, ts = self._leading(num_steps)
        previous = [stride * (i - 1) + self.steps_offset for i in reversed(range(num_steps))]
        return [(t, min(t_prev, self.num_train_steps - 1)) for t, t_prev in zip(ts, previous)]

    def draws_noise(self, t: int, t_prev: int) -> bool:
        return False

    def _move(self, said: Prediction, x: Tensor, t: int, t_prev: int, noise: Tensor | None) -> Tensor:
        alpha_bar_prev = self.alpha_bar(t_prev)
        return alpha_bar_prev**0.5 * said.x0 + (1 - alpha_bar_prev) ** 0.5 * said.eps


class DPMSolverScheduler(NoiseScheduler):
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): 15 to 20 steps where DDPM takes 50.

    Second order from the clean samples of two steps; first order where there is no earlier one, and in the
    last step. Clean samples are not clipped, as the solver's second order rests on where they truly are.
    """

    @classmethod
    def of(cls, scheduler: NoiseScheduler) -> "DPMSolverScheduler":
        """With another's noise schedule. Raises a ValueError for one that uses a learned variance."""
        if scheduler.predicts_variance:
            raise ValueError(
                "dpm++ has no use for a learned variance; this scheduler's variance is learned_range"
            )
        solver = cls(scheduler.num_train_steps)
        solver.betas, solver.alphas_cumprod = scheduler.betas, scheduler.alphas_cumprod
        return solver

    def timesteps(self, num_steps: int) -> Timesteps:
        """Evenly spaced from the noisiest, 999, towards the clean sample; of 1000 only 999 differ."""
        self._check_num_steps(num_steps)
        stride = (self.num_train_steps - 1) / num_steps
        ts = list(dict.fromkeys(round(stride * i) for i in range(num_steps, 0, -1)))
        return list(zip(ts, [*ts[1:], -1]))

    def draws_noise(self, t: int, t_prev: int) -> bool:
        return False

    def _move(self, said: Prediction, x: Tensor, t: int, t_prev: int, noise: Tensor | None) -> Tensor:
        if t_prev < 0:
            return said.x0
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        h = self._log_ratio(t_prev) - self._log_ratio(t)
        slope = said.x0
        if said.earlier is not None:
            t_earlier, x0_earlier = said.earlier
            r = (self._log_ratio(t) - self._log_ratio(t_earlier)) / h
            slope = said.x0 + (said.x0 - x0_earlier) / (2 * r)
        of_x = ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
        return of_x * x - alpha_bar_prev**0.5 * torch.expm1(-h) * slope

    def _log_ratio(self, t: int) -> Tensor:
        """Half the logarithm of signal to noise, the solver's time."""
        alpha_bar = self.alpha_bar(t)
        return (alpha_bar / (1 - alpha_bar)).log() / 2


class UnCLIPScheduler(Scheduler):
    """The prior's process (arXiv:2204.06125): cosine schedule, the network predicts the clean sample."""

    def __init__(
        self, num_train_steps: int = 1000, clip_sample: bool = True, clip_sample_range: float = 10.0
    ):
        super().__init__(cosine_betas(num_train_steps))
        self.clip_sample, self.clip_sample_range = clip_sample, clip_sample_range

    def timesteps(self, num_steps: int) -> Timesteps:
        """Evenly spaced from 999 to 0, both included; a single step goes from 999 to the clean sample."""
        self._check_num_steps(num_steps)
        last = self.num_train_steps - 1
        stride = last / max(num_steps - 1, 1)
        ts = [round(stride * i) for i in reversed(range(num_steps))] if num_steps > 1 else [last]
        return list(zip(ts, [*ts[1:], -1]))

    def draws_noise(self, t: int, t_prev: int) -> bool:
        return t_prev >= 0

    def step(
        self, x0: Tensor, x: Tensor, t: int, t_prev: int, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step (arXiv:2006.11239, eq. 7).

        Args:
            x0, x: (b, d) predicted clean sample, and the sample at t.
            noise: like x; needed where `draws_noise`.

        Returns:
            the sample at t_prev, and the clean sample as predicted, clipped.
        """
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        beta = self.betas[t] if t_prev == t - 1 else 1 - alpha_bar / alpha_bar_prev
        if self.clip_sample:
            x0 = x0.clamp(-self.clip_sample_range, self.clip_sample_range)
        mean = posterior_mean(x0, x, 1 - beta, beta, alpha_bar, alpha_bar_prev)
        if not self.draws_noise(t, t_prev):
            return mean, x0
        variance = ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=1e-20)
        return mean + (0.5 * variance.log()).exp() * noise, x0


def posterior_mean(
    x0: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor
) -> Tensor:
    """The mean of the sample at t_prev given the clean one (arXiv:2006.11239, eq. 7)."""
    of_x0 = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
    of_x = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return of_x0 * x0 + of_x * x
