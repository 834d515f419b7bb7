"""The contenders: their common settings, their common dataset, and a call for each that times it once."""

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.benchmark.children import run_child
from pipeline.benchmark.measuring import Row
from pipeline.settings.config import DEFAULTS, Config
from pipeline.settings.parser import read_config

Call = Callable[[], Row]

MADE = "synthetic"  # the dataset that is generated, so that no network is needed

# The learning rate does not affect the speed; with a small one the weights stay finite for any number of steps.
SHARED = ["--stem=imagenet", "--batch_size=128", "--lr=1e-5", "--val_fraction=0"]

BARE, OURS, FAST = "bare loop", "ours", "ours, bf16 and channels_last"
BARE_CHANNELS_LAST, OURS_CONTIGUOUS = "bare loop, channels_last", "ours, contiguous"
PEERS = {"plain": "datasets and torchvision", "timm": "timm's loader", "pytorch_accelerated": "pytorch-accelerated"}
PACKAGE_OF = {"plain": "datasets", "timm": "timm", "pytorch_accelerated": "pytorch_accelerated"}

# settings that the peers' loops do not support
OURS_ALONE = (
    "mixup",
    "cutmix",
    "random_erasing",
    "label_smoothing",
    "ema_decay",
    "clip_grad_norm",
    "micro_batch_size",
    "gradient_checkpointing",
    "batch_size_schedule",
    "freeze_epochs",
    "init_from",
    "sam_rho",
)


@contextlib.contextmanager
def prepared(args: Namespace, settings: list[str]) -> Iterator[tuple[list[str], dict[str, str], Path]]:
    """The settings (with the folder of the synthetic set, if used), the environment variables for them, and a scratch folder.

    Raises ValueError for invalid settings.
    """
    config = read_config([*SHARED, f"--dataset={MADE}", *settings])
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        if config.dataset != MADE:
            yield [*SHARED, *settings], {}, folder
            return
        made = folder / MADE
        made.mkdir()
        run_child("sets.make_set", {"set_folder": str(made), "num_images": args.num_images, "side": args.made_size})
        yield [*SHARED, *settings, f"--dataset={made}"], {"HF_DATASETS_CACHE": str(folder / "cache")}, folder


def peer_data(settings: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The dataset as the peers read it, see sets.peer_set."""
    arguments = {"settings": settings, "parquet": str(folder / "peers.parquet")}
    found = run_child("sets.peer_set", arguments, environment=environment)
    return {key: value for key, value in found.items() if key not in ("stderr", "peak_memory_bytes")}


def check_comparable(config: Config) -> None:
    """Raises ValueError for settings with which the peers would do less work than ours."""
    changed = [name for name in OURS_ALONE if getattr(config, name) != getattr(DEFAULTS, name)]
    if changed or config.optimizer == "sam":
        names = ", ".join(changed or ["optimizer sam"])
        raise ValueError(f"The peers' loops do not support {names}, so the comparison would be unfair. Remove {names}.")


def installed_peers() -> dict[str, str]:
    """The functions of peers.loops whose package is installed, and the names of their rows."""
    return {function: name for function, name in PEERS.items() if find_spec(PACKAGE_OF[function])}


def contender(
    function: str, settings: list[str], environment: dict[str, str], clock: dict[str, Any], **arguments: Any
) -> Call:
    return lambda: run_child(function, {"settings": settings, **clock, **arguments}, environment=environment)


def contenders(
    args: Namespace, settings: list[str], environment: dict[str, str], data: dict[str, Any], clock: dict[str, Any]
) -> dict[str, Call]:
    """The contenders by row name: the bare loop, ours, with --layouts both in the other memory format, with --fast ours in bf16,
    and the peers.

    If channels_last is null, ours chooses the memory format, and the others use contiguous tensors, PyTorch's default.
    """
    cache = {"HF_DATASETS_CACHE": str(Path(data["parquet"]).parent / "peers")}
    calls = {
        BARE: contender("peers.loops.bare", settings, cache, clock, data=data),
        OURS: contender("ours.train", settings, environment, clock),
    }
    if args.layouts:
        calls[BARE_CHANNELS_LAST] = contender(
            "peers.loops.bare", [*settings, "--channels_last=true"], cache, clock, data=data
        )
        calls[OURS_CONTIGUOUS] = contender("ours.train", [*settings, "--channels_last=false"], environment, clock)
    if args.fast:
        fast = [*settings, "--mixed_precision=bf16", "--channels_last=true"]
        calls[FAST] = contender("ours.train", fast, environment, clock)
    for function, name in installed_peers().items():
        calls[name] = contender(f"peers.loops.{function}", settings, cache, clock, data=data, workers=args.peer_workers)
    return calls
