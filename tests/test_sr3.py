"""sr3.py against the paper's equations, computed here in float64, with networks U that know the answer."""

from functools import partial

import numpy as np
import pytest
import torch

from sr3 import SR3, Regression, posterior, sample

T = 2000
GAMMAS = [1.0]  # γ_0 … γ_T of the default schedule
for t in range(T):
    GAMMAS.append(GAMMAS[-1] * (1 - 1e-6 - (1e-2 - 1e-6) * t / (T - 1)))
assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=0, check_dtype=False)


def mix(a, b, gamma):
    """Equation (5) for any two: √γ a + √(1 - γ) b."""
    return gamma**0.5 * a + (1 - gamma) ** 0.5 * b


def knowing(y_0):
    """A U that knows y_0, and so the noise in y_t: it returns v = √γ ε - √(1 - γ) y_0."""

    def unet(x, y_t, gamma):
        gamma = gamma.double().view(-1, 1, 1, 1)
        return mix((y_t - gamma**0.5 * y_0) / (1 - gamma) ** 0.5, -y_0, gamma)

    return unet


MODEL = SR3(lambda x, y_t, gamma: 0.3 * x - 0.1 * y_t)  # a U without meaning


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_gamma_t_is_the_product_of_the_alphas_and_next_to_nothing_at_T():
    assert MODEL.schedule == pytest.approx(GAMMAS) == MODEL.gammas.tolist()
    with pytest.raises(ValueError, match="between 1e-8 and 0.01"):
        SR3(None, T, 1e-6, 0.5)


@pytest.mark.parametrize("weight", ["1", "1/gamma"])
def test_the_loss_is_equation_6_and_divided_by_gamma_the_error_of_v(monkeypatch, weight):
    torch.manual_seed(0)
    given, (x, y_0, noise, u) = [], torch.randn(4, 256, 1, 8, 8)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    loss = SR3(lambda *inputs: given.extend(inputs) or u, loss_weight=weight)(y_0, x)
    gamma = given[2].double().view(-1, 1, 1, 1)
    noisy = mix(y_0, noise, gamma)
    assert_close(given[:2], [x, noisy])
    error = mix(u, noisy, gamma) - noise if weight == "1" else u - mix(noise, -y_0, gamma)
    assert_close(loss, error.square().mean())


def test_gamma_of_training_is_uniform_between_neighbouring_levels():
    torch.manual_seed(0)
    given, y_0 = [], torch.zeros(100_000, 1, 1, 1)
    model = SR3(lambda *inputs: given.extend(inputs) or y_0, 10, 0.05, 0.7)
    model(y_0, y_0)
    t = np.interp(-given[2], -model.gammas, range(11))  # linear in γ between the levels, so uniform
    assert abs(np.histogram(t, 100, (0, 10))[0] - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize("s", [1, 100, 299])
def test_the_posterior_is_bayes_rule_and_with_equation_10_its_mean_is_equation_11(s):
    """The prior is (3)'s y_s given y_0, the likelihood that of y_t given y_s, (2) for all steps between."""
    torch.manual_seed(0)
    noise, y_0 = torch.randn(2, 1, 1, 8, 8).double().clamp(-1, 1)
    gamma_t, gamma_s, alpha = GAMMAS[300], GAMMAS[s], GAMMAS[300] / GAMMAS[s]
    y_t = mix(y_0, noise, gamma_t)
    mean, variance = posterior(y_0, y_t, gamma_t, gamma_s)
    precision = 1 / (1 - gamma_s) + alpha / (1 - alpha)
    assert variance == pytest.approx(1 / precision)
    product = gamma_s**0.5 * y_0 / (1 - gamma_s) + alpha**0.5 * y_t / (1 - alpha)
    assert_close(mean, product / precision)
    y_0_hat = SR3(knowing(y_0)).estimate(y_t, y_t, gamma_t)
    equation_11 = (y_t - (1 - alpha) / (1 - gamma_t) ** 0.5 * noise) / alpha**0.5
    assert_close(posterior(y_0_hat, y_t, gamma_t, gamma_s)[0], equation_11)


def test_the_levels_are_those_at_T_times_i_over_steps_to_the_power_of_one_and_a_half():
    assert MODEL.levels(4) == pytest.approx([GAMMAS[t] for t in (T, 1299, 707, 250, 0)])
    assert MODEL.levels(T) == pytest.approx(GAMMAS[::-1])  # all of them


def test_the_steps_are_those_of_sde_dpm_solver_2m():
    """Lu et al.'s update in λ = log(√γ / √(1 - γ)), from each state to the next; of first order at both ends."""
    (generator,) = generators(3)
    noise = torch.stack([torch.randn(1, 32, 32, generator=generator) for _ in range(11)])
    y, y_0_hat = map(torch.cat, zip(*MODEL.refine(torch.rand(1, 1, 32, 32), 10, generators(3))))  # [10, 1, 32, 32]
    gammas = torch.tensor(MODEL.levels(10), dtype=torch.float64).view(-1, 1, 1, 1)
    h, sigma = (gammas.logit() / 2).diff(dim=0), (1 - gammas) ** 0.5  # h is the step in λ
    ahead = y_0_hat.double()
    ahead[1:-1] += h[1:-1] / h[:-2] / 2 * y_0_hat[:-1].diff(dim=0)
    expected = sigma[1:] / sigma[:-1] * torch.exp(-h) * torch.cat([noise[:1], y[:-1]])
    expected += gammas[1:] ** 0.5 * (1 - torch.exp(-2 * h)) * ahead
    expected += sigma[1:] * (1 - torch.exp(-2 * h)) ** 0.5 * noise[1:]
    assert_close(y, expected)


@pytest.mark.parametrize("steps", [1, 10])
def test_a_perfect_network_gives_y_0_back_clamped(steps):
    y_0 = torch.linspace(-2, 2, 192).view(3, 1, 8, 8)
    assert_close(sample(SR3(knowing(y_0)), y_0, steps), y_0.clamp(-1, 1))


def test_a_sample_depends_on_its_own_input_and_seed_only():
    """30 × 30 pixels are no multiple of 16: torch draws the last 16 numbers of a tensor anew there."""
    x, seeds = torch.rand(3, 1, 30, 30), (7, 8, 7)
    together = sample(MODEL, x, 4, generators(*seeds))
    alone = [sample(MODEL, image[None], 4, generators(seed)) for image, seed in zip(x, seeds)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(*sample(MODEL, x[[0, 0]], 4, generators(7, 8)))


def test_regression_learns_by_squared_error_and_its_one_answer_is_clamped():
    model = Regression(lambda x, y_t, gamma: x + y_t + gamma.view(-1, 1, 1, 1))  # U(x, 0, 1) = x + 1
    x, y_0 = torch.rand(2, 4, 3, 8, 8) * 2 - 1
    assert_close(model(y_0, x), (x + 1 - y_0).square().mean())
    assert_close(sample(model, x, 25), (x + 1).clamp(-1, 1))
