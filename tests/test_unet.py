"""unet.py: what starts at zero, what it looks at, where its connections lead, what it refuses."""

import pytest
import torch

from unet import SelfAttention, Stage, UNet

SETTINGS = {
    "image_channels": 3, "features": 8, "channel_multipliers": [1, 2, 3], "blocks_per_level": 2,
    "attention_resolutions": [4, 16], "attention_heads": 2, "dropout": 0.0, "image_size": 16,
}  # fmt: skip
INPUTS = x, y_t, gamma = *torch.randn(2, 4, 3, 16, 16), torch.tensor([1e-4, 0.3, 0.6, 1 - 1e-6])


@pytest.fixture
def unet():
    """All its weights are off their initial values, the zero ones too."""
    torch.manual_seed(0)
    unet = UNet(**SETTINGS)
    for weight in unet.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return unet


def test_it_keeps_the_shape_and_is_zero_before_training():
    assert torch.equal(UNet(**SETTINGS)(*INPUTS), torch.zeros(4, 3, 16, 16))


def test_every_input_and_every_weight_matters(unet):
    """γ also next to 0 and to 1."""
    u = unet(*INPUTS)
    for changed in ((x + 0.1, y_t, gamma), (x, y_t + 0.1, gamma), (x, y_t, gamma / 2), (x, y_t, (1 + gamma) / 2)):
        assert (unet(*changed) - u).flatten(1).abs().amax(1).min() > 1e-4
    u.square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in unet.parameters())


def test_images_of_a_batch_do_not_see_each_other(unet):
    alone = [unet(*(values[[i]] for values in INPUTS)) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), unet(*INPUTS), atol=1e-5, rtol=1e-5)


def test_stages_are_joined_to_their_mirror_images_and_attend_at_the_stated_resolutions(unet):
    calls = []
    for layer in unet.modules():
        if isinstance(layer, Stage):
            layer.register_forward_hook(lambda *call: calls.append(call))  # the stage, its inputs, its output
    unet(*INPUTS)
    assert len(calls) == 6 + 1 + 6
    for (stage, _, skip), (_, (joined, _), _) in zip(calls[:6], reversed(calls)):
        assert torch.equal(joined[:, -len(skip[0]) :], skip)
        assert isinstance(stage.attention, SelfAttention) == (skip.shape[2] in (4, 16))


@pytest.mark.parametrize("name, value", [("image_size", 18), ("features", 12), ("attention_resolutions", [5])])
def test_sizes_that_do_not_fit_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        UNet(**SETTINGS | {name: value})
