"""Two of README's pictures of MNIST's test digits: output/reference/README.md says how they are made."""

import torch

import sr3
from support.data import load_data
from support.settings import DEFAULTS, check
from utils import load_model, make_pair, picture_of_columns, super_resolve, to_unit, upsample

_, (IMAGES, _) = load_data(check(DEFAULTS), "data")


def hero(output, sampler, regression):
    """An animation: six samples for one input come out of noise. Digit 199 is a 2, and could be a 3."""
    _, low_res, x = make_pair(IMAGES[199:200], 4)
    columns = {
        "input": to_unit(upsample(low_res, 32, "nearest-exact")),
        "regression": super_resolve(load_model(regression), low_res, [0]),
    }
    states, frames = load_model(sampler).refine(x.repeat(6, 1, 1, 1), 48), []
    torch.manual_seed(1)  # nothing is drawn before the first state is asked for
    for y_t, _ in states:
        columns |= {f"sample {i + 1}": to_unit(y_t[i : i + 1]) for i in range(6)}
        picture = picture_of_columns(columns, scale=3).convert("L")
        frames.append(picture.point(lambda level: level // 16 * 17))  # 16 greys: a smaller file
    # In milliseconds: the last frame stays for three seconds.
    frames[0].save(output, save_all=True, append_images=frames[1:], duration=[100] * 47 + [3000], loop=0)


def mended(output, *checkpoints):
    """Algorithm 2 as the paper prints it, then with one remedy after the other: this changes sr3 for good."""
    bare, weight_1, default = map(load_model, checkpoints)
    y_0, low_res, _ = make_pair(IMAGES[:5], 4)
    columns, posterior = {"truth": to_unit(y_0)}, sr3.posterior

    def draw(name, model, steps):
        columns[f"{name}\n{steps} steps"] = super_resolve(model, low_res, range(5), steps)

    draw("(e) look-ahead", default, 10)
    sr3.look_ahead = lambda y_0_hat, *_: y_0_hat
    sr3.SR3.levels = lambda model, steps: model.schedule[:: -(2000 // steps)]  # even
    draw("(d) variance (4)", default, 10)
    sr3.posterior = lambda y_0, y_t, gamma_t, gamma_s: (posterior(y_0, y_t, gamma_t, gamma_s)[0], 1 - gamma_t / gamma_s)
    draw("(c) in few", default, 10)
    draw("(c) 1 / gamma", default, 100)
    draw("(b) v", weight_1, 100)
    bare.predict_noise = bare.unet.forward  # f_θ = U
    draw("(a) as printed", bare, 100)
    columns["input"] = to_unit(upsample(low_res, 32, "nearest-exact"))
    picture_of_columns(dict(reversed(columns.items())), scale=3).save(output)
