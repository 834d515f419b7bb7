"""The benchmarks' commands: every figure is present and, by a clock that ticks when it is read, exact. Speed is not tested."""

import importlib.util
import itertools
import json
import math
import os
import re
import select
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
from conftest import PYTHONPATH, end_of, run_process, start_process, wait_for

from pipeline.benchmark import child, children, efficiency, loaders, loop, lr, ours, startup, stepclock, waiting
from pipeline.benchmark.__main__ import COMMANDS, main
from pipeline.benchmark.children import run_child, run_program, running
from pipeline.benchmark.measuring import in_turns, summarise
from pipeline.benchmark.reporting import machine_facts, number
from pipeline.benchmark.results import tables_of
from pipeline.benchmark.sets import made_image, make_set
from pipeline.common.stopping import Interrupted, TrainingFailed
from pipeline.common.system import is_alive, process_tree, tree_memory

SMALL = {"model_name": "simple_mlp", "made_size": 16, "num_images": 64, "batch_size": 16, "rounds": 1}
PEERS = [
    name
    for package, name in {"timm": "timm's loader", "pytorch_accelerated": "pytorch-accelerated"}.items()
    if importlib.util.find_spec(package)
]
TICK = 0.125  # seconds, of a clock that advances when it is read; its sums are exact
PEAK = 3 * 2**20  # bytes of memory, of contenders in this process
FACTS = {"section", "command", "date", "cpu", "cores", "versions", "row", "n", "device", "threads"}


@pytest.fixture
def in_this_process(monkeypatch, tmp_path, forking_python):
    """Contenders run here, one after another, without the seconds that a process takes to start; torchrun's are forks."""
    real = children.run_program
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHON_EXEC", str(forking_python))

    def run_program(command, result_path, environment=None):
        if "torch.distributed.run" in command:
            return real([str(forking_python), *command[1:]], result_path, environment)
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        began = time.time()
        assert child.main(list(command[command.index("pipeline.benchmark.child") + 1 :])) == 0
        result = json.loads(result_path.read_text())
        printed = "import time:       300 |        300 | torch\n" if "importtime" in command else ""
        result |= {"peak_memory_bytes": PEAK, "stderr": printed}
        return result | {"seconds_to_start": result.get("first_step_at", began) - began}

    monkeypatch.setattr(children, "run_program", run_program)
    monkeypatch.setattr(startup, "run_program", lambda command, path: real([str(forking_python), *command[2:]], path))


@pytest.fixture
def ticking(monkeypatch):
    """Gives four modules clocks of their own, which advance by a TICK each time that they are read."""

    def clock():
        ticks = itertools.count()
        return SimpleNamespace(perf_counter=lambda: TICK * next(ticks), time=time.time)

    for module in (stepclock, loaders, ours, waiting):
        monkeypatch.setattr(module, "time", clock())


def check_three_steps(row, batch_size):
    """That a row's figures are those of three steps: the ticking clock is read before, after each, and at the end."""
    assert row["median"] == 3 * batch_size / (4 * TICK)
    # a tick of waiting for each batch; at the end of an epoch, here of two of the largest batches, for none
    assert row["wait_fraction"] == (3 + (batch_size == 32)) / 4
    assert row["peak_memory_bytes"] == PEAK


def measured(command, tmp_path, capsys, *more, **given):
    """The rows that a benchmark writes, after the checks that hold for all: facts, order of figures, ratios, the table."""
    flags = [f"--{name}={value}" for name, value in {**SMALL, **given}.items() if value is not None]
    argv = [command, *flags, *more, "--output", str(tmp_path / "out")]  # --output is not a condition
    assert main(argv) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    lines = (tmp_path / "out" / f"benchmark-{command}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert (tmp_path / "out" / f"benchmark-{command}.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows) > 0
    for row in rows:
        if "median" in row:
            check_figures(row, rows, printed)
        assert row["command"] == f"python -m pipeline.benchmark {shlex.join(argv[:-2])}" and row["command"] in printed
        assert row["versions"]["torch"] in printed and row["cpu"] in printed and row["date"] in printed
        assert row["section"] in printed
    check_markdown(tmp_path / "out" / f"benchmark-{command}.jsonl", rows, printed)
    return rows


@pytest.mark.parametrize("output", [["--output", "a folder"], ["--output=a folder"], []])
def test_the_command_of_a_row_is_without_the_folder_of_its_output(output):
    command = machine_facts(["loop", "--rounds", "1", *output, "--model_name=simple_mlp"])["command"]
    assert command == "python -m pipeline.benchmark loop --rounds 1 --model_name=simple_mlp"


def check_markdown(path, rows, printed):
    """That `results` makes a table of each section, with a line for each row, and has the notes that were printed."""
    text = tables_of([path])
    tables = {part.partition("\n")[0]: part for part in text.split("### ")[1:]}
    assert list(tables) == list(dict.fromkeys(row["section"] for row in rows))
    for section, table in tables.items():
        names = [row["row"] for row in rows if row["section"] == section]
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and rows[0]["command"] in table
    for note in (note for row in rows for note in row.get("notes", [])):
        assert f"\n\n{note}" in text and note in printed


def check_figures(row, rows, printed):
    """That a row's figures are those of its samples and of its section, and in the table."""
    assert row["n"] == len(row["samples"]) >= 1 and row["median"] == statistics.median(row["samples"])
    assert 0 < row["least"] <= row["median"] <= row["most"] < math.inf
    (reference,) = [r for r in rows if (r["section"], r["row"]) == (row["section"], row["ratio_to"])]
    assert row["ratio"] == row["median"] / reference["median"]
    starts = [line for line in printed.splitlines() if line.startswith(f"| {row['row']} ")]
    assert any(f" {number(row['median'])} " in line for line in starts)


def test_a_clock_counts_the_images_and_seconds_after_the_warm_up(ticking):
    clock = stepclock.StepClock(torch.device("cpu"), warmup_steps=2, seconds=3 * TICK)
    assert [clock.is_running] + [clock.step(size) for size in (1, 1)] == [False] * 3 and clock.is_running
    assert [clock.step(size) for size in (10, 20, 30)] == [False, False, True] and not clock.is_running
    # it was read at the end of the warm-up, after each of the three steps, and once more at the end
    figures = clock.figures()
    assert (figures["images_per_second"], figures["step_ms"], figures["steps"]) == (60 / (4 * TICK), 4000 * TICK / 3, 3)
    clock = stepclock.StepClock(torch.device("cpu"), warmup_steps=1, seconds=0.0, num_steps=2)
    assert [clock.step(5) for _ in range(3)] == [False, False, True]
    assert clock.figures()["images_per_second"] == 10 / TICK


def test_loop_compares_the_bare_loop_ours_and_the_peers(in_this_process, ticking, tmp_path, capsys):
    """After a step to warm up each is timed over three steps, in which a ticking clock advances by four ticks."""
    more = ("--fast", "--layouts")
    rows = measured("loop", tmp_path, capsys, *more, seconds=3 * TICK, warmup_steps=1, peer_workers=0)
    names = ["bare loop", "ours", "bare loop, channels_last", "ours, contiguous", "ours, bf16 and channels_last"]
    names += ["datasets and torchvision", *PEERS]
    assert [row["row"] for row in rows] == names
    for row in rows:
        assert row.keys() >= FACTS and row["unit"] == "images/s" and row["ratio_to"] == "bare loop"
        assert row["median"] == 3 * SMALL["batch_size"] / (4 * TICK) and row["peak_memory_bytes"] == PEAK


def test_loop_reports_the_speed_relative_to_each_peer():
    medians = {"bare loop": 8.0, "ours": 6.0, "datasets and torchvision": 3.0, "timm's loader": 4.0}
    rows = [{"row": name, "median": median} for name, median in medians.items()]
    assert loop.beside_peers(rows) == ["ours: 2.00 times datasets and torchvision, 1.50 times timm's loader"]
    assert loop.beside_peers(rows[:2]) == []


def test_loop_refuses_settings_that_the_peers_do_not_support(in_this_process, capsys):
    assert main(["loop", "--mixup", "0.2", "--num_images", "16"]) == 2
    assert "mixup" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("made_size, num_classes", [(8, 10), (None, 10)])
def test_peers_read_the_same_training_split_as_ours(in_this_process, tmp_path, made_size, num_classes):
    """Small PNG images stay as they are; photos are cropped to the model's size."""
    import torch

    from pipeline.benchmark.peers.loaders import plain_loader, timm_loader
    from pipeline.benchmark.sets import peer_set

    make_set(str(tmp_path), 20, made_size, "")
    settings = [f"--dataset={tmp_path}", "--model_name=simple_mlp", "--val_fraction=0", "--image_size=8"]
    data = peer_set(settings, str(tmp_path / "peers.parquet"), "")
    assert (data["num_images"], data["num_classes"], data["image_size"]) == (20, num_classes, 8)
    epochs = []
    for make in (plain_loader, timm_loader):
        batches = list(make(data, "light", 5, 0, torch.device("cpu")))
        assert [tuple(images.shape) for images, _ in batches] == [(5, 3, 8, 8)] * 4
        assert sorted(label for _, labels in batches for label in labels.tolist()) == sorted(list(range(10)) * 2)
        epochs.append(torch.cat([images for images, _ in batches]))
    if made_size is not None:  # too small to be cropped, the pixels are the same but for their order and mirroring
        sums = [images.sum((1, 2, 3)).sort().values for images in epochs]
        assert torch.allclose(*sums, atol=1e-3)


@pytest.mark.slow
def test_loaders_measures_ours_and_the_peers_at_equal_workers(in_this_process, ticking, tmp_path, capsys):
    more = {"num_photos": 16, "seconds": 0.01, "model_name": None}
    rows = measured("loaders", tmp_path, capsys, "--workers", "0", "1", **more)
    each = [f"{who}, {n}" for n in ("0 workers", "1 worker") for who in ("ours", "datasets and torchvision", "timm")]
    assert [row["row"] for row in rows] == ["ours, device", *each, *each]
    # one epoch after that to warm up, in which the clock is read twice
    epochs = [SMALL["num_images"] / (2 * TICK)] * (1 + len(each)) + [more["num_photos"] / (2 * TICK)] * len(each)
    assert [row["median"] for row in rows] == epochs
    assert {row["ratio_to"] for row in rows} == {"timm, 1 worker"} and all(row.keys() >= FACTS for row in rows)


@pytest.mark.slow
def test_checkpoint_reports_saving_as_a_share_of_an_epoch(in_this_process, tmp_path, capsys):
    rows = measured("checkpoint", tmp_path, capsys, steps=2, epoch_images=1600, rounds=2)
    saving, block = rows[:3], rows[3:]
    assert [row["row"] for row in saving] == [
        "accelerator.save_state",
        "ours: training is blocked",
        "ours: until it is on disk",
    ]
    epoch_ms = block[0]["median"] / 2 * 100
    assert [row["epoch_share"] for row in saving] == pytest.approx([row["median"] / epoch_ms for row in saving])
    assert [row["epoch_share"] for row in block] == pytest.approx(
        [(row["median"] - block[0]["median"]) / epoch_ms for row in block]
    )
    assert saving[1]["median"] < saving[2]["median"]
    # weights and momentum, and little else
    assert saving[2]["bytes_on_disk"] == pytest.approx(saving[0]["bytes_on_disk"], rel=0.1)


@pytest.mark.slow
def test_startup_times_starts_and_sums_imports_by_package(in_this_process, tmp_path, capsys):
    rows = measured("startup", tmp_path, capsys)
    names = ["bare script with timm", "ours, embedded digits", "ours, this set, from its cache"]
    names += ["ours, this set, first start", "datasets and torchvision", *PEERS]
    assert [row["row"] for row in rows if row["unit"] == "seconds"] == names
    assert [row["row"] for row in rows if row["unit"] == "ms"] == ["all", "torch"]


def test_imports_are_summed_by_package():
    lines = [(100, "torch"), (50, "torch.nn"), (30, "timm.layers"), (20, "_abc")]
    printed = "import time: self [us] | cumulative | imported package\n"
    printed += "".join(f"import time: {us:9} | {2 * us:10} |   {name}\n" for us, name in lines)
    rows = {row["row"]: row for row in startup.import_rows(printed)}
    assert {name: row["median"] for name, row in rows.items()} == pytest.approx(
        {"all": 0.2, "torch": 0.15, "timm": 0.03, "_abc": 0.02}
    )
    assert [rows[name]["modules"] for name in ("all", "torch", "timm")] == [4, 2, 1]


@pytest.mark.slow
def test_scaling_measures_processes_and_what_they_exchange(in_this_process, ticking, tmp_path, capsys):
    """The two processes have a real clock, the one process a ticking one."""
    rows = measured("scaling", tmp_path, capsys, "--processes", "1", "2", steps=2, warmup_steps=1)
    one, two = rows
    assert [row["row"] for row in rows] == ["1 process", "2 processes"]
    assert one["efficiency"] == 1 and two["efficiency"] == two["median"] / (2 * one["median"])
    model = timm.create_model("simple_mlp", img_size=16, num_classes=10)
    weights = sum(weight.numel() for weight in model.parameters())
    assert one["gradient_bytes"] == two["gradient_bytes"] == two["sent_bytes"] == 4 * weights and one["sent_bytes"] == 0
    assert one["all_reduce_ms"] is None and two["all_reduce_ms"] > 0
    assert one["median"] == 2 * SMALL["batch_size"] / TICK and one["step_ms"] == 1000 * TICK / 2
    assert one["loader_images_per_second"] == SMALL["num_images"] / TICK
    # a step of two processes takes the images of two
    assert two["median"] == pytest.approx(2 * SMALL["batch_size"] / (two["step_ms"] / 1000))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_efficiency_ends_in_a_recommendation(in_this_process, ticking, tmp_path, capsys):
    factors = ["--factors", "loader", "precision", "pin_memory", "batch_size", "--workers", "0"]
    rows = measured("efficiency", tmp_path, capsys, *factors, seconds=3 * TICK, warmup_steps=1)
    first = [row["row"] for row in rows if "one choice at a time" in row["section"]]
    assert first == [
        *("as given", "0 workers", "bf16", "contiguous", "bf16, contiguous"),
        *("batch 8", "batch 32", "pin_memory on, 0 workers", "pin_memory off, 0 workers"),
    ]
    assert [row["row"] for row in rows[len(first) :]] == ["as given", "recommended"]
    by_name = {row["row"]: row for row in rows}
    assert by_name["0 workers"]["loader"] == "workers" and by_name["bf16"]["loader"] == "device"
    for row in rows:
        check_three_steps(row, {"batch 8": 8, "batch 32": 32}.get(row["row"], SMALL["batch_size"]))
    assert by_name["recommended"]["median"] == by_name["as given"]["median"]  # all were alike


def test_efficiency_measures_settings_that_save_memory(in_this_process, ticking, tmp_path, capsys):
    more = ["--factors", "memory", "--model_name", "test_resnet"]
    rows = measured("efficiency", tmp_path, capsys, *more, seconds=3 * TICK, warmup_steps=1)
    assert [row["row"] for row in rows[:4]] == [
        *("as given", "gradient_checkpointing", "micro-batches of 4", "both, micro-batches of 4"),
    ]
    for row in rows:
        check_three_steps(row, SMALL["batch_size"])


def test_the_recommendation_follows_from_the_figures():
    factors = {
        "loader": {"0 workers": ["--num_workers=0"], "2 workers": ["--num_workers=2"]},
        "precision": {"bf16": ["--mixed_precision=bf16"]},
        "batch_size": {"batch 256": ["--batch_size=256"]},
        "memory": {"micro-batches of 32": ["--micro_batch_size=32"]},
    }
    medians = {"as given": 100.0, "0 workers": 101.0, "2 workers": 99.0, "bf16": 150.0, "batch 256": 200.0}
    medians["micro-batches of 32"] = 120.0
    assert efficiency.recommended(factors, medians) == ["bf16"]
    lines = efficiency.advice(["--mixed_precision=bf16"], 1.5, factors, medians)
    assert "--mixed_precision=bf16 (1.50 times" in lines[0] and "batch 256 runs at 2.00" in lines[1]
    assert efficiency.recommended(factors, {**medians, "2 workers": 103.0}) == ["2 workers", "bf16"]
    assert "as they are" in efficiency.advice([], 1.0, {}, medians)[0]


def test_lr_suggests_a_learning_rate_and_leaves_no_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_name", "simple_mlp", "--max_train_samples", "100", "--batch_size", "16", "--lr_end", "1000"]
    assert main(["lr", "--num_steps", "40", *flags]) == 0
    printed = capsys.readouterr().out
    assert "Suggested: --lr " in printed and "diverged after" in printed
    assert list(tmp_path.iterdir()) == []
    assert main(["lr", "--num_steps", "12", *flags, "--output", "out"]) == 0
    rows = [json.loads(line) for line in Path("out/benchmark-lr.jsonl").read_text().splitlines()]
    names = [".benchmark-lr.lock", "benchmark-lr.jsonl", "benchmark-lr.png"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    assert 2 < len(rows) <= 12 and all(row.keys() >= FACTS for row in rows)
    check_markdown(Path("out/benchmark-lr.jsonl"), rows, capsys.readouterr().out)
    assert any("Suggest" in note or "No suggestion" in note for note in rows[0]["notes"])
    ratios = [after["lr"] / before["lr"] for before, after in zip(rows, rows[1:])]
    assert rows[0]["lr"] == pytest.approx(1e-5) and ratios == pytest.approx([1e8 ** (1 / 11)] * len(ratios))


def test_the_suggestion_is_where_the_loss_falls_fastest():
    lrs = [10 ** (-5 + 6 * step / 119) for step in range(120)]

    def fall(rate):
        return 2.3 - 2 / (1 + (0.003 / rate) ** 2)  # steepest at 0.003 in the logarithm of the rate

    assert lr.suggestion(lrs, [fall(rate) for rate in lrs]) == pytest.approx(0.003, rel=0.15)
    risen = [fall(rate) if rate < 0.1 else 5.0 for rate in lrs]
    assert lr.suggestion(lrs, risen) == pytest.approx(0.003, rel=0.15)
    assert lr.suggestion(lrs, [1 + rate for rate in lrs]) is None
    assert lr.suggestion(lrs[:5], [5.0, 4.0, 3.0, 2.0, 1.0]) is None


def test_a_loss_diverges_when_it_is_infinite_or_far_above_its_lowest():
    assert lr.has_diverged([2.0, math.nan]) and lr.has_diverged([2.0] * 20 + [math.inf])
    assert not lr.has_diverged([2.0] * 20 + [20.0]) and lr.has_diverged([2.0] * 20 + [20.0] * 5)
    assert lr.smooth([3.0] * 7) == pytest.approx([3.0] * 7) == lr.moving_average([3.0] * 7)


def test_contenders_take_turns():
    order = []
    results = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ABC"}, 2)
    assert "".join(order) == "ABCABC" and results == {"A": [1, 4], "B": [2, 5], "C": [3, 6]}
    rows = summarise({"A": [4.0, 1.0, 2.0], "B": [8.0], "C": []}, "ms", "B", {"A": {"modules": 3}})
    assert [(row["row"], row["median"], row["ratio"]) for row in rows] == [("A", 2.0, 0.25), ("B", 8.0, 1.0)]
    assert rows[0]["modules"] == 3 and (rows[0]["least"], rows[0]["most"], rows[0]["n"]) == (1.0, 4.0, 3)


def test_synthetic_images_are_reproducible_and_hard_to_compress():
    assert made_image(32, 32, 5).tobytes() == made_image(32, 32, 5).tobytes() != made_image(32, 32, 6).tobytes()


def test_a_real_child_returns_its_figures_and_reports_its_errors(tmp_path):
    result = run_child("sets.make_set", {"set_folder": str(tmp_path), "num_images": 10, "side": 16})
    assert 100 < result["bytes_per_image"] < 16 * 16 * 3 + 100 and (tmp_path / "test.parquet").is_file()
    with pytest.raises(ValueError, match="negative"):
        run_child("sets.make_set", {"set_folder": str(tmp_path), "num_images": 1, "side": -1})
    with pytest.raises(TrainingFailed, match="TypeError"):
        run_child("sets.made_image", {})  # which requires sizes


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc")
def test_a_program_is_timed_to_its_first_step_and_its_memory_is_its_peak(tmp_path, monkeypatch):
    """It holds memory until that was measured, and then ends after one more measurement."""
    program = (
        "import json, pathlib, sys, time\n"
        "began, last = time.time(), time.monotonic() + 60\n"
        "def wait_for(name):\n"
        "    while not pathlib.Path(name).exists() and time.monotonic() < last: time.sleep(0.01)\n"
        "held = bytes(range(256)) * 400_000; wait_for('measured'); del held; wait_for('again')\n"
        "json.dump({'began': began, 'first_step_at': time.time()}, open(sys.argv[1], 'w'))"
    )
    measured = []

    def measure(process):
        measured.append(tree_memory(process))
        if measured[-1] >= 102_400_000:
            Path("measured").touch()
        elif max(measured) >= 102_400_000:
            Path("again").touch()
        return measured[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(children, "tree_memory", measure)
    began, path = time.time(), tmp_path / "result.json"
    result = run_program([sys.executable, "-c", program, str(path)], path)
    assert began <= result["first_step_at"] - result["seconds_to_start"] <= result["began"]
    assert measured[-1] < 102_400_000 <= result["peak_memory_bytes"] == max(measured) < 200_000_000


def test_the_memory_of_a_process_includes_that_of_its_children():
    inner = "import time; held = bytes(range(256)) * 200_000; time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    parent = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        wait_for(lambda: tree_memory(parent.pid) >= 51_200_000)
        assert len(process_tree(parent.pid)) == 2
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_a_contender_ends_with_the_benchmark_even_if_that_is_killed():
    """Otherwise it would slow down what the next call measures."""
    program = (
        "import sys; from pipeline.benchmark.children import running\n"
        "with running([sys.executable, '-c', 'import time; time.sleep(60)']) as process: process.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": PYTHONPATH})
    try:
        wait_for(lambda: len(process_tree(parent.pid)) == 2)
        (contender,) = process_tree(parent.pid)[1:]
        wait_for(lambda: contender.cmdline()[-1:] == ["import time; time.sleep(60)"])  # no longer a copy of its parent
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not is_alive(contender.pid))


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_a_contender_does_not_begin_if_the_benchmark_is_killed_while_it_starts():
    """Here just before the call by which Linux would end it."""
    program = (
        "import os, signal, sys, time; from pipeline.benchmark import children\n"
        "class Killing:\n"
        "    def prctl(self, *arguments):\n"
        "        parent = os.getppid(); os.kill(parent, signal.SIGKILL)\n"
        "        while os.getppid() == parent: time.sleep(0.01)\n"
        "        return library.prctl(*arguments)\n"
        "library, children.C_LIBRARY = children.C_LIBRARY, Killing()\n"
        "with children.running([sys.executable, '-c', 'import time; time.sleep(120)']): pass"
    )
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        assert select.select([parent.stdout], [], [], 60)[0], "the contender holds the other end of the pipe"
        assert parent.stdout.read() == b"" and parent.wait() == -signal.SIGKILL


def test_a_signal_while_a_program_starts_ends_it(monkeypatch):
    started, plain_start = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(plain_start(*arguments, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    def stop(number, frame):
        raise Interrupted(number)

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(subprocess, "Popen", start)
            with running([sys.executable, "-c", "import time; time.sleep(60)"]):
                raise AssertionError("the signal came too late")
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert started[0].returncode == -signal.SIGTERM  # so it does not hold back the signal either


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_benchmark_and_its_contenders(number):
    process = start_process("-m", "pipeline.benchmark", "loop", "--num_images=2000", "--model_name=simple_mlp")
    wait_for(lambda: len(process_tree(process.pid)) > 1, process=process)
    contenders = process_tree(process.pid)[1:]
    process.send_signal(number)
    ended = end_of(process, timeout=120)
    assert ended.returncode == 128 + number and "Traceback" not in ended.stderr
    assert not any(is_alive(contender.pid) for contender in contenders)


def test_help_and_parsing_import_no_torch():
    program = (
        "import sys; from pipeline.benchmark.__main__ import COMMANDS, main\n"
        "for name in (*COMMANDS, 'results'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as error: assert error.code == 0\n"
        "assert not {'torch', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    done = run_process("-c", program, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("folder to write") == len(COMMANDS) == 10


@pytest.mark.parametrize(
    "argv",
    [
        *([], ["optimisers"], ["optimizers", "--rounds", "0"], ["optimizers", "--round", "1"]),
        *(["loop", "--seconds", "0"], ["loaders", "--workers", "-1"], ["optimizers", "--lr", "1"]),
    ],
)
def test_a_wrong_command_line_exits_with_2(argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["loop", "--model_name", "resnet18x", "--num_images", "16"], ["resnet18x", "Did you mean 'resnet18'"]),
        (["efficiency", "--batch_size", "0"], ["batch_size", "at least 1"]),
        (["lr", "--lr_start", "1", "--lr_end", "0.1"], ["--lr_start 1 must be below"]),
    ],
)
def test_invalid_settings_are_reported_in_one_line(argv, words, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and all(word in printed for word in words)


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and all(f"\n    {name}" in printed for name in COMMANDS)
