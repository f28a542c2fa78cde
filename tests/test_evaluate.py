"""evaluate.py: its table against independent arithmetic, its judges, and what it refuses."""

import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, cells, raising, run
from PIL import Image

import evaluate
import metrics
from support.data import load_data
from utils import load_model, make_pair, super_resolve, to_unit


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]


def judge(output, *arguments):
    """evaluate.py in this process; returns results.md, and the numbers in each of its rows' cells."""
    call(evaluate, *arguments, "--output_dir", output, "--device", "cpu")
    text = (output / "results.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return text, {name: [*map(numbers, row)] for name, *row in rows}


def score(*values, **options):
    """A figure and its standard error."""
    return pytest.approx(numbers(evaluate.estimate(".6f", *values, **options)), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """An SR3 and a regression, of coloured digits, judged by 70 images with six digits after the points."""
    it = SimpleNamespace(folder=tmp_path_factory.mktemp("judged"))
    folders = [run(it.folder / method, method=method, channels=3) for method in ("sr3", "regression")]
    it.paths = [folder / "checkpoint.pt" for folder in folders]
    with pytest.MonkeyPatch.context() as patch:
        estimate = evaluate.estimate
        patch.setattr(evaluate, "estimate", lambda form, *a, **b: estimate(f".6{form[-1]}", *a, **b))
        it.text, it.scores = judge(it.folder, *it.paths, "--num_images", 70, "--num_samples", 4)
    sr3, regression = map(load_model, it.paths)
    (images, labels), (tests, answers) = load_data(sr3.config, "")
    seeds = torch.randperm(500, generator=torch.manual_seed(0))[:70]  # numbers in the test set
    pair = _, low_res, _ = make_pair(tests[seeds], 4)
    it.truth, it.small, it.context = map(to_unit, pair)
    it.labels, it.classifier = answers[seeds], metrics.train_classifier(images / 255, labels)
    it.guess = metrics.train_guesser(to_unit(make_pair(images, 4)[1]), labels)(it.small).softmax(dim=1).detach()
    it.samples = [super_resolve(sr3, low_res, seeds + 500 * j) for j in range(4)]
    it.answer = super_resolve(regression, low_res, seeds)
    return it


def test_the_table_has_a_row_for_each_method(judged):
    headings = "PSNR ↑ | SSIM ↑ | consistency ↓ | colour shift ↓ | accuracy | Fréchet distance ↓"
    assert judged.text.startswith(f"|  | {headings} | fool rate → 50% | spread / error → 1 | calibration error ↓ |\n")
    assert list(judged.scores) == ["real images", "bicubic", "regression", "SR3", "a perfect sampler"]
    assert "\n\n70 test images of digits, 4×4 → 16×16. regression: 20 training steps. SR3: 20 training" in judged.text
    assert cells(judged.folder / "comparison.png", scale=3).shape[:2] == (5, 8)


def test_a_second_model_of_a_kind_has_a_row_even_if_its_name_is_no_text(judged, tmp_path, capsys):
    path = shutil.copy(judged.paths[0], os.fsdecode(bytes(tmp_path) + b"/\xff.pt"))
    text, scores = judge(tmp_path, *judged.paths, path, "--num_images", 5)
    assert capsys.readouterr().out.encode(errors="replace").decode() == text
    assert scores.keys() - judged.scores.keys() == {f"SR3 ({tmp_path}/?.pt)"}


def test_figures_agree_with_independent_arithmetic(judged):
    truth, context = judged.truth, judged.context
    for name, images in (("SR3", judged.samples[0]), ("regression", judged.answer)):
        pixels = [metrics.psnr(images, truth), metrics.ssim(images, truth), metrics.consistency(images, judged.small)]
        right = 100.0 * (judged.classifier(images).argmax(1) == judged.labels)
        values = *pixels, metrics.color_shift(images, truth), right
        assert judged.scores[name][:5] == [score(value) for value in values], name
    squares = [metrics.squared_difference(judged.samples[0], others) for others in (judged.samples[1], truth)]
    assert judged.scores["SR3"][7] == score(*squares, statistic=lambda spread, error: spread.sum() / error.sum())
    assert judged.scores["regression"][7] == [0, 0]
    verdicts = 100 * torch.stack([metrics.fool_rate(truth, truth, context, seed) for seed in range(3)], dim=1)
    fooled = score(verdicts, statistic=torch.nanmean, luck=verdicts.nanmean(dim=0).std() / 3**0.5)
    *_, frechet, real_fooled, _, _ = judged.scores["real images"]
    assert real_fooled == fooled

    right = judged.guess.gather(1, judged.labels[:, None])  # how often p(y | x) draws the right digit
    psnr, *others, _ = judged.scores["a perfect sampler"]
    assert psnr[0] == pytest.approx(judged.scores["regression"][0][0] - 3.0103, abs=1e-3)
    assert others == [[], [0], [], score(100 * right), frechet, [50], [1]]


def test_the_standard_error_of_a_mean_is_that_of_independent_values():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    expected = [values.mean().item(), math.hypot(values.std() / 20**0.5, 0.2)]
    assert score(values, luck=0.2) == expected


def test_the_calibration_of_four_samples_is_told_below_the_table(judged):
    classes = torch.stack([judged.classifier(some).argmax(dim=1) for some in judged.samples], dim=1)
    error, bins = metrics.calibration(classes, judged.labels)
    lines = "".join(f"\n- {share:.0%} → {right:.0%} ({number:.0f})" for share, right, number in bins)
    assert f"\n\nSR3: share of samples that agree → how often they are right (of how many)\n{lines}\n" in judged.text
    assert judged.scores["SR3"][8][0] == pytest.approx(100 * error.item(), abs=1e-4)
    assert 0 < judged.scores["a perfect sampler"][8][0] < judged.scores["regression"][8][0]


def test_pictures_without_labels_have_no_classes_to_judge_and_one_is_enough(tmp_path, monkeypatch):
    for i in range(8):
        Image.linear_gradient("L").rotate(18 * i).save(tmp_path / f"{i}.png")
    output = run(tmp_path / "output", "--data_dir", tmp_path, dataset="folder", num_training_steps=1)
    monkeypatch.delattr(torch.optim, "Adam")
    text, scores = judge(output, output / "checkpoint.pt", "--data_dir", tmp_path, "--num_samples", 3)
    assert text.startswith("|  | PSNR ↑ | SSIM ↑ | consistency ↓ | spread / error → 1 | fool rate → 50% |\n")
    assert list(scores) == ["real images", "bicubic", "SR3", "a perfect sampler"]


def test_bad_input_is_refused_in_one_line_before_anything_is_done(judged, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(evaluate, "load_data", raising(AssertionError("it has begun")))
    path, _ = judged.paths
    for words, *arguments in (
        ("mnist-1x4-32", path, ROOT / "output/reference/8x/sr3.pt"),
        ("sampling_steps is 2001", path, "--sampling_steps", 2001),
    ):
        assert words in failure(judge, tmp_path / "new", *arguments) and not (tmp_path / "new").exists()
