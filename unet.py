"""The U-Net U(x, y_t, γ): DDPM's, made smaller, with changes of the paper's section 2.4, and ours where it says so.

It sees the low-resolution image x, enlarged to the target size, beside the noisy image y_t, and is told the noise level
γ. That level is all it knows of diffusion: what its output means is decided in sr3.py. Blocks first, then the U, which
works at several scales: scale 0 is the image's resolution, and each further scale halves it.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

GROUPS = 8  # of every GroupNorm; DDPM's 32 would be too many for as few channels as 16


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """A last convolution, zeroed, so that its branch, or the whole network, gives zero before training (DDPM)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """A residual block as in BigGAN, which also resamples. The 1/√2 of section 2.4 rescales the sum of skip and branch.

    GroupNorm, SiLU, 3×3 convolution, twice: [B, in_channels, H, W] -> [B, out_channels, H', W'], where H' is H, or
    H / 2 (`resample="down"`), or 2 H (`"up"`). The noise level, embedded as [B, embedding_dim], scales and shifts the
    second norm (DDPM only adds it to the channels).
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float, resample: str):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.resample = {"": nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        branch = self.conv1(self.resample(F.silu(self.norm1(h))))  # [B, out_channels, H', W']
        scale, shift = rearrange(self.scale_shift(embedding), "b (two c) -> two b c 1 1", two=2)
        branch = F.silu(self.norm2(branch) * (1 + scale) + shift)
        branch = self.conv2(self.dropout(branch))
        return (self.skip(self.resample(h)) + branch) * math.sqrt(0.5)


class SelfAttention(nn.Module):
    """Self-attention among the pixels of [B, C, H, W], with a residual sum that we rescale like a block's."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(h)), "b (three n c) h w -> three b n (h w) c", three=3, n=self.heads)
        branch = F.scaled_dot_product_attention(q, k, v)  # [B, heads, H · W, C / heads]
        branch = rearrange(branch, "b n (h w) c -> b (n c) h w", h=h.shape[2])
        return (h + self.out(branch)) * math.sqrt(0.5)


class Stage(nn.Module):
    """A residual block that keeps the resolution, then self-attention or nothing.

    The U's skip connections start and end at stages: see `UNet.forward`.
    """

    def __init__(self, block: ResidualBlock, attention: nn.Module):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(h, embedding))


class UNet(nn.Module):
    """U(x, y_t, γ): x and y_t [B, C, H, W] and γ [B] in [0, 1] -> [B, C, H, W].

    Scale i of the U, counted from 0, works at H / 2^i with features · channel_multipliers[i] channels. Each half has
    `blocks_per_level` stages on every scale (here, "level" means scale), and another is in the middle. Between two
    scales, a residual block by itself resamples. The output of a stage on the way down is concatenated to the input of
    its mirror image on the way up. In stages whose resolution is in `attention_resolutions`, self-attention follows the
    residual block. C is `image_channels`; `image_size` is H and W. Raises ValueError, which says what to give instead,
    for sizes that don't fit together.
    """

    def __init__(
        self,
        image_channels: int,
        features: int,
        channel_multipliers: list[int],
        blocks_per_level: int,
        attention_resolutions: list[int],
        attention_heads: int,
        dropout: float,
        image_size: int,
    ):
        super().__init__()
        widths = [features * multiplier for multiplier in channel_multipliers]  # channels of each scale
        sizes = [image_size // 2**i for i in range(len(widths))]  # resolution of each scale
        if not sizes or image_size % 2 ** (len(sizes) - 1):
            hint = "give one number for each scale, each at half the size of the scale above"
            raise ValueError(f"image_size {image_size} and channel_multipliers {channel_multipliers}: {hint}")
        if features % GROUPS or features % attention_heads:
            raise ValueError(f"features {features}: give a multiple of {GROUPS} and attention_heads {attention_heads}")
        if not set(attention_resolutions) <= set(sizes):
            raise ValueError(f"attention_resolutions is {attention_resolutions}: the scales have {sizes}")
        last = len(widths) - 1
        embedding_dim = 4 * features

        def block(in_channels, out_channels, resample=""):
            return ResidualBlock(in_channels, out_channels, embedding_dim, dropout, resample)

        def attention(i):
            return SelfAttention(widths[i], attention_heads) if sizes[i] in attention_resolutions else nn.Identity()

        # Frequencies of γ's embedding; `forward` feeds them an angle in [0, π / 2]. From 1, coarse, to 1000, fine.
        self.register_buffer("frequencies", torch.logspace(0, 3, features // 2), persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(features, embedding_dim),
            nn.SiLU(),
            nn.Linear(embedding_dim, embedding_dim),
            nn.SiLU(),
        )
        self.conv_in = nn.Conv2d(2 * image_channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            for _ in range(blocks_per_level):
                self.down.append(Stage(block(width, width), attention(i)))
            if i < last:
                self.down.append(block(width, widths[i + 1], "down"))
        self.middle = Stage(block(widths[last], widths[last]), attention(last))
        for i, width in reversed(list(enumerate(widths))):
            if i < last:
                self.up.append(block(widths[i + 1], width, "up"))
            for _ in range(blocks_per_level):
                self.up.append(Stage(block(2 * width, width), attention(i)))
        self.norm_out = nn.GroupNorm(GROUPS, widths[0])
        self.conv_out = zero_init(nn.Conv2d(widths[0], image_channels, 3, padding=1))

    def forward(self, x: Tensor, y_t: Tensor, gamma: Tensor) -> Tensor:
        # Ours: the noise level as the angle whose cosine is √γ and whose sine is √(1 - γ). It spreads the levels near
        # γ = 0 and near γ = 1, where γ itself crowds them.
        angle = torch.atan2((1 - gamma).sqrt(), gamma.sqrt())  # [B]
        phases = rearrange(angle, "b -> b 1") * self.frequencies
        embedding = self.embed(torch.cat([phases.sin(), phases.cos()], dim=1))  # [B, embedding_dim]

        # Down and up again. Stages hand their outputs across; the blocks that resample do not.
        h = self.conv_in(torch.cat([x, y_t], dim=1))  # [B, 2C, H, W] -> [B, widths[0], H, W]
        skips = []
        for layer in self.down:
            h = layer(h, embedding)
            if isinstance(layer, Stage):
                skips.append(h)
        h = self.middle(h, embedding)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))  # [B, C, H, W]
