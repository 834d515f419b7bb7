"""The name of a run."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import torchrun

from pipeline.run_folder.lock import FolderLock
from pipeline.run_folder.paths import named_run
from pipeline.settings.config import Config

ONE = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.mark.parametrize("dataset", [".", "./", "../my photos", "sub/.."])
def test_a_run_is_named_after_the_folder_that_the_path_leads_to(tmp_path, monkeypatch, dataset):
    (tmp_path / "my photos" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my photos")
    with named_run(Config(dataset=dataset, output_dir=str(tmp_path)), ONE) as named:
        assert re.fullmatch(r"my_photos-resnet18-\d{8}[-_]\d{6}", named.run_name) and named.run_dir.is_dir()


def test_a_new_name_fits_into_a_file_system_and_a_given_one_that_does_not_is_refused(tmp_path):
    config = Config(dataset=str(tmp_path / ("猫" * 85)), model_name="local-dir:" + "m" * 250, output_dir=str(tmp_path))
    with named_run(config, ONE) as named:
        assert named.run_name.startswith(f"{26 * '猫'}-local_dir_{70 * 'm'}-2") and named.run_dir.is_dir()
    with pytest.raises(ValueError, match=r"\(File name too long\)\. Choose a shorter run_name"):
        FolderLock(tmp_path / ("x" * 256))


def test_a_run_on_a_hub_set_is_named_after_the_set():
    with named_run(Config(dataset="owner/pets", dry_run=True), ONE) as named:
        assert named.run_name.startswith("pets-resnet18-") and not named.run_dir.exists()


def test_runs_that_start_in_the_same_second_get_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20261125-120000")
    number = 8
    barrier = threading.Barrier(number)

    def start(_):
        barrier.wait()
        with named_run(Config(output_dir=str(tmp_path / "runs")), ONE) as named:
            barrier.wait()  # all hold their names
            (named.run_dir / "config.yaml").write_text("")
            return named.run_name

    with ThreadPoolExecutor(number) as pool:
        names = set(pool.map(start, range(number)))
    base = "digits-resnet18-20261125_120000"
    assert names == {base, *(f"{base}-{suffix}" for suffix in range(2, number + 1))}
    assert names == {path.name for path in (tmp_path / "runs").iterdir()}


def test_the_folder_of_a_run_that_does_not_start_is_removed_and_a_given_one_stays(tmp_path):
    for name, left in ((None, []), ("mine", ["mine"])):
        if name is not None:
            (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="no data"):
            with named_run(Config(output_dir=str(tmp_path), run_name=name), ONE):
                raise ValueError("no data")
        assert [path.name for path in tmp_path.iterdir()] == left


def test_only_the_first_rank_takes_a_name_and_all_have_it(tmp_path):
    arguments = ["--model_name=simple_mlp", "--max_train_samples=100", "--epochs=1", f"--output_dir={tmp_path}"]
    done = torchrun(2, *arguments)
    assert done.returncode == 0, done.stderr
    (run_dir,) = tmp_path.iterdir()
    assert (run_dir / "summary.json").is_file()


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write into .*file.*another output_dir"):
        with named_run(Config(output_dir=str(tmp_path / "file")), ONE):
            pass
