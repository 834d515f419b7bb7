"""`python -m pipeline.sweep FILE`: runs a W&B sweep file without W&B, on one machine or on several."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import console
from pipeline.common.files import write_atomically
from pipeline.common.fork_server import ForkServer
from pipeline.common.stopping import Signals
from pipeline.common.system import usable_cores
from pipeline.settings.command_line import CommandFailed, CommandParser, at_least, exit_status
from pipeline.settings.config import Config
from pipeline.sweep.file import Sweep, check_trials, read_sweep
from pipeline.sweep.trials import (
    Outcome,
    RunningTrial,
    ask_to_stop,
    has_news,
    judge,
    read_history,
    shares,
    start_trial,
    trial_server,
    visible_devices,
)

if TYPE_CHECKING:
    from pipeline.sweep.study import Claim, SweepStudy

POLL_SECONDS = 0.5


def make_parser() -> CommandParser:
    parser = CommandParser(prog="python -m pipeline.sweep", description=__doc__)
    parser.add_argument("file", type=Path, help="a W&B sweep file")
    parser.add_argument("--num_trials", type=at_least(1), metavar="N", help="largest number of trials, over all agents")
    parser.add_argument(
        "--num_parallel", type=at_least(1), default=1, metavar="N", help="trials at once on this machine"
    )
    parser.add_argument("--name", help="name of the sweep and its folder; default: the name in the file, else the file's name")
    text = "folder for the sweep's folder; default: output_dir of the file, else runs"
    parser.add_argument("--output_dir", type=Path, help=text)
    text = "Optuna storage shared by the agents: a journal file, or a URL such as sqlite:///x.db or postgresql://host/base"
    parser.add_argument("--storage", help=f"{text}; default: a journal in the sweep's folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of random draws and of the search")
    return parser


class Agent:
    """Runs trials of a sweep on this machine until no agent has one left to run, or a signal stops it."""

    def __init__(self, sweep: Sweep, study: "SweepStudy", folder: Path, num_parallel: int, server: ForkServer | None):
        """server: forks the trials; None starts plain processes."""
        self.sweep, self.study, self.folder, self.server = sweep, study, folder, server
        self.shares = shares(num_parallel, usable_cores(), visible_devices() if num_parallel > 1 else [])
        self.running: dict[int, tuple[Claim, RunningTrial]] = {}  # by place
        self.next_beat = 0.0
        self.reported_waiting = False
        ended = sum(trial.state.is_finished() for trial in study.places().values())
        self.bar = console.progress_bar(study.limit or 0, ended, sweep.metric, shown=True, unit="trial")

    def run(self) -> int:
        """Returns 0 after the sweep has ended, or the number of the signal that stopped this agent."""
        signals = Signals()
        try:
            while not signals.received:
                started = len(self.running) < len(self.shares) and self.start_next()
                if not started and not self.running and not self.others_run():
                    break
                if not started:
                    self.rest()
                self.check_running()
            self.stop_all()
        except BaseException:  # the storage failed: stop the running trials after a checkpoint; the next agent resumes them
            for _, trial in self.running.values():
                ask_to_stop(trial, "interrupted")
                trial.log.close()
            raise
        finally:
            self.bar.close()
            signals.release()
        return signals.received

    def rest(self) -> None:
        """Waits POLL_SECONDS, less if a trial ends."""
        end = time.monotonic() + POLL_SECONDS
        while time.monotonic() < end and all(trial.process.poll() is None for _, trial in self.running.values()):
            time.sleep(POLL_SECONDS / 20)
        self.bar.refresh()

    def start_next(self) -> bool:
        """Starts a trial on a free share of the machine; returns False if there is none to start now."""
        from pipeline.sweep.table import run_dir_name

        claim = self.study.claim()
        if claim is None:
            return False
        taken = {trial.share for _, trial in self.running.values()}
        share = next(number for number in range(len(self.shares)) if number not in taken)
        run_dir = self.folder / run_dir_name(claim.place)
        try:
            trial = start_trial(self.sweep, claim.settings, run_dir, self.shares[share], share, self.server)
        except OSError as error:
            self.end(claim, Outcome("failed", None, {"error": f"The command cannot be started: {error}."}))
            return True
        self.running[claim.place] = (claim, trial)
        self.show(claim.place)
        return True

    def check_running(self) -> None:
        """Reports new metrics of running trials to the study, stops trials early, and ends those whose process has ended."""
        beats = time.monotonic() >= self.next_beat
        for place, (claim, trial) in list(self.running.items()):
            ended = trial.process.poll() is not None
            if has_news(trial):
                history = read_history(trial.run_dir, self.sweep.metric)
                self.study.report(claim.trial, history, trial.reported)
                # a resumed run first removes the values after its checkpoint, and then logs the same ones again
                is_new, trial.reported = len(history) > trial.reported, max(len(history), trial.reported)
                if is_new and not ended and trial.stopped is None and not self.study.keeps_up(place, history):
                    ask_to_stop(trial, "stopped")
            if ended:
                del self.running[place]
                self.end(claim, judge(trial, self.sweep))
            elif beats:
                trial.beats += 1
                self.study.beat(claim.trial, trial.beats)
        if beats:
            from pipeline.sweep.study import BEAT_SECONDS

            self.next_beat = time.monotonic() + BEAT_SECONDS

    def end(self, claim: "Claim", outcome: Outcome) -> None:
        if outcome.status == "interrupted":
            self.study.put_back(claim.trial, claim.place)
        else:
            self.study.end(claim.trial, outcome.status, outcome.value, outcome.facts)
        self.show(claim.place)

    def others_run(self) -> bool:
        """Whether other agents run trials; this agent resumes a trial if its agent dies."""
        unfinished = self.study.unfinished()
        if unfinished and not self.reported_waiting:
            with self.bar.external_write_mode():
                print(f"Waiting for {unfinished} more trials of other agents. Ctrl-C stops waiting.", flush=True)
            self.reported_waiting = True
        return unfinished > 0

    def stop_all(self) -> None:
        """Stops all running trials after a checkpoint and returns them to the study, to be resumed later."""
        for _, trial in self.running.values():
            ask_to_stop(trial, trial.stopped or "interrupted")
        while self.running:
            time.sleep(POLL_SECONDS / 5)
            self.check_running()

    def show(self, place: int) -> None:
        """Rewrites the sweep's tables, prints a line about one trial and updates the bar."""
        from pipeline.sweep.table import best_so_far, event_line, rows_of, write_results

        rows = rows_of(self.study.places(), self.sweep)
        write_results(self.folder, rows, self.sweep)
        self.bar.n = sum(row["status"] not in ("running", "interrupted") for row in rows)
        of = "" if self.study.limit is None else f"/{self.study.limit}"
        self.bar.set_description(best_so_far(rows, self.sweep), refresh=False)
        with self.bar.external_write_mode():  # clears the bar, and shows it again below the line
            print(f"[{self.bar.n}{of}]  {event_line(rows[place], self.sweep)}", flush=True)


def checked_sweep(args: argparse.Namespace) -> tuple[Sweep, list[Config]]:
    """The sweep of the file and the settings of a few trials. Raises ValueError if one of them is invalid."""
    sweep = read_sweep(args.file)
    sweep = dataclasses.replace(sweep, name=args.name or sweep.name)
    if Path(sweep.name).name != sweep.name:
        raise ValueError(f"--name {sweep.name!r} must be a plain folder name.")
    limits = [limit for limit in (sweep.limit, args.num_trials) if limit is not None]
    if not limits:
        raise ValueError(f"Method {sweep.method} has no end. Pass --num_trials N, or set run_cap in {args.file}.")
    try:
        return dataclasses.replace(sweep, limit=min(limits)), check_trials(sweep)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from error


def open_study(args: argparse.Namespace, sweep: Sweep, configs: Sequence[Config]) -> tuple["SweepStudy", Path]:
    """The sweep's study and its folder. Raises ValueError if one of them is invalid. configs: settings of a few trials."""
    try:
        check_names(configs)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from error
    folder = (args.output_dir or Path(configs[0].output_dir)) / sweep.name
    from pipeline.sweep.study import SweepStudy

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Cannot write into {folder} ({error.strerror}). Choose another --output_dir.") from error
    study = SweepStudy(sweep, args.storage or str(folder / "journal.log"), sweep.limit, args.seed)
    write_atomically(folder / "sweep.yaml", args.file.read_bytes())
    return study, folder


def check_names(configs: Sequence[Any]) -> None:
    """Raises ValueError for an unknown model, optimizer, schedule, dataset or tracker."""
    from pipeline.training.build import check_settings

    for config in configs:
        check_settings(config)


def reversed_warning(sweep: Sweep) -> str:
    goal, other = ("maximize", "minimize") if sweep.maximize else ("minimize", "maximize")
    origin = "is" if "goal" in sweep.content["metric"] else "is not set, and its default is"
    return f"The goal of {sweep.metric} {origin} {goal}: the worst trial ranks first. Write goal: {other} to find the best."


def run(args: argparse.Namespace) -> int:
    """Runs the sweep and prints its table. Raises ValueError for an invalid file or settings, CommandFailed after that."""
    sweep, configs = checked_sweep(args)
    with trial_server(sweep, args.num_parallel) as server:
        study, folder = open_study(args, sweep, configs)
        return run_trials(sweep, study, folder, args.num_parallel, server)


def run_trials(sweep: Sweep, study: "SweepStudy", folder: Path, num_parallel: int, server: ForkServer | None) -> int:
    """Runs the trials and prints the table; returns the exit status. Raises CommandFailed if the storage or the folder fails."""
    from optuna.exceptions import StorageInternalError

    from pipeline.sweep.table import result_table, rows_of

    print(f"sweep      {sweep.name}: {sweep.method}, {study.limit} trials, {sweep.aim}", flush=True)
    if sweep.is_reversed:
        console.warn(reversed_warning(sweep))
    print(f"folder     {folder}", flush=True)
    try:
        signal_number = Agent(sweep, study, folder, num_parallel, server).run()
        rows = rows_of(study.places(), sweep)
    except (StorageInternalError, OSError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise CommandFailed(
            f"The sweep's storage or folder failed: {cause}. To resume, run the same command again."
        ) from error
    print(f"\n{result_table(rows, sweep)}\n\ntable      {folder}/results.csv, trials.jsonl")
    if signal_number:
        print("To resume, run the same command again.")
        return 128 + signal_number
    return 0 if any(row["status"] == "completed" for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep; returns the exit status: 0 completed, 1 no trial completed, 2 invalid input, 128 + n for signal n."""
    args = make_parser().read(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
