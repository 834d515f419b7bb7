"""Training from Python, in the kernel of a notebook: runs one after another, two processes, bars, errors."""

import json
import os

import pytest
from conftest import ROOT, free_port, run_process, wait_for

from pipeline.common.console import in_notebook, progress_bar
from pipeline.settings.config import Config
from pipeline.settings.parser import checked, read_config

SETTINGS = {"model_name": "simple_mlp", "epochs": 1, "max_train_samples": 200, "batch_size": 50}


class Notebook:
    """A kernel as a notebook starts it."""

    def __init__(self, folder):
        from jupyter_client.manager import KernelManager

        own = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), "ACCELERATE_USE_CPU": "true"}
        self.manager = KernelManager(kernel_name="python3", transport="ipc", connection_file=str(folder / "kernel.json"))
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, **own})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def run(self, code, value="None"):
        """Runs a cell; returns the value of an expression as JSON holds it, and what the cell printed."""
        printed = []

        def keep(message):
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))

        expressions = {"value": f"__import__('json').dumps({value})"}
        reply = self.client.execute_interactive(code, output_hook=keep, timeout=300, user_expressions=expressions)
        text = "".join(printed)
        assert reply["content"]["status"] == "ok", text
        return json.loads(eval(reply["content"]["user_expressions"]["value"]["data"]["text/plain"])), text

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def notebook(tmp_path):
    pytest.importorskip("ipykernel")
    kernel = Notebook(tmp_path)
    yield kernel
    kernel.close()


@pytest.mark.slow
def test_a_notebook_trains_in_two_processes_then_run_after_run_and_its_stop_button_saves(notebook, tmp_path):
    value = "sorted({'torch', 'datasets', 'timm'} & set(__import__('sys').modules))"
    assert notebook.run("from pipeline import Config", value)[0] == []
    notebook.run(f"from pipeline import train\nfrom accelerate import notebook_launcher\nsettings = {SETTINGS}")
    launch = f"notebook_launcher(train, (Config(**settings, run_name='two'),), num_processes=2, use_port={free_port()})"
    _, printed = notebook.run(launch)
    assert "epoch 1/1" in printed and "Launching training on 2" in printed
    one, _ = notebook.run("one = train(Config(**settings, run_name='one'))", "one")
    two = json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())
    assert (one["num_processes"], two["num_processes"]) == (1, 2) and one["steps"] == two["steps"]
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], abs=1e-6)
    assert one == json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    # Accelerate refuses another precision in a process that has made an accelerator
    half, _ = notebook.run("half = train(Config(**settings, mixed_precision='bf16'))", "half")
    assert half["mixed_precision"] == "bf16" and half["status"] == "completed"
    bar = "from pipeline.common.console import progress_bar\nbar = progress_bar(2, 0, 'epoch', True)"
    assert notebook.run(bar, "[type(bar).__module__, bar.disable]")[0] == ["tqdm.notebook", False]
    notebook.client.execute("train(Config(**{**settings, 'epochs': 10_000}, run_name='stopped'))")
    stopped = tmp_path / "runs" / "stopped"
    wait_for(lambda: (stopped / "metrics.jsonl").is_file() and "val" in (stopped / "metrics.jsonl").read_text())
    notebook.manager.interrupt_kernel()
    reply = notebook.client.get_shell_msg(timeout=120)["content"]
    assert (reply["ename"], reply["evalue"]) == ("Interrupted", "SIGINT")
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "interrupted" and list((stopped / "checkpoints").iterdir())


def test_outside_a_notebook_bars_are_of_the_terminal():
    assert not in_notebook()
    with progress_bar(2, 0, "epoch", True) as bar:
        assert type(bar).__module__ == "tqdm.std"


def test_a_config_of_python_is_checked_as_that_of_a_command_line():
    given = Config(lr=1, step_epochs=[1.0, 2.0], batch_size_schedule={1: 64}, mixed_precision="no", epochs=3)
    assert checked(given) == read_config(
        ["--lr=1", "--step_epochs=[1, 2]", "--batch_size_schedule={1: 64}", "--mixed_precision=no", "--epochs=3"]
    )
    for wrong in ({"lr": -1.0}, {"lr": "fast"}, {"epochs": 1.5}, {"augment": "ligth"}, {"batch_size_schedule": {5: "all"}}):
        with pytest.raises(ValueError, match=next(iter(wrong))) as error:
            checked(Config(**wrong))
        assert "\n" not in str(error.value)


def test_the_package_has_config_and_train_and_nothing_else_and_imports_them_when_used():
    program = (
        "import sys, pipeline\n"
        "assert not {'torch', 'yaml', 'timm'} & set(sys.modules) and pipeline.__all__ == ['Config', 'train']\n"
        "from pipeline import Config\n"
        "assert Config is sys.modules['pipeline.settings.config'].Config and 'torch' not in sys.modules\n"
        "try: pipeline.tarin\n"
        "except AttributeError as error: assert 'tarin' in str(error)\n"
        "else: sys.exit('no error')\n"
    )
    done = run_process("-c", program, fresh=True)
    assert done.returncode == 0, done.stderr
