"""README.md: its links exist, its quotes are the code, its table, pictures and weights are those of the reference."""

import csv
import functools
import importlib
import os
import re
import shlex
import textwrap

import pytest
from conftest import ROOT
from PIL import Image

import utils
from metrics import psnr

REFERENCE = ROOT / "output/reference"
TEXT, NOTES = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, REFERENCE))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
CODE = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]]


@pytest.mark.parametrize("folder, text", [(ROOT, TEXT), (REFERENCE, NOTES)], ids=["lesson", "reference"])
def test_every_link_resolves_and_every_picture_is_large_enough_to_see(folder, text):
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert link.startswith("https://") or (folder / link).exists(), link
    pictures = [folder / picture for picture in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", text)]
    assert pictures and all(Image.open(picture).width >= 600 for picture in pictures)
    assert all(picture.stat().st_size < 2_500_000 for picture in pictures)


def test_every_function_of_the_map_is_in_the_file_that_it_links_to():
    named = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py\)", TEXT)
    assert len(named) >= 15
    for name, module in named:
        thing = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        assert thing.__module__ == module, name


def test_it_is_read_in_ten_minutes():
    prose = re.sub(r"```.*?```|^\|.*?$", "", TEXT, flags=re.DOTALL | re.MULTILINE)  # without code and tables
    assert len(prose.split()) <= 2400


def test_quoted_code_is_the_code_and_the_lines_that_use_the_shipped_weights_work(monkeypatch, tmp_path):
    quotes = [body for language, body in BLOCKS if language == "python"]
    [usage] = [quote for quote in quotes if "load_model" in quote]
    quotes.remove(usage)
    assert len(quotes) >= 7
    for quote in quotes:
        indented = [f"\n{textwrap.indent(quote, indent * ' ')}" for indent in (4, 8, 12)]
        assert any(lines in text for lines in indented for text in CODE), quote
    names, weights = {}, ROOT / "output/reference/8x/sr3.pt"
    monkeypatch.chdir(tmp_path)
    exec(usage.replace("output/reference/8x/sr3.pt", str(weights)).replace("steps=25", "steps=2"), names)
    assert names["images"].shape == (8, 1, 32, 32) and names["images"].isfinite().all()
    assert (tmp_path / "samples.png").exists()


def test_commands_name_files_and_flags_that_exist():
    flags = {"--help", "--standalone", "--nproc_per_node", "--index-url", *(f"--{name}" for name in utils.DEFAULTS)}
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
        assert vars(model.config) == utils.DEFAULTS | changed | {"num_training_steps": steps} and model.step == steps
        assert path.stat().st_size < 2.2 * sum(weight.numel() for weight in model.parameters())  # bytes: half precision


@pytest.mark.skipif("SR3_DATA_DIR" not in os.environ, reason="SR3_DATA_DIR names no folder with MNIST")
@pytest.mark.parametrize("method, log", [("sr3", "log.csv"), ("regression", "log-regression.csv")])
def test_the_shipped_weights_draw_digits_as_well_as_their_logs_say(all_cores, method, log):
    """The log's last row is of 64 digits; other noise than the training's changes their mean by less than 0.5 dB."""
    model = utils.load_model(REFERENCE / f"8x/{method}.pt")
    images = utils.load_data(model.config, os.environ["SR3_DATA_DIR"])[1][0][:64]
    high_res, _, context = utils.make_pair(images, 4)
    found = psnr(utils.super_resolve(model, context, 25), utils.to_unit(high_res)).mean().item()
    rows = list(csv.DictReader((REFERENCE / "8x" / log).read_text(encoding="utf-8").splitlines()))
    expected = float(rows[-1]["psnr"])
    assert rows[-1]["step"] == "20000" and found == pytest.approx(expected, abs=0.05 if method == "regression" else 0.5)
