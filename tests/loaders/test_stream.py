"""Streams: every sample once, the same batches for any number of processes and workers, nothing held, nothing downloaded."""

import dataclasses
import gc
import io
import itertools
import json
import re
import resource
import shutil
import sys
import tarfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    PYTHONPATH,
    SMALL_RUN,
    assert_close_figures,
    assert_identical,
    cut_back,
    flags,
    lines_of,
    run_process,
    torchrun,
    wait_for,
)
from PIL import Image
from stand_in_hub import set_hub

from pipeline.data import shards
from pipeline.data.image_dataset import load_image_dataset
from pipeline.data.shards import LostShard, Shards, StreamedSplit
from pipeline.images.augment import BatchTransform
from pipeline.images.preprocessing import Preprocessing
from pipeline.loaders.loader import Loader
from pipeline.loaders.sources import DeviceImages, FittedImages, WorkerImages
from pipeline.loaders.stream_loader import StreamLoader
from pipeline.run_folder.resume import check_same_settings
from pipeline.settings.checks import check_limits
from pipeline.settings.config import Config
from pipeline.settings.parser import from_yaml
from pipeline.training.loop import train
from pipeline.training.run import TrainingFailed

NUM_TRAIN, NUM_TEST = 203, 41  # not divisible by any number used here
CLASS_NAMES = ("cat", "dog", "owl")
CPU = torch.device("cpu")
PIXELS = Preprocessing(image_size=8, channels=1, mean=(0.0,), std=(1.0,), source_size=8)


WITHOUT_AUGMENTATION: dict[str, Any] = {"device": CPU, "augment": "none", "flip": False, "seed": 0}


def label_of(number: int) -> int:
    return number * 7 % 3


def picture(number: int, side: int = 8) -> bytes:
    """A grey PNG whose first two pixels encode its number."""
    pixels = np.full((side, side), 20 * label_of(number), np.uint8)
    pixels[0, :2] = divmod(number, 256)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(folder: Path) -> None:
    """Train in two files of uneven row groups, test in one."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    for name, numbers in (
        ("train-0", range(90)),
        ("train-1", range(90, NUM_TRAIN)),
        ("test-0", range(1000, 1000 + NUM_TEST)),
    ):
        rows = [{"image": {"bytes": picture(n), "path": None}, "label": label_of(n)} for n in numbers]
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=8)


def write_arrow(folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    for name, numbers in (("train", range(NUM_TRAIN)), ("test", range(1000, 1000 + NUM_TEST))):
        rows = [{"image": {"bytes": picture(n), "path": None}, "label": label_of(n)} for n in numbers]
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        (folder / name).mkdir()
        kinds = {"train": pa.ipc.new_stream, "test": pa.ipc.new_file}  # both formats of Arrow
        with kinds[name](str(folder / name / "0.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=10)


def write_tar(folder: Path) -> None:
    for name, numbers in (
        ("train-0", range(120)),
        ("train-1", range(120, NUM_TRAIN)),
        ("test-0", range(1000, 1000 + NUM_TEST)),
    ):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for number in numbers:
                facts = json.dumps({"label": label_of(number)}).encode()
                # both ways to store the label, before or after the image
                label = (
                    (f"{number:05}.cls", str(label_of(number)).encode()) if number % 2 else (f"{number:05}.json", facts)
                )
                for member, data in sorted([(f"{number:05}.png", picture(number)), label]):
                    info = tarfile.TarInfo(f"images/{member}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def write_folder(folder: Path) -> None:
    for name, numbers in (("train", range(NUM_TRAIN)), ("test", range(1000, 1000 + NUM_TEST))):
        for number in numbers:
            path = folder / name / CLASS_NAMES[label_of(number)] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))


WRITERS: dict[str, Callable[[Path], None]] = {
    "parquet": write_parquet,
    "arrow": write_arrow,
    "tar": write_tar,
    "files": write_folder,
}


@pytest.fixture(scope="module", autouse=True)
def hf_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets `datasets` write its locks to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("hf_cache")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))  # for started processes
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images in every format."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in WRITERS}
    for kind, write in WRITERS.items():
        write(folders[kind])
    return folders


def loader_of(
    split: Any,
    rank: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    shuffle_buffer: int = 40,
    augmentation: dict[str, Any] | None = None,
) -> StreamLoader:
    return StreamLoader(
        split,
        FittedImages(split, PIXELS, "none", 0),
        BatchTransform(PIXELS, **{**WITHOUT_AUGMENTATION, **(augmentation or {})}),
        num_workers=num_workers,
        shuffle_buffer=shuffle_buffer,
        device=CPU,
        rank=rank,
        num_processes=num_processes,
        num_classes=3,
        eval_batch_size=16,
    )


def numbers_of(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[list[int]]:
    """The numbers of the images, batch by batch; asserts that each has its label."""
    found = []
    for images, labels in batches:
        levels = (images[:, 0, 0, :2] * 255).round().long()
        numbers = levels[:, 0] * 256 + levels[:, 1]
        here = labels >= 0
        assert [label_of(number) for number in numbers[here].tolist()] == labels[here].tolist()
        found.append(numbers[here].tolist())
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_each_sample_once_with_its_label(sets, kind):
    dataset = load_image_dataset(str(sets[kind]), val_fraction=0.2, streamed=True)
    assert isinstance(dataset.train, StreamedSplit) and dataset.train.shards.kind == kind
    assert (dataset.image_size, dataset.channels, len(dataset.class_names)) == (8, 1, 3)
    train, val, test = (loader_of(split) for split in (dataset.train, dataset.val, dataset.test))
    epochs = [flat(numbers_of(train.train_epoch(epoch, 16, -(-len(train) // 16)))) for epoch in (0, 1)]
    held_out = flat(numbers_of(val.eval_epoch()))
    assert len(held_out) == round(0.2 * NUM_TRAIN)
    for numbers in epochs:
        assert sorted(numbers + held_out) == list(range(NUM_TRAIN))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert sorted(flat(numbers_of(test.eval_epoch()))) == list(range(1000, 1000 + NUM_TEST))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "files"])
def test_streamed_splits_are_those_of_the_other_loaders(sets, kind):
    streamed, held = (
        load_image_dataset(str(sets[kind]), seed=3, max_train_samples=150, streamed=streamed)
        for streamed in (True, False)
    )
    assert streamed.class_names == held.class_names == list(CLASS_NAMES)
    for ours, theirs in ((streamed.train, held.train), (streamed.val, held.val), (streamed.test, held.test)):
        assert ours.labels.tolist() == theirs.labels.tolist() and len(ours) > 10
        assert [ours.encoded(row) for row in range(len(ours))] == [theirs.encoded(row) for row in range(len(theirs))]


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_ranks_and_workers_partition_an_epoch_and_an_evaluation(sets, num_processes):
    train = load_image_dataset(str(sets["parquet"]), streamed=True).train
    steps = -(-len(train) // 37)
    alone = loader_of(train)
    ranks = [loader_of(train, rank, num_processes, num_workers=rank % 2 * 2) for rank in range(num_processes)]
    shares = [numbers_of(rank.train_epoch(0, 37, steps)) for rank in ranks]
    assert [len(share) for share in shares] == [steps] * num_processes
    together = [flat(list(parts)) for parts in zip(*shares)]
    assert sorted(flat(together)) == sorted(flat(numbers_of(alone.train_epoch(0, 37, steps))))
    if num_processes in (2, 4):  # as many as divide the lanes: the batches are those of one process, in their order
        assert together == numbers_of(alone.train_epoch(0, 37, steps))
    evaluated = flat([flat(numbers_of(rank.eval_epoch())) for rank in ranks])
    assert sorted(evaluated) == sorted(flat(together))


def test_a_stream_resumes_at_the_right_sample(sets):
    train = load_image_dataset(str(sets["parquet"]), streamed=True).train
    whole = numbers_of(loader_of(train).train_epoch(2, 16, 11))
    for first in (1, 7, 10):
        assert numbers_of(loader_of(train).train_epoch(2, 16, 11, first_batch=first)) == whole[first:]


def test_every_loader_alternates_the_same_images(sets):
    """The stream of one process, of two processes with workers, from the middle of an epoch; the device and worker loaders."""
    alternate = {"augment": "light", "flip": "alternate"}
    streamed, held = (load_image_dataset(str(sets["parquet"]), streamed=streamed).train for streamed in (True, False))
    images = FittedImages(held, PIXELS, "light", 0)
    transform = BatchTransform(PIXELS, **{**WITHOUT_AUGMENTATION, **alternate})
    ours = loader_of(streamed, augmentation=alternate)
    steps = -(-len(held) // 16)
    by_parity: list[list[bytes]] = [[], []]
    for epoch in range(3):
        whole = pixels_of_images(ours.train_epoch(epoch, 16, steps))
        assert whole[5 * 16 :] == pixels_of_images(ours.train_epoch(epoch, 16, steps, first_batch=5))
        ranks = [loader_of(streamed, rank, 2, num_workers=rank * 2, augmentation=alternate) for rank in range(2)]
        loaders: list[list[Any]] = [ranks]
        for source in (DeviceImages(images, CPU, 1), WorkerImages(images, 0, CPU)):
            loaders.append([Loader(held, source, transform, device=CPU, num_classes=3, eval_batch_size=16)])
        for parts in loaders:
            found = [pixels for part in parts for pixels in pixels_of_images(part.train_epoch(epoch, 16, steps))]
            assert sorted(found) == sorted(whole)
        assert by_parity[epoch % 2] in ([], sorted(whole))
        by_parity[epoch % 2] = sorted(whole)
    assert not set(by_parity[0]) & set(by_parity[1]) and len(set(by_parity[0])) == len(held)


def pixels_of_images(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[bytes]:
    """The pixels of each image of an epoch."""
    return [image.numpy().tobytes() for images, labels in batches for image in images[labels >= 0]]


class Chunk(list):
    """A chunk's images; a list that can be referred to weakly."""


@pytest.fixture
def held(monkeypatch) -> Callable[[], int]:
    """How many encoded images of chunks are alive."""
    alive: weakref.WeakSet[Chunk] = weakref.WeakSet()
    read_chunk, changing = shards.read_chunk, threading.Lock()
    Chunk.__hash__ = object.__hash__  # type: ignore[method-assign]

    def watched(*arguments: Any) -> Chunk:
        chunk = Chunk(read_chunk(*arguments))
        with changing:
            alive.add(chunk)
        return chunk

    def count() -> int:
        with changing:
            return sum(map(len, list(alive)))

    monkeypatch.setattr(shards, "read_chunk", watched)
    return count


class AtOnce:
    """Instead of a ThreadPoolExecutor: reads in `submit`."""

    def __init__(self, threads: int) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def test_at_most_twice_the_buffer_is_held(held, tmp_path, monkeypatch):
    """Of 2,000 images in chunks of 10: those of the windows that are shuffled, and of what comes next.

    Without the threads that read ahead, which may be slow, and may hold a chunk a little longer.
    """
    monkeypatch.setattr(shards, "ThreadPoolExecutor", AtOnce)
    for name, number in (("train", 2000), ("test", 20)):
        table = pa.table({"image": [picture(n) for n in range(number)], "label": [label_of(n) for n in range(number)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    train = load_image_dataset(str(tmp_path), val_fraction=0, streamed=True).train
    loader, buffer = loader_of(train, shuffle_buffer=400), 400
    assert held() == 0  # the first images were looked at for their size
    most = max(held() for _ in loader.train_epoch(0, 16, len(train) // 16))
    assert buffer < most <= 2 * buffer  # 700, where it is written
    assert held() == 0
    assert max(held() for _ in loader.eval_epoch()) <= 2 * buffer and held() == 0


@pytest.mark.parametrize("kind", WRITERS)
def test_what_an_epoch_has_held_is_let_go(held, sets, kind):
    train = load_image_dataset(str(sets[kind]), streamed=True).train
    loader = loader_of(train)
    assert max(held() for _ in loader.train_epoch(0, 16, len(train) // 16)) > 0
    first = next(loader.train_epoch(1, 16, 10))  # an epoch that is left before its end
    del first
    numbers_of(loader.eval_epoch())
    wait_for(lambda: held() == 0)  # a thread lets go of a chunk when it next looks for work


STREAM: dict[str, Any] = {
    "loader": "stream",
    "shuffle_buffer": 64,
    "max_train_samples": None,
    "val_fraction": 0.2,
    "batch_size": 37,
    "drop_last": False,
    "log_every": 1,
    "num_workers": 0,
    "flip": "alternate",
    "mixup": 0.4,
    "checkpoint_every_steps": 3,
    "keep_checkpoints": 99,
}


@pytest.fixture(scope="module")
def whole_run(sets, tmp_path_factory) -> Path:
    """A run of one process without workers."""
    folder = tmp_path_factory.mktemp("whole")
    config = Config(**{**SMALL_RUN, **STREAM, "dataset": str(sets["parquet"]), "output_dir": str(folder)})
    train(config)
    return config.run_dir


@pytest.mark.slow
def test_workers_change_no_bit(sets, whole_run, run_training):
    _, run_dir = run_training(**{**STREAM, "num_workers": 2}, dataset=str(sets["parquet"]))
    assert_identical(run_dir, whole_run)


def test_resuming_within_an_epoch_changes_no_bit(sets, whole_run, run_training, tmp_path):
    cut_back(whole_run, tmp_path / "run", step=3)
    _, run_dir = run_training(**STREAM, dataset=str(sets["parquet"]))
    assert_identical(run_dir, whole_run)


@pytest.mark.slow
def test_two_processes_train_as_one(sets, whole_run, tmp_path):
    settings = flags(**{**STREAM, "num_workers": 2}, dataset=sets["parquet"], output_dir=tmp_path)
    ended = torchrun(2, *settings)
    assert ended.returncode == 0, ended.stderr
    assert_close_figures(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_a_lost_shard_ends_the_run_which_resumes_when_the_shard_is_restored(
    sets, whole_run, run_training, tmp_path, monkeypatch
):
    folder = tmp_path / "set"
    shutil.copytree(sets["parquet"], folder)
    lost = folder / "train-1.parquet"
    train_epoch = StreamLoader.train_epoch

    def losing(self: StreamLoader, epoch: int, *arguments: Any, **more: Any) -> Any:
        if epoch == 1:
            lost.rename(tmp_path / "aside")
        return train_epoch(self, epoch, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StreamLoader, "train_epoch", losing)
        patch.setattr(shards, "FIRST_WAIT_SECONDS", 0.01)
        with pytest.raises(TrainingFailed) as failure:
            run_training(**{**STREAM, "num_workers": 1}, dataset=str(folder))
    message = str(failure.value)
    assert re.fullmatch(r"Cannot read the shard .*train-1.parquet: .*4 attempts.*", message)
    del failure  # its traceback keeps the worker alive, which holds the lock of the run
    gc.collect()
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    (tmp_path / "aside").rename(lost)
    run_training(**STREAM, dataset=str(folder))
    assert_identical(run_dir, whole_run)


def test_a_shard_that_is_restored_in_time_is_read(tmp_path, monkeypatch):
    """It is restored during the last wait."""
    path, waits = tmp_path / "0.png", []

    def restore_at_last(seconds):
        waits.append(seconds)
        if len(waits) == shards.ATTEMPTS - 1:
            path.write_bytes(picture(7))

    monkeypatch.setattr(shards, "time", SimpleNamespace(sleep=restore_at_last))
    split = StreamedSplit(
        "train", Shards("files", [str(path)], *np.zeros((2, 1), int), np.arange(2)), np.zeros(1), None, "train"
    )
    assert split.encoded(0) == picture(7) and waits == [0.5, 1.0, 2.0]
    path.unlink()
    split.release_all()
    with pytest.raises(LostShard, match="0.png"):
        split.encoded(0)
    assert len(waits) == 6


def test_sets_that_cannot_be_streamed_are_refused_with_an_alternative(sets, whole_run, tmp_path):
    with pytest.raises(ValueError, match="--loader stream"):
        load_image_dataset(str(sets["tar"]))
    with pytest.raises(ValueError, match="on_bad_image skip"):
        check_limits(Config(loader="stream", on_bad_image="skip"))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture(1))
        archive.addfile(info, io.BytesIO(picture(1)))
    with pytest.raises(ValueError, match="a has no label"):
        load_image_dataset(str(tmp_path), streamed=True)
    begun = from_yaml(whole_run / "config.yaml")
    check_same_settings(dataclasses.replace(begun, num_workers=3))
    with pytest.raises(ValueError, match="loader stream -> auto"):
        check_same_settings(dataclasses.replace(begun, loader="auto"))


# train.py, with short waits before it asks again
TRAIN = """
import sys
import train
from pipeline.data import shards
shards.FIRST_WAIT_SECONDS = 0.01
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def hub(sets, tmp_path) -> Iterator[Callable[..., tuple[Any, list[tuple[str, int, int]]]]]:
    """Streams the Parquet set from a Hub on this machine; returns the ended process and the byte ranges that it read."""
    settings = {**STREAM, "val_fraction": 0, "num_workers": 2, "dataset": "owner/pets", "output_dir": tmp_path}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets")}
    with set_hub(sets["parquet"]) as (address, served):

        def stream(fail: Callable[[str, int], int]) -> tuple[Any, list[tuple[str, int, int]]]:
            served.asked, served.fail = [], staticmethod(fail)
            ended = run_process("-c", TRAIN, *flags(**settings), HF_HUB_OFFLINE="0", HF_ENDPOINT=address, **home)
            return ended, served.asked

        yield stream


def row_group_starts(path: Path) -> list[int]:
    """The first byte of the images of each row group."""
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(number).column(0) for number in range(metadata.num_row_groups)]
    return [group.dictionary_page_offset or group.data_page_offset for group in groups]


@pytest.mark.slow
def test_a_hub_set_is_read_group_by_group_once_an_epoch_and_not_downloaded(hub, sets, tmp_path):
    stumbles = ["train-0.parquet"] * 2  # the server fails twice, then succeeds

    def fail(name: str, first: int) -> int:
        starts = row_group_starts(sets["parquet"] / name)
        if name in stumbles and first == starts[3]:
            stumbles.remove(name)
            return 500
        return 0

    ended, asked = hub(fail)
    assert ended.returncode == 0, ended.stderr
    assert not stumbles
    names = ("train-0.parquet", "train-1.parquet")
    groups = [(name, start) for name in names for start in row_group_starts(sets["parquet"] / name)]
    looked_at = [groups[number] for number in np.linspace(0, len(groups) - 1, 4).astype(int)]  # for size and channels
    read = Counter((name, first) for name, first, _ in asked if (name, first) in groups)
    assert len(groups) > 20 and read == Counter(groups * 2 + looked_at)
    kept = sum(path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert kept < 5000 < sum(path.stat().st_size for path in sets["parquet"].iterdir())
    assert len(lines_of(tmp_path / "run")) > 10


@pytest.mark.slow
def test_a_hub_set_that_becomes_unreachable_ends_the_run_with_one_line(hub, tmp_path):
    requests = itertools.count()
    ended, _ = hub(lambda name, first: 404 if next(requests) > 60 and name == "train-1.parquet" else 0)
    assert ended.returncode == 1
    assert re.fullmatch(
        r"error: Cannot read the shard hf://datasets/owner/pets.*train-1.parquet: .*", ended.stderr.strip()
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def measure(folder: str) -> None:
    """Prints the peak memory of this process, in KiB, after an epoch of the set."""
    split = load_image_dataset(folder, streamed=True).train
    preprocessing = Preprocessing(image_size=8, channels=1, mean=(0.0,), std=(1.0,))
    loader = loader_of(split)
    loader = StreamLoader(
        split,
        FittedImages(split, preprocessing, "light", 0),
        loader.transform,
        num_workers=0,
        shuffle_buffer=64,
        device=torch.device("cpu"),
        num_classes=2,
        eval_batch_size=16,
    )
    for _ in loader.train_epoch(0, 16, len(split) // 16):
        pass
    print(len(split), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.slow
def test_a_set_ten_times_larger_takes_no_more_memory(tmp_path):
    rng = np.random.default_rng(0)
    peaks = []
    for count in (250, 2500):  # of 64 KiB: 16 and 160 MB
        folder = tmp_path / str(count)
        folder.mkdir()
        schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
        with pq.ParquetWriter(folder / "train.parquet", schema, compression="none", use_dictionary=False) as writer:
            for first in range(0, count, 10):
                images = []
                for _ in range(10):
                    stream = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (256, 256), np.uint8)).save(stream, "BMP")
                    images.append(stream.getvalue())
                writer.write_table(pa.table({"image": images, "label": [0, 1] * 5}, schema))
        done = run_process(__file__, str(folder), PYTHONPATH=PYTHONPATH)
        assert done.returncode == 0, done.stderr
        samples, peak = map(int, done.stdout.split())
        assert samples == round(round(count * 0.8) * 0.9)
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0]


if __name__ == "__main__":
    measure(sys.argv[1])
