"""When a sweep stops a trial early: W&B's hyperband as a pure function of what all trials have reported."""

import math
from collections.abc import Sequence

from pipeline.sweep.file import Hyperband


def keeps_up(history: Sequence[float], others: Sequence[Sequence[float]], hyperband: Hyperband, maximize: bool) -> bool:
    """Whether a trial may go on.

    history: the trial's values of the metric, one for each iteration; others: those of all other trials, ended ones too.
    At the last of hyperband's iterations that the trial has reached it is compared with all that reached it: the best 1/eta
    go on, and with them the next best one unless strict.
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
