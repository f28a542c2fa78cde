"""SR3, "Image Super-Resolution via Iterative Refinement" (arXiv 2104.07636): the noise levels, Algorithms 1 and 2.

Diffusion adds noise to the high-resolution image y_0 until almost nothing is left of it (section 2.1). f_θ learns to
predict that noise, with the low-resolution image x beside it (section 2.2, Algorithm 1). A new image starts from pure
noise, which is removed step by step (section 2.3, Algorithm 2). Last comes the paper's regression baseline.

y_0 is [B, C, H, W] in [-1, 1]. x has the same shape and range: it is the low-resolution image, already enlarged to the
size of y_0; the code calls it `context`. U is the U-Net. In the paper it is f_θ itself; here f_θ is computed from its
output, see `predict_noise`. γ, `gamma`, is a noise level: the share of y_0's energy that is left, from 1 (no noise) to
0. This file needs torch and einops only. To use SR3 in a project of your own, copy it and unet.py, or pass in any
network that is called as unet(x, y_t, gamma), with gamma [B], and returns [B, C, H, W].
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Generators = list[torch.Generator] | None  # one for each image, so that its noise is its own; None: torch's global one


def noise_levels(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """γ_0 = 1 and γ_t = α_1 · … · α_t for t = 1…T, with β_t = 1 - α_t linear as in DDPM; [T + 1] in float64."""
    alphas = 1 - torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), alphas.cumprod(0)])


class SR3(nn.Module):
    """The diffusion around a U-Net: `predict_noise` is f_θ, `forward` the loss of Algorithm 1, `refine` Algorithm 2.

    `loss_weight` is "1/gamma" or "1", see `forward`. Sampling starts from pure noise, so γ_T must be next to nothing,
    but not zero, as (10) divides by its root. Raises ValueError unless all β are in (0, 1) and 1e-8 < γ_T < 0.01.
    """

    def __init__(
        self,
        unet: nn.Module,
        num_timesteps: int = 2000,
        beta_start: float = 1e-6,
        beta_end: float = 1e-2,
        loss_weight: str = "1/gamma",
    ):
        super().__init__()
        self.unet, self.loss_weight = unet, loss_weight
        gammas = noise_levels(num_timesteps, beta_start, beta_end)
        if not (0 < beta_start < 1 and 0 < beta_end < 1 and 1e-8 < gammas[-1] < 0.01):
            given = f"beta_start {beta_start}, beta_end {beta_end}, num_timesteps {num_timesteps}"
            hint = "it must lie between 1e-8 and 0.01 (a larger beta_end lowers it), each beta between 0 and 1"
            raise ValueError(f"{given}: γ_T is {gammas[-1].item():.2g}; {hint}")
        self.register_buffer("gammas", gammas.float(), persistent=False)  # for training, on the network's device
        self.schedule = gammas.tolist()  # the same for inference, in Python's float64

    def predict_noise(self, context: Tensor, y_t: Tensor, gamma: Tensor) -> Tensor:
        """f_θ(x, y_t, γ) = √(1 - γ) y_t + √γ U(x, y_t, γ), from γ [B]: the noise in y_t, [B, C, H, W] in float32.

        Why not f_θ = U, as in the paper? Equation (10) would divide the error of U by √γ, which is next to nothing when
        t is near T. With f_θ as above, f_θ - ε = √γ (U - v) for v = √γ ε - √(1 - γ) y_0: so f_θ is the noise ε exactly
        when U is v. Put into (10), f_θ gives ŷ_0 = √γ y_t - √(1 - γ) U, for any U, so the error of U isn't amplified.
        This is the v-prediction of Salimans and Ho (arXiv 2202.00512). The products are float32, even where autocast
        makes U compute in bfloat16.
        """
        level = rearrange(gamma, "b -> b 1 1 1")  # each image's γ, to multiply the image by
        return (1 - level).sqrt() * y_t + level.sqrt() * self.unet(context, y_t, gamma).float()

    def forward(self, high_res: Tensor, context: Tensor) -> Tensor:
        """Lines 3 and 4 of Algorithm 1, and the loss of line 5, for a batch of y_0 and x, [B, C, H, W]; a scalar.

        With `loss_weight="1"` it is the paper's (6) with p = 2, the mean of (f_θ - ε)². Since f_θ - ε = √γ (U - v),
        with the v of `predict_noise`, that nearly ignores U's errors where γ is small. With "1/gamma" each squared
        error is divided by its γ, which leaves (U - v)²: all levels count alike.
        """
        # Line 3: γ ~ p(γ): t uniform in 1…T, then γ uniform between γ_t and γ_{t-1} (section 2.4).
        t = torch.randint(1, len(self.gammas), high_res.shape[:1], device=high_res.device)  # [B]
        gamma = torch.lerp(self.gammas[t], self.gammas[t - 1], torch.rand_like(self.gammas[t]))  # [B]
        # Line 4: ε ~ N(0, I), and with it ỹ of equation (5).
        noise = torch.randn(high_res.shape, device=high_res.device)
        level = rearrange(gamma, "b -> b 1 1 1")  # each image's γ, to multiply the image by
        y_t = level.sqrt() * high_res + (1 - level).sqrt() * noise
        # Line 5: the loss (6) for the gradient step.
        error = (self.predict_noise(context, y_t, gamma) - noise).square()  # [B, C, H, W]
        return (error / level if self.loss_weight == "1/gamma" else error).mean()

    def levels(self, steps: int) -> list[float]:
        """The `steps` + 1 noise levels for inference, γ_T to γ_0 = 1: γ_t at t = T (i / steps)^1.5, for i = steps…0.

        f_θ is told γ and not t, so the levels can be chosen after training; the paper searches for good ones. The t lie
        closer together towards the image, as ŷ_0 hardly changes while γ is tiny. Each t is rounded down, but is at
        least i, so that all levels differ. Raises ValueError unless 1 ≤ steps ≤ T.
        """
        T = len(self.schedule) - 1
        if not 1 <= steps <= T:
            raise ValueError(f"steps is {steps}: give a number of refinement steps from 1 to {T}")
        return [self.schedule[max(i, int(T * (i / steps) ** 1.5))] for i in range(steps, -1, -1)]

    @torch.no_grad()
    def refine(self, context: Tensor, steps: int, generators: Generators = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Algorithm 2 for x, [B, C, H, W]: yields, for each step, the image that it leads to and the ŷ_0 at its start.

        A step leads from γ_t to γ_s, the next of the chosen levels, where the paper has t - 1. The last y_s is y_0, the
        image, in [-1, 1]. Besides f_θ, four things are ours: which levels there are; the clamp in `estimate`;
        `look_ahead`; and the variance, which is (4)'s, since the 1 - α_t of line 4 would leave grain after few steps.
        Without the clamp and `look_ahead`, the mean is (11)'s.
        """
        y_t = draw_noise(context, generators)  # line 1: y_T ~ N(0, I)
        earlier = None  # the ŷ_0 and the γ of the step before, for `look_ahead`
        for gamma_t, gamma_s in pairwise(self.levels(steps)):  # line 2: for t = T … 1
            z = draw_noise(context, generators) if gamma_s < 1 else 0  # line 3: z ~ N(0, I), but 0 in the last step
            y_0_hat = self.estimate(context, y_t, gamma_t)  # equation (10)
            y_0_ahead = look_ahead(y_0_hat, gamma_t, gamma_s, earlier)
            mean, variance = posterior(y_0_ahead, y_t, gamma_t, gamma_s)  # equation (4)
            y_t = mean + variance**0.5 * z  # line 4: this is y_s, and the next step's y_t
            yield y_t, y_0_hat
            earlier = y_0_hat, gamma_t
        # Line 6 is `sample`.

    def estimate(self, context: Tensor, y_t: Tensor, gamma_t: float) -> Tensor:
        """Equation (10): ŷ_0, the image that y_t and its predicted noise amount to, clamped to y_0's range, [-1, 1]."""
        noise = self.predict_noise(context, y_t, torch.full((len(context),), gamma_t, device=context.device))
        return ((y_t - (1 - gamma_t) ** 0.5 * noise) / gamma_t**0.5).clamp(-1, 1)


def posterior(y_0: Tensor, y_t: Tensor, gamma_t: float, gamma_s: float) -> tuple[Tensor, float]:
    """Equation (4): the mean, [B, C, H, W], and the variance of y_s given y_0 and y_t, for γ_s > γ_t."""
    alpha_t = gamma_t / gamma_s  # the α_t of a process that has only these levels
    mean = (gamma_s**0.5 * (1 - alpha_t) * y_0 + alpha_t**0.5 * (1 - gamma_s) * y_t) / (1 - gamma_t)
    return mean, (1 - gamma_s) * (1 - alpha_t) / (1 - gamma_t)


def look_ahead(y_0_hat: Tensor, gamma_t: float, gamma_s: float, earlier: tuple[Tensor, float] | None) -> Tensor:
    """The ŷ_0 that is expected halfway through the step from γ_t to γ_s, given the ŷ_0 and the γ of the step before.

    Not in the paper. Algorithm 2 takes a step as if ŷ_0 stayed the same, which makes samples too alike when steps are
    large. Here ŷ_0 goes on changing as it did, linearly in log(γ / (1 - γ)): the second-order multistep update of
    SDE-DPM-Solver++ (Lu et al., arXiv 2211.01095). In the first step, which has none before it, and in the last, whose
    length in log(γ / (1 - γ)) is infinite, ŷ_0 is returned as it is.
    """
    if earlier is None or gamma_s == 1:
        return y_0_hat
    earlier_y_0_hat, earlier_gamma = earlier
    before, now, after = (math.log(gamma / (1 - gamma)) for gamma in (earlier_gamma, gamma_t, gamma_s))
    return y_0_hat + 0.5 * (after - now) / (now - before) * (y_0_hat - earlier_y_0_hat)


def draw_noise(like: Tensor, generators: Generators) -> Tensor:
    """N(0, I) of the shape, type and device of `like`, [B, C, H, W]; each image by itself with generators."""
    if generators is None:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)
    drawn = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generators]
    return torch.stack(drawn).to(like.device)


class Regression(nn.Module):
    """The baseline of section 4: U(x, 0, 1), the U-Net without noise, maps x straight to y_0. Called like SR3."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def predict(self, context: Tensor) -> Tensor:
        """x -> ŷ_0, both [B, C, H, W]. Zeros take the place of y_t, 1 that of γ: neither is informative."""
        return self.unet(context, torch.zeros_like(context), context.new_ones(len(context))).float()

    def forward(self, high_res: Tensor, context: Tensor) -> Tensor:
        """The mean squared error of ŷ_0. It is least for the mean of all y_0 that fit x, which is blurred."""
        return F.mse_loss(self.predict(context), high_res)

    @torch.no_grad()
    def refine(self, context: Tensor, steps: int, generators: Generators = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (ŷ_0, ŷ_0) once, in [-1, 1], however many steps are asked for."""
        y_0_hat = self.predict(context).clamp(-1, 1)
        yield y_0_hat, y_0_hat


def sample(model: SR3 | Regression, context: Tensor, steps: int, generators: Generators = None) -> Tensor:
    """The image that `refine` arrives at, line 6 of Algorithm 2: [B, C, H, W] in [-1, 1]."""
    for y_t, _ in model.refine(context, steps, generators):
        pass
    return y_t
