"""README.md: its links exist, its quotes are the code, its tables, curves and weights are those of the reference."""

import csv
import functools
import importlib
import os
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train_mnist
import utils
from metrics import psnr
from sr3 import load_model

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "output/reference"
NOTES = (REFERENCE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("path", [ROOT / "README.md", REFERENCE / "README.md"], ids=["lesson", "reference"])
def test_every_link_and_picture_resolves(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert len(links) > 3 and not any("#L" in link for link in links)
    for link in links:
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), link


def test_every_function_of_the_map_is_in_the_file_that_it_links_to():
    named = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", TEXT)
    assert len(named) >= 15
    for name, module in named:
        thing = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        assert thing.__module__ == module, name


def test_it_is_short_and_names_every_file():
    assert len(PROSE.split()) < 2000
    assert all(f"{path.name}" in TEXT for path in ROOT.glob("*.py"))
    assert len(re.findall(r"^\d\. ", TEXT.split("Eight exercises")[1], re.M)) == 8


QUOTES = [body for language, body in BLOCKS if language == "python" and "import" not in body]


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote.split("=")[0].strip())
def test_quoted_code_is_the_code(quote):
    code = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    assert any(f"\n{textwrap.indent(quote, indent * ' ')}" in text for indent in (4, 8, 12) for text in code)


def test_the_lines_that_use_the_shipped_weights_work(monkeypatch):
    [usage] = [body for language, body in BLOCKS if language == "python" and "import" in body]
    monkeypatch.chdir(ROOT)
    names = {"low_res": torch.rand(2, 1, 4, 4) * 2 - 1}
    exec(usage.replace("steps=25", "steps=2"), names)
    assert names["images"].shape == (2, 1, 32, 32) and names["images"].isfinite().all()


def test_commands_name_files_and_flags_that_exist(capsys):
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    flags = set(re.findall(r'"(--\w+)"', "".join(path.read_text(encoding="utf-8") for path in scripts)))
    flags |= {"--help", "--no-compile", "--standalone", "--nproc_per_node", "--index-url"}
    text = TEXT + NOTES
    assert set(re.findall(r"(?<!\w)--[a-z]\w*(?:-[a-z]+)*", text)) <= flags
    code = " ".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)) + " ".join(re.findall(r"`([^`\n]+)`", text))
    for path in re.findall(r"(?<![\w./])(?:configs|tools|tests)?/?\w+\.(?:py|toml|txt)(?!\w)", code):
        assert (ROOT / path).exists(), path
    assert all(shlex.split(body) for language, body in BLOCKS if language == "bash")


@pytest.mark.parametrize("factor", ["4x", "8x"])
def test_the_tables_are_those_of_the_reference(factor):
    lines = (REFERENCE / factor / "results.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line[:1] == "|"]
    assert len(table) == 7 and "\n".join(table) in TEXT


def numbers(line):
    return [float(number) for number in line.strip(" []\n").split(",")]


def chart(title):
    """The x-axis and the lines of a Mermaid chart."""
    [body] = [body for language, body in BLOCKS if language == "mermaid" and title in body]
    return numbers(re.search(r"x-axis.*?\[(.*?)\]", body)[1]), [numbers(m) for m in re.findall(r"line \[(.*?)\]", body)]


def test_the_training_curves_are_the_reference_logs():
    steps, lines = chart("PSNR")
    for name, line in zip(("log-regression.csv", "log.csv"), lines, strict=True):
        rows = csv.DictReader((REFERENCE / "8x" / name).read_text(encoding="utf-8").splitlines())
        log = {int(row["step"]): float(row["psnr"]) for row in rows if row["psnr"]}
        assert line == [pytest.approx(log[int(step)], abs=0.051) for step in steps]
        assert max(log) == steps[-1]


def test_the_curve_over_refinement_steps_is_the_reference_table():
    steps, [line] = chart("refinement steps")
    rows = re.findall(r"^\| (\d+) \| [\d.]+ / ([\d.]+)", (REFERENCE / "8x/refinement_steps.md").read_text(), re.M)
    assert [(float(step), float(spread)) for step, spread in rows] == list(zip(steps, line, strict=True))


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR doesn't name a folder with MNIST")
@pytest.mark.parametrize("index, name", [(0, "regression"), (1, "sr3")])
def test_the_shipped_weights_draw_64_digits_as_well_as_the_readme_says(index, name):
    config = utils.load_config(ROOT / f"configs/mnist_8x{'_regression' if name == 'regression' else ''}.toml")
    images, _ = utils.load_data_set("mnist", False, os.environ["SR3_DATA_DIR"], 32, 1)
    high_res, _, context = train_mnist.make_pair(images[:64], config)
    generator = torch.Generator().manual_seed(config.training.seed)
    model = load_model(REFERENCE / f"8x/{name}.pt")
    drawn = model.sample(context, config.sampling.steps, generator=generator)
    found = psnr(utils.to_unit(drawn), utils.to_unit(high_res)).mean().item()
    assert found == pytest.approx(chart("PSNR")[1][index][-1], abs=0.3)


def test_the_reference_was_trained_by_the_shipped_configs():
    for factor in ("4x", "8x"):
        for name in ("sr3", "regression"):
            weights = utils.load_checkpoint(REFERENCE / factor / f"{name}.pt")
            path = f"mnist{'_8x' * (factor == '8x')}{'_regression' * (name == 'regression')}.toml"
            config = utils.load_config(ROOT / "configs" / path)
            assert utils.parse_config(weights["config"], path) == config
            assert weights["step"] == config.training.num_training_steps and weights["dataset"] == "mnist"


def test_the_reference_is_small():
    sizes = {path: path.stat().st_size for path in Path(REFERENCE).rglob("*") if path.is_file()}
    weights = sum(size for path, size in sizes.items() if path.suffix == ".pt")
    assert weights < 30_000_000 and sum(sizes.values()) - weights < 5_000_000
    assert sizes[REFERENCE / "8x/refinement.gif"] < 1_500_000
    assert all(size < 1_500_000 for path, size in sizes.items() if path.suffix != ".pt")
