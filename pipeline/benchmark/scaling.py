"""`scaling`: images per second of one and of several processes, and the parts of a data-parallel step."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from statistics import median

from pipeline.benchmark.children import run_child
from pipeline.benchmark.contenders import prepared
from pipeline.benchmark.measuring import Row, Section, column, in_turns, largest, summarise
from pipeline.benchmark.reporting import number
from pipeline.common.console import plural
from pipeline.common.system import usable_cores
from pipeline.settings.parser import read_config


def sections(args: Namespace, settings: list[str]) -> Iterator[Section]:
    """One table. batch_size is per process (weak scaling), or with --strong the size for all processes together."""
    with prepared(args, settings) as (settings, environment, _):
        config = read_config(settings)
        assert config.batch_size is not None
        calls = {}
        for processes in args.processes:
            given = [*settings, f"--batch_size={config.batch_size * (1 if args.strong else processes)}"]
            arguments = {"settings": given, "warmup_steps": args.warmup_steps, "seconds": 0.0, "num_steps": args.steps}
            arguments |= {"with_pieces": True}
            calls[name_of(processes)] = torchrun_call(processes, arguments, environment)
        results = in_turns(calls, args.rounds)
    counts = dict(zip(calls, args.processes))
    rates = column(results, "images_per_second")
    base = name_of(args.processes[0])
    per_process = summarise(rates, "images/s", base)[0]["median"] / args.processes[0]
    extras = {name: pieces(of_name, counts[name]) for name, of_name in results.items()}
    rows = summarise(rates, "images/s", base, extras)
    for row in rows:
        row["efficiency"] = row["median"] / (counts[row["row"]] * per_process)
    each = "for all together" if args.strong else "for each process"
    yield Section(f"{config.model_name}, batch {config.batch_size} {each}", rows, "images/s", notes(rows))


def name_of(processes: int) -> str:
    return plural(processes, "process", "processes")


def torchrun_call(processes: int, arguments: Row, environment: dict[str, str]) -> Callable[[], Row]:
    """A call that times a run of so many processes, without torchrun for one. CPU cores are divided among them."""
    threads = max(usable_cores() // processes, 1)
    own = {"OMP_NUM_THREADS": str(threads), **environment}

    # torchrun listens at a port that the system chooses
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    return lambda: run_child("ours.train", arguments, launcher=launcher, environment=own)


def pieces(results: list[Row], processes: int) -> Row:
    """Medians of step_ms, gradient_bytes, all_reduce_ms and loader_images_per_second; sent_bytes; the largest memory.

    In a ring all-reduce each process sends 2 (N - 1) / N of the gradient (https://arxiv.org/abs/1802.05799).
    """
    keys = ("step_ms", "gradient_bytes", "all_reduce_ms", "loader_images_per_second")
    found: Row = {key: None if results[0][key] is None else median(result[key] for result in results) for key in keys}
    found["sent_bytes"] = 2 * (processes - 1) / processes * found["gradient_bytes"]
    found |= {key: largest(results, key) for key in ("peak_memory_bytes", "gpu_memory_bytes")}
    return found | {key: results[-1][key] for key in ("device", "threads")}


def notes(rows: list[Row]) -> list[str]:
    """Bounds of the efficiency with many processes, from the slowest measured all-reduce."""
    reduced = [row for row in rows if row["all_reduce_ms"]]
    if not reduced:
        return ["One process has no all-reduce. To estimate DDP's limit, measure several: --processes 1 2."]
    row = max(reduced, key=lambda row: row["all_reduce_ms"] / row["sent_bytes"])
    bandwidth = row["sent_bytes"] / (row["all_reduce_ms"] / 1000)
    many_ms = 1000 * 2 * row["gradient_bytes"] / bandwidth
    step_ms = rows[0]["step_ms"]
    return [
        f"A step of {rows[0]['row']} takes {number(step_ms)} ms. An all-reduce of many processes takes {number(many_ms)} ms "
        f"at the {number(bandwidth / 1e6)} MB/s per process measured here.",
        f"Efficiency with many processes: at least {step_ms / (step_ms + many_ms):.0%} without overlap of computation and "
        f"all-reduce, at most {step_ms / max(step_ms, many_ms):.0%} with full overlap.",
    ]
