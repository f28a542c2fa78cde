"""utils.py: the pair written out in float64, an answer that is the image's own, models, pictures to look at."""

import math

import pytest
import torch
from conftest import DRAW_DIGITS, TINY, cells

from support.output import save_checkpoint
from support.settings import complete_settings
from utils import build_model, load_model, make_pair, picture_of, picture_of_columns, super_resolve


def keys(x, a):
    """The cubic convolution kernel of Keys (1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("size, low_res_size", [(32, 8), (32, 4), (32, 5), (24, 16), (16, 1)])
def test_a_pair_is_shrunk_antialiased_and_enlarged_bicubically(size, low_res_size):
    """Down: a = -1/2, stretched by the factor, weights normalised to 1. Up: a = -3/4; the border repeats outwards."""
    noise = torch.randint(256, (4, 3, size, size), generator=torch.Generator().manual_seed(0))
    images, factor = torch.cat([noise, (noise > 127) * 255]).byte(), size / low_res_size  # black and white overshoots
    y_0, low_res, context = (image.double() for image in make_pair(images, low_res_size))
    down = [[keys((j + 0.5) / factor - (i + 0.5), -0.5) for j in range(size)] for i in range(low_res_size)]
    down = torch.tensor(down, dtype=torch.float64)
    down /= down.sum(1, keepdim=True)
    up = torch.zeros(size, low_res_size, dtype=torch.float64)
    for i in range(size):
        centre = (i + 0.5) / factor - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            up[i, min(max(j, 0), low_res_size - 1)] += keys(centre - j, -0.75)
    torch.testing.assert_close(y_0, images.double() / 127.5 - 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(low_res, (down @ y_0 @ down.T).clamp(-1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(context, (up @ low_res @ up.T).clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("low_res_size, highest, mean, share", [(4, 0.311, -0.796, 0.214), (8, 1, -0.804, 0.436)])
def test_x_is_clamped_to_what_a_picture_can_hold(low_res_size, highest, mean, share):
    """`share` of its pixels are at the limits, most of them since bicubic enlargement overshoots next to strokes."""
    _, _, context = make_pair(DRAW_DIGITS(200, 32)[0], low_res_size)
    found = torch.stack([context.min(), context.max(), context.mean(), (context.abs() > 0.9999).float().mean()])
    assert found.tolist() == pytest.approx([-1, highest, mean, share], abs=1e-3)


def tiny_model(folder, **settings):
    """A model in which every weight matters, from a checkpoint in half precision, as the shipped ones are."""
    torch.manual_seed(0)
    config = complete_settings(TINY | settings)
    weights = {name: w + 0.1 * torch.randn_like(w) for name, w in build_model(config).state_dict().items()}
    halves = {name: weight.half() for name, weight in weights.items()}
    save_checkpoint(folder / "tiny.pt", {"config": vars(config), "step": 7, "ema": halves})
    model = load_model(folder / "tiny.pt")
    assert model.config == config and model.step == 7 and not model.training
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=1e-3, atol=1e-6)  # float32 again
    return model


@pytest.mark.parametrize("size, channels", [(16, 3), (24, 1), (30, 1)])
def test_an_images_answer_is_its_own_whatever_else_is_in_the_call(tmp_path, size, channels):
    """Of 66, more than a batch: alone, in another order, behind others. bfloat16 may round to a neighbour."""
    settings = {"image_size": size, "channels": channels, "attention_resolutions": [size // 2], "sampling_steps": 2}
    model = tiny_model(tmp_path, **settings)
    low_res = make_pair(DRAW_DIGITS(66, size, channels)[0], 4)[1]
    together = super_resolve(model, low_res, range(66))
    assert torch.equal(together, (together.clamp(0, 1) * 255).round() / 255)
    for indices in ([0], [65, 3, 1], [*range(10, 66)]):
        found = super_resolve(model, low_res[indices], iter(indices))
        torch.testing.assert_close(found, together[indices], atol=1.1 / 255, rtol=0)
    assert (super_resolve(model, low_res[:1], [1]) - together[:1]).abs().mean() > 0.05  # the seed matters


def test_the_network_sees_the_x_that_it_was_trained_on_and_a_step_for_each_that_is_asked_for(tmp_path):
    model = tiny_model(tmp_path)
    _, low_res, context = make_pair(DRAW_DIGITS(3, 16)[0], 4)
    seen = []
    model.unet.register_forward_pre_hook(lambda unet, arguments: seen.append(arguments[0]))
    for steps, expected in ((None, 4), (2, 2)):
        seen.clear()
        super_resolve(model, low_res, [0, 0, 0], steps)
        assert len(seen) == expected and all(torch.equal(x, context) for x in seen)
    for images, seeds in ((context, 3), (low_res, 2), (low_res.expand(-1, 3, -1, -1), 3), (low_res[0], 1)):
        with pytest.raises(ValueError, match=r"give \[N, 1, 4, 4\] and N seeds"):
            super_resolve(model, images, range(seeds))
    with pytest.raises(ValueError, match="steps is 0"):
        super_resolve(model, low_res, [0, 0, 0], 0)


def test_a_picture_shows_images_row_by_row_and_columns_under_their_labels():
    images = torch.rand(6, 3, 16, 16)
    expected = (255 * images).round().permute(0, 2, 3, 1).byte()
    picture = picture_of(images, 3, scale=3)
    assert picture.size == (3 * (3 * 18 + 2), 3 * (2 * 18 + 2)) and torch.equal(cells(picture, 3, scale=3), expected)
    picture = picture_of_columns({"input": images[:3], "two\nlines": images[3:]})
    assert picture.size == (2 * (2 * 18 + 2), 2 * (3 * 18 + 2) + 32)
    assert torch.equal(cells(picture, 2), expected[[0, 3, 1, 4, 2, 5]])
