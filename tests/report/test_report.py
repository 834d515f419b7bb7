"""Reports: reading runs, tables and figures, and a page that is valid, safe and self-contained."""

import csv
import io
import json
import math
import os
import re
import statistics
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_process

from pipeline.pages.confusion import confusion_matrix
from pipeline.pages.figure_style import COLOURS, MOST_NAMED, STYLE, png_and_svg, short
from pipeline.report.__main__ import main
from pipeline.report.charts import (
    accuracy_against_time,
    class_accuracies,
    epoch_rates,
    importance_bars,
    seed_bands,
    throughput,
)
from pipeline.report.comparison import ranked, repeated, varied_settings
from pipeline.report.curves import AXES, curves, schedules
from pipeline.report.importance import importances
from pipeline.report.looks import looks
from pipeline.report.parallel import is_logarithmic, parallel_coordinates, placed
from pipeline.report.read_runs import read_run
from pipeline.report.read_sweeps import read_records
from pipeline.report.tables import class_table, confusions_table, ranked_table, seeds_table, unfinished_table
from pipeline.settings.config import Config, to_yaml

HOSTILE = "<script>alert('1')<&script>|`*\"$x$"  # a folder's name
HOSTILE_CLASS = "</script><img src=http://example.com/x.png onerror=alert(2)>|--><b>"
STEPS, BATCH_SIZE = 10, 20  # of an epoch; images a step


def write_run(folder: Path, accuracies: tuple[float, ...], *, summary: bool = True, **settings: Any) -> Path:
    """A run of one epoch for each validation accuracy, at 100 images/s; its test accuracy is 0.01 below the best one."""
    folder.mkdir(parents=True)
    given = {"model_name": "simple_mlp", "lr": 0.1, "batch_size": BATCH_SIZE, "epochs": len(accuracies), **settings}
    (folder / "config.yaml").write_text(to_yaml(Config(run_name=folder.name, **given)))
    lines: list[dict[str, Any]] = []
    for epoch, accuracy in enumerate(accuracies, 1):
        for step in (STEPS * epoch - 5, STEPS * epoch):
            place = {"epoch": epoch, "step": step, "samples": BATCH_SIZE * step, "seconds": BATCH_SIZE * step / 50}
            rates = {"lr": given["lr"] / epoch, "batch_size": BATCH_SIZE, "images_per_second": 100.0}
            lines.append({"split": "train", **place, "loss": 2 / epoch, **rates})
        figures = {"loss": 2 / epoch, "top5_accuracy": 1.0, "num_samples": 100}
        lines.append({"split": "train", **place, "event": "epoch", "accuracy": accuracy / 2, **figures})
        lines.append({"split": "val", **place, "accuracy": accuracy, **figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary:
        write_summary(folder, accuracies)
    return folder


def write_summary(folder: Path, accuracies: tuple[float, ...], **changes: Any) -> None:
    best = max(accuracies)
    figures = {"epoch": accuracies.index(best) + 1, "loss": 0.5, "top5_accuracy": 1.0, "num_samples": 100}
    right = round(100 * (best - 0.01))
    matrix = [[right - 4, 100 - right, 0], [0, 0, 0], [0, 0, 4]]
    test = {**figures, "accuracy": right / 100, "confusion_matrix": matrix}
    test["per_class_accuracy"] = {"cat": (right - 4) / 96, HOSTILE_CLASS: None, "dog": 1.0}
    steps = STEPS * len(accuracies)
    summary = {
        "status": "completed", "epochs": len(accuracies), "steps": steps, "samples": BATCH_SIZE * steps, "seconds": 2.5 * steps,
        "images_per_second": 100.0, "peak_memory_bytes": 2**30, "num_parameters": 1000, "device": "cpu (x)",
        "num_processes": 1, "mixed_precision": "no", "best": {**figures, "accuracy": best, "weights": "model"}, "test": test,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | changes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two optimizers with two seeds each, and one run of each kind of failure."""
    folder = tmp_path_factory.mktemp("some") / "runs"
    write_run(folder / "sgd-0", (0.5, 0.8), seed=0)
    write_run(folder / "sgd-1", (0.6, 0.9), seed=1)
    write_run(folder / "adamw-0", (0.4, 0.7), seed=0, optimizer="adamw", lr=1e-3)
    write_run(folder / HOSTILE, (0.4, 0.6), seed=1, optimizer="adamw", lr=1e-3)
    write_run(folder / "torn", (0.3,), summary=False, epochs=4)
    with open(folder / "torn" / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "epo')
    write_run(folder / "failed", (0.2,), epochs=3)
    reason = "The loss of step 11 was not finite </script>"
    write_summary(folder / "failed", (0.2,), status="failed", reason=reason, test=None)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("[1, 2")
    (folder / "broken" / "metrics.jsonl").write_text('not json\n[1]\n{"split": "val", "epoch": NaN}\n')
    (folder / "broken" / "summary.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    output = runs.parent / "report"
    assert main([str(runs), "--output", str(output), "--target", "0.75"]) == 0
    return output


class Checker(HTMLParser):
    """Collects the errors of a page: unclosed tags, and requests that it would make."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster") or name.startswith("on"):
                self.references.append(f"{name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


@pytest.mark.slow
def test_the_page_is_complete_and_makes_no_request(report: Path):
    page = (report / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.problems and not checker.open
    assert checker.tags["table"] >= 5 and checker.tags["svg"] >= 12
    assert max(checker.ids.values()) == 1
    local = [reference.split("#", 1)[1] for reference in checker.references if "href=#" in reference]
    assert len(local) > 100 and set(local) <= checker.ids.keys()
    others = {reference for reference in checker.references if "href=#" not in reference}
    assert all(re.match(r"(src|href)=data:", reference) for reference in others), others
    assert set(re.findall(r"url\(([^#])", page)) == set()
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_text_of_runs_is_escaped(report: Path):
    page = (report / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.tags["script"] == 1 and checker.tags["img"] == 0 and checker.tags["b"] == 0
    assert "&lt;script&gt;alert(&#39;1&#39;)" in page and "&lt;/script&gt;&lt;img src=http" in page
    assert not re.search(r"<!--", page)
    markdown = (report / "report.md").read_text()
    assert not re.search(r"(?<!\\)<", markdown)
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(runs: Path, report: Path, tmp_path: Path):
    arguments = ("-m", "pipeline.report", str(runs), "--output", str(tmp_path / "again"), "--target", "0.75")
    done = run_process(*arguments, timeout=240, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    first, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (report, tmp_path / "again")
    )
    assert len(first) > 30 and first.keys() == again.keys()
    assert [str(name) for name in first if first[name] != again[name]] == []
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.slow
def test_figures_are_there_as_png_and_svg_without_dates(report: Path):
    stems = {path.stem for path in (report / "figures").iterdir()}
    curves_of = {
        f"{name}_by_{axis}" for name in ("accuracy", "loss", "learning_rate") for axis in ("epoch", "step", "time")
    }
    compared = {"seeds", "throughput", "accuracy_against_time", "parallel_coordinates", "confusion_matrix", "classes"}
    assert stems == curves_of | compared
    for stem in stems:
        assert (report / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        svg = (report / "figures" / f"{stem}.svg").read_text()
        assert "dc:date" not in svg and "<text" not in svg
        assert f"figures/{stem}.png" in (report / "report.md").read_text()


@pytest.mark.slow
def test_the_csv_holds_each_runs_figures_and_settings(runs: Path, report: Path):
    with open(report / "results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"sgd-0", "sgd-1", "adamw-0", HOSTILE, "torn", "failed", "broken"}
    for name in ("sgd-0", "sgd-1", "adamw-0", HOSTILE):
        summary = json.loads((runs / name / "summary.json").read_text())
        settings = yaml.safe_load((runs / name / "config.yaml").read_text())
        assert float(rows[name]["test_accuracy"]) == summary["test"]["accuracy"]
        assert float(rows[name]["best_val_accuracy"]) == summary["best"]["accuracy"]
        assert float(rows[name]["seconds"]) == summary["seconds"]
        assert rows[name]["setting_optimizer"] == settings["optimizer"]
        assert float(rows[name]["setting_lr"]) == settings["lr"]
    assert [rows[name]["rank"] for name in ("sgd-1", "sgd-0", "adamw-0", HOSTILE, "failed")] == ["1", "2", "3", "4", ""]
    assert rows["failed"]["reason"].startswith("The loss of step 11")


def test_runs_above_the_target_are_marked(runs: Path):
    records, _ = read_records([runs])
    table = ranked_table(ranked(records, None), None, 0.79)
    assert {row.run: row.marked for row in table.rows if row.marked} == {"sgd-1": True, "sgd-0": True}
    assert table.columns[-1] == "test accuracy at least 79.00 %"
    assert [row.cells[-1].text for row in table.rows] == ["yes", "yes"] + ["no"] * 5


def test_repeated_seeds_become_mean_and_sample_standard_deviation(runs: Path):
    records, _ = read_records([runs])
    assert [len(group) for group in repeated([run for run in records if run.ended])] == [2, 2]
    table = seeds_table(records)
    assert table is not None
    by_name = {row.cells[0].text: [cell.text for cell in row.cells[1:5]] for row in table.rows}
    mean, spread = statistics.mean([79, 89]), statistics.stdev([79, 89])
    assert by_name["sgd, lr 0.1"] == ["2", "0, 1", f"{85:.2f} ± {spread:.2f} %", f"{mean:.2f} ± {spread:.2f} %"]
    assert by_name.keys() == {"sgd, lr 0.1", "adamw, lr 0.001"}


def test_an_incomplete_last_line_is_ignored_and_other_bad_lines_are_reported(runs: Path, tmp_path: Path):
    whole = write_run(tmp_path / "torn", (0.3,), summary=False, epochs=4)
    torn, expected = read_run(runs / "torn"), read_run(whole)
    assert (torn.epochs, torn.log, torn.best, torn.status, torn.notes) == (
        (expected.epochs, expected.log, expected.best, "unfinished", ())
    )
    assert torn.best is not None and torn.best["accuracy"] == 0.3
    broken = read_run(runs / "broken")
    assert broken.epochs == [] and broken.settings == {}
    assert broken.notes == (
        "summary.json cannot be read", "3 unreadable lines of metrics.jsonl were skipped", "config.yaml cannot be read",
    )  # fmt: skip


def test_the_status_of_a_run_is_read_from_its_files(tmp_path: Path):
    folder = write_run(tmp_path / "run", (0.3, 0.4), summary=False)
    assert read_run(folder).status == "unfinished"
    holder = {"process": os.getpid(), "machine": os.uname().nodename, "beats": 1}
    (folder / ".lock").write_text(json.dumps(holder))
    assert read_run(folder).status == "running"
    (folder / ".lock").write_text(json.dumps(holder | {"machine": "another"}))
    assert read_run(folder).status == "running"
    os.utime(folder / ".lock", (0, 0))  # no new beat for a long time
    assert read_run(folder).status == "unfinished"
    (folder / ".lock").write_text("")  # as it is left when a run ends
    assert read_run(folder).status == "unfinished"
    write_summary(folder, (0.3, 0.4), status="interrupted", reason="SIGINT", test=None)
    assert (read_run(folder).status, read_run(folder).reason) == ("interrupted", "SIGINT")
    write_summary(folder, (0.3,), status="interrupted", reason="SIGINT", test=None)
    assert read_run(folder).status == "unfinished"  # it was resumed since


def test_training_lines_have_their_progress_in_epochs(tmp_path: Path):
    log = read_run(write_run(tmp_path / "run", (0.3, 0.4, 0.5))).log
    assert [line["progress"] for line in log] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    under_way = read_run(write_run(tmp_path / "other", (0.3, 0.4), summary=False))
    with open(tmp_path / "other" / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"split": "train", "epoch": 3, "step": 24, "seconds": 9.0, "samples": 480, "lr": 0.1}) + "\n"
        )
    assert [line["progress"] for line in under_way.log] == [0.5, 1.0, 1.5, 2.0]
    assert read_run(tmp_path / "other").log[-1]["progress"] == pytest.approx(2.4)


def test_throughput_of_an_epoch_is_its_own_not_the_mean_since_the_start(tmp_path: Path):
    folder = write_run(tmp_path / "run", (0.3, 0.4))
    assert epoch_rates(read_run(folder)) == pytest.approx({1: 100, 2: 100})
    # 200 images in 2 s, then 200 in 8 s
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        if "images_per_second" in line:
            line["images_per_second"] = (
                100.0 if line["epoch"] == 1 else line["samples"] / (2 + (line["samples"] - 200) / 25)
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert epoch_rates(read_run(folder)) == pytest.approx({1: 100, 2: 25})


def test_curves_draw_the_measured_figures(runs: Path):
    import matplotlib

    records, _ = read_records([runs / "sgd-0", runs / "sgd-1"])
    look_of = looks(repeated(records), ranked(records, None))
    with matplotlib.rc_context(STYLE):
        figure = curves(records, look_of, "accuracy", "step")
    assert not isinstance(figure, str)
    drawn = {
        str(line.get_gid()): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()
    }
    assert drawn == {
        "run-1-train": ([10, 20], [25, 40]), "run-1-val": ([10, 20], [50, 80]),
        "run-0-train": ([10, 20], [30, 45]), "run-0-val": ([10, 20], [60, 90]),
    }  # fmt: skip
    assert figure.axes[0].get_ylabel() == "accuracy (%)" and figure.axes[0].get_xlabel() == "optimizer step"


def test_runs_beyond_those_in_the_legend_are_grey(tmp_path: Path):
    for place in range(MOST_NAMED + 3):
        write_run(tmp_path / f"run-{place:02d}", (0.5 + place / 100,), weight_decay=place / 100)
    records, _ = read_records([tmp_path])
    look_of = looks(repeated(records), ranked(records, None))
    assert [name for name, look in look_of.items() if not look.named] == ["run-02", "run-01", "run-00"]
    assert len({(look.colour, look.marker, str(look.dashes)) for look in look_of.values() if look.named}) == MOST_NAMED


def sweep_folder(folder: Path, goal: str = "maximize", metric: str = "val/accuracy") -> Path:
    """A grid of two optimizers by three learning rates, of which only the optimizer matters; and a trial that failed."""
    trials = []
    for number, (optimizer, lr) in enumerate((name, rate) for name in ("sgd", "adamw") for rate in (1e-3, 1e-2, 1e-1)):
        accuracy = 0.9 if optimizer == "sgd" else 0.6
        write_run(folder / f"run-{number}", (accuracy,), optimizer=optimizer, lr=lr)
        params = {"optimizer": optimizer, "lr": lr}
        trials.append(
            {"number": number, "status": "completed", "params": params, "run_dir": f"run-{number}", "value": accuracy}
        )
    failed = {"number": 6, "status": "failed", "params": {"optimizer": "adamv"}, "run_dir": "run-6", "value": None}
    trials.append(failed | {"error": "Unknown optimizer 'adamv'."})
    sweep = {"method": "grid", "metric": {"name": metric, "goal": goal}, "parameters": {"optimizer": {}, "lr": {}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials) + '{"number": 7, "sta')
    return folder


def test_a_sweep_is_ranked_by_its_own_metric_and_shows_failed_trials(tmp_path: Path):
    records, sweep = read_records([sweep_folder(tmp_path / "sweep")])
    assert sweep is not None and (sweep.method, sweep.metric, sweep.maximize) == ("grid", "val/accuracy", True)
    names = [run.name for run in ranked(records, sweep)]
    assert names == [f"run-{number}" for number in range(7)]
    failed = records[-1]
    assert (failed.status, failed.reason) == ("failed", "Unknown optimizer 'adamv'.")
    records, sweep = read_records([sweep_folder(tmp_path / "lowest", "minimize", "val/loss")])
    assert [run.name for run in ranked(records, sweep)][:3] == ["run-3", "run-4", "run-5"]
    table = ranked_table(ranked(records, sweep), sweep, None)
    assert "val/loss" in table.columns and "lowest first" in table.note


def test_sweeps_beside_runs_and_nested_folders_are_found(tmp_path: Path):
    runs = tmp_path / "runs"
    write_run(runs / "single", (0.8,), optimizer="sgd")
    sweep_folder(runs / "first", "minimize", "val/loss")
    write_run(runs / "by" / "the" / "way" / "deep", (0.7,))
    write_run(runs / "1" / "2" / "3" / "4" / "in reach", (0.6,))
    for unseen in (runs / "1/2/3/4/5/too deep", runs / "single/inner", runs / ".hidden/run", runs / "wandb/run/files"):
        write_run(unseen, (0.5,))
    (runs / "loop").symlink_to(tmp_path)
    (runs / "again").symlink_to(runs / "single")
    records, sweep = read_records([runs])
    assert sweep is None
    assert [run.name for run in records] == ["single", "in reach", "deep", *(f"first/run-{place}" for place in range(7))]
    best_first = ranked(records, None)
    assert [run.name for run in best_first[:4]] == ["first/run-0", "first/run-1", "first/run-2", "single"]
    table = ranked_table(best_first, sweep, None)
    place = table.columns.index("sweep")
    assert [row.cells[place].text for row in table.rows[:4]] == ["first", "first", "first", "-"]
    assert "Ranked by validation accuracy." in table.note

    with_the_sweep, _ = read_records([runs / "first" / "run-0", runs / "first", runs])
    assert {run.name: run.sweep is not None for run in with_the_sweep} == {
        run.name: run.sweep is not None for run in records
    }


def test_a_folder_of_one_sweep_is_ranked_by_the_sweeps_metric_and_several_sweeps_by_accuracy(tmp_path: Path):
    sweep_folder(tmp_path / "a" / "trials", "minimize", "val/loss")
    records, sweep = read_records([tmp_path])
    assert sweep is not None and [run.name for run in ranked(records, sweep)][:2] == ["trials/run-3", "trials/run-4"]
    assert "sweep" not in ranked_table(ranked(records, sweep), sweep, None).columns

    sweep_folder(tmp_path / "b" / "trials")
    records, sweep = read_records([tmp_path])
    assert sweep is None
    assert [run.name for run in ranked(records, sweep)][:4] == [
        "a/trials/run-0", "a/trials/run-1", "a/trials/run-2", "b/trials/run-0",
    ]  # fmt: skip
    assert {run.sweep.name for run in records if run.sweep is not None} == {"a/trials", "b/trials"}


def test_a_run_in_a_sweeps_folder_that_is_no_trial_has_a_rank_only_if_its_metric_is_known(tmp_path: Path):
    for metric, goal, place in (("val/loss", "minimize", 6), ("val/accuracy", "maximize", 3)):
        folder = sweep_folder(tmp_path / goal, goal, metric)
        write_run(folder / "extra", (0.7,))
        records, sweep = read_records([folder])
        assert [run.name for run in ranked(records, sweep) if run.ended].index("extra") == place


@pytest.mark.parametrize("higher_is_better, best", [(True, "run-0-parallel"), (False, "run-1-parallel")])
def test_the_best_run_is_the_last_and_bluest_of_the_parallel_coordinates(higher_is_better, best, tmp_path):
    import matplotlib

    for place, lr in enumerate((1e-4, 1e-3, 1e-2, 1e-1)):
        write_run(tmp_path / f"run-{place}", (0.8 - place / 10,), lr=lr)
    records, _ = read_records([tmp_path])
    look_of = looks(repeated(records), [records[0], records[3], *records[1:3]])
    with matplotlib.rc_context(STYLE):
        scores = [run.val_accuracy or 0 for run in records]
        figure = parallel_coordinates(records, ["lr"], scores, "score", look_of, higher_is_better)
    assert not isinstance(figure, str)
    lines = [line for line in figure.axes[0].get_lines() if str(line.get_gid()).startswith("run-")]
    assert len(lines) == 4 and lines[-1].get_gid() == best
    assert matplotlib.colors.to_hex(lines[-1].get_color()) == COLOURS[0]
    ends = [float(line.get_ydata()[-1]) for line in lines]
    assert ends == pytest.approx([0, 1 / 3, 2 / 3, 1] if higher_is_better else [1, 2 / 3, 1 / 3, 0])


def test_a_trial_that_hyperband_stopped_keeps_its_rank(tmp_path: Path):
    folder = sweep_folder(tmp_path / "sweep")
    write_summary(folder / "run-0", (0.9,), status="interrupted", reason="SIGTERM", test=None)
    text = (folder / "trials.jsonl").read_text()
    (folder / "trials.jsonl").write_text(text.replace('"status": "completed"', '"status": "stopped"', 1))
    records, sweep = read_records([folder])
    first = ranked_table(ranked(records, sweep), sweep, None).rows[0]
    assert [cell.text for cell in first.cells[:3]] == ["1", "run-0", "stopped"]
    table = unfinished_table(records)
    assert table is not None and [row.run for row in table.rows] == ["run-0", "run-6"]


def test_settings_that_the_model_determines_are_no_difference_between_runs_of_several_models(tmp_path: Path):
    models = {"a": ("simple_mlp", False), "b": ("small_convnet", True), "c": ("small_convnet", False)}
    for name, (model, channels_last) in models.items():
        write_run(tmp_path / name, (0.5,), model_name=model, channels_last=channels_last)
    a, b, c = read_records([tmp_path / name for name in models])[0]
    assert varied_settings([a, b]) == ["model_name"]
    assert varied_settings([b, c]) == ["channels_last"]


def test_a_trial_without_a_run_adds_no_columns_to_the_ranking(tmp_path: Path):
    records, sweep = read_records([sweep_folder(tmp_path / "sweep")])
    assert [run.name for run in records if not run.ended] == ["run-6"] and set(records[-1].settings) == {"optimizer"}
    assert varied_settings(records) == ["optimizer", "lr"]


def test_importance_goes_to_the_setting_that_matters(tmp_path: Path):
    records, sweep = read_records([sweep_folder(tmp_path / "sweep")])
    ended = [run for run in records if run.ended]
    names = varied_settings(ended)
    assert names == ["optimizer", "lr"]
    settings = [{name: run.settings[name] for name in names} for run in ended]
    assert importances(settings, [run.val_accuracy or 0 for run in ended]) == pytest.approx(
        {"optimizer": 1.0, "lr": 0.0}
    )
    assert importances(settings[:5], [1.0, 2.0, 3.0, 4.0, 5.0]) == {}
    assert importances(settings, [0.5] * 6) == {}


def test_importance_is_omega_squared():
    """Two groups of four, means 1 and 3: SS_between 8, SS_within 4, MS_within 4 / 6."""
    values = [0.0, 0.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    shares = importances([{"a": place < 4} for place in range(8)], values)
    assert shares["a"] == pytest.approx((8 - 4 / 6) / (12 + 4 / 6))


def test_importance_of_noise_is_near_zero_however_many_values_it_takes():
    draws = np.random.default_rng(0)
    values = list(draws.normal(size=400))
    shares = importances([{"noise": float(draws.random()), "name": str(place % 40)} for place in range(400)], values)
    assert max(shares.values()) < 0.03
    linear = importances([{"x": float(value)} for value in values], values)
    assert linear["x"] > 0.7


def test_numbers_over_decades_have_a_logarithmic_axis():
    values = [1e-4, 1e-3, 1e-2, 1e-1, 3e-4, 3e-3, 3e-2]
    assert is_logarithmic(values) and not is_logarithmic([0.0, *values])
    heights, ticks = placed(values, logarithmic=True)
    assert heights[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert ticks[0] == (0.0, "0.0001") and ticks[-1] == (1.0, "0.1")
    heights, ticks = placed(["b", "a", "b"])
    assert heights == [1, 0, 1] and ticks == [(0, "a"), (1, "b")]


def test_few_numbers_are_placed_to_scale_with_ticks_at_the_values_that_do_not_overlap():
    heights, ticks = placed([0.00022, 0.015, 0.00023, 0.004], logarithmic=True)
    assert heights[0] == 0 and heights[1] == pytest.approx(1)
    assert heights[2] == pytest.approx(math.log(23 / 22) / math.log(0.015 / 0.00022))
    assert heights[3] == pytest.approx(math.log(0.004 / 0.00022) / math.log(0.015 / 0.00022))
    assert [text for _, text in ticks] == ["0.00022", "0.004", "0.015"]
    assert placed([1, 2, 9]) == ([0, 1 / 8, 1], [(0, "1"), (1 / 8, "2"), (1, "9")])
    assert [text for _, text in placed([1, 99, 100])[1]] == ["1", "100"]
    assert [text for _, text in placed([99, 100])[1]] == ["99", "100"]


def test_numbers_beside_other_values_stay_to_scale_above_them():
    heights, ticks = placed([None, 1, 2, 5])
    assert heights == pytest.approx([0, 0.12, 0.34, 1]) and ticks[0] == (0, "-")


def test_a_logarithmic_distribution_of_the_sweep_file_gives_a_logarithmic_axis(tmp_path: Path):
    folder = sweep_folder(tmp_path / "sweep")
    kinds = {"a": "log_uniform_values", "b": "q_log_uniform", "c": "inv_log_uniform_values", "d": "log_normal", "e": "normal"}
    specs: dict[str, Any] = {name: {"distribution": kind} for name, kind in kinds.items()}
    sweep = {"method": "random", "parameters": specs | {"f": {"values": [1, 2]}, "g": {"min": 1, "max": 2}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    read = read_records([folder])[1]
    assert read is not None and read.logarithmic == {"a", "b", "c", "d"}
    assert is_logarithmic([1, 3]) is False and is_logarithmic([1, 3], drawn_so=True)
    assert not is_logarithmic([0, 3], drawn_so=True) and not is_logarithmic(["x"], drawn_so=True)


def test_a_figure_that_would_show_nothing_is_a_sentence(tmp_path: Path):
    """Runs of one epoch with equal results: one point for each curve."""
    for name in ("a", "b"):
        write_run(tmp_path / name, (0.5,), lr=0.1)
    records, _ = read_records([tmp_path])
    look_of = looks(repeated(records), records)
    sentences = {
        "two epochs with one": [curves(records, look_of, quantity, "epoch") for quantity in ("accuracy", "loss")],
        "constant and equal": [schedules(records, look_of, axis) for axis in AXES],
        "two epochs in common": [seed_bands([("both", records)])],
        "for two epochs": [throughput(records, look_of)],
        "no two tested runs that differ": [accuracy_against_time(records, look_of)],
        "2 runs that have ended have the same settings": [parallel_coordinates(records, [], [1, 2], "score", look_of)],
        "have the same score: 0.5": [parallel_coordinates(records, ["lr"], [0.5, 0.5], "score", look_of)],
        "fewer than two": [parallel_coordinates(records[:1], ["lr"], [0.5], "score", look_of)],
        "tested on 0 images of 2 classes": [confusion_matrix(np.zeros((2, 2), int), ["cat", "dog"], "a")],
        "tested on 7 images of 1 classes": [confusion_matrix(np.array([[7]]), ["cat"], "a")],
        "of all 2 classes is 100.00 %": [class_accuracies({"cat": 1.0, "dog": 1.0}, "a", {})],
        "of cat, the only class with test images, is 50.00 %": [class_accuracies({"cat": 0.5}, "a", {})],
    }
    for part, drawn in sentences.items():
        assert all(isinstance(each, str) and part in each for each in drawn), (part, drawn)
    empty = [replace(run, epochs=[], log=[]) for run in records]
    assert curves(empty, look_of, "loss", "time") == "There is no curve of the loss: no run has an epoch with one."
    assert schedules(empty, look_of, "step") == "There is no curve of the learning rate: no run has logged it twice."
    assert importance_bars({}) is None and importance_bars({"lr": 0.0}) is None
    assert accuracy_against_time(records[:1], look_of) is None


@pytest.mark.slow
def test_a_report_on_runs_of_one_epoch_holds_sentences_and_no_files_of_empty_figures(tmp_path: Path):
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, (0.5,))
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("There is no curve of") == 3 and "are constant and equal" in page
    assert {path.stem for path in (tmp_path / "report" / "figures").iterdir()} == {"confusion_matrix", "classes"}


def test_tables_of_classes_agree_with_the_matrix():
    matrix = [[8, 2, 0], [0, 5, 0], [3, 1, 6]]
    table = class_table(read_run(ROOT), ["ant", "bee", "cat"], matrix)
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["ant", "10", "8", "80.00 %", "72.73 %", "76.19 %", "bee (2)"], ["bee", "5", "5", "100.00 %", "62.50 %", "76.92 %", "-"],
        ["cat", "10", "6", "60.00 %", "100.00 %", "75.00 %", "ant (3)"],
    ]  # fmt: skip
    pairs = confusions_table(["ant", "bee", "cat"], matrix)
    assert pairs is not None
    assert [[cell.text for cell in row.cells][:3] for row in pairs.rows] == [
        ["cat", "ant", "3"], ["ant", "bee", "2"], ["cat", "bee", "1"],
    ]  # fmt: skip


def test_runs_of_equal_names_get_the_names_of_their_folders(tmp_path: Path):
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "run", (0.5,))
    records, sweep = read_records([tmp_path / "a", tmp_path / "b" / "run", tmp_path / "a" / "run"])
    assert [run.name for run in records] == ["a/run", "b/run"] and sweep is None
    assert short("x" * 50) == "x" * 17 + "…" + "x" * 16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["EMPTY"], "holds no run: neither config.yaml nor metrics.jsonl"),
        (["nowhere"], "There is no folder nowhere"),
        (["RUN", "--output", "EMPTY/no/report"], "Create it first"),
        (["RUN", "--output", "FULL"], "is not a report. Choose a new folder"),
        (["RUN", "--target", "90"], "'90' is not a fraction from 0 to 1; 90 % is 0.9"),
        (["RUN", "--mistakes", "2"], "none of these runs was tested"),
    ],
)
def test_invalid_input_is_reported_in_one_line_with_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY" / "folder").mkdir(parents=True)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine.txt").write_text("mine")
    write_run(tmp_path / "RUN", (0.5,), summary=False)
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FULL", "RUN"]
    assert (tmp_path / "FULL" / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_real_run_shows_its_most_confident_mistakes_and_replaces_the_earlier_report(
    finished_run, tmp_path, monkeypatch
):
    from pipeline.inference.mistakes import most_confident_mistakes

    summary, run_dir = finished_run()
    mistakes, total = most_confident_mistakes(run_dir, 1000)
    test = summary["test"]
    assert total == len(mistakes) == test["num_samples"] - round(test["accuracy"] * test["num_samples"]) > 3
    assert [mistake.confidence for mistake in mistakes] == sorted((each.confidence for each in mistakes), reverse=True)
    off_diagonal = Counter((each.true, each.predicted) for each in mistakes)
    matrix = np.array(test["confusion_matrix"])
    names = list(test["per_class_accuracy"])
    assert all(matrix[names.index(true), names.index(other)] == n for (true, other), n in off_diagonal.items())

    output = tmp_path / "report"
    output.mkdir()
    (output / "report.html").write_text("earlier")
    (output / "left.over").write_text("earlier")
    assert main([str(run_dir), "--output", str(output), "--mistakes", "3"]) == 0
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and not (output / "left.over").exists()
    assert len(list((output / "figures").glob("mistake_*.png"))) == 3
    assert f"{100 * test['accuracy']:.2f} %" in page


def test_a_figures_bytes_depend_on_its_content_alone():
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        first, second = (png_and_svg(Figure()) for _ in range(2))
    assert first == second and first.keys() == {"png", "svg"}
    assert io.BytesIO(first["png"]).read(4) == b"\x89PNG"
