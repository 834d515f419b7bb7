"""Launching: two machines, restarts, a lost process, SLURM; a failure in one process is reported by all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    PYTHONPATH,
    ROOT,
    assert_identical,
    flags,
    free_port,
    in_processes,
    is_open,
    run_process,
    start_process,
    wait_for,
)

SETTINGS: dict[str, Any] = {
    "checkpoint_every_steps": 2,
    "log_every": 1,
    "optimizer": "adamw",
    "lr": 0.005,
    "ema_decay": 0.3,
}
KILLED_STEP = 7  # of ten; the last checkpoint before it is step 6


NOT_THERE = "path/to/set is not on this machine."


def train_and_die(folder: str, name: str, victim: int) -> None:
    """Trains, but the victim kills itself at KILLED_STEP."""
    from pipeline.settings.config import Config
    from pipeline.training import loop

    train_step = loop.train_step

    def fatal_step(state: Any, share: Any, config: Config, accelerator: Any) -> Any:
        if state.step == KILLED_STEP and accelerator.process_index == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, share, config, accelerator)

    loop.train_step = fatal_step
    run_main(folder, name)


def run_main(folder: str, name: str) -> None:
    """Runs train.py; writes its output to a file per rank."""
    import train

    rank = os.environ["RANK"]
    sys.stdout = sys.stderr = open(f"{folder}/{name}-{rank}.txt", "w", buffering=1)
    status = train.main(flags(output_dir=folder, run_name=name, **SETTINGS))
    in_group = sys.modules["torch"].distributed.is_initialized()
    Path(folder, f"{name}-{rank}-{'in' if in_group else 'out_of'}_group").touch()
    sys.exit(status)


def train_without_data(folder: str, name: str) -> None:
    """Trains, but rank 1 does not find its data."""
    from pipeline.data import from_settings

    def load(*arguments: Any, **settings: Any) -> Any:
        raise ValueError(NOT_THERE)

    if os.environ["RANK"] == "1":
        from_settings.load_image_dataset = load
    run_main(folder, name)


def train_on_a_bad_image(folder: str, name: str) -> None:
    """Trains, but rank 1 cannot read an image of its sixth batch."""
    from pipeline.images.decode import BadImage
    from pipeline.training import loop

    train_step = loop.train_step

    def failing_step(state: Any, share: Any, config: Any, accelerator: Any) -> Any:
        if state.step == 5 and accelerator.process_index == 1:
            raise BadImage(NOT_THERE)
        return train_step(state, share, config, accelerator)

    loop.train_step = failing_step
    run_main(folder, name)


def train_in_another_folder(folder: str, name: str) -> None:
    """Trains, but rank 1 sees another folder, as on a machine that does not share it."""
    from pipeline.run_folder import lock

    if os.environ["RANK"] == "1":
        lock.read = lambda path: {}
    run_main(folder, name)


def resume_with_a_checkpoint_that_rank_1_cannot_read(folder: str, name: str) -> None:
    """Resumes the killed run, but rank 1 fails to read the newest checkpoint."""
    from pipeline.run_folder.checkpoint import BadCheckpoint, checkpoints
    from pipeline.training import run

    newest, from_checkpoint = checkpoints(Path(folder, name))[0], run.from_checkpoint

    def refuse_newest(state: Any, start: Path, accelerator: Any) -> Any:
        if start == newest and os.environ["RANK"] == "1":
            raise BadCheckpoint(f"{start}: unreadable here")
        return from_checkpoint(state, start, accelerator)

    run.from_checkpoint = refuse_newest
    run_main(folder, name)


def train_and_stop(folder: str, name: str, is_killed: bool) -> None:
    """Trains; a signal reaches rank 1 only. Rank 0 writes its summary after rank 1 has nothing left to do, or is killed then."""
    from pipeline.training import finish, loop
    from pipeline.training.run import Run

    train_step, end, wait_for_all = loop.train_step, Run.end, finish.wait_for_all
    arrived, rank = Path(folder, f"{name} arrived"), os.environ["RANK"]

    def signalled_step(state: Any, share: Any, config: Any, accelerator: Any) -> Any:
        if state.step == 3 and rank == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(state, share, config, accelerator)

    def late_end(run: Run, summary: dict[str, Any]) -> None:
        if rank == "0":
            wait_for(arrived.exists)
        end(run, summary)

    def wait() -> None:
        if rank == "1":
            arrived.touch()
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
        wait_for_all(1.0 if is_killed else 60.0)
        assert Path(folder, name, "summary.json").is_file()

    loop.train_step, Run.end, finish.wait_for_all = signalled_step, late_end, wait
    run_main(folder, name)


def fork_all(folder: str) -> None:
    """Runs groups of two processes in sequence; writes the exit statuses of each. One that does not end is an error."""
    import pipeline.training.loop  # imported once for all forked processes

    assert pipeline.training
    ended = {}
    for name, work, arguments in (
        ("whole", run_main, ()),
        ("killed", train_and_die, (1,)),
        ("killed first", train_and_die, (0,)),
        ("no data", train_without_data, ()),
        ("bad image", train_on_a_bad_image, ()),
        ("stopped", train_and_stop, (False,)),
        ("killed at its end", train_and_stop, (True,)),
        ("not shared", train_in_another_folder, ()),
        ("resumed", train_and_die, (1,)),
        ("resumed", resume_with_a_checkpoint_that_rank_1_cannot_read, ()),
    ):
        ended[name] = in_processes(2, work, folder, name, *arguments)
    Path(folder, "ended.json").write_text(json.dumps(ended))


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of fork_all."""
    folder = tmp_path_factory.mktemp("forked")
    done = run_process(__file__, str(folder), PYTHONPATH=PYTHONPATH, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


def end_of(forked: Path, name: str) -> tuple[list[int], list[str], dict[str, Any]]:
    """Exit statuses and last line of each rank, and the summary, of a group."""
    statuses = json.loads((forked / "ended.json").read_text())[name]
    last = [(forked / f"{name}-{rank}.txt").read_text().splitlines()[-1:] for rank in (0, 1)]
    path = forked / name / "summary.json"
    return statuses, [line for lines in last for line in lines], json.loads(path.read_text()) if path.is_file() else {}


@pytest.mark.slow
def test_processes_end_their_group_before_they_exit(forked):
    """Otherwise torch may abort a process at exit."""
    found = sorted(path.name for path in forked.glob("*_group") if path.name.startswith("whole"))
    assert found == ["whole-0-out_of_group", "whole-1-out_of_group"]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_clear_message(forked):
    statuses, last, summary = end_of(forked, "killed")
    assert statuses == [1, -signal.SIGKILL]
    reason = "Another process ended: it was killed, ran out of memory, or its machine was lost."
    assert last[0] == f"error in process 0 of 2: {reason}"
    assert (summary["status"], summary["reason"]) == ("failed", reason)
    assert (forked / "killed" / "checkpoints" / "step-00000006" / "state.json").is_file()


@pytest.mark.slow
def test_a_killed_first_process_does_not_leave_the_other_waiting(forked):
    statuses, last, _ = end_of(forked, "killed first")
    assert statuses == [-signal.SIGKILL, 1]
    assert last[-1].startswith("error in process 1 of 2: Another process ended: it was killed")


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_message(forked):
    statuses, last, summary = end_of(forked, "no data")
    assert statuses == [1, 2] and summary == {}
    assert last[1] == f"error in process 1 of 2: {NOT_THERE}"
    assert last[0] == f"error in process 0 of 2: Another process ended: process 1 failed: {NOT_THERE}"


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all_with_its_message(forked):
    statuses, last, summary = end_of(forked, "bad image")
    assert statuses == [1, 1] and summary["status"] == "failed"
    assert last[1] == f"error in process 1 of 2: {NOT_THERE}"
    assert NOT_THERE in last[0] and NOT_THERE in summary["reason"] and "process 1" in summary["reason"]


@pytest.mark.slow
def test_a_folder_that_another_machine_does_not_share_is_refused_at_the_start(forked):
    statuses, last, summary = end_of(forked, "not shared")
    assert statuses == [2, 2] and summary == {}
    assert all("is not the folder that process 0 uses on" in line and "Set output_dir" in line for line in last)


@pytest.mark.slow
def test_all_processes_resume_from_a_checkpoint_that_each_can_read(forked):
    statuses, _, _ = end_of(forked, "resumed")
    assert statuses == [0, 0]
    printed = (forked / "resumed-0.txt").read_text()
    assert "step-00000006: unreadable here" in printed and "step-00000005: epoch 2, step 5" in printed
    assert_same_end(forked / "resumed", forked / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name, second", [("stopped", 128 + signal.SIGUSR1), ("killed at its end", -signal.SIGKILL)])
def test_interrupted_processes_end_together_after_the_summary_and_do_not_wait_for_ever(forked, name, second):
    statuses, _, summary = end_of(forked, name)
    assert statuses == [128 + signal.SIGUSR1, second]
    assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", "SIGUSR1", 5)


def assert_same_end(run_dir: Path, whole: Path) -> None:
    """Asserts that two processes ended with bit-identical metrics and weights."""
    assert json.loads((run_dir / "summary.json").read_text())["num_processes"] == 2
    assert_identical(run_dir, whole)


@pytest.mark.slow
def test_two_machines_train_as_one(forked, tmp_path, forking_python):
    """Two agents with the launch file for several machines."""
    port = free_port()
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/multi_node.yaml"]
    launcher += ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    program = ["--mixed_precision=no", "train.py", *flags(output_dir=tmp_path, **SETTINGS)]
    workers = {"PYTHON_EXEC": str(forking_python)}
    agents = [start_process(*launcher, "--machine_rank=0", *program, **workers)]
    wait_for(lambda: is_open(port), process=agents[0])
    agents.append(start_process(*launcher, "--machine_rank=1", *program, **workers))
    said = []
    for agent in agents:
        out, err = agent.communicate(timeout=900)
        assert agent.returncode == 0, err
        said.append(out.count("test accuracy"))
    assert sorted(said) == [0, 1]  # torch gives rank 0 to the agent with the smaller process number
    assert_same_end(tmp_path / "run", forked / "whole")


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_result_is_unchanged(forked, tmp_path, forking_python):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    environment = {"PYTHONPATH": PYTHONPATH, "PYTHON_EXEC": str(forking_python)}
    done = run_process(*launcher, __file__, str(tmp_path), timeout=900, **environment)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "restarted-0.txt").read_text()
    assert "Resuming from" in said and "step 6." in said
    assert_same_end(tmp_path / "restarted", forked / "whole")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("processes_here, num_workers", [("1", 7), ("2", 3), ("4", 1), (None, 3)])
def test_workers_are_divided_among_the_processes_of_one_machine_not_of_all(monkeypatch, processes_here, num_workers):
    """Of 8 cores, for one of two processes; of each process's share one core is left to the training."""
    from types import SimpleNamespace

    import torch

    from pipeline.data.image_dataset import load_image_dataset
    from pipeline.images.preprocessing import Preprocessing
    from pipeline.loaders import build
    from pipeline.settings.config import Config

    monkeypatch.setattr(build, "usable_cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes_here is not None:  # else the launcher does not say, and all count as being here
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=2, process_index=0, is_main_process=True)
    dataset, preprocessing = load_image_dataset("digits"), Preprocessing(8, 1, (0.5,), (0.2,), source_size=8)
    config = Config(loader="workers", batch_size=16)
    loader = build.make_loader(config, dataset.train, dataset, preprocessing, accelerator, training=True)
    assert loader.source.loader.num_workers == num_workers


def test_restarts_need_a_run_name(monkeypatch, run_training):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="max_restarts needs a --run_name"):
        run_training(run_name=None)


def test_accelerate_accepts_every_launch_file():
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        assert load_config_from_file(str(path)).num_machines == yaml.safe_load(path.read_text())["num_machines"]
    several = load_config_from_file(str(ROOT / "accelerate_configs" / "multi_node.yaml"))
    assert several.rdzv_backend == "c10d" and not several.same_network


SLURM = ROOT / "accelerate_configs" / "slurm.sh"
# Stand-ins for SLURM's commands and for python. sbatch and srun set what SLURM sets; a call is a line of the file calls.
STAND_INS = {
    "sbatch": """
        script=$1; shift
        option() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
        grep -o "^#SBATCH .*" "$script" > options
        export SLURM_JOB_ID=42 SLURM_JOB_NAME=$(option job-name) SLURM_JOB_NODELIST="node[7-8]"
        export SLURM_NTASKS_PER_NODE=$(option ntasks-per-node) SLURM_CPUS_PER_TASK=$(option cpus-per-task)
        export SLURM_NTASKS=$(($(option nodes) * SLURM_NTASKS_PER_NODE))
        exec bash "$script" "$@" """,
    "scontrol": 'echo "$@" >> calls; [ "$1" = show ] && printf "node7\\nnode8\\n"; true',
    # the tasks one after another
    "srun": """
        echo "$1" >> calls; shift
        for ((task = 0; task < SLURM_NTASKS; task++)); do
            SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@"; status=$?
        done
        exit $status""",
    "python": """
        [ "$1" = -c ] && exec "$PYTHON" "$@"
        ranks="$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"
        echo "$ranks $(printf "%s|" "$@")" >> calls
        [ -z "$SUMMARY" ] || echo "$SUMMARY" > out/train-42/summary.json
        exit $STATUS""",
}


def run_job(folder: Path, status: int, summary: str, *arguments: str) -> tuple[int, list[str]]:
    """Submits the SLURM script to the stand-ins. Returns the job's status and the calls.

    status: that of each task. summary: the content of the summary.json that the tasks write, "" for none.
    """
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "STATUS": str(status), "SUMMARY": summary}
    env |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sbatch", str(SLURM), *arguments], cwd=folder, env=env, timeout=300)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_the_slurm_script_starts_a_process_per_gpu_and_requeues_only_a_job_whose_run_was_interrupted(tmp_path):
    (tmp_path / "out" / "train-42").mkdir(parents=True)
    arguments = ["--lr", "0.1", "--batch_size_schedule", "{1: 2}", "--output_dir", "out"]
    command = f"node7 20042 8 {'|'.join(['train.py', '--run_name', 'train-42', *arguments])}|"
    tasks = [f"{rank}/16 {rank % 8}/8 {command}" for rank in range(16)]  # two machines of eight GPUs
    completed, failed, first, second = (
        json.dumps({"status": status, "seconds": seconds}, indent=1)
        for status, seconds in (("completed", 1), ("failed", 2), ("interrupted", 3), ("interrupted", 4))
    )
    requeue = ["requeue 42"]
    for status, summary, end in (
        (0, completed, []),
        (1, failed, []),
        (128 + signal.SIGUSR1, first, requeue),
        (2, "", []),  # the requeued job fails before it trains: the summary is that of the first job
        (128 + signal.SIGTERM, second, requeue),  # srun killed a process that had not ended yet
    ):
        ended, calls = run_job(tmp_path, status, summary, *arguments)
        assert ended == status
        assert calls == ["show hostnames node[7-8]", "--kill-on-bad-exit=1", *tasks, *end]
    # what brings the signal in time, lets the job queue again, and keeps the log of its first part
    options = (tmp_path / "options").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@90", "#SBATCH --open-mode=append"} <= set(options)


if __name__ == "__main__":
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        fork_all(sys.argv[1])
    elif os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        train_and_die(sys.argv[1], "restarted", victim=1)
    else:
        run_main(sys.argv[1], "restarted")
