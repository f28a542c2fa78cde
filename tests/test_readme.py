"""README.md: its links exist, its quotes are the code, its table, pictures and weights are those of the reference."""

import csv
import functools
import importlib.util
import os
import re
import shlex
import textwrap

import pytest
from conftest import ROOT
from PIL import Image

import utils
from metrics import psnr
from support.data import load_data
from support.settings import DEFAULTS

REFERENCE = ROOT / "output/reference"
TEXT, NOTES = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, REFERENCE))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
FILES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")]
CODE = [path.read_text(encoding="utf-8") for path in FILES]


@pytest.mark.parametrize("folder, text", [(ROOT, TEXT), (REFERENCE, NOTES)], ids=["lesson", "reference"])
def test_every_link_resolves_and_every_picture_is_large_enough_to_see(folder, text):
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        is_heading = link.startswith("#") and re.search(f"^#+ {link[1:]}$", text, re.MULTILINE | re.IGNORECASE)
        assert link.startswith("https://") or is_heading or (folder / link).exists(), link
    pictures = [folder / picture for picture in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", text)]
    assert pictures and all(Image.open(picture).width >= 600 for picture in pictures)
    assert all(picture.stat().st_size < 2_500_000 for picture in pictures)


def test_every_function_of_the_map_is_in_the_file_that_it_links_to():
    named = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", TEXT)
    assert len(named) >= 15
    for name, module in named:
        thing = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        assert thing.__module__ == module, name


def test_what_comes_before_the_results_is_short():
    prose = re.sub(r"```.*?```|^\|.*?$", "", TEXT.split("\n## Results")[0], flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) <= 1300  # words, without code and tables


def test_quoted_code_is_the_code_and_the_lines_that_use_the_shipped_weights_work(monkeypatch, tmp_path):
    quotes = [body for language, body in BLOCKS if language == "python"]
    usages = [quote for quote in quotes if "load_model" in quote]
    assert len(usages) == 2 and len(quotes) >= 10
    for quote in quotes:
        indented = [f"\n{textwrap.indent(quote, indent * ' ')}" for indent in (4, 8, 12, 16)]
        assert quote in usages or any(lines in text for lines in indented for text in CODE), quote
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").symlink_to(ROOT / "output")
    for usage, number in zip(usages, (8, 24)):
        if "sklearn" in usage and not importlib.util.find_spec("sklearn"):
            continue  # no requirement of the lesson
        names = {}
        exec(usage, names)
        assert names["images"].shape == (number, 1, 32, 32) and names["images"].std() > 0.2
    assert (tmp_path / "samples.png").exists()


def test_the_charts_show_the_shipped_log():
    rows = {int(row["step"]): row for row in csv.DictReader((REFERENCE / "8x/log.csv").open(encoding="utf-8"))}
    charts = re.findall(r"x-axis \[(.*?)\].*?y-axis \"(PSNR|loss).*?line \[(.*?)\]", TEXT, re.DOTALL)
    assert [column for _, column, _ in charts] == ["PSNR", "loss"]
    for steps, column, values in charts:
        expected = [float(rows[int(step)][column.lower()]) for step in steps.split(", ")]
        rounding = 0.051 if column == "PSNR" else 0.0006
        assert [float(value) for value in values.split(", ")] == pytest.approx(expected, abs=rounding)


def test_commands_name_files_and_flags_that_exist():
    flags = {"--help", "--standalone", "--nproc_per_node", "--index-url", *(f"--{name}" for name in DEFAULTS)}
    flags |= set(re.findall(r'"(--\w+)"', "".join(CODE)))
    text = TEXT + NOTES
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-[a-z]+)*", text)) <= flags
    code = " ".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    for path in re.findall(r"(?<![\w./])(?:configs|tools|tests)?/?\w+\.(?:py|toml|txt)(?!\w)", code):
        assert (ROOT / path).exists(), path
    assert all(shlex.split(body) for language, body in BLOCKS if language == "bash")


def test_the_tables_are_those_of_the_reference_without_their_errors():
    for folder, text in (("8x", TEXT), ("4x", NOTES)):
        lines = (REFERENCE / folder / "results.md").read_text(encoding="utf-8").splitlines()
        table = "\n".join(line for line in lines if line.startswith("|"))
        assert table.count("\n") == 6 and re.sub(r" ± [\d.]+", "", table) in text


@pytest.mark.parametrize("factor, low_res_size, steps", [("8x", 4, 20_000), ("4x", 8, 3_000)])
def test_the_reference_was_trained_by_the_default_config_and_is_small(factor, low_res_size, steps):
    for method in ("sr3", "regression"):
        path = REFERENCE / factor / f"{method}.pt"
        model, changed = utils.load_model(path), {"method": method, "low_res_size": low_res_size}
        assert vars(model.config) == DEFAULTS | changed | {"num_training_steps": steps} and model.step == steps
        assert path.stat().st_size < 2.2 * sum(weight.numel() for weight in model.parameters())  # bytes: half precision


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR names no folder with MNIST")
@pytest.mark.parametrize("method, log", [("sr3", "log.csv"), ("regression", "log-regression.csv")])
def test_the_shipped_weights_draw_digits_as_well_as_their_logs_say(all_cores, method, log):
    """The log's last row is of the same 64 digits and noise; weights in half precision change their mean a little."""
    model = utils.load_model(REFERENCE / f"8x/{method}.pt")
    images = load_data(model.config, os.environ["SR3_DATA_DIR"])[1][0][:64]
    high_res, low_res, _ = utils.make_pair(images, 4)
    found = psnr(utils.super_resolve(model, low_res, range(64)), utils.to_unit(high_res)).mean().item()
    rows = list(csv.DictReader((REFERENCE / "8x" / log).read_text(encoding="utf-8").splitlines()))
    expected = float(rows[-1]["psnr"])
    assert rows[-1]["step"] == "20000" and found == pytest.approx(expected, abs=0.05 if method == "regression" else 0.2)
