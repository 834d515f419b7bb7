"""An image-classification trainer on Hugging Face Accelerate.

`import pipeline` registers the models of this project (`simple_mlp`, `small_convnet*`, `<name>_small_stem`) with timm, so that
timm can load a saved folder. timm takes seconds to import. If it is not imported yet, an import hook registers them when it is.

It also lets OpenMP's threads sleep while they wait, unless the environment says otherwise or torch has started them already.
As a part of `python -m pipeline.COMMAND`, it lets Ctrl-C end the process without a traceback while the command is imported.

`from pipeline import Config, train` is the way in from Python. Both are imported when they are first used.
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pipeline.settings.config import Config
    from pipeline.training.session import train

__all__ = ["Config", "train"]
__version__ = "0.1.0"

PLACES = {"Config": "pipeline.settings.config", "train": "pipeline.training.session"}

if "torch" not in sys.modules:  # OpenMP reads it once
    # Threads that spin take the cores of decoding workers and of other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Python's own handler would print a traceback. `exit_status` installs a handler for as long as the command works.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # "-m" until its module is found
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _TimmLoader(SourceFileLoader):
    """Loads timm, then registers the models."""

    def exec_module(self, module: ModuleType) -> None:
        hides_wandb = "wandb" not in sys.modules
        if hides_wandb:  # timm would import it (0.4 s) for a logger that is not used here
            sys.modules["wandb"] = cast(ModuleType, None)
        try:
            super().exec_module(module)
        finally:
            if hides_wandb:
                del sys.modules["wandb"]
        _register_models()


class _TimmFinder:
    """Finds timm as Python does, and registers the models after it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _TimmLoader(spec.loader.name, spec.loader.path)
        return spec


def _register_models() -> None:
    for name in ("small_models", "small_stems"):
        import_module(f"pipeline.models.{name}")


if "timm" in sys.modules:
    _register_models()
else:
    sys.meta_path.insert(0, _TimmFinder())


def __getattr__(name: str) -> object:
    """Config and train. They are imported here because torch, which train needs, takes seconds to import."""
    if name not in PLACES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
