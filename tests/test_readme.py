"""README.md, and that of the reference: links lead somewhere, quotes are the code, commands are the scripts'."""

import re

import pytest
from conftest import ROOT

from support.settings import DEFAULTS

TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "output/reference/README.md")}
BLOCKS = re.findall(r"^```python\n(.*?)^```", "".join(TEXTS.values()), re.DOTALL | re.MULTILINE)


def stripped(text):
    """Quotes are indented less than the code."""
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_quoted_is_the_code_and_examples_import_what_exists(block):
    if block.startswith(("from ", "import ")):  # some packages are no requirements
        compile(block, "README.md", "exec")
        for line in re.findall(r"^(?:from|import) (?!sklearn|matplotlib).*", block, re.MULTILINE):
            exec(line)
    else:
        code = [stripped((ROOT / f"{name}.py").read_text("utf-8")) for name in ("train_mnist", "sr3", "unet", "utils")]
        assert any(stripped(block) in text for text in code)


@pytest.mark.parametrize("path", TEXTS)
def test_every_file_that_is_linked_or_shown_exists(path):
    for link in re.findall(r'(?:\]\(|src=")([^)\s"#]+)', TEXTS[path]):
        assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize("path", TEXTS)
def test_commands_name_scripts_configs_and_flags_that_exist(path):
    commands = re.findall(r"\b(?:python|torchrun) [^`]*?([\w/]+\.py)((?:(?!python|torchrun)[^`])*)", TEXTS[path])
    for script, arguments in commands:
        code = (ROOT / script).read_text(encoding="utf-8")
        settings = [f"--{name}" for name in (*DEFAULTS, "config_path") if "add_settings(" in code]
        flags = {*settings, *re.findall(r'"(--\w+)"', code)}
        assert {*re.findall(r"--\w+", arguments)} <= flags, (script, arguments)
        assert all((ROOT / config).exists() for config in re.findall(r"configs/\w+\.toml", arguments))
    assert commands
