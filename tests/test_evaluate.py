"""evaluate.py: the table against independent arithmetic, its pictures, and what it takes and refuses."""

import io
import json
import math
import runpy
import sys

import pytest
import torch
from conftest import ROOT, cells, checkpoint_of, draw_few_digits, lines_of, run, write_tiny_config
from PIL import Image

import evaluate
import sr3
import utils

pytestmark = pytest.mark.usefixtures("few_digits")


def judge(output, *arguments):
    """evaluate.py in this process, in float32; returns its table, its results and what it printed, in ASCII."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py"])
        patch.setattr(sys, "stdout", console)
        patch.setattr(utils, "choose_precision", lambda *_: torch.float32)
        evaluate.main([*map(str, arguments), "--output_dir", str(output), "--device", "cpu"])
    results = json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    return (output / "results.md").read_text(encoding="utf-8"), results, console.buffer.getvalue()


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory):
    """An SR3 and a regression, 20 steps on drawn digits in colour; of the SR3 only the averaged weights in float16."""
    folder, outputs = tmp_path_factory.mktemp("trained"), []
    for method in ("sr3", "regression"):
        config = write_tiny_config(folder / f"{method}.toml", method=method, channels=3)
        outputs.append(run(config, folder / method))
    weights = {key: checkpoint_of(outputs[0])[key] for key in utils.WEIGHTS}
    weights["ema"] = {name: weight.half() for name, weight in weights["ema"].items()}
    torch.save(weights, outputs[0] / "weights.pt")
    return outputs[0] / "weights.pt", outputs[1] / "checkpoint.pt"


@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """The output folder, the table, the results and the printed table of both on 70 images."""
    output = tmp_path_factory.mktemp("judged")
    return output, *judge(output, *trained, "--num_images", 70)


def in_8_bits(images):
    return ((images.clamp(-1, 1).double() + 1) * 127.5).round() / 255


def draw(path, context, seed=0):
    """In batches of 64, the noise of all of them from one generator."""
    generator, model = torch.Generator().manual_seed(seed), sr3.load_model(path)
    return in_8_bits(torch.cat([model.sample(part, 4, generator=generator) for part in context.split(64)]))


def error_of(images, others):
    return (images - others).square().mean((1, 2, 3))


def test_the_table_has_a_row_for_each_method_in_order(judged, trained):
    _, table, results, printed = judged
    names, rows = ["reference", "bicubic", "regression", "SR3", "SR3, mean of 2 samples"], results["methods"]
    assert list(rows) == names and results["dataset"] == "digits" and results["num_images"] == 70
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[:7]]
    headings = ["PSNR ↑", "SSIM ↑", "consistency ↓", "accuracy ↑", "fool rate → 50 %", "spread / error → 1"]
    assert lines[0] == ["method", "steps", *headings] and [line[0] for line in lines[2:]] == names
    assert [line[1] for line in lines[2:]] == ["–", "–", "20", "20", "20"] and lines[2][2] == "–"
    for column, key in ((2, "psnr"), (7, "spread_over_error")):
        assert lines[5][column] == "{mean:.2f} ± {standard_error:.2f}".format_map(rows["SR3"][key])
    assert lines[2][7] == lines[6][7] == "–"
    assert "70 test images of digits, 4×4 -> 16×16" in table
    assert printed.splitlines() == table.encode("ascii", "replace").splitlines()  # the console lacks its letters
    for paths in (trained, trained[::-1]):  # their order does not matter
        assert list(evaluate.load_models(paths, torch.device("cpu"))) == ["regression", "SR3"]


def test_psnr_and_spread_over_error_agree_with_independent_arithmetic(judged, trained):
    rows = judged[2]["methods"]
    chosen = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:70]
    images = draw_few_digits(10_000, 16, 3, seed=1)[0][chosen]
    context, images = utils.upsample(utils.downsample(images / 127.5 - 1, 4), 16), images.double() / 255
    first, second = (draw(trained[0], context, seed) for seed in (0, 1))
    outputs = {"bicubic": in_8_bits(context), "regression": draw(trained[1], context), "SR3": first}
    for name, output in (outputs | {"SR3, mean of 2 samples": (first + second) / 2}).items():
        error = error_of(output, images)
        assert rows[name]["psnr"]["mean"] == pytest.approx(-10 * math.log10(error.mean()), abs=2e-3)
        relative = error.std().item() / 70**0.5 / error.mean().item()
        assert rows[name]["psnr"]["standard_error"] == pytest.approx(10 / math.log(10) * relative, rel=0.01)

    found, spread, error = rows["SR3"]["spread_over_error"], error_of(first, second), error_of(first, images)
    assert found["mean"] == pytest.approx((spread.mean() / error.mean()).item(), rel=2e-3)
    without_one = (spread.sum() - spread) / (error.sum() - error)
    assert found["standard_error"] == pytest.approx(69 / 70**0.5 * without_one.std().item(), rel=0.1)  # the jackknife's
    assert rows["regression"]["spread_over_error"] == {"mean": 0, "standard_error": 0}
    assert rows["reference"]["psnr"] is None and rows["reference"]["ssim"]["mean"] == pytest.approx(1)
    fooled = rows["reference"]["fool_rate"]
    assert fooled["low"] < 0.5 < fooled["high"] and rows["bicubic"]["fool_rate"]["mean"] < 0.3


def test_the_pictures_show_x_samples_their_mean_the_regression_and_the_reference(judged, trained):
    """diversity.png has eight samples and their mean, comparison.png the first four after the regression."""
    rows = cells(judged[0] / "diversity.png", 12, scale=2).view(8, 12, 16, 16, 3).int()
    low_res, samples, mean, regression, high_res = rows.split([1, 8, 1, 1, 1], dim=1)
    for found, name in ((low_res, "lr"), (high_res, "hr"), (regression, "sr")):
        grid = cells(trained[1].parent / f"{name}-000020.png", 8)
        assert (found[:, 0] - grid[:8]).abs().max() <= (name == "sr")
    assert (mean[:, 0] - samples.double().mean(1)).abs().max() < 0.51
    assert (samples[:, 1:] != samples[:, :1]).flatten(2).any(2).all()  # no two alike
    few = cells(judged[0] / "comparison.png", 7, scale=3).view(8, 7, 16, 16, 3)
    assert torch.equal(few.int(), torch.cat([low_res, regression, samples[:, :4], high_res], dim=1))


def test_a_single_image_without_a_label_has_neither_judges_nor_nan(tiny_config, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(10):  # one of them for testing
        Image.new("RGB", (20, 18), (10 * i, 100, 200)).save(tmp_path / f"pictures/{i}.png")
    flags = ["--data_dir", tmp_path / "pictures"]
    output = run(tiny_config(dataset="folder", channels=3, num_training_steps=1), tmp_path / "output", *flags)
    table, results, _ = judge(output, output / "checkpoint.pt", *flags)
    assert results["num_images"] == 1 and list(results["methods"])[2:] == ["SR3", "SR3, mean of 2 samples"]
    assert all(row["accuracy"] is row["fool_rate"] is None for row in results["methods"].values())
    assert "nan" not in table and (output / "diversity.png").exists() and (output / "checkpoint.pt").exists()


def test_checkpoints_of_other_data_and_bad_flags_are_refused_in_one_line(trained, tmp_path, capsys):
    path, weights = trained[0], torch.load(trained[0])
    for setting, value in (("low_res_size", 8), ("dataset", "mnist")):
        weights["config"]["data"][setting] = value
        torch.save(weights, tmp_path / f"{value}.pt")
    for words, arguments in (
        ("dataset='mnist'", [path, tmp_path / "mnist.pt"]),
        ("of the same data", [path, tmp_path / "8.pt"]),
        ("none.pt", [path, tmp_path / "none.pt"]),
        ("--num_images is 0", [path, "--num_images", 0]),
        ("CHECKPOINT", []),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            judge(tmp_path / "new", *arguments)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and not (tmp_path / "new").exists()
        assert error.count("\n") == len(lines_of("evaluate.py: ", error)) == 1 and words in error


@pytest.mark.parametrize("script", ["train_mnist.py", "evaluate.py"])
def test_help_is_printed_on_a_console_that_lacks_its_letters(monkeypatch, script):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    console.flush()
    assert exit.value.code == 0 and b"--data_dir" in console.buffer.getvalue()
