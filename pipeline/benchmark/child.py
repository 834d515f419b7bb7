"""The child process of a contender: calls one function of this package and writes its result as JSON."""

import importlib
import json
import os
import sys
from pathlib import Path

from pipeline.common.files import write_json


def main(argv: list[str]) -> int:
    """argv: module.function, its arguments as a JSON object, the file for its result. Returns the exit status."""
    name, arguments, result_path = argv
    module, _, function = name.rpartition(".")
    try:
        result = getattr(importlib.import_module(f"pipeline.benchmark.{module}"), function)(**json.loads(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        write_json(Path(result_path), result)
    if "RANK" in os.environ:
        from pipeline.distributed.shared_failure import end_process_group  # lazy: startup is timed without torch

        end_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
