"""SR3, "Image Super-Resolution via Iterative Refinement" (arXiv 2104.07636): the noise levels, Algorithms 1 and 2.

The story in the paper's order. A diffusion adds noise to the high-resolution image y_0 until nothing is left of it
(section 2.1). f_θ, a network, learns to tell the noise from the image, with the low-resolution image x to lean on
(section 2.2, Algorithm 1). A new image is made by starting from noise alone and taking it away bit by bit (section 2.3,
Algorithm 2). Images are [B, C, H, W] in [-1, 1]; the U-Net U is any module called as unet(x, y_t, gamma), gamma [B].
"""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unet import UNet
from utils import Config, InputError, load_checkpoint, parse_config


class SR3(nn.Module):
    """The diffusion of section 2.1 around a U-Net: `predict_noise` is f_θ, `loss` trains it, `refine` draws with it.

    The schedule is β_t = 1 - α_t, linear from `beta_start` to `beta_end` in `num_timesteps` steps, T of the paper.
    Buffer `gammas`, [T + 1]: γ_0 = 1 and γ_t = α_1 · … · α_t, multiplied up in float64, then rounded to float32 once.
    All that follows uses these float32 values as they are, so f_θ is told the very noise level that is in ỹ. Raises
    ValueError unless γ_1 < 1 and γ_T > 1e-8 in float32.
    """

    def __init__(self, unet: nn.Module, num_timesteps: int = 2000, beta_start: float = 1e-6, beta_end: float = 1e-2):
        super().__init__()
        self.unet = unet
        alphas = 1 - torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        gammas = torch.cat([torch.ones(1, dtype=torch.float64), alphas.cumprod(0)])  # [T + 1]
        gammas = gammas.float()
        if not 1e-8 < gammas[-1] <= gammas[1] < 1:
            schedule = f"β from {beta_start} to {beta_end} in {num_timesteps} steps"
            raise ValueError(f"{schedule}: γ_1 … γ_T must be smaller than 1 and larger than 1e-8")
        self.register_buffer("gammas", gammas, persistent=False)

    def predict_noise(self, context: Tensor, y_t: Tensor, gamma: Tensor) -> Tensor:
        """f_θ(x, ỹ, γ) = √(1 - γ) · ỹ + √γ · U(x, ỹ, γ): x and ỹ [B, C, H, W], γ [B] -> the noise in ỹ, float32.

        Why not f_θ = U? Equation (10) would divide U's error by √γ, which is 1/150 at t = T. With the line above, f_θ
        is ε exactly when U is √γ ε - √(1 - γ) y_0, and (10) becomes ŷ_0 = √γ ỹ - √(1 - γ) U: nothing is amplified. This
        is the v-prediction of Salimans and Ho (arXiv 2202.00512). Loss and algorithms stay the paper's.

        The products are float32 also under autocast: divided by √γ, bfloat16's rounding alone would be 0.6.
        """
        level = rearrange(gamma, "b -> b 1 1 1")
        return (1 - level).sqrt() * y_t + level.sqrt() * self.unet(context, y_t, gamma).float()

    def loss(self, high_res: Tensor, context: Tensor) -> Tensor:
        """Algorithm 1 for one batch: the mean of (f_θ(x, ỹ, γ) - ε)², equation (6) with p = 2; a scalar.

        `high_res` is y_0, `context` is x, both [B, C, H, W], scaled to [-1, 1]: line 2 of the algorithm.
        """
        # Line 3: γ ~ p(γ): t uniform in 1…T, then γ uniform between γ_t and γ_{t-1} (section 2.4).
        t = torch.randint(1, len(self.gammas), high_res.shape[:1], device=high_res.device)  # [B]
        gamma = torch.lerp(self.gammas[t], self.gammas[t - 1], torch.rand_like(self.gammas[t]))  # [B]
        # Line 4: ε ~ N(0, I), and with it ỹ of equation (5).
        noise = torch.randn_like(high_res)
        level = rearrange(gamma, "b -> b 1 1 1")
        y_noisy = level.sqrt() * high_res + (1 - level).sqrt() * noise
        # Line 5: what the gradient step is taken on.
        return F.mse_loss(self.predict_noise(context, y_noisy, gamma), noise)

    forward = loss  # what DistributedDataParallel calls

    @torch.no_grad()
    def refine(
        self,
        context: Tensor,
        steps: int,
        variance: str = "posterior",
        generator: torch.Generator | None = None,
        y_T: Tensor | None = None,
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Algorithm 2: from noise to an image; yields (γ, y_t, ŷ_0) after each step, the last one with γ = 1.

        `context` is x, [B, C, H, W] in [-1, 1]. `steps` is from 1 to T, on the same weights, since f_θ is told γ.
        `variance` is the σ_t² of the noise put back in: "posterior" is equation (4)'s, "forward" the paper's 1 - α_t.
        `generator` (on x's device) makes the result reproducible; `y_T` starts from that noise instead of drawing it.
        Raises ValueError where steps or variance is none of these.
        """
        T = len(self.gammas) - 1
        if not 1 <= steps <= T:
            raise ValueError(f"steps is {steps}: give a number of refinement steps from 1 to {T}")
        if variance not in ("posterior", "forward"):
            raise ValueError(f'variance is {variance!r}: give "posterior" or "forward"')

        def randn():
            return torch.randn(context.shape, generator=generator, device=context.device)

        # The levels are some of the training's, t = T · (i / steps)²: closer together where little noise is left.
        gammas = self.gammas.tolist()  # float64, for the arithmetic on levels below
        # At least i, so that no level comes twice. From γ_T to γ_0 = 1.
        gammas = [gammas[max(i, round(T * (i / steps) ** 2))] for i in range(steps, -1, -1)]
        y_t = randn() if y_T is None else y_T  # line 1
        for gamma_t, gamma_s in pairwise(gammas):  # line 2: from level t to the next lower noise level s
            alpha_t = gamma_t / gamma_s  # what t keeps of s: the α_t of a process that has only these levels
            noise = self.predict_noise(context, y_t, context.new_full((len(context),), gamma_t))
            y_0_hat = ((y_t - (1 - gamma_t) ** 0.5 * noise) / gamma_t**0.5).clamp(-1, 1)  # equation (10)
            z = randn() if gamma_s < 1 else 0  # line 3
            # Line 4. The mean is equation (4)'s with ŷ_0 for y_0, which without the clamp is equation (11)'s.
            mean = (gamma_s**0.5 * (1 - alpha_t) * y_0_hat + alpha_t**0.5 * (1 - gamma_s) * y_t) / (1 - gamma_t)
            posterior = (1 - gamma_s) * (1 - alpha_t) / (1 - gamma_t)  # σ² of equation (4); the paper's is 1 - α_t
            sigma = (posterior if variance == "posterior" else 1 - alpha_t) ** 0.5
            y_t = mean + sigma * z
            yield gamma_s, y_t, y_0_hat

    def sample(self, context: Tensor, steps: int, **options) -> Tensor:
        """The last y_t of `refine`, whose arguments it takes: [B, C, H, W] in [-1, 1]."""
        for _, y_t, _ in self.refine(context, steps, **options):
            pass
        return y_t  # line 6


class Regression(nn.Module):
    """The baseline of section 4: the U-Net without noise, U(x, 0, 1), maps x straight to y_0. Called like SR3."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def predict(self, context: Tensor) -> Tensor:
        """x -> ŷ_0, both [B, C, H, W], in float32: zeros take the place of ỹ, and γ = 1 says that there is no noise."""
        return self.unet(context, torch.zeros_like(context), context.new_ones(len(context))).float()

    def loss(self, high_res: Tensor, context: Tensor) -> Tensor:
        """The mean squared error of ŷ_0, for y_0 and x as `SR3.loss` takes them; a scalar.

        The best answer to it is the mean of all y_0 that could belong to x, and that mean is blurred.
        """
        return F.mse_loss(self.predict(context), high_res)

    forward = loss  # what DistributedDataParallel calls

    @torch.no_grad()
    def refine(self, context: Tensor, steps: int = 1, **options) -> Iterator[tuple[float, Tensor, Tensor]]:
        """What SR3 does in many steps, in one: yields (1.0, ŷ_0, ŷ_0), whatever number is asked for."""
        y_0 = self.predict(context).clamp(-1, 1)
        yield 1.0, y_0, y_0

    sample = SR3.sample  # deterministic: the same x gives the same ŷ_0


def build_model(config: Config) -> SR3 | Regression:
    """The untrained model that a config describes. Raises InputError for what `UNet` or `SR3` refuses."""
    try:
        unet = UNet(image_channels=config.data.channels, image_size=config.data.image_size, **asdict(config.model))
        return SR3(unet, **asdict(config.diffusion)) if config.method == "sr3" else Regression(unet)
    except ValueError as error:
        raise InputError(f"config: {error}") from None


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SR3 | Regression:
    """A trained model with the averaged weights, ready to `sample`, from a checkpoint or from shipped weights.

    It has its `config` and its `training_steps`. Raises InputError for what is no checkpoint.

    model = load_model("output/reference/8x/sr3.pt")
    images = model.sample(upsample(low_res, 32), steps=25)  # low_res: [B, 1, 4, 4] in [-1, 1]
    """
    checkpoint = load_checkpoint(path)
    config = parse_config(checkpoint["config"], path)
    model = build_model(config)
    model.config, model.training_steps = config, checkpoint["step"]
    try:
        model.load_state_dict(checkpoint["ema"])  # half precision becomes float32 here
    except (RuntimeError, TypeError):
        raise InputError(f"{path} is of another version of this lesson, or damaged: its weights don't fit") from None
    return model.eval().to(device)
