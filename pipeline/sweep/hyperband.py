"""Early termination of trials: W&B's hyperband as a pure function of the reported values of all trials."""

import math
from collections.abc import Sequence

from pipeline.sweep.file import Hyperband


def keeps_up(history: Sequence[float], others: Sequence[Sequence[float]], hyperband: Hyperband, maximize: bool) -> bool:
    """Whether a trial continues.

    history: the trial's values of the metric, one per iteration; others: those of all other trials, ended ones included. At
    the last of hyperband's iterations that the trial has reached, it is compared with all trials that reached it. The best
    1/eta of them continue, and the next best one too unless strict.
    """
    reached = [iteration for iteration in hyperband.iterations if iteration <= len(history)]
    if not reached:
        return True

    def loss(values: Sequence[float]) -> float:
        value = values[reached[-1] - 1]
        return math.inf if math.isnan(value) else -value if maximize else value

    losses = sorted(loss(values) for values in [history, *others] if len(values) >= reached[-1])
    share = len(losses) / hyperband.eta
    last = max(math.ceil(share) - 1, 0) if hyperband.strict else math.floor(share)
    return loss(history) <= losses[last]
