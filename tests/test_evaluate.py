"""evaluate.py: its table against independent arithmetic, its picture, and what it takes and refuses."""

import math
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, cells, draw_few_digits, raising, run
from PIL import Image

import evaluate
import metrics
from utils import load_model, make_pair, super_resolve, to_unit

QUICK = "--num_images", 5


def judge(output, *arguments):
    """evaluate.py in this process; returns results.md, and the numbers in each of its rows' cells."""
    call(evaluate, *arguments, "--output_dir", output, "--device", "cpu")
    text = (output / "results.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return text, {name: [[float(n) for n in re.findall(r"[\d.]+", cell)] for cell in row] for name, *row in rows}


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(metrics, "train_network", lambda network, *_, **__: network.eval())


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
    (images, labels), (tests, test_labels) = (draw_few_digits(n, 16, 3, i) for i, n in enumerate((60_000, 10_000)))
    it.seeds = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:70]  # numbers in the test set
    it.labels, it.low_res = test_labels[it.seeds], make_pair(tests[it.seeds], 4)[1]
    it.truth, it.small, it.context = map(to_unit, make_pair(tests[it.seeds], 4))
    it.classifier = metrics.train_classifier(images / 255, labels)
    guesser = metrics.train_guesser(to_unit(make_pair(images, 4)[1]), labels)
    it.guess = guesser(it.small).softmax(dim=1).detach()
    it.sr3, it.regression = map(load_model, it.paths)
    it.samples = [super_resolve(it.sr3, it.low_res, it.seeds + 500 * j) for j in range(8)]
    it.answer = super_resolve(it.regression, it.low_res, it.seeds)
    return it


def score(statistic, *values):
    """A statistic and its standard error by leaving out each 20th of the images in turn."""
    values = [np.asarray(some.detach().double()) for some in values]
    left = [statistic(*(np.delete(some, np.s_[i::20], axis=0) for some in values)) for i in range(20)]
    return pytest.approx([statistic(*values), 19**0.5 * np.std(left)], rel=1e-3, abs=1e-4)


def test_the_table_has_a_row_for_each_method_and_is_printed_without_errors(judged, tmp_path, untrained, capsys):
    headings = "PSNR ↑ | SSIM ↑ | consistency ↓ | colour shift ↓ | accuracy | Fréchet distance ↓"
    assert judged.text.startswith(f"|  | {headings} | fool rate → 50% | spread / error → 1 | calibration error ↓ |\n")
    assert list(judged.scores) == ["real digits", "bicubic", "regression", "SR3", "a perfect sampler"]
    assert "\n\n70 test images of digits, 4×4 → 16×16. regression: 20 training steps. SR3: 20 training" in judged.text
    text, scores = judge(tmp_path, *judged.paths[::-1], *QUICK)
    assert capsys.readouterr().out == re.sub(r" ± [\d.]+", "", text) and "±" in text
    assert list(scores) == list(judged.scores) and "calibration" not in text  # of two samples


def test_figures_and_their_standard_errors_agree_with_independent_arithmetic(judged):
    truth, context, bicubic = judged.truth, judged.context, (255 * judged.context).round() / 255
    for name, images in (("SR3", judged.samples[0]), ("regression", judged.answer), ("bicubic", bicubic)):
        decibels = -10 * (images - truth).double().square().flatten(1).mean(1).log10()
        shift = 255 * (images - truth).double().mean((2, 3)).abs().mean(1)
        right = 100.0 * (judged.classifier(images).argmax(1) == judged.labels)
        values = decibels, metrics.ssim(images, truth), metrics.consistency(images, judged.small), shift, right
        assert judged.scores[name][:5] == [score(np.mean, value) for value in values], name
    spread, error = ((judged.samples[0] - others).square().mean((1, 2, 3)) for others in (judged.samples[1], truth))
    assert judged.scores["SR3"][7] == score(lambda a, b: a.sum() / b.sum(), spread, error)
    assert judged.scores["regression"][7] == [0, 0]
    verdicts = 100 * torch.stack([metrics.fool_rate(truth, truth, context, seed) for seed in range(3)], dim=1)
    (rate, of_images), of_judges = score(np.nanmean, verdicts).expected, verdicts.nanmean(0).std().item() / 3**0.5
    fooled = pytest.approx([rate, math.hypot(of_images, of_judges)], rel=1e-3)
    *exact, accuracy, frechet, real_fooled = judged.scores["real digits"][:7]
    assert exact == [[], [1, 0], [0, 0], [0, 0]] and accuracy[0] > 90 and real_fooled == fooled and rate > 30

    right = judged.guess[range(70), judged.labels]  # how often p(y | x) draws the right digit
    psnr, *others, _ = judged.scores["a perfect sampler"]
    assert psnr == pytest.approx(np.subtract(judged.scores["regression"][0], [3.0103, 0]), abs=1e-3)
    assert others == [[], [0], [], score(np.mean, 100 * right), frechet, [50], [1]]


def test_the_standard_error_of_a_mean_is_that_of_independent_values():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    figure, error = map(float, evaluate.estimate(".6f", values).split(" ± "))
    assert (figure, error) == pytest.approx((values.mean().item(), values.std().item() / 20**0.5), abs=1e-6)


def test_the_calibration_of_four_samples_is_told_below_the_table(judged):
    classes = torch.stack([judged.classifier(some).argmax(dim=1) for some in judged.samples[:4]], dim=1)
    error, bins = metrics.calibration(classes, judged.labels)
    lines = "".join(f"\n- {share:.0%} → {right:.0%} ({number:.0f})" for share, right, number in bins)
    assert f"\n\nSR3: share of samples that agree → how often they are right (of how many)\n{lines}\n" in judged.text
    assert judged.scores["SR3"][8][0] == pytest.approx(100 * error.item(), abs=1e-4)
    accuracy, *_, error = judged.scores["regression"][4:]
    assert error == pytest.approx([100 - accuracy[0], accuracy[1]], abs=1e-4)  # it is always sure
    assert 0 < judged.scores["a perfect sampler"][8][0] < error[0]


def test_the_picture_has_five_rows_from_ambiguous_to_clear(judged):
    entropy = -(judged.guess * judged.guess.log()).sum(1)  # of a guess at the digit from x alone
    wanted = np.linspace(1, 0.2, 5) * np.quantile(entropy, 0.98)  # of 70: for the last two samples may be no digits
    rows = np.abs(entropy.numpy() - wanted[:, None]).argmin(1)
    samples = torch.stack(judged.samples)[:, rows]
    squares = judged.small[rows].repeat_interleave(4, 2).repeat_interleave(4, 3)
    columns = [squares, judged.answer[rows], samples.mean(0), *samples[:4], judged.truth[rows]]
    grid = cells(judged.folder / "comparison.png", 8, scale=3).view(5, 8, 16, 16, 3).permute(0, 1, 4, 2, 3) / 255
    assert (grid - torch.stack(columns, dim=1)).abs().max() < 1.01 / 255


def test_pictures_without_labels_have_no_classes_to_judge_and_one_is_enough(tmp_path, monkeypatch):
    for i in range(8):
        Image.linear_gradient("L").rotate(18 * i).save(tmp_path / f"{i}.png")
    data = ["--data_dir", tmp_path]
    output = run(tmp_path / "output", *data, dataset="folder", num_training_steps=1)
    monkeypatch.setattr(metrics, "train_network", raising(AssertionError("a network was trained")))
    text, scores = judge(output, "--sampling_steps", 2, output / "checkpoint.pt", *data, "--num_samples", 3)
    assert text.startswith("|  | PSNR ↑ | SSIM ↑ | consistency ↓ | spread / error → 1 | fool rate → 50% |\n")
    assert list(scores) == ["real images", "bicubic", "SR3", "a perfect sampler"]
    assert len(cells(output / "comparison.png", 7, scale=3)) % 7 == 0  # without a regression


def test_a_name_that_is_no_text_costs_nothing(judged, tmp_path, untrained):
    path = shutil.copy(judged.paths[0], os.fsdecode(bytes(tmp_path) + b"/\xff.pt"))
    assert f"SR3 ({tmp_path}/?.pt)" in judge(tmp_path, judged.paths[0], path, *QUICK)[1]


def test_what_can_not_be_written_is_a_line_but_the_table_is_printed_before(judged, tmp_path, untrained, capsys):
    (tmp_path / "results.md").mkdir()
    with pytest.raises(SystemExit, match="^2$"):
        judge(tmp_path, judged.paths[0], *QUICK)
    printed = capsys.readouterr()
    assert "\n| SR3 | " in printed.out and "results.md" in printed.err


def test_checkpoints_of_other_data_and_bad_flags_are_refused_in_one_line(judged, tmp_path, failure, monkeypatch):
    monkeypatch.setattr(evaluate, "load_data", raising(AssertionError("it has begun")))
    path, weights = judged.paths[0], torch.load(judged.paths[0])
    for setting, value in (("low_res_size", 8), ("dataset", "mnist")):
        torch.save(weights | {"config": weights["config"] | {setting: value}}, tmp_path / f"{value}.pt")
    (tmp_path / "file").write_text("")
    for words, *arguments in (
        ("mnist-3x4-16", path, tmp_path / "mnist.pt"),
        ("digits-3x8-16", path, tmp_path / "8.pt"),
        ("give different checkpoints", path, judged.paths[1], path),
        ("none.pt", path, tmp_path / "none.pt"),
        ("num_images", path, "--num_images", 0),
        ("sampling_steps is 2001", path, "--sampling_steps", 2001),
        ("CHECKPOINT",),
    ):
        assert words in failure(judge, tmp_path / "new", *arguments) and not (tmp_path / "new").exists()
    assert "file" in failure(judge, tmp_path / "file", path)
