"""Loaders: both give the same batches; the cache of decoded images is valid or unused; bad images are skipped."""

import io
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from conftest import assert_identical, cut_back, flags, lines_of, torchrun
from PIL import Image

from pipeline.common.randomness import uniforms
from pipeline.data import cache_folder
from pipeline.data.bad_images import without_bad_images
from pipeline.data.image_dataset import load_image_dataset
from pipeline.data.splits import Split
from pipeline.images.augment import BatchTransform, random_parts, resized_parts
from pipeline.images.crop import FIT, NUM_FIT_DRAWS, fit_for_eval, random_part
from pipeline.images.decode import BadImage, decode_image, decode_pixels
from pipeline.images.preprocessing import Preprocessing
from pipeline.loaders import decoded_cache, sources
from pipeline.loaders.build import choose_loader, make_loader
from pipeline.loaders.loader import Loader
from pipeline.loaders.sources import DeviceImages, FittedImages, WorkerImages, make_source
from pipeline.settings.config import Config

CPU = torch.device("cpu")
SMALL = Preprocessing(8, 3, (0.5,) * 3, (0.2,) * 3, source_size=8)
PHOTOS = Preprocessing(24, 3, (0.5,) * 3, (0.2,) * 3, "bilinear", 0.875)


def encode(pixels: np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format, **options)
    return stream.getvalue()


def noise(side: int, seed: int, width: int | None = None) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, width or side, 3), dtype=np.uint8)


def table_of(images: list[bytes | None], name: str = "train") -> Split:
    """A split of images in a table, with labels 0, 1, 0, 1, ..."""
    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return Split(name, pa.table({"image": pa.array(rows, kind)}), "image", np.arange(len(images)) % 2)


def small_split(count: int = 40) -> Split:
    return table_of([encode(noise(8, seed)) for seed in range(count)])


def photo_split(count: int = 8) -> Split:
    return table_of([encode(noise(60 + seed, seed, 80), "JPEG") for seed in range(count)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of decoded images, in tmp_path; caches any number of images."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(cache_folder, "SMALLEST_KEPT", 0)
    return tmp_path / "datasets" / "decoded"


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image that is decoded."""
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return decode_pixels(*arguments)

    monkeypatch.setattr(sources, "decode_pixels", counted)
    return calls


def device_images(split: Split, preprocessing: Preprocessing = SMALL, augment: str = "light") -> DeviceImages:
    return DeviceImages(FittedImages(split, preprocessing, augment, 0), CPU, 2)


def worker_images(
    split: Split, preprocessing: Preprocessing = SMALL, augment: str = "light", num_workers: int = 0
) -> WorkerImages:
    return WorkerImages(FittedImages(split, preprocessing, augment, 0), num_workers, CPU)


def all_of(source: DeviceImages | WorkerImages, split: Split) -> torch.Tensor:
    return next(iter(source.batches(0, [np.arange(len(split))])))


# Both loaders


def loader_of(source: Any, split: Split, preprocessing: Preprocessing, **settings: Any) -> Loader:
    transform = BatchTransform(preprocessing, device="cpu", augment="randaugment", flip=True, seed=0)
    return Loader(split, source, transform, device=CPU, num_classes=2, eval_batch_size=7, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_loaders_give_the_same_batches_of_small_images(folder: Path, num_workers: int) -> None:
    split = small_split()
    device = loader_of(device_images(split), split, SMALL, cutmix=1.0)
    workers = loader_of(worker_images(split, num_workers=num_workers), split, SMALL, cutmix=1.0)
    assert (device.kind, workers.kind) == ("device", "workers")
    for epochs in [(device.train_epoch(e, 16, 2), workers.train_epoch(e, 16, 2)) for e in (0, 1)]:
        pairs = list(zip(*epochs, strict=True))
        assert len(pairs) == 2 and all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))
    pairs = list(zip(device.eval_epoch(), workers.eval_epoch(), strict=True))
    assert len(pairs) == 6 and all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_a_photo_does_not_depend_on_its_batch_or_worker() -> None:
    split, rows = photo_split(), np.arange(8)
    whole = all_of(worker_images(split, PHOTOS), split)
    parts = worker_images(split, PHOTOS, num_workers=2).batches(0, [rows[5:], rows[:5]])
    assert torch.equal(torch.cat([*parts]), torch.cat([whole[5:], whole[:5]]))
    later = next(iter(worker_images(split, PHOTOS).batches(1, [rows])))
    assert (later != whole).flatten(1).any(1).all()


def test_photos_evaluate_equally_on_the_device_and_are_kept_there_only_on_request(folder: Path) -> None:
    split = photo_split()
    assert [choose_loader([split], PHOTOS, wanted, CPU) for wanted in ("auto", "device", "workers")] == [
        "workers", "device", "workers",
    ]  # fmt: skip
    assert choose_loader([small_split()], SMALL, "auto", CPU) == "device"
    assert isinstance(make_source(FittedImages(split, PHOTOS, "none", 0), "device", 0, CPU), DeviceImages)
    on_device = all_of(device_images(split, PHOTOS, "none"), split)
    assert torch.equal(on_device, all_of(worker_images(split, PHOTOS, "none"), split))
    expected = [fit_for_eval(decode_image(split.encoded(row), 3), PHOTOS) for row in range(8)]
    assert torch.equal(on_device, torch.stack(expected))


def test_photos_on_the_device_get_the_same_crops_as_in_workers() -> None:
    draws = np.random.default_rng(0).random((300, 22))
    assert random_parts(draws, 256).tolist() == [list(random_part(256, 256, row)) for row in draws]
    ramp = torch.arange(32).float()
    picture = (ramp * 4 + ramp[:, None] * 3).to(torch.uint8).expand(2, 1, 32, 32)
    whole, part = resized_parts(picture, np.array([[0, 0, 32, 32], [8, 4, 24, 20]]), 32)
    assert torch.equal(whole, picture[0])
    inside = picture[0, :, 4:20, 8:24].float()[None]
    expected = torch.nn.functional.interpolate(inside, 32, mode="bilinear")[0]
    # border pixels of a crop may sample beyond it, where interpolate repeats the last pixel
    assert (part[:, 2:-2, 2:-2] - expected[:, 2:-2, 2:-2]).abs().max() <= 0.5


def test_photos_on_the_device_train_from_the_larger_square(folder: Path) -> None:
    from dataclasses import replace

    split, kept = photo_split(), replace(PHOTOS, kept_size=28)
    loader = loader_of(device_images(split, kept), split, kept)
    assert loader.resident_bytes == 8 * 3 * 28 * 28
    first, again = (next(loader.train_epoch(0, 8, 1))[0] for _ in range(2))
    assert first.shape == (8, 3, 24, 24) and torch.equal(first, again)
    assert not torch.equal(first, next(loader.train_epoch(1, 8, 1))[0])


def test_a_small_crop_of_a_large_photo_is_decoded_smaller_but_large_enough() -> None:
    large = table_of([encode(np.kron(noise(50, 1, 60), np.ones((10, 10, 1), np.uint8)), "JPEG")])
    sizes = []

    def spy(encoded: bytes, channels: int, shrink: Any, grey_max: int) -> torch.Tensor:
        pixels = decode_pixels(encoded, channels, shrink, grey_max)
        sizes.append(tuple(pixels.shape))
        return pixels

    images = FittedImages(large, PHOTOS, "light", 0)
    for epoch in range(12):
        images[epoch, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "decode_pixels", spy)
        fitted = [images[epoch, 0] for epoch in range(12)]
    assert all(image.shape == (3, 24, 24) for image in fitted)
    factors = []
    for epoch, (_, height, width) in enumerate(sizes):
        left, top, right, bottom = random_part(600, 500, uniforms(np.array([0]), NUM_FIT_DRAWS, 0, epoch, FIT)[0])
        factors.append(600 // width)
        assert height == -(-500 // factors[-1])
        # the crop is not enlarged, and half the size would be too small; JPEG has no factor above 8
        assert min(right - left, bottom - top) >= 24 * factors[-1]
        assert factors[-1] == 8 or min(right - left, bottom - top) < 24 * 2 * factors[-1]
    assert len(set(factors)) > 1


# Decoding


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_decoded_image(channels: int) -> None:
    for encoded in (encode(noise(20, 1, 30), "JPEG"), encode(noise(20, 1, 30)), encode(noise(20, 1, 30)[:, :, 0])):
        expected = np.asarray(decode_image(encoded, channels)).reshape(20, 30, channels)
        assert np.array_equal(decode_pixels(encoded, channels).permute(1, 2, 0).numpy(), expected)


# The cache


def test_a_second_start_maps_the_images_decoded_by_the_first(folder: Path, decodings: list[int]) -> None:
    split = small_split()
    first = all_of(device_images(split), split)
    assert len(decodings) == 40
    assert torch.equal(all_of(device_images(small_split()), split), first) and len(decodings) == 40
    assert torch.equal(first, all_of(worker_images(split), split))
    (kept,) = folder.glob("*.decoded")
    assert np.array_equal(np.load(kept / "images.npy"), first) and np.load(kept / "is_decoded.npy").all()
    assert first.dtype == torch.uint8 and first.shape == (40, 3, 8, 8)


def test_all_splits_of_a_table_share_one_file(folder: Path, decodings: list[int]) -> None:
    split = small_split()
    train, val = split.select(np.arange(3, 40)), split.select(np.array([2, 0, 1]), "val")
    other_seed = split.select(np.random.default_rng(1).permutation(40)[:30])
    for part in (train, val, other_seed):
        assert torch.equal(all_of(device_images(part), part), all_of(worker_images(part), part))
    assert len(list(folder.glob("*.decoded"))) == 1
    assert len(decodings) == 40 + (37 + 3 + 30), "the table once, besides what the worker loader decoded"


def test_for_a_small_split_of_a_table_the_rest_is_not_decoded(folder: Path, decodings: list[int]) -> None:
    part = small_split().select(np.array([7, 3, 30]))
    assert torch.equal(all_of(device_images(part), part)[1], torch.from_numpy(noise(8, 3)).permute(2, 0, 1))
    assert len(decodings) == 3 and not list(folder.glob("*.decoded"))


@pytest.mark.parametrize("what", ["pixels", "size", "channels", "filter"])
def test_another_content_or_size_has_another_file(folder: Path, decodings: list[int], what: str) -> None:
    split, preprocessing = photo_split(), PHOTOS
    all_of(device_images(split, preprocessing, "none"), split)
    if what == "pixels":
        images = [split.encoded(row) for row in range(8)]
        split = table_of(images[:3] + [encode(noise(63, 99, 80), "JPEG")] + images[4:])
    elif what == "size":
        preprocessing = Preprocessing(16, 3, (0.5,) * 3, (0.2,) * 3, "bilinear", 0.875)
    elif what == "channels":
        preprocessing = Preprocessing(24, 1, (0.5,), (0.2,), "bilinear", 0.875)
    else:
        preprocessing = Preprocessing(24, 3, (0.5,) * 3, (0.2,) * 3, "bicubic", 0.875)
    images = all_of(device_images(split, preprocessing, "none"), split)
    assert len(decodings) == 16 and len(list(folder.glob("*.decoded"))) == 2
    assert torch.equal(images, all_of(worker_images(split, preprocessing, "none"), split))


def test_a_changed_file_of_a_folder_is_decoded_again(folder: Path, decodings: list[int], tmp_path: Path) -> None:
    for row in range(20):
        path = tmp_path / "set" / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(8, row)))

    def load() -> torch.Tensor:
        split = load_image_dataset(str(tmp_path / "set"), val_fraction=0.1).train
        return all_of(device_images(split), split)

    before = load()
    assert torch.equal(load(), before) and len(decodings) == 20
    victim = tmp_path / "set" / "a" / "0.png"
    status = victim.stat()
    victim.write_bytes(encode(255 - noise(8, 0)))
    assert victim.stat().st_size == status.st_size, "only its time of change tells"
    for later in (1, 2 * 10**9):  # a nanosecond, or what every file system stores
        os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns + later))
        if victim.stat().st_mtime_ns != status.st_mtime_ns:
            break
    assert not torch.equal(load(), before) and len(decodings) == 40


@pytest.mark.parametrize("name", ["images.npy", "is_decoded.npy", "checksums.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "flipped header", "empty", "other", "missing"])
def test_a_damaged_file_is_detected_and_written_again(
    folder: Path, decodings: list[int], damage: str, name: str, capsys: pytest.CaptureFixture
) -> None:
    split = small_split()
    expected = all_of(device_images(split), split)
    (file,) = folder.glob(f"*.decoded/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if damage == "flipped" else 10] ^= 1
    damaged = {"truncated": content[:-30], "empty": b"", "other": b"\x89PNG" * 500}.get(damage, content)
    file.write_bytes(bytes(damaged))
    if damage == "missing":
        file.unlink()
    assert torch.equal(all_of(device_images(split), split), expected) and len(decodings) == 80
    assert "are damaged" in capsys.readouterr().err
    assert torch.equal(all_of(device_images(split), split), expected) and len(decodings) == 80


def test_a_cache_that_cannot_be_written_only_warns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    split = small_split()

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    images = all_of(device_images(split), split)
    assert "could not be cached" in capsys.readouterr().err and not list(folder.glob("*.decoded"))
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"], "nothing is left aside"
    monkeypatch.undo()
    folder.parent.mkdir(exist_ok=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", "/proc/none")
    monkeypatch.setattr(cache_folder, "SMALLEST_KEPT", 0)
    monkeypatch.setattr(decoded_cache, "cache_folder", lambda: Path("/proc/none"))
    assert torch.equal(all_of(device_images(split), split), images)
    assert "could not be cached" in capsys.readouterr().err


def test_leftovers_of_a_killed_process_are_ignored(folder: Path, decodings: list[int]) -> None:
    split = small_split()
    expected = all_of(device_images(split), split)
    (file,) = folder.glob("*.decoded")
    left = file.with_name(f".{file.name}.{os.getpid()}@{os.uname().nodename}.tmp")
    file.rename(left)
    assert torch.equal(all_of(device_images(split), split), expected) and len(decodings) == 80
    assert file.is_dir() and not left.exists()


def decode_slowly(folder: Path, results: Any) -> None:
    """A process of the test below: tells how many images it decoded, and their sum."""
    cache_folder.SMALLEST_KEPT, count = 0, 0

    def fit(row: int) -> torch.Tensor:
        nonlocal count
        count += 1
        time.sleep(0.01)
        return torch.full((3, 8, 8), row, dtype=torch.uint8)

    os.environ["HF_DATASETS_CACHE"] = str(folder.parent)
    images, _ = decoded_cache.resident_images(small_split(), (3, 8, 8), "edition", fit, 1, True)
    results.put((count, int(images.sum())))


def test_only_one_of_several_processes_decodes(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(__import__("sys").modules, "datasets")
        processes = [context.Process(target=decode_slowly, args=(folder, results)) for _ in range(3)]
        for process in processes:
            process.start()
    answers = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert answers == [(0, 192 * 780), (0, 192 * 780), (40, 192 * 780)]


def test_the_cache_is_in_the_cache_folder_of_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    import datasets

    assert cache_folder.cache_folder() == Path(datasets.config.HF_DATASETS_CACHE) / "decoded"
    monkeypatch.delitem(sys.modules, "datasets")
    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder.cache_folder() == Path.home() / ".cache" / "huggingface" / "datasets" / "decoded"
    for name, rest in [("XDG_CACHE_HOME", "huggingface/datasets"), ("HF_HOME", "datasets"), ("HF_DATASETS_CACHE", ".")]:
        monkeypatch.setenv(name, str(tmp_path / name))
        assert cache_folder.cache_folder() == tmp_path / name / rest / "decoded"


def test_the_embedded_digits_are_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    split = load_image_dataset("digits").train
    preprocessing = Preprocessing(8, 1, (0.5,), (0.2,), source_size=8)
    assert len(all_of(device_images(split, preprocessing), split)) == 1294
    assert not (tmp_path / "datasets").exists()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), cache_folder.locked(tmp_path / "a" / "file"):
        raise KeyError
    with cache_folder.locked(tmp_path / "a" / "file"):
        pass


# Bad images

BAD = {
    2: b"",
    5: encode(noise(8, 5))[:-30],
    11: b"no image",
    17: b"P6 20000 20000 255\n",
}


def with_bad_images(count: int = 30) -> Split:
    return table_of([BAD.get(row, encode(noise(8, row))) for row in range(count)])


def test_bad_images_are_skipped_and_reported(folder: Path, capsys: pytest.CaptureFixture) -> None:
    split = with_bad_images()
    parts = [split.select(np.arange(20)), split.select(np.arange(10, 30), "val"), small_split(4)]
    screened = without_bad_images(parts, 3, 2, shown=True)
    assert [len(part) for part in screened.splits] == [16, 18, 4]
    assert screened.splits[0].table_rows.tolist() == [row for row in range(20) if row not in BAD]
    assert screened.splits[0].labels.tolist() == [row % 2 for row in range(20) if row not in BAD]
    assert [text.split(" of ")[0] for text in screened.messages] == [f"row {row}" for row in BAD]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 4 and all("The image is skipped." in line for line in printed)
    assert without_bad_images(parts, 3, 2, shown=False).messages == screened.messages
    assert not capsys.readouterr().err


def test_images_recorded_as_good_are_not_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import bad_images

    calls: list[int] = []

    def counted(encoded: bytes, channels: int) -> torch.Tensor:
        calls.append(len(encoded))
        return decode_pixels(encoded, channels)

    monkeypatch.setattr(bad_images, "decode_pixels", counted)
    split = with_bad_images()
    without_bad_images([split.select(np.arange(20))], 3, 1, shown=False)
    assert len(calls) == 20
    without_bad_images([split], 3, 1, shown=False)
    assert len(calls) == 20 + 4 + 10, "the bad ones again, and what was not asked for before"
    (file,) = folder.glob("*.checked")
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(bytes(content))
    assert len(without_bad_images([split], 3, 1, shown=False).messages) == 4 and len(calls) == 34 + 30


def test_many_bad_images_are_counted_and_all_bad_is_an_error(capsys: pytest.CaptureFixture) -> None:
    split = table_of([b"broken %d" % row if row < 15 else encode(noise(8, row)) for row in range(20)])
    assert len(without_bad_images([split], 3, 1, shown=True).splits[0]) == 5
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 11 and printed[-1] == "warning: 5 more images cannot be decoded and are skipped."
    with pytest.raises(BadImage, match="No image of the val split can be decoded. The first: row 0 of val"):
        without_bad_images([table_of([b"", b"x"], "val")], 3, 1, shown=False)


@pytest.mark.parametrize("source", [device_images, worker_images])
def test_a_bad_image_raises_an_error_with_its_place(folder: Path, source: Any) -> None:
    split = with_bad_images()
    with pytest.raises(BadImage, match="^row 2 of train: The image is empty.*--on_bad_image skip"):
        all_of(source(split), split)
    good = split.select(np.setdiff1d(np.arange(30), list(BAD)))
    assert torch.equal(all_of(source(good), good)[0], torch.from_numpy(noise(8, 0)).permute(2, 0, 1))


def write_set(root: Path) -> Path:
    """A folder of two classes and 60 images: five bad ones, each of another kind, and an animation, which is good."""
    for row in range(60):
        path = root / "ab"[row % 2] / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({**BAD, 0: b"<html>"}.get(row, encode(noise(8, row))))
    frames = [Image.fromarray(noise(8, seed)) for seed in (1, 2)]
    frames[0].save(root / "a" / "60.gif", save_all=True, append_images=frames[1:])
    return root


SKIPPING = {
    "max_train_samples": None, "batch_size": 8, "drop_last": False, "on_bad_image": "skip", "checkpoint_every_steps": 3,
    "keep_checkpoints": 9,
}  # fmt: skip


@pytest.mark.slow
def test_runs_without_the_bad_images_agree_on_both_loaders_after_resuming_and_on_two_processes(run_training, tmp_path):
    settings = {**SKIPPING, "dataset": str(write_set(tmp_path / "set"))}
    with pytest.raises(BadImage, match="00.png: Cannot read the header"):
        run_training(**{**settings, "on_bad_image": "error"}, run_name="error")
    device, first = run_training(run_name="device", loader="device", **settings)
    workers, second = run_training(run_name="workers", loader="workers", num_workers=1, **settings)
    assert device["bad_images"] == workers["bad_images"] == 5
    assert_identical(first, second)
    counts = {line["split"]: line["num_samples"] for line in lines_of(first) if "num_samples" in line}
    assert sum(counts.values()) == 61 - 5 and device["samples"] == 2 * counts["train"]

    cut_back(first, tmp_path / "part", step=3)
    resumed, third = run_training(run_name="part", loader="device", **settings)
    assert resumed["bad_images"] == 5
    assert_identical(third, first)

    two = torchrun(2, *flags(**{**settings, "output_dir": tmp_path, "run_name": "two", "max_train_samples": "null"}))
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("The image is skipped.") == 5
    ours, theirs = ([line.get("num_samples") for line in lines_of(tmp_path / name)] for name in ("device", "two"))
    assert ours == theirs


@pytest.mark.parametrize(
    "own, flip, mirrored",
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False), (False, "alternate", "alternate")],
)
def test_the_setting_flip_decides_over_the_dataset(own: bool, flip: Any, mirrored: Any) -> None:
    """The digits are not mirrored unless asked for, other sets are."""
    digits = replace(load_image_dataset("digits"), flip=own)
    preprocessing = Preprocessing(8, 1, digits.mean, digits.std, source_size=8)
    config = Config(flip=flip, num_workers=0)
    loader = make_loader(config, digits.train, digits, preprocessing, Accelerator(cpu=True), training=True)
    assert isinstance(loader, Loader) and loader.transform.flip == mirrored
