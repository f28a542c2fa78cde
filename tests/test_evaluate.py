"""evaluate.py: its table against independent arithmetic, its picture, and what it takes and refuses."""

import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import evaluate  # first, as in the scripts: support comes before torch
import numpy as np
import pytest
import torch
from conftest import ROOT, call, cells, draw_few_digits, raising, run, snapshot
from PIL import Image

import metrics
from support import scores
from utils import downsample, load_model, super_resolve, to_float, to_unit, upsample


def judge(output, *arguments):
    """evaluate.py in this process; returns results.md, the numbers in each of its rows' cells, and its stdout."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(console):
        call(evaluate, *arguments, "--output_dir", output, "--device", "cpu")
    table = (output / "results.md").read_text(encoding="utf-8")
    assert "nan" not in table and "inf" not in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    scores = {name: [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in row] for name, *row in rows}
    return table, scores, console.buffer.getvalue()


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The exported weights of an SR3 and a regression, of coloured digits, judged on 70 images with six digits after
    the points. With the images, and what a network says of them that sees x alone."""
    it = SimpleNamespace(folder=tmp_path_factory.mktemp("judged"))
    for method in ("sr3", "regression"):
        run(it.folder / method, method=method, channels=3)
    it.paths = it.folder / "sr3/weights.pt", it.folder / "regression/checkpoint.pt"
    columns = {key: (heading, f".6{form[-1]}") for key, (heading, form) in scores.COLUMNS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export_weights.py", str(it.folder / "sr3/checkpoint.pt"), str(it.paths[0])])
        runpy.run_path(str(ROOT / "tools/export_weights.py"), run_name="__main__")
        patch.setattr(scores, "COLUMNS", columns)
        it.table, it.scores, it.stdout = judge(it.folder, *it.paths, "--num_images", 70)
    it.sr3, it.regression = map(load_model, it.paths)
    (images, labels), (tests, test_labels) = (draw_few_digits(n, 16, 3, i) for i, n in enumerate((60_000, 10_000)))
    it.seeds = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:70]  # numbers in the test set
    it.truth, it.labels = tests[it.seeds] / 255, test_labels[it.seeds]
    it.low_res = downsample(2 * it.truth - 1, 4)
    it.context = upsample(it.low_res, 16)
    guesser = metrics.train_guesser(to_unit(downsample(to_float(images), 4)), labels)
    it.guess = guesser(to_unit(it.low_res)).softmax(dim=1).detach().double()
    return it


def mean_of(values):
    return pytest.approx([values.mean().item(), values.std().item() / len(values) ** 0.5], rel=1e-4, abs=1e-5)


def test_the_table_has_a_row_for_each_method_in_order_and_is_printed_without_errors(judged):
    assert list(judged.scores) == ["real digits", "bicubic", "regression", "SR3", "a perfect sampler"]
    headings = "PSNR ↑ | SSIM ↑ | consistency ↓ | colour shift ↓ | accuracy | Fréchet distance ↓"
    assert judged.table.startswith(f"|  | {headings} | fool rate → 50% | spread / error → 1 |\n")
    steps = "regression: 20 training steps, SR3: 20 training steps"
    assert judged.table.endswith(f"\n\n70 test images of digits, 4×4 → 16×16. {steps}.\n")
    plain = re.sub(r" ± [\d.]+", "", judged.table).encode("ascii", "replace")  # the console lacks its letters
    assert judged.stdout.splitlines() == plain.splitlines()
    for paths in (judged.paths, judged.paths[::-1]):  # their order does not matter
        assert list(evaluate.load_models(paths, torch.device("cpu"), None)) == ["regression", "SR3"]


def test_means_and_standard_errors_agree_with_independent_arithmetic(judged):
    truth, scores = judged.truth, judged.scores
    first, second = (super_resolve(judged.sr3, judged.low_res, (judged.seeds + offset).tolist()) for offset in (0, 500))
    outputs = {"SR3": first, "regression": super_resolve(judged.regression, judged.low_res, judged.seeds.tolist())}
    outputs["bicubic"] = ((judged.context + 1) * 127.5).round() / 255
    for name, images in outputs.items():
        decibels = -10 * (images - truth).double().square().flatten(1).mean(1).log10()
        shift = 255 * (images - truth).double().mean((2, 3)).abs().mean(1)
        values = decibels, metrics.ssim(images, truth), metrics.consistency(images, to_unit(judged.low_res)), shift
        assert scores[name][:4] == [mean_of(value) for value in values], name
    *exact, (accuracy, _), (frechet, _), (fooled, _), spread = scores["real digits"]
    assert exact == [[], [1, 0], [0, 0], [0, 0]] and accuracy > 90 and frechet < scores["bicubic"][5][0]
    assert abs(fooled - 50) < 4 * 50 / 60**0.5 and scores["bicubic"][6][0] < 30  # 7/8 of the 70 are asked about
    verdicts = np.stack([metrics.fool_rate(first, truth, to_unit(judged.context), seed) for seed in range(3)])
    of_images = [np.mean(column[np.isfinite(column)]) for column in verdicts.T if np.isfinite(column).any()]
    of_judges = [np.mean(row[np.isfinite(row)]) for row in verdicts]
    error = np.hypot(np.std(of_images, ddof=1) / len(of_images) ** 0.5, np.std(of_judges, ddof=1) / 3**0.5)
    assert scores["SR3"][6] == pytest.approx([100 * np.mean(of_judges), 100 * error], abs=1e-4)

    spread, error = ((first - others).square().mean((1, 2, 3)).numpy() for others in (second, truth))
    ratio = spread.mean() / error.mean()
    left_out = [np.delete(spread, np.s_[i::20]).sum() / np.delete(error, np.s_[i::20]).sum() for i in range(20)]
    jackknife = 19**0.5 * np.std(left_out)
    linear = (spread - ratio * error).std(ddof=1) / 70**0.5 / error.mean()  # by the delta method
    assert scores["SR3"][7] == pytest.approx([ratio, jackknife], rel=2e-3) and scores["regression"][7] == [0, 0]
    assert jackknife == pytest.approx(linear, rel=0.5)


def test_the_perfect_sampler_has_twice_the_error_of_the_regression_and_what_else_theory_says(judged):
    decibels, error = judged.scores["regression"][0]
    psnr, *cells, accuracy, frechet, fooled, spread = judged.scores["a perfect sampler"]
    assert psnr == pytest.approx([decibels - 3.0103, error], abs=1e-4) and cells == [[], [0, 0], []]
    right = judged.guess[torch.arange(70), judged.labels]  # how often it draws the right digit
    assert accuracy == mean_of(100 * right) and frechet == judged.scores["real digits"][5]
    assert fooled == [50, 0] and spread == [1, 0]


def test_the_picture_has_labelled_columns_and_five_rows_of_eight_from_the_more_ambiguous_half(judged):
    picture = Image.open(judged.folder / "comparison.png")
    assert picture.height == 16 + 3 * (8 * 18 + 2)  # labels, and pixels of 3 × 3
    grid = cells(picture, 8, scale=3).view(8, 8, 16, 16, 3).permute(0, 1, 4, 2, 3) / 255
    chosen = [(judged.truth - truth).abs().flatten(1).amax(1).argmin().item() for truth in grid[:, 7]]
    entropy = -(judged.guess * judged.guess.log()).sum(1)  # of a guess at the digit from x alone
    highest = np.quantile(entropy, 0.98)  # of 70: neither the first nor the second, whose samples may be no digits
    for i, wanted in enumerate(np.linspace(highest, highest / 5, 8)):
        others = [j for j in range(70) if j not in chosen[:i]]
        assert abs(entropy[chosen[i]] - wanted) <= min(abs(entropy[j] - wanted) for j in others) + 1e-6
    assert len(set(chosen)) == 8 and sum(entropy[i] > highest / 2 for i in chosen) in (5, 6)

    low_res, seeds = judged.low_res[chosen], judged.seeds[chosen]
    samples = torch.stack([super_resolve(judged.sr3, low_res, (seeds + 500 * i).tolist()) for i in range(8)], dim=1)
    assert (samples[:, 1:] != samples[:, :1]).flatten(2).any(2).all()  # no two alike
    squares = to_unit(low_res).repeat_interleave(4, 2).repeat_interleave(4, 3)
    answer = super_resolve(judged.regression, low_res, seeds.tolist())
    columns = [squares, answer, samples.mean(1), *samples[:, :4].unbind(1), judged.truth[chosen]]
    assert (grid - torch.stack(columns, dim=1)).abs().max() < 1.01 / 255


def test_what_an_image_is_given_does_not_depend_on_how_many_are_judged(judged, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "super_resolve", lambda *a: calls.append(a[1:]) or super_resolve(*a))
    monkeypatch.setattr(metrics, "train_network", lambda network, *_, **__: network.eval())
    for number in (3, 7):
        judge(tmp_path, judged.paths[0], "--num_images", number)
    few, few_again, _, more, more_again, (_, drawn) = calls
    for (low_res, seeds), (other, other_seeds) in ((few, more), (few_again, more_again)):
        assert torch.equal(low_res, other[:3]) and seeds == other_seeds[:3]
    assert more[1] == judged.seeds[:7].tolist() and len({*more[1], *more_again[1]}) == 14  # no two share their noise
    assert len(set(drawn)) == len(drawn) == 7 * 8 and {*more[1], *more_again[1]} < set(drawn)  # the picture's


def test_judges_are_kept_for_the_very_images_that_they_learned_from(judged, tmp_path, monkeypatch, capsys):
    (kept,) = judged.folder.glob("judges-*.pt")
    path, good, trained = tmp_path / kept.name, torch.load(kept, weights_only=True), []
    (images, labels), tests = draw_few_digits(60_000, 16, 3, 0), draw_few_digits(10_000, 16, 3, 1)
    monkeypatch.setattr(metrics, "train_network", lambda network, *_, **__: trained.append(1) or network.eval())

    def judged_again(judges, data=(images, labels)):
        """Whether the judges were read, with the number of them that were trained."""
        trained.clear()
        torch.save(judges, path) if isinstance(judges, dict) else path.write_bytes(judges)
        monkeypatch.setattr(evaluate, "load_data", lambda *_: (data, tests))
        _, _, stdout = judge(tmp_path, judged.paths[0], "--num_images", 5)
        return f"judges read from {path}".encode() in stdout, len(trained)

    assert judged_again(kept.read_bytes()) == (True, 0)
    other_data, other_network = good | {"data": good["data"][:-1] + "?"}, good | {"guesser": good["classifier"]}
    cut_off, foreign = kept.read_bytes()[:-1000], judged.paths[0].read_bytes()
    for damaged in (other_data, other_network, {"data": good["data"]}, b"", cut_off, foreign):
        assert judged_again(damaged) == (False, 2)
    for other in ((images.flip(0), labels), (images, 9 - labels)):  # as many, of the same name
        assert judged_again(kept.read_bytes(), other) == (False, 2)
        assert judged_again(path.read_bytes(), other) == (True, 0)  # those have been kept instead
    path.unlink()
    path.mkdir()  # where they can be neither read nor written, the table comes all the same
    judge(tmp_path, judged.paths[0], "--num_images", 5)
    assert f"{kept.name} can't be written" in capsys.readouterr().err


def test_the_place_is_tried_first_and_a_file_that_cannot_be_written_costs_neither_table_nor_the_other(
    judged, tmp_path, monkeypatch, failure, capsys
):
    arguments = judged.paths[0], "--num_images", 5
    monkeypatch.setattr(metrics, "train_network", lambda network, *_, **__: network.eval())
    for name in ("results.md", "comparison.png"):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "load_data", raising(AssertionError("it has begun")))
            assert name in failure(judge, tmp_path, *arguments)
        (tmp_path / name).rmdir()
    (tmp_path / "file").write_text("")
    assert "file" in failure(judge, tmp_path / "file", *arguments)

    judge(tmp_path / "good", *arguments)
    for function, lost in (("write_atomically", "results.md"), ("save_picture", "comparison.png")):
        path = tmp_path / function / lost
        console = io.StringIO()
        with pytest.raises(SystemExit) as exit, redirect_stdout(console), monkeypatch.context() as patch:
            patch.setattr(evaluate, function, raising(OSError(28, "No space left on device", str(path))))
            call(evaluate, *arguments, "--output_dir", path.parent, "--device", "cpu")
        assert exit.value.code == 2 and f"{lost} can't be written: No space left" in capsys.readouterr().err
        assert "\n| SR3 | " in console.getvalue()
        whole = snapshot(tmp_path / "good", ".md", ".png")
        assert snapshot(path.parent, ".md", ".png") == {name: whole[name] for name in whole if name != lost}


def test_pictures_without_labels_have_no_classes_to_judge_and_two_are_enough(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for i in (14, 47, 1, 2, 3, 4, 5, 6):  # names decide: the first two are for testing
        Image.linear_gradient("L").rotate(18 * i).save(tmp_path / f"pictures/{i}.png")
    data = ["--data_dir", tmp_path / "pictures"]
    output = run(tmp_path / "pictures/output", *data, dataset="folder", num_training_steps=1)
    monkeypatch.setattr(metrics, "train_network", raising(AssertionError("a network was trained")))
    table, scores, _ = judge(output, "--sampling_steps", 2, output / "checkpoint.pt", *data)
    assert list(scores) == ["real images", "bicubic", "SR3", "a perfect sampler"]
    assert (output / "checkpoint.pt").exists()  # it moves nothing away, and takes no grid for a picture
    assert all(row[3:5] == [[], []] for row in scores.values()) and "colour" not in table  # no accuracy, no distance
    assert re.search(r"\| bicubic \| \d+\.\d ± \d+\.\d \|", table) and "\n2 test images of folder" in table
    assert len(cells(output / "comparison.png", 7, scale=3)) == 2 * 7  # without a regression
    _, scores, _ = judge(output, "--num_images", 1, output / "checkpoint.pt", *data)
    assert len(scores["SR3"][0]) == 1  # no standard error


def test_checkpoints_of_other_data_and_bad_flags_are_refused_in_one_line(judged, tmp_path, failure):
    path, weights = judged.paths[0], torch.load(judged.paths[0])
    for setting, value in (("low_res_size", 8), ("dataset", "mnist")):
        torch.save(weights | {"config": weights["config"] | {setting: value}}, tmp_path / f"{value}.pt")
    for words, *arguments in (
        ("dataset is mnist", path, tmp_path / "mnist.pt"),
        ("low_res_size is 8", path, tmp_path / "8.pt"),
        ("given twice", path, judged.paths[1], path),
        ("none.pt", path, tmp_path / "none.pt"),
        ("'0' is not a whole number above 0", path, "--num_images", 0),
        ("sampling_steps is 2001: it must be at most num_timesteps, 2000", path, "--sampling_steps", 2001),
        ("CHECKPOINT",),
    ):
        assert words in failure(judge, tmp_path / "new", *arguments) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", ["train_mnist.py", "evaluate.py", "sample.py"])
def test_help_is_printed_also_on_a_console_that_lacks_its_letters(monkeypatch, script):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="^0$"), redirect_stdout(console):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert console.seek(0) == 0 and "--device" in console.read()
