"""A sweep's trials in an Optuna storage, which any number of agents on any number of machines may share.

Every trial has a place: 0, 1, 2, ... in the order of their starts. The place determines the point of a grid and the draws of a
random search, so agents need no other communication. A trial that was interrupted, or whose agent died, is marked as failed in
Optuna and added again as a new trial at the same place. The agent that marks it adds it; Optuna lets only one agent mark it.
"""

import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from pipeline.common import console
from pipeline.common.randomness import address
from pipeline.common.system import is_alive
from pipeline.sweep.file import Sweep
from pipeline.sweep.hyperband import keeps_up
from pipeline.sweep.space import WHOLE, Parameter

OPENINGS = 4  # attempts to open a database
BEAT_SECONDS = 30.0
SILENCE_SECONDS = 300.0  # an agent on another machine without a new beat for this long is treated as dead

# the status of a trial by Optuna's state
STATUS = {
    TrialState.WAITING: "interrupted",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


def open_storage(text: str) -> BaseStorage:
    """Opens a database by its URL, else a journal file. Raises ValueError if it cannot be opened."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" not in text:
            return JournalStorage(JournalFileBackend(text))
        return open_database(text)
    except ImportError as error:
        raise ValueError(f"--storage {text} needs a package that is not installed: {error}.") from error
    except Exception as error:  # drivers of databases raise exceptions of any type
        raise ValueError(f"Cannot open --storage {text}: {' '.join(str(error).split())}") from error


def open_database(url: str) -> BaseStorage:
    """Opens a database, with retries: of agents that start at the same time, only one can create the tables."""
    for _ in range(OPENINGS - 1):
        try:
            return optuna.storages.get_storage(url)
        except ImportError:
            raise
        except Exception:  # drivers of databases raise exceptions of any type
            time.sleep(1.0)
    return optuna.storages.get_storage(url)


def optuna_distribution(parameter: Parameter) -> BaseDistribution:
    """The parameter's distribution for Optuna's samplers and dashboards."""
    low, high, is_log = parameter.bounds
    if parameter.distribution == "categorical":
        return CategoricalDistribution([str(value) for value in parameter.spec["values"]])
    if parameter.distribution in WHOLE:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=is_log)


def recorded_distribution(parameter: Parameter) -> BaseDistribution:
    """The distribution of the values of a grid or a random search, with which Optuna and its dashboards know them."""
    if "values" in parameter.spec:
        return CategoricalDistribution([str(value) for value in parameter.spec["values"]])
    low, high = parameter.quantile(0.0), parameter.quantile(1.0)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=parameter.bounds[2] and low > 0)


class PlaceSampler(optuna.samplers.BaseSampler):
    """TPE seeded by the sweep's seed and the trial's number, so that agents draw different values.

    point: the values of the trial's parameters for Optuna, if a grid or a random search has determined them.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.point: Mapping[str, Any] = {}
        self.tpe = optuna.samplers.TPESampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.tpe = optuna.samplers.TPESampler(seed=address(self.seed, trial.number) % 2**32)
        self.tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self.point:
            return self.point[param_name]
        seeded = optuna.samplers.TPESampler(
            seed=address(self.seed, trial.number, zlib.crc32(param_name.encode())) % 2**32
        )
        return seeded.sample_independent(study, trial, param_name, param_distribution)


@dataclass(frozen=True)
class Claim:
    """A trial that this agent runs. settings: the values of the sweep's parameters."""

    place: int
    trial: optuna.Trial
    settings: Mapping[str, Any]


class SweepStudy:
    """The trials of one sweep. Several agents may call all methods at the same time."""

    def __init__(self, sweep: Sweep, storage: str, limit: int | None, seed: int):
        """Opens or creates the study. limit: largest number of trials, None for no limit.

        Raises ValueError if the storage cannot be opened or contains a different sweep of this name.
        """
        self.sweep, self.limit, self.sampler = sweep, limit, PlaceSampler(seed)
        self.study = optuna.create_study(
            study_name=sweep.name,
            storage=open_storage(storage),
            direction="maximize" if sweep.maximize else "minimize",
            sampler=self.sampler,
            load_if_exists=True,
        )
        stored = self.study.user_attrs.get("sweep")
        ours = json.dumps({**sweep.fixed_content, "seed": seed}, sort_keys=True)
        if stored is None:
            self.study.set_user_attr("sweep", ours)
        elif stored != ours:
            raise ValueError(
                f"The sweep {sweep.name} in {storage} was started with another file or --seed. Choose another --name."
            )
        self.seed = seed
        self.last_beats: dict[int, tuple[Any, float]] = (
            {}
        )  # by trial number: its agent's last beat, and when it was first read

    def places(self) -> dict[int, FrozenTrial]:
        """The newest trial of every place."""
        return {place: trial for trial, place in self.with_places(self.study.get_trials(deepcopy=False))}

    def with_places(self, trials: Sequence[FrozenTrial]) -> list[tuple[FrozenTrial, int]]:
        placed, started = [], 0
        for trial in sorted(trials, key=lambda trial: trial.number):
            if "surplus" in trial.user_attrs:
                continue
            if "put_back" in trial.user_attrs:
                placed.append((trial, trial.user_attrs["put_back"]))
            else:
                placed.append((trial, started))
                started += 1
        return placed

    def claim(self) -> Claim | None:
        """A trial to run: an interrupted one, else a new one; None if there is none to start."""
        self.put_back_dead()
        places = self.places()
        waiting = any(trial.state == TrialState.WAITING for trial in places.values())
        full = self.limit is not None and len(places) >= self.limit
        if not waiting and (full or self.target_reached(places)):
            return None
        trial = self.study.ask()
        placed = self.with_places(self.study.get_trials(deepcopy=False))
        place = next(place for other, place in placed if other.number == trial.number)
        if self.limit is not None and place >= self.limit and "put_back" not in trial.user_attrs:
            trial.set_user_attr("surplus", True)  # another agent claimed the last place at the same time
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        self.beat(trial, 0)
        settings = self.settings(place, trial)
        trial.set_user_attr("settings", settings)
        return Claim(place, trial, settings)

    def settings(self, place: int, trial: optuna.Trial) -> dict[str, Any]:
        """The values of a trial's parameters; method bayes draws those that the trial does not have yet."""
        space = self.sweep.space
        if self.sweep.method == "bayes":
            return {parameter.name: suggested(trial, parameter) for parameter in space.parameters}
        point = space.grid_point(place) if self.sweep.method == "grid" else space.random_point(place, self.seed)
        distributions = {one.name: recorded_distribution(one) for one in space.parameters if one.is_varied}
        self.sampler.point = {
            name: str(point[name]) if isinstance(distribution, CategoricalDistribution) else point[name]
            for name, distribution in distributions.items()
        }
        for name, distribution in distributions.items():
            suggest(trial, name, distribution)
        return point

    def beat(self, trial: optuna.Trial, count: int) -> None:
        """Records a sign of life for the other agents."""
        trial.set_user_attr("agent", {"machine": os.uname().nodename, "process": os.getpid(), "beat": count})

    def report(self, trial: optuna.Trial, history: Sequence[float], known: int) -> None:
        """Reports the values of the metric after the first `known` to the study; iterations count from 1."""
        for iteration in range(known, len(history)):
            trial.report(history[iteration], iteration + 1)

    def keeps_up(self, place: int, history: Sequence[float]) -> bool:
        """Whether hyperband lets the trial continue; True without early_terminate."""
        if self.sweep.hyperband is None:
            return True
        others = [reported(trial) for other, trial in self.places().items() if other != place]
        return keeps_up(history, others, self.sweep.hyperband, self.sweep.maximize)

    def end(self, trial: optuna.Trial, status: str, value: float | None, facts: Mapping[str, Any]) -> None:
        """Ends a trial. status: one of STATUS; facts: its columns in the table, with an error if it failed."""
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        try:
            state = next(state for state, name in STATUS.items() if name == status)
            self.study.tell(trial, values=value if status == "completed" else None, state=state)
        except (ValueError, UpdateFinishedTrialError):
            console.warn(f"Another agent treated trial {trial.number} as dead and runs it again.")

    def put_back(self, trial: optuna.Trial | FrozenTrial, place: int) -> None:
        """Makes an unfinished trial available to all agents, which resume it."""
        try:
            self.study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            return  # it has ended, or another agent has put it back
        again = optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"put_back": place, "settings": trial.user_attrs.get("settings", {})},
        )
        self.study.add_trial(again)

    def put_back_dead(self) -> None:
        for place, trial in self.places().items():
            if trial.state == TrialState.RUNNING and self.is_dead(trial):
                self.put_back(trial, place)

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the agent of a running trial is dead: by its process on this machine, by its beat on another."""
        agent = trial.user_attrs.get("agent", {})
        if agent.get("machine") == os.uname().nodename:
            return agent["process"] != os.getpid() and not is_alive(agent["process"])
        beat, since = self.last_beats.get(trial.number, (None, 0.0))
        if beat != agent or trial.number not in self.last_beats:
            self.last_beats[trial.number] = (agent, time.monotonic())
            return False
        return time.monotonic() - since > SILENCE_SECONDS

    def target_reached(self, places: Mapping[int, FrozenTrial]) -> bool:
        target = self.sweep.target
        values = [value for trial in places.values() for value in reported(trial)]
        return target is not None and any(
            value >= target if self.sweep.maximize else value <= target for value in values
        )

    def unfinished(self) -> int:
        """The number of running and interrupted trials of all agents."""
        return sum(not trial.state.is_finished() for trial in self.places().values())


def suggested(trial: optuna.Trial, parameter: Parameter) -> Any:
    """The value of a parameter that Optuna has drawn earlier or draws now."""
    if not parameter.is_varied:
        return parameter.value(0)
    distribution = optuna_distribution(parameter)
    drawn = suggest(trial, parameter.name, distribution)
    return parameter.value(distribution.choices.index(drawn) if isinstance(distribution, CategoricalDistribution) else drawn)


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """The number or choice that the trial has for this name; if it has none, the sampler's, which the trial keeps."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def reported(trial: FrozenTrial) -> list[float]:
    """The reported values of the metric, ordered by iteration."""
    return [value for _, value in sorted(trial.intermediate_values.items())]
