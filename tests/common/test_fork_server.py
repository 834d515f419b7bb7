"""The fork server: a program in a fork is as one in a fresh interpreter, and outlives the server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ON_THE_CPU, run_process, wait_for

from pipeline.common.fork_server import UNKNOWN, ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")

PROGRAM = """
import os, random, sys, time
import numpy
print(os.getpid() == os.getpgrp() == os.getsid(0), __name__, sys.argv[1:], os.environ.get("ADDED"), "REMOVED" in os.environ)
print("draws", random.random(), numpy.random.random())
print(os.getcwd(), sys.path[0], file=sys.stderr)
command = sys.argv[1]
if command == "raise":
    raise ValueError("a reason")
if command == "exit":
    sys.exit(3)
if command == "kill":
    os.kill(os.getpid(), 9)
while command == "wait" and not os.path.exists("end"):
    time.sleep(0.01)
"""


@pytest.fixture
def server():
    server = ForkServer({**os.environ, "REMOVED": "yes"}, ["numpy"])
    yield server
    server.close()


@pytest.fixture
def start(server, tmp_path):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "program.py").write_text(PROGRAM)

    def start(*arguments):
        with open(tmp_path / "output", "wb", buffering=0) as out:
            words = ["programs/program.py", *arguments]
            return server.start(words, tmp_path, {**os.environ, "ADDED": "1"}, out.fileno(), out.fileno())

    return start


def end_of(fork):
    wait_for(lambda: fork.poll() is not None)
    return fork.returncode


def test_programs_end_with_the_status_and_the_output_of_a_process_of_their_own(start, tmp_path):
    draws = set()
    for command, status in (("return", 0), ("exit", 3), ("raise", 1), ("kill", -signal.SIGKILL)):
        fork = start(command)
        assert end_of(fork) == status and os.getpid() != fork.pid
        lines = (tmp_path / "output").read_text().splitlines()
        if command != "kill":  # its buffer is lost
            assert f"True __main__ ['{command}'] 1 False" in lines and f"{tmp_path} {tmp_path / 'programs'}" in lines
            draws |= {draw for line in lines if line.startswith("draws") for draw in line.split()[1:]}
        assert (lines[-1:] == ["ValueError: a reason"]) == (command == "raise")
    assert len(draws) == 6  # each process draws its own random numbers


def test_a_program_receives_signals_and_outlives_the_server(server, start, tmp_path):
    killed, waiting = start("wait"), start("wait")
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGTERM)
    assert end_of(killed) == -signal.SIGTERM and waiting.poll() is None
    server.process.kill()
    server.process.wait()
    time.sleep(0.05)
    assert waiting.poll() is None
    (tmp_path / "end").touch()
    assert end_of(waiting) == UNKNOWN
    with pytest.raises(ConnectionError):
        start("wait")


def test_a_command_that_cannot_start_leaves_the_server_alive(server, start, tmp_path):
    with open(tmp_path / "output", "wb") as out:
        fork = server.start([str(tmp_path / "missing.py")], tmp_path, dict(os.environ), out.fileno(), out.fileno())
    assert end_of(fork) == 1 and "missing.py" in (tmp_path / "output").read_text()
    assert end_of(start("return")) == 0


def test_the_imports_of_the_server_use_no_gpu(tmp_path: Path):
    """torch refuses CUDA in a process whose parent had called it. The tests' own server imports what that of a sweep imports."""
    code = "import sys, torch; print('timm' in sys.modules, torch.cuda._is_in_bad_fork(), torch.cuda.is_initialized())"
    assert run_process("-c", code).stdout.split() == ["True", "False", "False"]


def test_a_program_in_the_place_of_python_ends_as_its_fork_and_passes_signals_on(forking_python, tmp_path):
    def start(*arguments, **environment):
        environment = {**os.environ, **ON_THE_CPU, **environment}
        return subprocess.Popen([forking_python, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    code = "import os, sys; print('torch' in sys.modules, sys.argv[1:], os.environ.get('ADDED'), os.getcwd()); sys.exit(3)"
    forked, itself = start("-u", "-c", code, "a b", ADDED="1"), start("-c", code, HF_HOME=str(tmp_path))
    assert forked.communicate()[0] == f"True ['a b'] 1 {tmp_path}\n" and forked.returncode == 3
    assert itself.communicate()[0].startswith("False ") and itself.returncode == 3  # HF_HOME is read when timm is imported
    killed = start("-c", "import os; os.kill(os.getpid(), 9)")
    assert killed.communicate() and killed.returncode == -signal.SIGKILL
    waiting = start("-c", "import signal; print('ready', flush=True); signal.pause()")
    assert waiting.stdout.readline() == "ready\n"
    waiting.terminate()
    assert waiting.communicate() and waiting.returncode == -signal.SIGTERM
