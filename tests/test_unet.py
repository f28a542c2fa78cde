"""unet.py: shapes, what starts at zero, what it looks at, what it refuses."""

import pytest
import torch

from unet import UNet


def small_unet(image_channels=1, image_size=16, multipliers=(1, 2), blocks=1, attention=8):
    return UNet(image_channels, 8, multipliers, blocks, [attention], 2, dropout=0.0, image_size=image_size)


def shaken_unet(**settings):
    """All weights are off their initial values, the zero ones too."""
    torch.manual_seed(0)
    unet = small_unet(**settings)
    for weight in unet.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return unet


@pytest.mark.parametrize("channels, blocks", [(1, 1), (3, 2)])
@pytest.mark.parametrize("size, multipliers", [(8, [1]), (32, [1, 2, 2, 4]), (24, [1, 1, 2])])
def test_it_keeps_the_shape_refuses_another_and_is_zero_before_training(channels, blocks, size, multipliers):
    y_t, gamma = torch.randn(2, channels, size, size), torch.tensor([0.1, 0.9])
    unet = small_unet(channels, size, multipliers, blocks, attention=size)
    assert torch.equal(unet(y_t, y_t, gamma), torch.zeros_like(y_t))  # the last convolution starts at zero
    for x in (y_t[..., 2:], y_t[..., 2:, 2:], y_t[0], y_t[..., None], torch.cat([y_t, y_t], dim=1)):
        with pytest.raises(ValueError, match=rf"wants \[B, {channels}, {size}, {size}\]"):
            unet(x, x, gamma)


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


def test_images_of_a_batch_do_not_see_each_other_and_their_layout_in_memory_does_not_matter():
    unet, given = shaken_unet(image_channels=3), (*torch.randn(2, 4, 3, 16, 16), torch.rand(4))
    together = unet(*given)
    alone = torch.cat([unet(*(v[i : i + 1] for v in given)) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for x in (given[0].contiguous(memory_format=torch.channels_last), given[0].mT.contiguous().mT):
        torch.testing.assert_close(unet(x, *given[1:]), together, atol=1e-5, rtol=1e-5)
