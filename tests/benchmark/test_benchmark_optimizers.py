"""`benchmark optimizers`: rows take turns, slow ones stop, and what is printed is what is saved."""

import json
import shlex
import statistics
from types import SimpleNamespace

import pytest
import timm
import torch
from test_benchmark import check_markdown
from torch.nn.functional import cross_entropy

from pipeline.benchmark import optimizers
from pipeline.benchmark.__main__ import main
from pipeline.benchmark.reporting import number, table
from pipeline.models.timm_folder import save_model

ROWS = {
    "whole training steps": [
        "sgd",
        "adam",
        "adamw",
        "sam (sgd + SAM)",
        "muon",
        "muon + SAM",
        "bare loop, torch's sgd",
    ],
    "optimizer.step alone": [
        "sgd, fused",
        "sgd, for-loop",
        "adamw, fused",
        "adamw, for-loop",
        "muon",
        "timm muon",
        "torch muon, matrices only",
    ],
}
REFERENCES = {"whole training steps": "sgd", "optimizer.step alone": "timm muon"}
FACTS = {"command", "date", "cpu", "cores", "threads", "device", "versions"}
MEASURED = {"section", "row", "unit", "median", "least", "most", "n", "ratio", "ratio_to", "warmed_up", "samples"}


@pytest.fixture
def tiny_model(tmp_path):
    """The name of a simple_mlp with layers of 16: on usual ones timm's Muon takes seconds where bf16 is slow."""
    save_model(
        timm.create_model("simple_mlp", img_size=8, hidden_sizes=(16, 16), num_classes=10),
        tmp_path / "tiny",
        label_names=[str(label) for label in range(10)],
        image_size=8,
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        interpolation="bilinear",
        crop_pct=1.0,
        readme="",
    )
    return f"local-dir:{tmp_path / 'tiny'}"


def arguments(model_name, *more):
    given = {"model_name": model_name, "stem": "auto", "batch_size": 8, "image_size": 8, "rounds": 1}
    return ["optimizers", *(f"--{name}={value}" for name, value in given.items()), *more]


def settings(model_name, **changed):
    given = {"stem": "auto", "batch_size": 8, "image_size": 8, "channels_last": "false", "device": "cpu"}
    given["mixed_precision"] = "no"
    return SimpleNamespace(**{"model_name": model_name, **given, **changed})


@pytest.mark.parametrize("channels_last, layout", [("false", "contiguous weights"), ("true", "channels-last weights")])
def test_the_table_and_the_file_hold_every_row_and_the_same_figures(
    tiny_model, tmp_path, capsys, channels_last, layout
):
    argv = arguments(tiny_model, "--channels_last", channels_last, "--output", str(tmp_path / "out"))
    assert main(argv) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "benchmark-optimizers.jsonl").read_text().splitlines()]
    assert [(row["section"], row["row"]) for row in rows] == [
        (f"{title}, {layout}", name) for title, names in ROWS.items() for name in names
    ]
    assert (tmp_path / "out" / "benchmark-optimizers.png").stat().st_size > 1000
    medians = {(row["section"], row["row"]): row["median"] for row in rows}
    for row in rows:
        assert row.keys() == MEASURED | FACTS
        assert row["ratio_to"] == REFERENCES[row["section"].removesuffix(f", {layout}")]
        assert row["ratio"] == row["median"] / medians[row["section"], row["ratio_to"]] > 0
        assert row["n"] == len(row["samples"]) == 1 and row["warmed_up"] and row["unit"] == "ms"
        assert row["samples"] == [row["median"]] == [row["least"]] == [row["most"]]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {row['row']} ") and pattern(row, line))
        assert [cell.strip() for cell in line.strip("|").split("|")][4] == "1"
        assert row["command"] == f"python -m pipeline.benchmark {shlex.join(argv[:-2])}" and row["command"] in printed
        assert row["threads"] == torch.get_num_threads() and row["device"] == "cpu" and row["cpu"] in printed
        assert row["versions"]["torch"] in printed and row["versions"]["timm"] in printed
    check_markdown(tmp_path / "out" / "benchmark-optimizers.jsonl", rows, printed)


def pattern(row, line):
    """Whether the line shows the row's figures."""
    return f" {number(row['median'])} " in line and f" {row['ratio']:#.3g} " in line


def test_channels_last_reaches_images_weights_and_gradients():
    args = settings("resnet10t", image_size=32, channels_last="true")
    accelerator = optimizers.make_accelerator(args)
    model, images, labels = optimizers.make_model_and_batch(args, accelerator)
    cross_entropy(model(images), labels).backward()
    filters = [weight for weight in model.parameters() if weight.ndim == 4 and weight.shape[-1] > 1]
    assert len(filters) > 5
    for tensor in [images, *filters, *(weight.grad for weight in filters)]:
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    step = optimizers.our_step(model, images, labels, optimizers.make_config(args), accelerator)
    assert step() is None


def test_every_optimizer_moves_the_weights_and_none_the_gradients(tiny_model):
    args = settings(tiny_model)
    model, images, labels = optimizers.make_model_and_batch(args, optimizers.make_accelerator(args))
    cross_entropy(model(images), labels).backward()
    weights = [weight.detach().clone() for weight in model.parameters()]
    gradients = [weight.grad.clone() for weight in model.parameters()]
    steps = optimizers.optimizers_alone(model, args)
    assert list(steps) == ROWS["optimizer.step alone"]
    for name, step in steps.items():
        before = [weight.detach().clone() for group in step.__self__.param_groups for weight in group["params"]]
        step()
        after = [weight for group in step.__self__.param_groups for weight in group["params"]]
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), name
        assert all(torch.equal(weight.grad, old) for weight, old in zip(model.parameters(), gradients)), name
    assert all(torch.equal(weight, old) for weight, old in zip(model.parameters(), weights))


def on_a_false_clock(monkeypatch, milliseconds):
    """Calls that take so many milliseconds, by name, on a clock that only they move; and the order they ran in."""
    now, order = [0.0], []
    monkeypatch.setattr(optimizers, "perf_counter", lambda: now[0])

    def call(name):
        order.append(name)
        now[0] += milliseconds[name].pop(0) / 1000

    return {name: lambda name=name: call(name) for name in milliseconds}, order


def test_rows_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    milliseconds = {"A": [900, 1, 4, 2], "B": [800, 3, 8, 5], "C": [700, 9, 9, 9]}
    expected = {name: taken[1:] for name, taken in milliseconds.items()}
    calls, order = on_a_false_clock(monkeypatch, {name: list(taken) for name, taken in milliseconds.items()})
    samples = optimizers.take_turns(calls, SimpleNamespace(rounds=3, seconds_per_row=60, device="cpu"))
    assert "".join(order) == "ABC" * 4
    rows = {row["row"]: row for row in optimizers.to_section("a title", "B", samples, "cpu").rows}
    for name, taken in expected.items():
        assert rows[name]["samples"] == pytest.approx(taken) and rows[name]["n"] == 3
        assert rows[name]["median"] == statistics.median(rows[name]["samples"])
        assert [rows[name]["least"], rows[name]["most"]] == pytest.approx([min(taken), max(taken)])
        assert rows[name]["ratio"] == rows[name]["median"] / rows["B"]["median"]


def test_a_slow_row_runs_while_it_fits_but_at_least_once(monkeypatch):
    calls, order = on_a_false_clock(monkeypatch, {"fast": [1] * 4, "slow": [400] * 4, "endless": [90_000] * 4})
    samples = optimizers.take_turns(calls, SimpleNamespace(rounds=3, seconds_per_row=1.0, device="cpu"))
    assert [order.count(name) for name in calls] == [4, 2, 1]
    section = optimizers.to_section("a title", "endless", samples, "cpu")
    assert [(row["n"], row["warmed_up"]) for row in section.rows] == [(3, True), (1, True), (1, False)]
    assert section.rows[2]["median"] == pytest.approx(90_000) and section.rows[2]["ratio"] == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(section).splitlines()]
    assert [line[0] for line in cells] == ["row", "---", "fast", "slow", "endless (cold)"]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model_name", "resnet81"], ["resnet81", "Did you mean"]),
        (["--mixed_precision", "fp16"], ["fp16 needs a GPU"]),
        (["--image_size", "1", "--model_name", "convnext_atto"], ["convnext_atto", "image_size"]),
        pytest.param(
            ["--device", "cuda", "--model_name", "simple_mlp"],
            ["cuda", "--device cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(more, words, capsys):
    assert main(["optimizers", *more]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert all(word in complaint for word in words)
