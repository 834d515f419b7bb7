"""`python -m pipeline.evaluate RUN|MODEL`: evaluates a saved model on the test split of its run or on another dataset.

Reports loss, top-1, top-5 and balanced accuracy, macro F1, the area under the ROC curve of two classes, precision, recall and
F1 by class, the confusion matrix, images per second, and the expected calibration error over 15 bins of equal width (arXiv
1706.04599). `--tta flip` averages the probabilities of each image and its mirror image.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.common import console
from pipeline.common.files import to_json
from pipeline.settings.command_line import CommandParser, at_least, exit_status, one_of

MOST_CLASSES_SHOWN = 20  # in the confusion matrix; with more classes the most confused pairs are shown
MOST_PAIRS_SHOWN = 10


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m pipeline.evaluate", description=__doc__)
    parser.add_argument("model", metavar="RUN|MODEL", help="a run, a timm folder, a Hub id or a timm model name")
    parser.add_argument("--dataset", help="dataset as in train.py; default: the run's dataset with its splits")
    text = "train, val, test or all; default: test, and all images of a --dataset without splits"
    parser.add_argument("--split", type=one_of("train", "val", "test", "all"), help=text)
    parser.add_argument("--label_column", help="for --dataset, as in train.py")
    parser.add_argument("--hub_config", help="for --dataset, as in train.py")
    text = "test-time augmentation: none, or flip (mean probabilities of each image and its mirror image)"
    parser.add_argument("--tta", type=one_of("none", "flip"), default="none", help=text)
    parser.add_argument("--batch_size", type=at_least(1), help="images at once per process; default: as in the run, else 64")
    parser.add_argument("--num_workers", type=at_least(0), help="worker processes that decode, per process; default: by cores")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda", "mps"), default="auto", help="auto, cpu, cuda or mps")
    precisions = one_of("no", "fp16", "bf16")
    parser.add_argument("--mixed_precision", type=precisions, help="no, fp16 or bf16; default: as in the run's test")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser


def report(result: dict[str, Any]) -> str:
    """The figures as text for the terminal."""
    margin = 1.96 * math.sqrt(result["accuracy"] * (1 - result["accuracy"]) / result["num_samples"])
    rows = [
        ("model", result["model"]),
        ("data", f"{data_text(result)}, {result['num_samples']:,} images"),
        *classes_rows(result["classes"]),
        ("accuracy", f"{console.percent(result['accuracy'])} +- {100 * margin:.2f}"),
        ("balanced accuracy", f"{console.percent(result['balanced_accuracy'])}, the mean recall of the classes"),
        ("macro F1", console.percent(result["macro_f1"])),
        *([("area under ROC", console.percent(result["roc_auc"]))] if math.isfinite(result.get("roc_auc", math.nan)) else []),
        ("top-5 accuracy", console.percent(result["top5_accuracy"])),
        ("loss", f"{result['loss']:.4f}"),
        ("calibration", f"{console.percent(result['expected_calibration_error'])} expected error, 15 bins"),
        ("speed", f"{result['images_per_second']:,.0f} images/s on {result['device']}"),
    ]
    if result["tta"] != "none":
        rows.insert(2, ("augmentation", f"{result['tta']}, probabilities averaged"))
    names = list(result["per_class_accuracy"])
    detail = confusion_table(names, result) if len(names) <= MOST_CLASSES_SHOWN else confused_pairs(names, result)
    return f"{console.table(rows)}\n\n{detail}"


def data_text(result: dict[str, Any]) -> str:
    return f"all of {result['dataset']}" if result["split"] == "all" else f"{result['split']} split of {result['dataset']}"


def classes_rows(classes: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the report on classes that were matched by number, or are only in the dataset or in the model."""
    rows = []
    if classes["matched_by"] == "number":
        rows.append(("classes", "matched by number, because no name is the same"))
    if classes["not_in_model"]:
        rows.append(("not scored", f"{classes['images_left_out']:,} images of {listed(classes['not_in_model'])}"))
    if classes["not_in_dataset"]:
        rows.append(("not in dataset", listed(classes["not_in_dataset"])))
    return rows


def listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_PAIRS_SHOWN} more" if len(names) > MOST_PAIRS_SHOWN else ""
    return ", ".join(map(console.on_one_line, names[:MOST_PAIRS_SHOWN])) + more


def confusion_table(names: list[str], result: dict[str, Any]) -> str:
    """A line per true class: its recall, precision and F1, then how often each class was predicted, by class number."""
    labels = [f"{number} {console.on_one_line(name)}" for number, name in enumerate(names)]
    label = max(map(len, labels))
    cell = max(len(str(count)) for row in result["confusion_matrix"] for count in (*row, len(names)))
    lines = [f"{'true class':<{label}} {'recall':>9} {'precision':>9} {'F1':>9}  predicted class"]
    lines.append(f"{'':<{label}} {'':>29}  {' '.join(f'{number:>{cell}}' for number in range(len(names)))}")
    for name, shown, row in zip(names, labels, result["confusion_matrix"]):
        own = result["per_class"][name]
        shares = " ".join(f"{console.percent(own[key]):>9}" for key in ("recall", "precision", "f1"))
        lines.append(f"{shown:<{label}} {shares}  {' '.join(f'{count:>{cell}}' for count in row)}")
    return "\n".join(lines)


def confused_pairs(names: list[str], result: dict[str, Any]) -> str:
    """The classes of the lowest accuracy and, where a confusion matrix was counted, the pairs of classes confused most often."""
    names = [console.on_one_line(name) for name in names]
    recalls = zip(names, result["per_class_accuracy"].values())
    known = {name: value for name, value in recalls if value is not None}
    worst = sorted(known, key=lambda name: known[name])[:MOST_PAIRS_SHOWN]
    matrix = result.get("confusion_matrix", [])
    pairs = [
        (count, true, predicted)
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:MOST_PAIRS_SHOWN]
    lines = ["lowest accuracy by class", *(f"{console.percent(known[name]):>9}  {name}" for name in worst)]
    if pairs:
        lines += ["", "most often confused"]
    lines += [f"{count:>9}  {names[true]} predicted as {names[predicted]}" for count, true, predicted in pairs]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and prints; returns the exit status: 0 completed, 1 an image that cannot be read, 2 invalid input."""
    args = make_parser().read(argv)

    def run() -> int:
        from pipeline.distributed.shared_failure import end_process_group  # lazy: --help does not import torch
        from pipeline.inference.saved_evaluation import evaluate_saved

        result = evaluate_saved(args)
        end_process_group()
        if result is not None:
            print(to_json(result) if args.json else report(result))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
