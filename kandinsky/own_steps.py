"""A share of the prior's training samples is what its own steps make, as it is when drawing.

In training the sample at t is x0 with Gaussian noise. When drawing it is what earlier steps made of the
network's guesses, which guidance exaggerates; a network that saw only the former goes astray there
(arXiv:2301.11706 calls it exposure bias). So some rows are noised to an earlier t, and a guided step of the
sampler brings them to their own. They still show x0, and the loss asks for it as everywhere.

    x0 ─ noise ─→ x at an earlier t ─ the prior, guided → a guess of x0 ─ step → x at t ─→ the loss

The same was tried for the decoder's U-Net, 1,100 steps of it: 80 of 100 pictures were right, without it 88.
"""

from torch import Tensor

from kandinsky.schedulers import Scheduler, posterior_mean

NUM_STEPS = 25  # of the loop that own steps are like
MOST_GUIDANCE = 5.0  # of own steps; the least is 1


def noised(scheduler: Scheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Each row at its own timestep (arXiv:2006.11239, eq. 4). x0, noise: (b, …), t: (b,) -> (b, …)"""
    alpha_bar = at(scheduler.alphas_cumprod, t, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """A table's values at (b,) timesteps, shaped to go with (b, …)"""
    return table.to(like.device, like.dtype)[t].reshape(-1, *[1] * (like.ndim - 1))


def earlier_than(t: Tensor, scheduler: Scheduler, u: Tensor) -> Tensor:
    """From where a step may have led to t: one stride of the loop before it, or further, up to the schedule's
    end. u: like t, in [0, 1)"""
    last, stride = scheduler.num_train_steps - 1, scheduler.num_train_steps // NUM_STEPS
    further = u.square() * (last - stride - t).clamp(min=0)
    return (t + stride + further.long()).clamp(max=last)


def own_noise(
    scheduler: Scheduler, x0: Tensor, guess: Tensor, x: Tensor, earlier: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """The noise on x0 at t after a step of the sampler, from which `noised` gives the sample that it made.

    Args:
        guess: of x0, guided; clipped here as in a step.
        x, noise: like x0, the sample at `earlier`, and what the step draws.
        earlier, t: (b,) timesteps, the first not below the second.

    Returns:
        like x0
    """
    if scheduler.clip_sample:
        guess = guess.clamp(-scheduler.clip_sample_range, scheduler.clip_sample_range)
    before, after = (at(scheduler.alphas_cumprod, steps, x0) for steps in (earlier, t))
    beta = 1 - before / after
    mean = posterior_mean(guess, x, 1 - beta, beta, before, after)
    x = mean + ((1 - after) / (1 - before) * beta).sqrt() * noise
    return (x - after.sqrt() * x0) / (1 - after).sqrt()
