"""docs/settings.md: generated from Config, complete, and never stale."""

import re
import subprocess
import sys
from dataclasses import asdict

import yaml
from conftest import ROOT

from pipeline.settings.config import DEFAULTS, FIELDS, SECTIONS
from pipeline.settings.parser import SettingsLoader, read_config
from pipeline.settings.reference import main, reference_text

PAGE = (ROOT / "docs" / "settings.md").read_text()


def rows() -> dict[str, list[str]]:
    """The cells behind each setting's name: type and limits, default, meaning."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| `(.*?)` \| (.*) \|$", PAGE, re.MULTILINE)
    return {name: cells for name, *cells in found}


def test_the_page_is_what_the_command_prints(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == PAGE, "run: python -m pipeline.settings.reference > docs/settings.md"


def test_every_setting_has_a_row_in_the_section_of_its_name():
    assert list(rows()) == list(FIELDS)
    assert re.findall(r"^## (.*)", PAGE, re.MULTILINE)[2:] == list(SECTIONS.values())
    for first, title in SECTIONS.items():
        table = PAGE.split(f"\n## {title}\n")[1]
        assert re.search(r"^\| `(\w+)`", table, re.MULTILINE)[1] == first


def test_the_defaults_of_the_page_read_as_the_defaults():
    defaults = {name: default for name, (_, default, _) in rows().items()}
    assert {name: yaml.load(default, SettingsLoader) for name, default in defaults.items()} == asdict(DEFAULTS)
    assert read_config([f"--{name}={default}" for name, default in defaults.items()]) == DEFAULTS


def test_the_values_that_the_page_shows_mean_the_same_in_a_file_and_on_a_command_line(tmp_path):
    pairs = re.findall(r"^\| [\w ]+ \| (`\w+: .*`) \| `(--\w+) '?([^'`]+)'?` \|$", PAGE, re.MULTILINE)
    assert len(pairs) == 6
    for in_file, option, value in pairs:
        for written in re.findall(r"`(.*?)`", in_file):
            (tmp_path / "settings.yaml").write_text(f"epochs: 20\n{written}\n")
            from_file = read_config(["--config", str(tmp_path / "settings.yaml")])
            assert from_file == read_config(["--epochs", "20", option, value]), written


def test_the_command_imports_no_torch():
    code = "import sys; from pipeline.settings.reference import main; main([]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == reference_text()
