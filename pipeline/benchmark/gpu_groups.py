"""A group of measurements of `gpu`: the unit in which it is resumed."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.benchmark.measuring import Row


@dataclass(frozen=True)
class Group:
    """Measurements that are compared with each other, and are repeated together if they are interrupted.

    section: the table that they belong to; name: which of its groups, "" for the only one; measure: returns the rows;
    row_names: of those that the arguments of the command select.
    """

    section: str
    name: str
    measure: Callable[[], list[Row]]
    row_names: frozenset[str] = frozenset()

    def is_complete(self, rows: list[Row]) -> bool:
        """Whether these rows of an earlier call are all that measure would return. Tests that failed are repeated."""
        names = {row["row"] for row in rows}
        return bool(rows) and names >= self.row_names and not any(row.get("failed") for row in rows)


Groups = Callable[[Namespace, list[str]], Iterator[Group]]


def has_gpu() -> bool:
    """Whether there is a GPU that torch can use; a rehearsal does without."""
    import torch  # lazy: the other modules of these measurements need it in their children only

    return torch.cuda.is_available()


def precisions_of(args: Namespace) -> list[str]:
    """The precisions to measure; without fp16 in a rehearsal on a CPU."""
    return [precision for precision in args.precisions if precision != "fp16" or has_gpu()]
