"""The setup of the process for its machine."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import ROOT, run_process, wait_for

from pipeline.common.system import end_tree, is_alive, process_tree, tree_memory
from pipeline.training.step import seed_generators

PROGRAM = """
import ctypes, resource, torch
from pipeline.settings.config import Config
from pipeline.distributed.accelerator import make_accelerator

def pages_fetched():
    # The minimum over the steps: a small allocation may occupy part of a block that would be reused.
    return min(pages_of_a_step() for _ in range(30))

def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20)  # 40 MiB, more than glibc keeps by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be counted once for 512 pages
fetched = pages_fetched()
make_accelerator(Config())
print(fetched, pages_fetched())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("options, is_kept", [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_on_a_cpu_freed_memory_is_kept_unless_the_environment_configures_it(options, is_kept):
    if any(name.startswith("MALLOC_") for name in os.environ):
        pytest.skip("the environment says how")
    program = run_process("-c", PROGRAM, **options)
    assert program.returncode == 0, program.stderr
    before, after = (int(word) for word in program.stdout.split())
    all_pages = 40 * 2**20 / os.sysconf("SC_PAGE_SIZE")
    assert before > 0.9 * all_pages
    assert after < 0.1 * all_pages if is_kept else after > 0.9 * all_pages


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_seeded_generators_draw_as_after_torchs_own_seeding(device):
    if not (device == "cpu" or torch.cuda.is_available()):
        pytest.skip("no GPU")
    draws = []
    for seed in (lambda: torch.manual_seed(7), lambda: seed_generators(torch.device(device), 7)):
        seed()
        draws.append((torch.rand(3).tolist(), torch.rand(3, device=device).tolist()))
    assert draws[0] == draws[1]


def test_a_process_is_alive_until_it_has_ended():
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(process.pid) and is_alive(1) and is_alive(os.getpid())
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its status has not been read
    assert not is_alive(process.pid)
    process.wait()
    assert not any(is_alive(number) for number in (process.pid, -1, 2**40))


def test_a_process_is_ended_with_all_that_it_started():
    """Descendants in sessions of their own too, as torchrun starts its workers."""
    inner = "import time; time.sleep(60)"
    program = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.run([sys.executable, '-S', '-c', {inner!r}], start_new_session=True)"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", program])
    wait_for(lambda: len(process_tree(process.pid)) == 2)
    tree = process_tree(process.pid)
    assert len(tree) == 2 and tree_memory(process.pid) > 2**20
    end_tree(process, seconds=0.1)
    psutil.wait_procs(tree, timeout=120)
    assert process.returncode == -signal.SIGKILL and not any(is_alive(one.pid) for one in tree)
    assert process_tree(process.pid) == [] and tree_memory(process.pid) == 0


@pytest.mark.slow
@pytest.mark.parametrize("given, policy", [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_openmps_threads_sleep_while_they_wait_unless_the_environment_says_otherwise(given, policy):
    """As OpenMP itself reports when torch loads it after train.py's own imports."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = {**inherited, "OMP_DISPLAY_ENV": "true", **({} if given is None else {"OMP_WAIT_POLICY": given})}
    command = [sys.executable, "-c", "import train, torch"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    if "OMP_WAIT_POLICY" not in ended.stderr:
        pytest.skip("this torch has another OpenMP")
    assert ended.returncode == 0 and f"OMP_WAIT_POLICY = '{policy}'" in ended.stderr, ended.stderr
