"""README.md: its links exist, its quotes are the code, its tables, curves and weights are those of the reference."""

import csv
import functools
import importlib
import os
import re
import shlex
import textwrap

import pytest
import torch
from conftest import ROOT

import train_mnist
import utils
from metrics import psnr
from sr3 import load_model

REFERENCE = ROOT / "output/reference"
TEXT, NOTES = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, REFERENCE))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
CODE = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]]


@pytest.mark.parametrize("folder, text", [(ROOT, TEXT), (REFERENCE, NOTES)], ids=["lesson", "reference"])
def test_every_link_and_picture_resolves(folder, text):
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 3
    for link in links:
        assert link.startswith("https://") or (folder / link).exists(), link


def test_every_function_of_the_map_is_in_the_file_that_it_links_to():
    named = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", TEXT)
    assert len(named) >= 15
    for name, module in named:
        thing = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        assert thing.__module__ == module, name


def test_it_is_short_names_every_file_and_has_eight_exercises():
    assert len(re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).split()) < 2000
    assert all(path.name in TEXT for path in ROOT.glob("*.py"))
    assert len(re.findall(r"^\d\. ", TEXT.split("Eight exercises")[1], re.M)) == 8


def test_quoted_code_is_the_code_and_the_lines_that_use_the_shipped_weights_work(monkeypatch):
    *quotes, usage = [body for language, body in BLOCKS if language == "python"]
    assert len(quotes) >= 5
    for quote in quotes:
        indented = [f"\n{textwrap.indent(quote, indent * ' ')}" for indent in (4, 8, 12)]
        assert any(lines in text for lines in indented for text in CODE), quote
    monkeypatch.chdir(ROOT)
    names = {}
    exec(usage.replace("steps=25", "steps=2"), names)
    assert names["images"].shape == (8, 1, 32, 32) and names["images"].isfinite().all()


def test_commands_name_files_and_flags_that_exist():
    flags = {"--help", "--no-compile", "--standalone", "--nproc_per_node", "--index-url"}
    flags |= set(re.findall(r'"(--\w+)"', "".join(CODE)))
    text = TEXT + NOTES
    assert set(re.findall(r"(?<!\w)--[a-z]\w*(?:-[a-z]+)*", text)) <= flags
    code = " ".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    for path in re.findall(r"(?<![\w./])(?:configs|tools|tests)?/?\w+\.(?:py|toml|txt)(?!\w)", code):
        assert (ROOT / path).exists(), path
    assert all(shlex.split(body) for language, body in BLOCKS if language == "bash")


def test_the_tables_are_those_of_the_reference():
    for factor in ("4x", "8x"):
        lines = (REFERENCE / factor / "results.md").read_text(encoding="utf-8").splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 7 and "\n".join(table) in TEXT


def chart(title):
    """The x-axis and the lines of a Mermaid chart."""
    [body] = [body for language, body in BLOCKS if language == "mermaid" and title in body]
    rows = re.findall(r"(?:x-axis.*|line) \[(.*?)\]", body)
    return [[float(number) for number in row.split(",")] for row in rows]


def test_the_curves_are_those_of_the_reference():
    steps, *lines = chart("PSNR")
    for name, line in zip(("log-regression.csv", "log.csv"), lines, strict=True):
        rows = csv.DictReader((REFERENCE / "8x" / name).read_text(encoding="utf-8").splitlines())
        log = {int(row["step"]): float(row["psnr"]) for row in rows if row["psnr"]}
        assert line == [pytest.approx(log[int(step)], abs=0.051) for step in steps] and max(log) == steps[-1]
    rows = re.findall(r"^\| (\d+) \| [\d.]+ / ([\d.]+)", (REFERENCE / "8x/refinement_steps.md").read_text(), re.M)
    assert [(float(step), float(spread)) for step, spread in rows] == list(zip(*chart("refinement steps"), strict=True))


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR doesn't name a folder with MNIST")
@pytest.mark.parametrize("line, name, tolerance", [(1, "regression", 0.1), (2, "sr3", 0.3)])
def test_the_shipped_weights_draw_digits_as_well_as_the_readme_says(all_cores, line, name, tolerance):
    config = utils.load_config(ROOT / "configs/mnist_8x.toml")
    images, _ = utils.load_data_set(config.data, False, os.environ["SR3_DATA_DIR"])
    high_res, _, context = train_mnist.make_pair(images[:64], config)
    generator = torch.Generator().manual_seed(config.training.seed)
    drawn = load_model(REFERENCE / f"8x/{name}.pt").sample(context, config.sampling.steps, generator=generator)
    found = psnr(utils.to_unit(drawn), utils.to_unit(high_res)).mean().item()
    assert found == pytest.approx(chart("PSNR")[line][-1], abs=tolerance)


@pytest.mark.parametrize("factor, config", [("4x", "mnist"), ("8x", "mnist_8x")])
def test_the_reference_was_trained_by_the_shipped_configs(factor, config):
    for name, path in (("sr3", f"configs/{config}.toml"), ("regression", f"configs/{config}_regression.toml")):
        model, expected = load_model(REFERENCE / factor / f"{name}.pt"), utils.load_config(ROOT / path)
        assert model.config == expected and model.training_steps == expected.training.num_training_steps


def test_the_reference_is_small():
    sizes = {path: path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()}
    others = [size for path, size in sizes.items() if path.suffix != ".pt"]
    assert sum(sizes.values()) - sum(others) < 30_000_000 and sum(others) < 5_000_000 and max(others) < 1_500_000
