"""sr3.py against equations (4) to (6) and (10), computed here in float64, with networks U that know the answer."""

import math
from itertools import pairwise

import pytest
import torch

from sr3 import SR3, Regression
from unet import UNet

T = 2000


def gammas64(num_timesteps=T, beta_start=1e-6, beta_end=1e-2):
    """γ_0 … γ_T by the definition, one factor at a time, in Python's float64."""
    gammas = [1.0]
    for t in range(num_timesteps):
        beta = beta_start + (beta_end - beta_start) * t / max(1, num_timesteps - 1)
        gammas.append(gammas[-1] * (1 - beta))
    return gammas


class TrueV:
    """A U that knows y_0, and so the noise ε = (ỹ - √γ y_0) / √(1 - γ): returns √γ ε - √(1 - γ) y_0, in float64."""

    def __init__(self, y_0):
        self.y_0 = y_0

    def __call__(self, x, y_t, gamma):
        assert gamma.shape == (len(y_t),)
        level = gamma.double()[:, None, None, None]
        noise = (y_t.double() - level.sqrt() * self.y_0) / (1 - level).sqrt()
        return level.sqrt() * noise - (1 - level).sqrt() * self.y_0


class Recorder:
    """A U that remembers what it was given and answers such that f_θ is zero."""

    def __call__(self, x, y_t, gamma):
        self.given = x, y_t, gamma
        level = gamma[:, None, None, None]
        return -((1 - level) / level).sqrt() * y_t


def generators(number, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


@pytest.mark.parametrize("gamma", [5e-5, 1e-2, 0.5, 0.99, 1 - 1e-6])
def test_the_loss_is_equation_6_and_divided_by_gamma_the_error_of_v(monkeypatch, gamma):
    """With f_θ = √(1 - γ) ỹ + √γ U in float64; the code's is float32, also where U ran in bfloat16."""
    torch.manual_seed(0)
    y_0, noise, u = torch.rand(64, 1, 16, 16) * 2 - 1, torch.randn(64, 1, 16, 16), torch.randn(64, 1, 16, 16).bfloat16()
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    losses = []
    for weight in ("1", "1/gamma"):
        model = SR3(lambda x, y_t, gamma: u, loss_weight=weight)
        model.gammas = torch.tensor([gamma, gamma])  # of a process that has only this level
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(y_0, y_0).item())
    level, y_0, noise, u = model.gammas[0].double(), y_0.double(), noise.double(), u.double()
    y_noisy = level.sqrt() * y_0 + (1 - level).sqrt() * noise  # equation (5)
    equation_6 = ((1 - level).sqrt() * y_noisy + level.sqrt() * u - noise).square().mean().item()
    error_of_v = (u - (level.sqrt() * noise - (1 - level).sqrt() * y_0)).square().mean().item()
    assert losses == pytest.approx([equation_6, error_of_v], rel=1e-4)


def test_gamma_follows_the_piecewise_uniform_mixture_of_section_2_4():
    torch.manual_seed(0)
    recorder, schedule, y_0 = Recorder(), (10, 0.05, 0.7), torch.zeros(200_000, 1, 1, 1)
    SR3(recorder, *schedule)(y_0, y_0 - 1)
    assert torch.equal(recorder.given[0], y_0 - 1)  # x as it is
    gamma = recorder.given[2].double()
    levels = torch.tensor(gammas64(*schedule), dtype=torch.float64)
    piece = torch.bucketize(-gamma, -levels).clamp(1, 10)  # t with γ_t <= γ <= γ_{t-1}
    share = torch.bincount(piece, minlength=11)[1:] / len(gamma)
    assert (share - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / len(gamma))
    within = (gamma - levels[piece]) / (levels[piece - 1] - levels[piece])  # uniform in [0, 1] in every piece
    for t in range(1, 11):
        u = within[piece == t].sort().values
        distance = (u - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max()  # Kolmogorov-Smirnov
        assert distance < 2 / math.sqrt(len(u))


def levels64(steps, gammas):
    """γ at t_i = T (i / steps)^1.5, rounded down, but at least i, from T to 0."""
    T = len(gammas) - 1
    return [gammas[max(i, math.floor(T * math.sqrt(i / steps) ** 3 + 1e-9))] for i in range(steps, -1, -1)]


def test_the_levels_of_any_number_of_steps_differ_and_rise_to_1_ever_closer_in_t():
    for schedule, numbers in (((T, 1e-6, 1e-2), (1, 10, 25, 250, 999, 1999, T)), ((100, 1e-4, 0.1), range(1, 101))):
        model, gammas = SR3(Recorder(), *schedule), gammas64(*schedule)
        for steps in numbers:
            levels = model.levels(steps)
            assert levels == pytest.approx(levels64(steps, gammas), rel=1e-7) and levels[-1] == 1
            assert all(low < high for low, high in pairwise(levels))
    assert SR3(Recorder()).levels(4) == pytest.approx([gammas64()[t] for t in (2000, 1299, 707, 250, 0)])


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_each_step_from_the_true_noise_is_the_posterior_of_equation_4(steps):
    """From any γ to any other: the step's mean and variance, over 100,000 pixels, are equation (4)'s in float64."""
    y_0, context, gammas = 0.3, torch.zeros(10, 1, 100, 100), gammas64()
    levels = levels64(steps, gammas)
    y_t = torch.stack([torch.randn(context.shape[1:], generator=g) for g in generators(10)])  # what refine starts from
    global_state = torch.get_rng_state()
    states = list(SR3(TrueV(y_0)).refine(context, steps, generators(10)))
    assert len(states) == steps and torch.equal(global_state, torch.get_rng_state())  # all noise is the generator's
    for gamma_t, gamma_s, (y_s, y_0_hat) in zip(levels, levels[1:], states):
        # The posterior by Bayes' rule for Gaussians, not by the paper's formula: prior y_s | y_0, then y_t | y_s.
        alpha = gamma_t / gamma_s
        prior_mean, prior_variance = math.sqrt(gamma_s) * y_0, 1 - gamma_s
        gain = prior_variance * math.sqrt(alpha) / (alpha * prior_variance + 1 - alpha)
        mean = prior_mean + gain * (y_t.double() - math.sqrt(alpha) * prior_mean)
        expected = prior_variance * (1 - gain * math.sqrt(alpha))
        residual = y_s.double() - mean
        assert abs(residual.mean()) < 5 * math.sqrt(expected / residual.numel()) + 1e-5
        assert residual.var() == pytest.approx(expected, rel=0.03, abs=1e-8)
        torch.testing.assert_close(y_0_hat, torch.full_like(y_0_hat, y_0), atol=1e-4, rtol=0)
        y_t = y_s
    torch.testing.assert_close(y_t, torch.full_like(y_t, y_0), atol=1e-4, rtol=0)  # where it ends


def test_the_steps_are_those_of_dpm_solver_2m_which_keep_the_variance_of_what_they_draw():
    """Lu et al.'s update in λ = log(√γ / √(1 - γ)), in float64, for pixels of N(0, 0.04) and their best ŷ_0."""
    variance, steps, gammas = 0.04, 100, gammas64()

    def best_estimate(y_t, gamma):
        return gamma**0.5 * variance * y_t / (gamma * variance + 1 - gamma)

    def best_v(x, y_t, gamma):
        return TrueV(best_estimate(y_t.double(), gamma.double()))(x, y_t, gamma)

    found = SR3(best_v).sample(torch.zeros(1, 1, 100, 100), steps, [torch.Generator().manual_seed(3)])
    generator, levels = torch.Generator().manual_seed(3), levels64(steps, gammas)
    y, previous, last_h = torch.randn(found.shape, generator=generator).double(), 0, math.inf
    for gamma_t, gamma_s in pairwise(levels[:-1]):
        h = math.log(gamma_s / (1 - gamma_s)) / 2 - math.log(gamma_t / (1 - gamma_t)) / 2
        y_0_hat, z = best_estimate(y, gamma_t), torch.randn(found.shape, generator=generator).double()
        extrapolated = (1 + h / (2 * last_h)) * y_0_hat - h / (2 * last_h) * previous
        y = math.sqrt((1 - gamma_s) / (1 - gamma_t)) * math.exp(-h) * y
        y += math.sqrt(gamma_s) * (1 - math.exp(-2 * h)) * extrapolated
        y += math.sqrt(1 - gamma_s) * math.sqrt(1 - math.exp(-2 * h)) * z
        previous, last_h = y_0_hat, h
    torch.testing.assert_close(found.double(), best_estimate(y, levels[-2]), atol=1e-4, rtol=0)
    assert found.var().item() == pytest.approx(variance, rel=0.1)  # without the extrapolation it is 13 % less


@pytest.mark.parametrize("size", [24, 30, 32])
def test_an_image_with_a_generator_of_its_own_does_not_depend_on_the_others(size):
    """Also where the number of pixels is no multiple of 16: torch draws the last 16 of a tensor anew there."""
    x = torch.rand(4, 1, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model = SR3(lambda x, y_t, gamma: 0.3 * x + 0.1 * y_t)
    together = model.sample(x, 4, generators(4))
    alone = [model.sample(x[i : i + 1], 4, generators(1, seed=i)) for i in range(4)]
    assert torch.equal(together, torch.cat(alone)) and not torch.equal(together[0], together[1])
    again = model.sample(x.flip(0), 4, generators(4)[::-1])  # nor on their order, nor on their layout in memory
    assert torch.equal(again.flip(0), together)
    layout = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.sample(layout, 4, generators(4)), together)
    torch.manual_seed(0)
    first, second = model.sample(x, 4), model.sample(x, 4)  # without generators the noise is torch's own
    assert not torch.equal(first, second)


def test_a_model_in_half_precision_samples():
    """Noise, ỹ and x are of its type; its levels are as exact as ever."""
    unet = UNet(1, 8, [1, 2], 1, [8], 2, dropout=0, image_size=16)
    x = torch.zeros(2, 1, 16, 16)
    expected = SR3(unet).eval().sample(x, 50, generators(2))
    found = SR3(unet).half().eval().sample(x.half(), 50, generators(2))
    assert found.isfinite().all() and found.shape == expected.shape


def test_schedules_and_arguments_out_of_range_are_refused():
    for schedule in ((2000, 1e-6, 0.5), (10, 1e-9, 1e-9), (100, 1e-6, 1e-2)):  # too little or too much left
        with pytest.raises(ValueError, match=f"beta_end {schedule[2]}.* larger beta_end"):
            SR3(Recorder(), *schedule)
    with pytest.raises(ValueError, match="loss_weight is 'gamma'"):
        SR3(Recorder(), loss_weight="gamma")
    for steps in (0, T + 1):
        with pytest.raises(ValueError, match=f"steps is {steps}"):
            SR3(Recorder()).sample(torch.zeros(1, 1, 4, 4), steps)


def test_regression_learns_y_0_from_x_by_squared_error_and_always_samples_its_one_answer():
    def enlarge(x, y_t, gamma):
        assert torch.equal(y_t, torch.zeros_like(x)) and torch.equal(gamma, torch.ones(4))
        return 1.5 * x

    torch.manual_seed(0)
    model, (x, y_0) = Regression(enlarge), torch.rand(2, 4, 3, 8, 8) * 2 - 1
    expected = (1.5 * x.double() - y_0.double()).square().mean().item()
    assert model(y_0, x).item() == pytest.approx(expected, rel=1e-5)
    for image in (model.sample(x, 25, [torch.Generator()] * 4), *next(model.refine(x, 7))):
        assert torch.equal(image, (1.5 * x).clamp(-1, 1))
    assert len(list(model.refine(x, 7))) == 1
