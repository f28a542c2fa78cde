"""unet.py: shapes, what starts at zero, what it looks at, and that it can learn."""

import pytest
import torch

from sr3 import SR3
from unet import UNet


def small_unet(image_channels=1, image_size=16, multipliers=(1, 2), blocks=1, attention=8):
    return UNet(image_channels, 8, multipliers, blocks, [attention], 2, dropout=0.0, image_size=image_size)


def shaken_unet(**settings):
    """All weights are off their initial values, the zero ones too."""
    torch.manual_seed(0)
    unet = small_unet(**settings)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return unet


@pytest.mark.parametrize("channels, blocks", [(1, 1), (3, 2)])
@pytest.mark.parametrize("size, multipliers", [(8, [1]), (32, [1, 2, 2, 4]), (24, [1, 1, 2])])
def test_it_keeps_the_shape_and_is_zero_before_training(channels, blocks, size, multipliers):
    y_t = torch.randn(2, channels, size, size)
    u = small_unet(channels, size, multipliers, blocks, attention=size)(y_t, y_t, torch.tensor([0.1, 0.9]))
    assert torch.equal(u, torch.zeros_like(y_t))  # the last convolution starts at zero


def test_every_input_and_every_weight_matters():
    unet = shaken_unet(image_channels=3, blocks=2)
    x, y_t, gamma = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6])
    u = unet(x, y_t, gamma)
    for others in ((x + 0.1, y_t, gamma), (x, y_t + 0.1, gamma), (x, y_t, gamma + 0.01)):
        assert not torch.allclose(u, unet(*others), atol=1e-4)
    levels = torch.tensor([[1e-4, 2e-4], [1 - 1e-6, 1 - 2e-6]])  # it tells levels apart next to γ = 0 and to γ = 1
    assert all((unet(x[:1], y_t[:1], a[None]) - unet(x[:1], y_t[:1], b[None])).abs().max() > 1e-4 for a, b in levels)
    u.square().sum().backward()
    for name, weight in unet.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_images_of_a_batch_do_not_see_each_other():
    unet, given = shaken_unet(), (torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16), torch.rand(4))
    alone = torch.cat([unet(*(v[i : i + 1] for v in given)) for i in range(4)])
    torch.testing.assert_close(unet(*given), alone, atol=1e-5, rtol=1e-5)


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    model = SR3(small_unet(image_size=8, attention=4))
    y_0 = torch.ones(4, 1, 8, 8)
    y_0[0, :, :4], y_0[1, :, :, :4], y_0[2, :, 2:6, 2:6] = -1, -1, -1  # four patterns, told apart by the context
    context = torch.tensor([-1.0, -0.3, 0.3, 1.0]).view(4, 1, 1, 1).expand_as(y_0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(y_0.repeat(8, 1, 1, 1), context.repeat(8, 1, 1, 1)).backward()
        optimizer.step()
    result = model.sample(context, 20, generator=torch.Generator().manual_seed(0))
    assert (result - y_0).abs().mean() < 0.1
