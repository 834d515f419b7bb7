"""The name of a run."""

import re
from types import SimpleNamespace

import pytest

from pipeline.run_folder.paths import name_run
from pipeline.settings.config import Config


@pytest.mark.parametrize("dataset", [".", "./", "../my photos", "sub/.."])
def test_a_run_is_named_after_the_folder_that_the_path_leads_to(tmp_path, monkeypatch, dataset):
    (tmp_path / "my photos" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my photos")
    named = name_run(Config(dataset=dataset, output_dir=str(tmp_path)), SimpleNamespace(num_processes=1))
    assert re.fullmatch(r"my_photos-resnet18-\d{8}[-_]\d{6}", named.run_name)


def test_a_run_on_a_hub_set_is_named_after_the_set():
    named = name_run(Config(dataset="owner/pets"), SimpleNamespace(num_processes=1))
    assert named.run_name.startswith("pets-resnet18-")
