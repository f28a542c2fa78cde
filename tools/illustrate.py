"""README's pictures of MNIST's test digits: `python -m tools.illustrate PICTURE OUTPUT FILE…`

    hero OUTPUT SR3 REGRESSION              an animation: six samples for one ambiguous input come out of noise
    mended OUTPUT BARE WEIGHT_1 DEFAULT     Algorithm 2 as the paper prints it, then with one remedy after the other
    curves OUTPUT LOG CHECKPOINT…           loss and PSNR against training steps, and the loss at ten ranges of noise

The last one needs matplotlib. What the files are, and how they are made, is said in output/reference/README.md.
"""

import torch

import sr3
from support.data import load_data
from support.errors import Parser, one_line_errors
from support.settings import DEFAULTS, HERE, check
from utils import load_model, make_pair, picture_of_columns, super_resolve, to_unit, upsample


@one_line_errors()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("files", nargs="+", help="OUTPUT, then what the picture is made from")
    parser.add_argument("--data_dir", default=HERE / "data", help="default: data")
    flags = parser.parse_args()
    _, (images, _) = load_data(check(DEFAULTS), flags.data_dir)
    torch.manual_seed(0)
    PICTURES[flags.picture](images, *flags.files)


def hero(images, output, sampler, regression):
    """The test set's digit 199 is a 2, and could be a 3."""
    _, low_res, x = make_pair(images[199:200], 4)
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


def mended(images, output, *checkpoints):
    """Takes the remedies out of SR3 again, from the last to the first: what is left is the paper's Algorithm 2."""
    bare, weight_1, default = map(load_model, checkpoints)
    y_0, low_res, _ = make_pair(images[:5], 4)
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


@torch.no_grad()
def curves(images, output, log, *checkpoints):
    """The last plot is of 300 test digits, with the weight 1/γ: the checkpoints' loss for t in each tenth of 1…T."""
    import matplotlib.pyplot as plt
    import numpy as np

    _, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    rows = np.genfromtxt(log, delimiter=",", names=True)
    for axis, name in zip(axes, ("loss", "psnr")):
        axis.semilogx(rows["step"], rows[name], ".")
        axis.set(title=name, xlabel="training steps")
    y_0, _, x = make_pair(images[:300], 4)
    for model in map(load_model, checkpoints):
        losses = []
        for model.gammas in model.gammas.unfold(0, 201, 200):  # all that `forward` draws γ from
            losses.append(model(y_0, x))
        axes[2].plot(range(1, 11), losses, label=f"{model.step:,} steps")
    axes[2].set(title="loss by noise level", xlabel="tenth of t, from little noise to much", ylim=0)
    axes[2].legend()
    plt.savefig(output)


PICTURES = {"hero": hero, "mended": mended, "curves": curves}

if __name__ == "__main__":
    main()
