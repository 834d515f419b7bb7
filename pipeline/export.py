"""`python -m pipeline.export RUN`: exports a run's model as a timm folder, ONNX, TorchScript or torch.export, and checks it.

The logits of the exported model must equal the model's on images, in batches of one and of many; otherwise the export
fails and writes nothing. preprocessing.json describes how to prepare an image and what the outputs mean.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.common import console
from pipeline.settings.command_line import CommandParser, exit_status, one_of

FORMAT_NAMES = ("timm", "onnx", "torchscript", "torch_export")


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("model", metavar="RUN|MODEL", help="a run, a timm folder, a Hub id or a timm model name")
    text = "timm, onnx, torchscript or torch_export"
    parser.add_argument("--format", type=one_of(*FORMAT_NAMES), default="timm", help=text)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write; default: RUN/export/FORMAT")
    text = "images, folders or quoted patterns for the check; default: random ones for timm, else the run's test images"
    parser.add_argument("--images", metavar="PATH", nargs="+", default=[], help=text)
    text = "where the run's dataset is now, if it has moved"
    parser.add_argument("--dataset", metavar="PATH", help=text)
    text = "upload the timm folder to the Hugging Face Hub, with the token of HF_TOKEN"
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help=text)
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: create a private repository")
    return parser


def run(args: argparse.Namespace) -> int:
    """Exports, checks and uploads. Raises ValueError for invalid input, CommandFailed if the export or the upload fails."""
    if args.push_to_hub is not None and args.format != "timm":
        raise ValueError(f"--push_to_hub uploads the timm folder, not --format {args.format}. Remove --format.")
    if args.private and args.push_to_hub is None:
        raise ValueError("--private requires --push_to_hub.")
    if args.dataset is not None and args.images:
        raise ValueError("--images and --dataset both select the images of the check. Pass one of them.")
    from pipeline.inference.export_formats import (
        check_exportable,
        check_packages,
        check_replaceable,
        export,
        images_for_check,
    )
    from pipeline.inference.hub_upload import check_can_push, push_to_hub
    from pipeline.inference.saved_model import load_saved_model

    if args.push_to_hub is not None:
        check_can_push(args.push_to_hub)
    check_packages(args.format)
    saved = load_saved_model(args.model)
    check_exportable(saved, args.format)
    output = args.output
    if output is None:
        if saved.run_dir is None:
            raise ValueError(f"{args.model} is not a run. Pass the folder to write with --output.")
        output = saved.run_dir / "export" / args.format
    check_replaceable(output)
    facts = export(saved, args.format, images_for_check(saved, args.format, args.images, args.dataset), output)
    check = facts["check"]
    rows = [
        ("export", str(output)),
        ("files", ", ".join(sorted(path.name for path in output.iterdir()))),
        (
            "check",
            f"{check['num_images']} images, largest relative difference of a logit "
            f"{check['largest_relative_difference']:.2g} (tolerance {check['tolerance']:g})",
        ),
    ]
    if args.push_to_hub is not None:
        rows.append(("uploaded", push_to_hub(output, args.push_to_hub, args.private)))
    print(console.table(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exports; returns the exit status: 0 completed, 1 the export or the upload failed, 2 invalid input."""
    args = make_parser().read(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
