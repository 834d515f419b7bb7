"""`benchmark gpu` end to end at toy size, its resumption, and `benchmark results`, which makes the tables of a document."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_benchmark import in_this_process  # noqa: F401: a fixture

from pipeline.benchmark import gpu, gpu_child, gpu_training, reporting, results
from pipeline.benchmark.__main__ import GPU_PARTS, main
from pipeline.benchmark.gpu_groups import Group

REHEARSAL = ["gpu", "--rehearse", "--rounds", "1", "--seeds", "1", "--seconds", "0.01", "--warmup_steps", "1"]
FEW = ["--compile_modes", "off", "--precisions", "no"]
FACTS = {"command": "a command", "date": "2026-11-26", "cpu": "a processor", "cores": 2, "versions": {"torch": "2.9"}}


def rows_in(folder):
    return [json.loads(line) for line in (folder / "benchmark-gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_rehearsal_runs_every_part_and_its_tables_are_made_by_the_command(
    in_this_process, tmp_path, capsys, monkeypatch  # noqa: F811
):
    monkeypatch.setattr(gpu_training, "run", passed_and_skipped)
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
        "Fine-tuning from given weights",
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


def passed_and_skipped(command, **options):
    """Stands in for pytest: writes its report."""
    (path,) = [word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml=")]
    Path(path).write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"></testsuite></testsuites>')


@pytest.fixture
def counted_groups(monkeypatch):
    """Two parts of two groups each, whose measurements are counted."""
    measured = []

    def part(name):
        def groups(args, settings):
            for number in (1, 2):
                row = {"row": "a row", "unit": "s", "median": float(number), "ratio": 1.0, "ratio_to": "a row"}
                yield Group(f"Part {name}", f"group {number}", lambda n=number, row=row: measured.append(f"{name}{n}") or [row])

        return groups

    monkeypatch.setattr(gpu, "PARTS", {"tests": part("a"), "steps": part("b")})
    return measured


def test_the_same_command_continues_after_its_last_complete_group(counted_groups, tmp_path, capsys):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    assert main([*command, "tests"]) == 0 and counted_groups == ["a1", "a2"]
    lines = (tmp_path / "benchmark-gpu.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "benchmark-gpu.jsonl").write_text(lines[0])  # as if it had been killed in the second group
    assert main([*command, "tests", "steps"]) == 0
    assert counted_groups == ["a1", "a2", "a2", "b1", "b2"]
    assert [(row["section"], row["group"]) for row in rows_in(tmp_path)] == [
        (f"Part {part}", f"group {number}") for part in "ab" for number in (1, 2)
    ]
    assert {row["command"].split("--parts ")[1] for row in rows_in(tmp_path)} == {"tests", "tests steps"}


def test_rows_of_parts_that_are_not_named_are_kept(counted_groups, tmp_path):
    command = ["gpu", "--rehearse", "--output", str(tmp_path), "--parts"]
    assert main([*command, "tests"]) == 0 and main([*command, "steps"]) == 0
    assert [row["section"] for row in rows_in(tmp_path)] == ["Part a", "Part a", "Part b", "Part b"]


def test_no_group_begins_after_the_given_minutes(counted_groups, tmp_path, capsys, monkeypatch):
    minutes = iter([0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 60 * next(minutes)))
    assert main(["gpu", "--rehearse", "--parts", "tests", "steps", "--minutes", "9", "--output", str(tmp_path)]) == 0
    assert counted_groups == ["a1"] and "3 groups did not begin within 9 minutes" in capsys.readouterr().out


def test_without_a_gpu_it_says_how_to_rehearse(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert main(["gpu"]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_the_parts_of_the_command_line_are_those_that_exist():
    assert GPU_PARTS == tuple(gpu.PARTS)


def test_a_curve_is_the_mean_of_equal_parts():
    assert gpu_child.parts_of([4.0, 2.0, 3.0, 3.0, 2.0, 0.0, 1.0, 1.0]) == [3.0, 3.0, 1.0, 1.0]
    assert gpu_child.parts_of([2.0, 1.0]) == [2.0, 1.0]


def test_the_name_of_a_group_precedes_that_of_a_row_once():
    assert results.name_of({"group": "bf16", "row": "ours"}) == "bf16: ours"
    assert results.name_of({"group": "sgd", "row": "sgd, SAM"}) == "sgd, SAM" == results.name_of({"row": "sgd, SAM"})


def write_rows(path, rows):
    path.write_text("".join(json.dumps({**FACTS, **row}) + "\n" for row in rows))


def test_results_join_the_groups_of_a_section_and_name_each_machine(tmp_path, capsys):
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    write_rows(files[0], [{"section": "Speed", "group": "bf16", "row": "ours", "median": 1234.5, "unit": "images/s", "n": 3}])
    other = {"section": "Speed", "group": "fp16", "row": "ours", "median": 2.5, "unit": "images/s", "n": 1}
    write_rows(files[1], [{**other, "cpu": "another", "device": "a GPU", "reached": "yes", "flip_accuracies": [0.94, 0.95]}])
    assert main(["results", *map(str, files)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "### Speed",
        "",
        "`a command`: a processor, 2 cores; 2026-11-26; torch 2.9.",
        "",
        "`a command`: a GPU, another, 2 cores; 2026-11-26; torch 2.9.",
        "",
        "| row | images/s | n | with mirror images | reached |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| bf16: ours | 1,234 | 3 | - | - |",
        "| fp16: ours | 2.5 | 1 | 94.50 ± 0.71 % | yes |",
    ]


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", '{"row": 1}'])
def test_results_refuse_other_files(content, tmp_path, capsys):
    (tmp_path / "file.jsonl").write_text(content)
    assert main(["results", str(tmp_path / "file.jsonl")]) == 2
    assert str(tmp_path / "file.jsonl") in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no markers", f"{results.END} {results.BEGIN}", results.BEGIN])
def test_results_are_not_written_to_a_document_without_markers(text, tmp_path, capsys):
    write_rows(tmp_path / "file.jsonl", [{"section": "Speed", "row": "ours", "median": 1.0}])
    document = tmp_path / "document.md"
    document.write_text(text)
    assert main(["results", str(tmp_path / "file.jsonl"), "--write", str(document)]) == 2
    assert results.BEGIN in capsys.readouterr().err and document.read_text() == text


def test_the_tables_of_the_documentation_are_made_by_the_command():
    document, rows = ROOT / "docs" / "results.md", ROOT / "docs" / "benchmark-gpu.jsonl"
    if not rows.is_file():
        pytest.skip("nothing was measured on a GPU yet")
    assert results.between_markers(document, results.tables_of([rows])) == document.read_text()
