"""Names of runs and paths of their files."""

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.settings.config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator  # it imports torch, which is not needed to read a run


def name_run(config: Config, accelerator: "Accelerator") -> Config:
    """The settings with run_name filled in: dataset, model and start time, the same on every rank.

    If `resume` is a checkpoint, name and folder are those of its run. Under `wandb agent` the name consists of W&B's ids, so
    that a requeued trial resumes in its own folder. Raises ValueError for a launcher that restarts processes (max_restarts),
    because without a run_name the restarted processes would start a new run.
    """
    if config.run_name is not None:
        return config
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        return dataclasses.replace(config, run_name=f"{os.environ['WANDB_SWEEP_ID']}-{os.environ['WANDB_RUN_ID']}")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and config.resume == "auto":
        raise ValueError("max_restarts needs a --run_name: the restarted processes resume the run of that name.")
    if config.resume not in ("auto", "never"):
        run_dir = Path(config.resume).resolve().parent.parent
        return dataclasses.replace(config, run_name=run_dir.name, output_dir=str(run_dir.parent))
    words = [os.path.basename(os.path.abspath(config.dataset)), config.model_name, time.strftime("%Y%m%d-%H%M%S")]
    base = "-".join("".join(letter if letter.isalnum() or letter in "._" else "_" for letter in word) for word in words)
    name, number = base, 2
    while (config.run_dir.parent / name).exists():
        name, number = f"{base}-{number}", number + 1
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (name,) = broadcast_object_list([name])
    return dataclasses.replace(config, run_name=name)


def metrics_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"
