"""README.md: what it links to exists, what it quotes is the code, and its tables are those of output/reference/."""

import csv
import functools
import importlib
import inspect
import re
import shlex
import textwrap

import pytest
import torch
from conftest import ROOT, write_tiny_config

import train_mnist

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "output/reference"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)


def section(title):
    return re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)[1]


def test_every_link_and_picture_resolves():
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert len(links) > 40
    for link in links:
        if not link.startswith("https://"):
            assert (ROOT / link.split("#")[0]).exists(), link


NAMED = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py#L(\d+)-L(\d+)\)", TEXT)


@pytest.mark.parametrize("name, module, first, last", sorted(set(NAMED)))
def test_every_named_function_is_at_the_lines_that_the_map_gives(name, module, first, last):
    thing = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    lines, start = inspect.getsourcelines(thing)
    assert (int(first), int(last)) == (start, start + len(lines) - 1)


def test_every_line_that_an_exercise_begins_at_holds_what_it_says():
    named = re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", TEXT)
    assert len(named) >= 8
    for code, path, line in named:
        assert code in (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1], (code, path, line)


def test_no_link_to_lines_escapes_these_tests():
    checked = len(NAMED) + len(re.findall(r"\[`[^`]+`\]\([\w./]+#L\d+\)", TEXT))
    assert len(re.findall(r"\]\([^)]*#L", TEXT)) == checked


def test_the_map_has_every_equation_both_algorithms_and_every_metric():
    table = section("3. The map: paper → code")
    for part in [*(f"({number})" for number in range(1, 12)), "Algorithm 1", "Algorithm 2", "1/√2", "FiLM", "p(γ)"]:
        assert part in table, part
    for part in ("PSNR", "SSIM", "consistency", "fool rate", "accuracy", "FID", "regression"):
        assert part in table, part


CODE = [(path, path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")]
QUOTES = [body for language, body in BLOCKS if language == "python" and "import" not in body]


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote.split("=")[0].strip())
def test_quoted_code_is_the_code(quote):
    for indent in (4, 8, 12):
        if any(f"\n{textwrap.indent(quote, indent * ' ')}" in text for _, text in CODE):
            return
    raise AssertionError("these lines don't stand in any module")


def test_the_three_lines_that_use_a_trained_model_work(tmp_path):
    [usage] = [body for language, body in BLOCKS if language == "python" and "import" in body]
    config = write_tiny_config(tmp_path / "tiny.toml", image_size=32, low_res_size=8, num_training_steps=1)
    train_mnist.main(["--config_path", str(config), "--output_dir", str(tmp_path), "--device", "cpu"])
    names = {"low_res": torch.rand(2, 1, 8, 8)}
    exec(usage.replace("output/checkpoint.pt", str(tmp_path / "checkpoint.pt")).replace("steps=25", "steps=2"), names)
    assert names["images"].shape == (2, 1, 32, 32)


def test_commands_name_files_and_flags_that_exist(capsys):
    with pytest.raises(SystemExit):
        train_mnist.parse_flags(["--help"])
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    flags = set(re.findall(r"--\w[\w-]*", capsys.readouterr().out)) | {"--standalone", "--nproc_per_node"}
    flags |= set(re.findall(r'add_argument\("(--\w+)"', scripts))
    assert set(re.findall(r"(?<!\w)--[a-z]\w*(?:-[a-z]+)*", TEXT)) <= flags
    code = " ".join(body for language, body in BLOCKS if language == "bash") + " ".join(re.findall(r"`([^`]+)`", PROSE))
    for path in re.findall(r"(?<![\w./])[\w/]+\.(?:py|toml|txt)(?!\w)", code):
        assert (ROOT / path).exists(), path
    assert all(shlex.split(body) for language, body in BLOCKS if language == "bash")


def test_the_table_of_methods_is_the_reference_runs():
    table = [line for line in (REFERENCE / "results.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert len(table) == 6 and "\n".join(table) in TEXT


def test_the_growth_table_is_the_reference_runs():
    logs = {
        name: {row["step"]: row for row in csv.DictReader((REFERENCE / name).read_text().splitlines())}
        for name in ("log.csv", "log-regression.csv")
    }
    rows = re.findall(
        r"^\| (\d[\d,]*) \| ([\d.]+) / ([\d.]+) / ([\d.]+) \| ([\d.]+) / ([\d.]+) / ([\d.]+) \|$", TEXT, re.M
    )
    assert len(rows) >= 5
    for step, *cells in rows:
        found = [logs[name][step.replace(",", "")] for name in logs]
        expected = [
            f"{float(row[key]):{f}}"
            for row in found
            for key, f in (("psnr", ".1f"), ("ssim", ".2f"), ("consistency", ".1f"))
        ]
        assert cells == expected


def test_the_reference_results_are_small():
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()) < 2_000_000
