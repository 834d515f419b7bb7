"""Shared by tests: small runs in this process, real processes, a reset of Accelerate."""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fork_server import Fork, ForkServer

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for processes that run a test file as their program

os.environ["OMP_WAIT_POLICY"] = "passive"  # as `import pipeline` would set it, so that it is the same in every process
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; pytest-xdist uses the other cores
ON_THE_CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}  # for processes of tests
AT_THE_START = {**os.environ, **ON_THE_CPU}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # set in a background job of a shell, and inherited by its processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A run of one second: 5 steps of 16 images per epoch on the embedded dataset.
SMALL_RUN: dict[str, Any] = {
    "model_name": "simple_mlp",
    "max_train_samples": 100,
    "val_fraction": 0.2,
    "epochs": 2,
    "batch_size": 16,
    "log_every": 2,
    "augment": "light",
    "run_name": "run",
    "lr": 0.05,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, a worker runs the tests of a file in a row, since they share what a fixture has trained, until one is idle."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked long, unless -m names them."""
    if "long" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Resets Accelerate after each test, because it keeps its first settings for the whole process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run_training(tmp_path: Path, fresh_accelerate: None) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Trains in this process with SMALL_RUN and the given settings; returns the summary and the run folder."""

    def run(**settings: Any) -> tuple[dict[str, Any], Path]:
        from accelerate.state import AcceleratorState

        from pipeline.settings.config import Config
        from pipeline.training.loop import train

        AcceleratorState._reset_state(reset_partial_state=True)
        config = Config(**{"output_dir": str(tmp_path), **SMALL_RUN, **settings})
        return train(config), config.run_dir

    return run


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, Path]]:
    """Trains with SMALL_RUN and the given settings, once per session; returns summary.json and the run folder."""
    runs: dict[str, Path] = {}

    def run(**settings: Any) -> tuple[str, Path]:
        from accelerate.state import AcceleratorState

        from pipeline.settings.config import Config
        from pipeline.training.loop import train

        key = json.dumps(settings, sort_keys=True)
        if key not in runs:
            AcceleratorState._reset_state(reset_partial_state=True)
            folder = tmp_path_factory.mktemp("finished")
            config = Config(**{"output_dir": str(folder), **SMALL_RUN, **settings})
            train(config)
            runs[key] = config.run_dir
        return (runs[key] / "summary.json").read_text(), runs[key]

    return run


@pytest.fixture
def finished_run(
    tmp_path: Path, fresh_accelerate: None, finished_runs: Callable[..., tuple[str, Path]]
) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Like run_training, but returns a copy of a finished run that the session shares, with a name of its own."""

    def copy(run_name: str = SMALL_RUN["run_name"], **settings: Any) -> tuple[dict[str, Any], Path]:
        from accelerate.state import AcceleratorState

        summary, folder = finished_runs(**settings)
        AcceleratorState._reset_state(reset_partial_state=True)
        shutil.copytree(folder, tmp_path / run_name)
        config = tmp_path / run_name / "config.yaml"
        text = config.read_text().replace(str(folder.parent), str(tmp_path))
        config.write_text(text.replace(f"run_name: {folder.name}\n", f"run_name: {run_name}\n"))
        return json.loads(summary), tmp_path / run_name

    return copy


CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,900", "--force-prefers-reduced-motion",
    "--disable-dev-shm-usage",  # which is 64 MB in a container, and a page that needs more crashes
]  # fmt: skip


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with a new profile. Skips where it or its driver is not installed; `.ci/run` installs both."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def flags(**settings: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL_RUN, **settings}.items()]


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer(AT_THE_START)


def pytest_sessionfinish() -> None:
    if fork_server.cache_info().currsize:
        fork_server().close()


@contextlib.contextmanager
def python_that_forks(folder: Path, **environment: str) -> Iterator[Path]:
    """Writes a program `python` for programs that start it: its arguments run in a fork. environment: what is read only once."""
    path = folder / "python"
    if sys.platform != "linux":
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        path.chmod(0o755)
        yield path
        return
    server = ForkServer({**AT_THE_START, **environment}) if environment else fork_server()
    server.write_python(path)
    yield path
    if environment:
        server.close()


@pytest.fixture
def forking_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with python_that_forks(tmp_path_factory.mktemp("bin")) as path:
        yield path


def start_process(
    *arguments: str, cwd: Path = ROOT, fresh: bool = False, **environment: str
) -> "Fork | subprocess.Popen[str]":
    """Starts `python ARGUMENTS` with one thread, on the CPU: in a fork, or in a fresh interpreter if that may differ."""
    env = {**os.environ, **ON_THE_CPU, **environment}
    if not fresh and sys.platform == "linux" and fork_server().can_run_with(env):
        return fork_server().run(list(arguments), cwd, env)
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process: "Fork | subprocess.Popen[str]", timeout: float) -> subprocess.CompletedProcess[str]:
    """Waits for a process to end. After the timeout, kills it and fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill_group() if isinstance(process, Fork) else process.kill()
        out, err = process.communicate(timeout=120)
        raise AssertionError(f"{process.args} took more than {timeout} s.\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_process(
    *arguments: str, timeout: float = 300, cwd: Path = ROOT, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` to its end."""
    return end_of(start_process(*arguments, cwd=cwd, fresh=fresh, **environment), timeout)


def rank_environment(rank: int, number: int, port: int) -> dict[str, str]:
    """The environment that torchrun sets for a process on the machine that serves the store."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    agent = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in {**ranks, **agent}.items()}


@contextlib.contextmanager
def launchers_store() -> Iterator[int]:
    """Serves a rendezvous store; yields its port, which no other process uses."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def free_port() -> int:
    """A port that stays free: it is below those that the system assigns, and other test processes begin elsewhere."""
    for port in range(10_000 + os.getpid() % 20_000, 32_000):
        if not is_open(port):
            return port
    raise AssertionError("no free port")


def is_open(port: int) -> bool:
    """Whether a process listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def torchrun(
    number: int, *arguments: str, program: str = "train.py", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs train.py, or another program, in several gloo processes, as torchrun does; their outputs by rank."""
    with launchers_store() as port:
        environments = [rank_environment(rank, number, port) | {"PYTHONPATH": PYTHONPATH} for rank in range(number)]
        processes = [start_process(program, *arguments, **environment) for environment in environments]
        ended = [end_of(process, timeout) for process in processes]
    status = next((one.returncode for one in ended if one.returncode), 0)
    out, err = "".join(one.stdout for one in ended), "".join(one.stderr for one in ended)
    return subprocess.CompletedProcess([program, *arguments], status, out, err)


def in_processes(number: int, work: Callable[..., None], *arguments: Any, **environment: str) -> list[int]:
    """Forks processes that form a gloo group and each call `work`; returns their exit statuses.

    For a program that has imported torch, with one thread, but has not used it yet.
    """
    reading, writing = os.pipe()  # for the port: the store's thread begins after the forks

    def work_as(rank: int) -> None:
        os.environ.update(rank_environment(rank, number, int(os.read(reading, 5))) | environment)
        if number == 1:
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        work(*arguments)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work_as, args=(rank,)) for rank in range(number)]
    for process in processes:
        process.start()
    os.close(reading)
    with launchers_store() as port, open(writing, "wb") as ports:
        ports.write(f"{port:5}".encode() * number)
        ports.flush()
        wait_for(lambda: not any(process.is_alive() for process in processes), timeout=400)
    return [process.exitcode or 0 for process in processes]


def wait_for(
    condition: Callable[[], Any], timeout: float = 120, process: "Fork | subprocess.Popen[str] | None" = None
) -> None:
    """Waits until the condition holds. Fails after a timeout, or if the process ends first."""
    end = time.monotonic() + timeout
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"waited for {timeout} s"
        time.sleep(0.01)


def hold(process: int) -> None:
    """Stops a process with SIGSTOP. Returns when it has stopped: a signal that is sent before may be delivered first."""
    os.kill(process, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED)


def is_pending(process: int, number: int) -> bool:
    """Whether a signal to a process waits for it, such as while SIGSTOP holds the process. Other systems than Linux: True."""
    if sys.platform != "linux":
        return True
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without the entries that depend on time."""
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in lines
    ]


def weights_of(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with bit-identical weights."""
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys() and ours
    return all(bool((ours[name] == theirs[name]).all()) for name in ours)


def assert_identical(ours: Path, theirs: Path) -> None:
    """Asserts that two runs logged identical lines and ended with bit-identical weights."""
    assert timeless(lines_of(ours)) == timeless(lines_of(theirs)) and len(lines_of(ours)) > 4
    assert same_weights(ours, theirs)


def assert_close_figures(ours: Path, theirs: Path, rel: float = 1e-6) -> None:
    """Asserts that two runs logged the same lines; floats may differ by rounding."""
    our_lines, their_lines = timeless(lines_of(ours)), timeless(lines_of(theirs))
    assert len(our_lines) == len(their_lines) > 4
    for our, their in zip(our_lines, their_lines):
        assert our.keys() == their.keys()
        for key, value in our.items():
            assert value == (pytest.approx(their[key], rel=rel) if isinstance(value, float) else their[key]), key


def assert_close_weights(ours: dict[str, Any], theirs: dict[str, Any], has_adam: bool = False) -> None:
    """Asserts equal weights up to rounding.

    has_adam: where a gradient is almost zero, Adam makes a step of its rounding, which differs by the kind of CPU. Of 300,000
    weights, up to 4 were up to 5e-6 apart; one in 10,000 may be.
    """
    assert ours.keys() == theirs.keys() and ours
    apart = {name: ~value.isclose(theirs[name], rtol=1e-5, atol=1e-6) for name, value in ours.items()}
    found = {name: (int(each.sum()), (ours[name] - theirs[name])[each].abs().max()) for name, each in apart.items() if each.any()}
    allowed = sum(each.numel() for each in apart.values()) // 10_000 if has_adam else 0
    assert sum(number for number, _ in found.values()) <= allowed and all(most < 1e-4 for _, most in found.values()), found


def cut_back(whole: Path, part: Path, step: int) -> None:
    """Creates in `part` the folder that a process killed some time after the checkpoint of that step leaves behind."""
    (part / "checkpoints").mkdir(parents=True)
    config = (whole / "config.yaml").read_text()
    (part / "config.yaml").write_text(config.replace(f"run_name: {whole.name}", f"run_name: {part.name}"))
    (part / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes() + b'{"torn')
    for folder in (whole / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) <= step:
            (part / "checkpoints" / folder.name).symlink_to(folder, target_is_directory=True)
