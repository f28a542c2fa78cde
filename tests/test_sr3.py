"""sr3.py against equations (3) to (6) and (10), computed here in float64, with networks U that know the answer."""

import math

import pytest
import torch

from sr3 import SR3, Regression

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
        self.y_0, self.gammas = y_0, []

    def __call__(self, x, y_t, gamma):
        assert gamma.shape == (len(y_t),)
        self.gammas.append(gamma[0].item())
        level = gamma.double()[:, None, None, None]
        noise = (y_t.double() - level.sqrt() * self.y_0) / (1 - level).sqrt()
        return level.sqrt() * noise - (1 - level).sqrt() * self.y_0


class Recorder:
    """A U that remembers what it was given and answers such that f_θ is zero."""

    def __call__(self, x, y_t, gamma):
        self.given = x, y_t, gamma
        level = gamma[:, None, None, None]
        return -((1 - level) / level).sqrt() * y_t


def test_gammas_are_right_to_float32_rounding():
    gammas = SR3(Recorder()).gammas
    torch.testing.assert_close(gammas, torch.tensor(gammas64()), rtol=1e-7, atol=0, check_dtype=False)
    assert gammas.dtype == torch.float32 and (gammas.diff() < 0).all()


def test_the_loss_is_the_mean_squared_error_to_the_noise_of_equation_5():
    """A U that knows y_0 finds in ỹ the noise that is asked for; with an f_θ of 0 the loss is the noise's variance."""
    torch.manual_seed(0)
    y_0 = torch.rand(512, 1, 16, 16) * 2 - 1
    assert SR3(TrueV(y_0)).loss(y_0, y_0).item() < 1e-9
    recorder = Recorder()
    loss = SR3(recorder).loss(y_0, y_0 - 1)
    assert loss.shape == () and abs(loss.item() - 1) < 0.02 and torch.equal(recorder.given[0], y_0 - 1)


def test_y_noisy_has_the_moments_of_equation_3():
    torch.manual_seed(0)
    recorder, y_0 = Recorder(), torch.full((256, 1, 64, 64), 0.7)
    SR3(recorder).loss(y_0, y_0 - 1)
    x, y_noisy, gamma = recorder.given
    torch.testing.assert_close(x, y_0 - 1)
    mean, std = y_noisy.double().mean((1, 2, 3)), y_noisy.double().std((1, 2, 3))
    expected = (1 - gamma.double()).sqrt()
    assert ((mean - 0.7 * gamma.double().sqrt()).abs() < 5 * expected / 64 + 1e-6).all()
    assert ((std / expected - 1).abs() < 5 / math.sqrt(2 * 64 * 64)).all()


def test_gamma_follows_the_piecewise_uniform_mixture_of_section_2_4():
    torch.manual_seed(0)
    recorder, schedule, y_0 = Recorder(), (10, 0.05, 0.5), torch.zeros(200_000, 1, 1, 1)
    SR3(recorder, *schedule).loss(y_0, y_0)
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


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_each_step_from_the_true_noise_is_the_posterior_of_equation_4(steps, variance):
    """From any γ to any other: the step's mean and variance, over 100,000 pixels, are equation (4)'s in float64."""
    y_0, context, generator = 0.3, torch.zeros(10, 1, 100, 100), torch.Generator().manual_seed(2)
    gammas = gammas64()
    levels = [gammas[max(i, round(T * (i / steps) ** 2))] for i in range(steps, -1, -1)]
    y_t = torch.randn(context.shape, generator=generator)
    states = list(SR3(TrueV(y_0)).refine(context, steps, variance, generator, y_t))
    assert len(states) == steps
    for gamma_t, gamma_s, (gamma, y_s, y_0_hat) in zip(levels, levels[1:], states):
        # The posterior by Bayes' rule for Gaussians, not by the paper's formula: prior y_s | y_0, then y_t | y_s.
        alpha = gamma_t / gamma_s
        prior_mean, prior_variance = math.sqrt(gamma_s) * y_0, 1 - gamma_s
        gain = prior_variance * math.sqrt(alpha) / (alpha * prior_variance + 1 - alpha)
        mean = prior_mean + gain * (y_t.double() - math.sqrt(alpha) * prior_mean)
        posterior = prior_variance * (1 - gain * math.sqrt(alpha))
        expected = posterior if variance == "posterior" else (1 - alpha) * (gamma_s < 1)  # the last adds no noise
        residual = y_s.double() - mean
        assert gamma == pytest.approx(gamma_s, rel=1e-6)
        assert abs(residual.mean()) < 5 * math.sqrt(expected / residual.numel()) + 1e-5
        assert residual.var() == pytest.approx(expected, rel=0.03, abs=1e-9)
        torch.testing.assert_close(y_0_hat, torch.full_like(y_0_hat, y_0), atol=1e-4, rtol=0)
        y_t = y_s


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("steps", [1, 7, T])
def test_with_the_true_noise_a_whole_refinement_ends_at_y_0(steps, variance):
    y_0 = torch.rand(2, 3, 4, 4) * 2 - 1
    unet = TrueV(y_0)
    result = SR3(unet).sample(torch.zeros_like(y_0), steps, variance=variance)
    torch.testing.assert_close(result, y_0, atol=1e-4, rtol=0)  # f_θ's rounding to float32 is divided by √γ
    assert len(set(unet.gammas)) == len(unet.gammas) == steps and unet.gammas == sorted(unet.gammas)


def test_f_theta_is_preconditioned_so_that_nothing_is_amplified():
    """f_θ = √(1 - γ) ỹ + √γ U, and so ŷ_0 of (10) is √γ ỹ - √(1 - γ) U: in float64, also where U ran in bfloat16."""
    gamma = torch.tensor([4.5e-5, 1e-3, 0.5, 0.999, 1 - 1e-6])
    u, y_t = torch.randn(5, 1, 8, 8).bfloat16(), torch.randn(5, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        noise = SR3(lambda x, y_t, gamma: u).predict_noise(y_t, y_t, gamma)
    level = gamma.double().view(5, 1, 1, 1)
    expected = (1 - level).sqrt() * y_t.double() + level.sqrt() * u.double()
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise.double(), expected, atol=1e-6, rtol=1e-6)
    y_0 = (y_t.double() - (1 - level).sqrt() * expected) / level.sqrt()
    torch.testing.assert_close(y_0, level.sqrt() * y_t.double() - (1 - level).sqrt() * u.double(), atol=1e-9, rtol=1e-9)


def test_a_generator_makes_samples_reproducible():
    model, context, state = SR3(Recorder()), torch.zeros(2, 1, 8, 8), torch.get_rng_state()
    first, again, other = (model.sample(context, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())  # the global numbers are left alone


def test_schedules_and_arguments_out_of_range_are_refused():
    for schedule in ((2000, 1e-6, 0.5), (10, 1e-9, 1e-9), (2000, 1e-6, 0.999)):  # nothing left to divide by
        with pytest.raises(ValueError, match=str(schedule[2])):
            SR3(Recorder(), *schedule)
    for steps, variance, word in ((0, "forward", "0"), (T + 1, "forward", "2001"), (1, "fixed", "fixed")):
        with pytest.raises(ValueError, match=word):
            SR3(Recorder()).sample(torch.zeros(1, 1, 4, 4), steps, variance=variance)


def test_regression_learns_y_0_from_x_by_squared_error_and_always_samples_its_one_answer():
    given = []

    def enlarge(x, y_t, gamma):
        given.append((y_t, gamma))
        return 1.5 * x

    torch.manual_seed(0)
    model, (x, y_0) = Regression(enlarge), torch.rand(2, 4, 3, 8, 8) * 2 - 1
    expected = (1.5 * x.double() - y_0.double()).square().mean().item()
    assert model.loss(y_0, x).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(given[0][0], torch.zeros_like(x)) and torch.equal(given[0][1], torch.ones(4))
    result = model.sample(x, 25, variance="forward", generator=torch.Generator())
    assert torch.equal(result, (1.5 * x).clamp(-1, 1))
    [(gamma, y_t, y_0)] = model.refine(x, 7)
    assert gamma == 1 and torch.equal(y_t, result) and torch.equal(y_0, result)
