"""`benchmark gpu` end to end at toy size, its resumption, and `benchmark results`, which makes the tables of a document."""

import errno
import functools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_benchmark import in_this_process  # noqa: F401: a fixture

from pipeline.benchmark import __main__ as command_line
from pipeline.benchmark import gpu, gpu_child, gpu_groups, gpu_training, reporting, results
from pipeline.benchmark.__main__ import GPU_PARTS, main
from pipeline.benchmark.gpu_groups import Group
from pipeline.common.stopping import TrainingFailed

REHEARSAL = ["gpu", "--rehearse", "--rounds", "1", "--seeds", "1", "--seconds", "0.01", "--warmup_steps", "1"]
FEW = ["--compile_modes", "off", "--precisions", "no"]
FACTS = {"command": "a command", "date": "2026-11-26", "cpu": "a processor", "cores": 2, "versions": {"torch": "2.9"}}


def rows_in(folder):
    return [json.loads(line) for line in (folder / "benchmark-gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_rehearsal_runs_every_part_and_its_tables_are_made_by_the_command(
    in_this_process, tmp_path, capsys, monkeypatch  # noqa: F811
):
    monkeypatch.setattr(gpu_training, "run_tests", passed_and_skipped)
    parts = [part for part in GPU_PARTS if part not in ("half_sgd", "half_adamw")]
    assert main([*REHEARSAL, *FEW, "--output", str(tmp_path / "out"), "--parts", *parts]) == 0, capsys.readouterr().err
    rows = rows_in(tmp_path / "out")
    by_section = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
        assert row.keys() >= {"group", "group_seconds", *FACTS}
    assert list(by_section) == [
        "Tests marked gpu",
        "Time to 94% test accuracy with mirror images",
        "Training speed: resnet18 at 32 pixels, batch 512",
        "Training speed: resnet50 at 224 pixels, batch 256",
        "Training speed: vit_small_patch16_224 at 224 pixels, batch 256",
        "Half precision, SAM and gradient accumulation",
        "Loaders alone",
        "Training steps by optimizer",
        "Fine-tuning from given weights: tf_efficientnet_lite0, oxford_iiit_pet, 128 pixels, batch 16, 3 epochs",
        "Time to 95% test accuracy with mirror images",
    ]
    assert by_section["Tests marked gpu"][0]["passed"] == 2 and by_section["Tests marked gpu"][0]["skipped_tests"] == 1
    for section, of_section in by_section.items():
        names = [row["row"] for row in of_section]
        if "Training speed" in section:
            assert names == ["bare loop", "ours", "timm's train.py"]
            assert all(row["ratio_to"] == "bare loop" and 0 <= row["wait_fraction"] < 1 for row in of_section)
        if "Half" in section:
            kinds = ["muon", "muon, 4 micro-batches", "muon, SAM", "muon, SAM, 4 micro-batches"]
            assert names == [f"{kind}, fp32" for kind in kinds]
            assert [row["distance"] for row in of_section] == [0.0] * 4
            assert all(row["skipped_steps"] == 0 and len(row["loss_curve"]) == 4 for row in of_section)
            curves = [row["loss_curve"] for row in of_section]
            assert curves[0] == pytest.approx(curves[1]) != curves[2] == pytest.approx(curves[3])
        if "Fine" in section:
            assert names == ["ours, adamw", "plain loop, AdamW"] and all(len(row["points"]) >= 2 for row in of_section)
        if "Time to" in section:
            assert names[0].endswith(".yaml, seed 0") and of_section[0]["reached"] == "no"
    capsys.readouterr()
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\n{results.BEGIN}\n{results.END}\n\nThe end.\n")
    assert main(["results", str(tmp_path / "out" / "benchmark-gpu.jsonl"), "--write", str(document)]) == 0
    written = document.read_text()
    assert written.startswith(f"# Results\n\n{results.BEGIN}\n\n### Tests marked gpu") and written.endswith("\n\nThe end.\n")
    for row in (row for row in rows if "median" in row):
        lines = [line for line in written.splitlines() if line.startswith(f"| {results.name_of(row)} |")]
        assert any(f" {reporting.number(row['median'])} " in line for line in lines)
    assert rows[0]["cpu"] in written and rows[0]["versions"]["timm"] in written


def passed_and_skipped(command, failures=0):
    """Stands in for pytest: writes its report."""
    (path,) = [word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml=")]
    counts = f'tests="3" failures="{failures}" errors="0" skipped="1"'
    Path(path).write_text(f"<testsuites><testsuite {counts}></testsuite></testsuites>")
    return int(failures > 0)


@pytest.fixture
def counted_groups(monkeypatch):
    """Two parts of two groups each, whose measurements are counted; failures: what is called instead of one, by its name."""
    measured, failures = [], {}

    def part(name):
        def groups(args, settings):
            for number in (1, 2):
                row = {"row": "a row", "unit": "s", "median": float(number), "ratio": 1.0, "ratio_to": "a row"}
                measure = functools.partial(failures.get(f"{name}{number}", measured_row), measured, f"{name}{number}", row)
                yield Group(f"Part {name}", f"group {number}", measure)

        return groups

    monkeypatch.setattr(gpu, "PARTS", {"tests": part("a"), "steps": part("b")})
    return SimpleNamespace(measured=measured, failures=failures)


def measured_row(measured, name, row):
    measured.append(name)
    return [row]


def test_the_same_command_continues_after_its_last_complete_group(counted_groups, tmp_path, capsys):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    assert main([*command, "tests", "tests"]) == 0 and counted_groups.measured == ["a1", "a2"]
    lines = (tmp_path / "benchmark-gpu.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "benchmark-gpu.jsonl").write_text(lines[0])  # as if it had been killed in the second group
    assert main([*command, "tests", "steps"]) == 0
    assert counted_groups.measured == ["a1", "a2", "a2", "b1", "b2"]
    assert [(row["section"], row["group"]) for row in rows_in(tmp_path)] == [
        (f"Part {part}", f"group {number}") for part in "ab" for number in (1, 2)
    ]
    assert {row["command"].split("--parts ")[1] for row in rows_in(tmp_path)} == {"tests tests", "tests steps"}


def test_a_call_that_is_killed_while_it_continues_loses_no_earlier_row(counted_groups, tmp_path, monkeypatch):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    assert main([*command, "tests"]) == 0
    written, write_lines = [], command_line.write_lines

    def write(path, sections, facts):
        write_lines(path, sections, facts)
        written.append(len(rows_in(tmp_path)))

    monkeypatch.setattr(command_line, "write_lines", write)
    assert main([*command, "steps"]) == 0 and written == [3, 4]


def test_a_second_call_with_the_same_output_is_refused_while_the_first_measures(counted_groups, tmp_path, capsys):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    statuses = []

    def call_again(measured, name, row):
        statuses.append(main([*command, "steps"]))
        return measured_row(measured, name, row)

    counted_groups.failures["a2"] = call_again
    assert main([*command, "tests"]) == 0
    assert statuses == [2] and counted_groups.measured == ["a1", "a2"]
    held = f"{tmp_path} is in use by process {os.getpid()} on {os.uname().nodename}. Wait for it, or pass another --output."
    assert capsys.readouterr().err == f"error: {held}\n"
    assert main([*command, "steps"]) == 0 and [row["group"] for row in rows_in(tmp_path)] == ["group 1", "group 2"] * 2


@pytest.mark.parametrize("failure", [ValueError("no images"), TrainingFailed("the contender ended"), OSError("no room")])
def test_a_group_that_fails_does_not_stop_the_others_and_is_measured_again(counted_groups, tmp_path, capsys, failure):
    def fail(*arguments):
        raise failure

    counted_groups.failures["a1"] = fail
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts", "tests", "steps"]
    assert main(command) == 1 and counted_groups.measured == ["a2", "b1", "b2"]
    assert f"measured again by the same command: tests: group 1: {failure}" in capsys.readouterr().err
    counted_groups.failures.clear()
    assert main(command) == 0 and counted_groups.measured == ["a2", "b1", "b2", "a1"]


def test_a_signal_stops_at_once_and_keeps_what_was_measured(counted_groups, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    counted_groups.failures["a2"] = interrupt
    assert main(["gpu", "--rehearse", "--output", str(tmp_path), "--parts", "tests", "steps"]) == 130
    assert counted_groups.measured == ["a1"] and [row["group"] for row in rows_in(tmp_path)] == ["group 1"]


@pytest.mark.parametrize("changed, text", [(["--rounds", "5"], "rounds 3, and not rounds 5"), (["--lr", "0.1"], "settings")])
def test_measurements_of_other_arguments_are_not_mixed(counted_groups, tmp_path, capsys, changed, text):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    assert main([*command, "tests"]) == 0
    before = (tmp_path / "benchmark-gpu.jsonl").read_bytes()
    assert main([*command, "steps", *changed]) == 2
    error = capsys.readouterr().err
    assert text in error and "another --output" in error and "benchmark-gpu.jsonl" in error
    assert counted_groups.measured == ["a1", "a2"] and (tmp_path / "benchmark-gpu.jsonl").read_bytes() == before


def test_a_rehearsal_does_not_replace_measurements(counted_groups, tmp_path, capsys, monkeypatch):
    assert main(["gpu", "--rehearse", "--output", str(tmp_path), "--parts", "tests"]) == 0
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    assert main(["gpu", "--output", str(tmp_path), "--parts", "tests"]) == 2
    assert "rehearse True, and not rehearse False" in capsys.readouterr().err


@pytest.mark.parametrize("last", ['{"section": "Part a", "gr', "null"])
def test_a_damaged_file_is_not_continued(counted_groups, tmp_path, capsys, last):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts", "tests"]
    assert main(command) == 0
    with open(tmp_path / "benchmark-gpu.jsonl", "a") as file:
        file.write(last)
    assert main(command) == 2
    assert f"Line 3 of {tmp_path / 'benchmark-gpu.jsonl'} is not a row" in capsys.readouterr().err


def test_failed_tests_are_the_exit_status_and_are_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_training, "run_child", lambda *arguments: {"device": "cpu", "threads": 1})
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts", "tests"]
    for failures, status in ((2, 1), (0, 0)):
        monkeypatch.setattr(gpu_training, "run_tests", functools.partial(passed_and_skipped, failures=failures))
        assert main(command) == status
        (row,) = rows_in(tmp_path)
        assert (row["passed"], row["failed"]) == (2 - failures, failures)
    assert "tests: 2 tests" in capsys.readouterr().err
    monkeypatch.setattr(gpu_training, "run_tests", lambda command: 3)
    assert main([*command[:-3], str(tmp_path / "other"), "--parts", "tests"]) == 1
    assert "pytest ended with status 3 and without a report" in capsys.readouterr().err


@pytest.mark.parametrize("given, measured", [(["bf16"], ["no", "bf16"]), (["fp16", "no"], ["no", "fp16"])])
def test_half_precision_is_compared_with_fp32_in_every_subset(monkeypatch, given, measured):
    monkeypatch.setattr(gpu_groups, "has_gpu", lambda: True)
    groups = list(gpu_training.half("muon", SimpleNamespace(precisions=given, rehearse=False), []))
    assert [group.measure.args[1]["precisions"] for group in groups] == [measured] * 4
    rows = [{"row": name} for name in ("muon, fp32", "muon, bf16")]
    assert [group.is_complete(rows) for group in groups] == [given == ["bf16"], False, False, False]


@pytest.mark.parametrize(
    "settings, text", [(["--batch_size", "8"], "choose batch_size"), (["--mixup=0.2"], "mixup"), (["--lr", "much"], "lr")]
)
def test_settings_with_which_the_titles_would_be_wrong_are_refused(settings, text, capsys):
    assert main(["gpu", "--rehearse", *settings]) == 2
    assert text in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(counted_groups, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["gpu", "--rehearse", "--output", str(tmp_path / "file"), "--parts", "tests"]) == 2
    assert "--output" in capsys.readouterr().err and counted_groups.measured == []


def test_a_full_disk_ends_the_command(counted_groups, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command_line, "write_lines", full)
    assert main(["gpu", "--rehearse", "--output", str(tmp_path), "--parts", "tests"]) == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err and counted_groups.measured == ["a1"]


def test_rows_of_parts_that_are_not_named_are_kept(counted_groups, tmp_path):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    assert main([*command, "tests"]) == 0 and main([*command, "steps"]) == 0
    assert [row["section"] for row in rows_in(tmp_path)] == ["Part a", "Part a", "Part b", "Part b"]


def test_no_group_begins_after_the_given_minutes(counted_groups, tmp_path, capsys, monkeypatch):
    minutes = iter([0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 60 * next(minutes)))
    assert main(["gpu", "--rehearse", "--parts", "tests", "steps", "--minutes", "9", "--output", str(tmp_path)]) == 0
    assert counted_groups.measured == ["a1"] and "3 groups did not begin within 9 minutes" in capsys.readouterr().out


def test_without_a_gpu_it_says_how_to_rehearse(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert main(["gpu"]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_the_parts_of_the_command_line_are_those_that_exist():
    assert GPU_PARTS == tuple(gpu.PARTS)


def test_a_curve_is_the_mean_of_equal_parts():
    assert gpu_child.parts_of([4.0, 2.0, 3.0, 3.0, 2.0, 0.0, 1.0, 1.0]) == [3.0, 3.0, 1.0, 1.0]
    assert gpu_child.parts_of([2.0, 1.0]) == [2.0, 1.0]
    assert gpu_child.parts_of([]) == []  # every step was skipped


def test_the_name_of_a_group_precedes_that_of_a_row_once():
    assert results.name_of({"group": "bf16", "row": "ours"}) == "bf16: ours"
    assert results.name_of({"group": "sgd", "row": "sgd, SAM"}) == "sgd, SAM" == results.name_of({"row": "sgd, SAM"})


def write_rows(path, rows):
    path.write_text("".join(json.dumps({**FACTS, **row}) + "\n" for row in rows))


def test_results_join_the_groups_of_a_section_and_name_each_machine(tmp_path, capsys):
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    write_rows(files[0], [{"section": "Speed", "group": "bf16", "row": "ours", "median": 1234.5, "unit": "images/s", "n": 3}])
    other = {"section": "Speed", "group": "fp16", "row": "ours", "median": 2.5, "unit": "images/s", "n": 1}
    other |= {"cpu": "another", "device": "a GPU", "reached": "yes", "flip_accuracies": [0.94, 0.95], "notes": ["A note."]}
    missing = {"section": "Speed", "row": "a peer", "skipped": "not installed", "cpu": "another"}
    write_rows(files[1], [other, {**other, "median": 3.5, "date": "2026-11-27"}, missing])
    assert main(["results", *map(str, files), str(files[1])]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "### Speed",
        "",
        "`a command`: a processor, 2 cores; 2026-11-26; torch 2.9.",
        "",
        "| row | images/s | n |",
        "| --- | ---: | ---: |",
        "| bf16: ours | 1,234 | 3 |",
        "",
        "`a command`: a GPU, another, 2 cores; 2026-11-26; torch 2.9.",
        "",
        "`a command`: a GPU, another, 2 cores; 2026-11-27; torch 2.9.",
        "",
        "| row | images/s | n | with mirror images | reached |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| fp16: ours | 2.5 | 1 | 94.50 ± 0.71 % | yes |",
        "| fp16: ours (2) | 3.5 | 1 | 94.50 ± 0.71 % | yes |",
        "| a peer | - | - | - | - |",
        "",
        "A note.",
    ]


def test_results_of_any_names_and_figures_are_a_table(tmp_path, capsys):
    rows = [
        {"section": "a|b\nc", "row": "x | y", "median": math.nan, "unit": "ms", "losses": [], "command": "a `b` | c\nd"},
        {"section": "a|b\nc", "row": "none", "median": None, "test_accuracies": [0.5, None], "loss_curve": [], "ratio": math.inf},
        {"section": "a|b\nc", "row": "one", "median": 0.0, "run_seconds": {"mean": 2.0, "deviation": None}},
    ]
    write_rows(tmp_path / "file.jsonl", rows)
    assert main(["results", str(tmp_path / "file.jsonl")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == ["### a\\|b c", "", "`` a `b` | c d ``: a processor, 2 cores; 2026-11-26; torch 2.9.", ""]
    assert printed[-5:] == [
        "| row | median | ratio | test accuracy | seconds | loss by quarter of the run |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| x \\| y | - | - | - | - | - |",
        "| none | - | - | - | - | - |",
        "| one | 0 | - | - | 2.0 | - |",
    ]


@pytest.mark.parametrize("content", [b"", b"\n", b"no JSON", b"[1]", b'{"row": 1}', b'{"section": "a", "row": "b"}', b"\xff"])
def test_results_refuse_other_files(content, tmp_path, capsys):
    (tmp_path / "file.jsonl").write_bytes(content)
    for path in (tmp_path / "file.jsonl", tmp_path / "missing.jsonl", tmp_path):
        assert main(["results", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"median": "fast"}, {"test_accuracies": 3}, {"points": [{}]}, {"versions": None}])
def test_results_refuse_figures_of_another_kind(changed, tmp_path, capsys):
    write_rows(tmp_path / "file.jsonl", [{"section": "a", "row": "b", "median": 1.0}, {"section": "a", "row": "c", **changed}])
    assert main(["results", str(tmp_path / "file.jsonl")]) == 2
    assert f"Line 2 of {tmp_path / 'file.jsonl'}" in capsys.readouterr().err


def test_results_name_a_last_line_that_is_cut_off(tmp_path, capsys):
    write_rows(tmp_path / "file.jsonl", [{"section": "a", "row": "b", "median": 1.0}] * 2)
    content = (tmp_path / "file.jsonl").read_text()
    (tmp_path / "file.jsonl").write_text(content[:-20])
    assert main(["results", str(tmp_path / "file.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "Line 2 of" in error and "may be cut off" in error and "Delete it" in error


def test_a_document_keeps_its_line_ends(tmp_path):
    write_rows(tmp_path / "file.jsonl", [{"section": "Speed", "row": "ours", "median": 1.0}])
    document = tmp_path / "document.md"
    document.write_bytes(f"A\r\n{results.BEGIN}\r\nold\r\n{results.END}\r\n".encode())
    for _ in range(2):  # the second time nothing changes
        assert main(["results", str(tmp_path / "file.jsonl"), "--write", str(document)]) == 0
        content = document.read_bytes()
        assert content.count(b"\n") == content.count(b"\r\n") == 12 and b"| ours | 1 |\r\n" in content and b"old" not in content


def test_results_are_not_written_to_a_missing_document(tmp_path, capsys):
    write_rows(tmp_path / "file.jsonl", [{"section": "Speed", "row": "ours", "median": 1.0}])
    assert main(["results", str(tmp_path / "file.jsonl"), "--write", str(tmp_path / "document.md")]) == 2
    assert "document.md cannot be read" in capsys.readouterr().err and not (tmp_path / "document.md").exists()


@pytest.mark.parametrize("text", ["no markers", f"{results.END} {results.BEGIN}", results.BEGIN])
def test_results_are_not_written_to_a_document_without_markers(text, tmp_path, capsys):
    write_rows(tmp_path / "file.jsonl", [{"section": "Speed", "row": "ours", "median": 1.0}])
    document = tmp_path / "document.md"
    document.write_text(text)
    assert main(["results", str(tmp_path / "file.jsonl"), "--write", str(document)]) == 2
    assert results.BEGIN in capsys.readouterr().err and document.read_text() == text


@pytest.mark.parametrize("page, rows", [("results.md", "benchmark-gpu.jsonl"), ("performance.md", "benchmark-cpu.jsonl")])
def test_the_tables_of_the_documentation_are_made_by_the_command(page, rows):
    document = ROOT / "docs" / page
    assert results.between_markers(document, results.tables_of([ROOT / "docs" / rows])) == document.read_text()
