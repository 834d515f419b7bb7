"""Inspection: duplicates, samples, training batches as a run makes them, unreadable images, labels that look wrong."""

import json
import re
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from PIL import Image

from pipeline.data.image_dataset import load_image_dataset
from pipeline.inspect import features as features_module
from pipeline.inspect.__main__ import main
from pipeline.inspect.batches import first_batches, parts_of_run
from pipeline.inspect.duplicates import LEAST_COSINE, SPLIT_PAIRS, exact_copies, near_duplicates, similar_features
from pipeline.inspect.examine import ImageFacts, examine, examine_image, reduction, sampled_rows, splits_of
from pipeline.inspect.features import contradictions, features_of, load_features
from pipeline.settings.config import Config
from pipeline.training.samples import samples_path

HOSTILE = "<script>alert(1)<"  # a class


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture of large random patches, unlike that of any other seed."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def write(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of photos; a test image is a copy of a training image, another is one in another format and size."""
    root = tmp_path_factory.mktemp("some") / "photos"
    for number in range(20):
        label = ("cat", HOSTILE)[number % 2]
        write(root / "train" / label / f"{number}.png", photo(number))
    for number in range(20, 28):
        write(root / "test" / ("cat", HOSTILE)[number % 2] / f"{number}.png", photo(number, (64, 96)))
    (root / "test" / "cat" / "copy.png").write_bytes((root / "train" / "cat" / "4.png").read_bytes())
    write(root / "test" / HOSTILE / "near.jpg", photo(6, (192, 128)), quality=90)  # of class cat in train
    write(root / "train" / "cat" / "dark.png", Image.new("L", (96, 64), 3))
    return root


@pytest.fixture(scope="module")
def inspected(folder, tmp_path_factory):
    """The page and the JSON object of the folder."""
    page, output = tmp_path_factory.mktemp("page") / "page.html", StringIO()
    settings = ["--model_name=simple_mlp", "--image_size=32", "--batch_size=8", "--val_fraction=0.2", "--mixup=0.5"]
    with redirect_stdout(output):
        assert main([str(folder), "--output", str(page), "--json", *settings]) == 0
    return page.read_text(), json.loads(output.getvalue())


def pairs_of(facts: dict, kind: str) -> list[tuple[set[str], bool]]:
    """The file names of each pair of a kind, and whether the labels are equal."""
    (found,) = [each for each in facts["duplicates"] if each["kind"] == kind]
    return [({Path(image["where"]).name for image in pair["images"]}, pair["same_label"]) for pair in found["pairs"]]


def test_duplicates_across_train_and_test_are_found_with_their_labels(inspected):
    _, facts = inspected
    assert pairs_of(facts, "exact copies") == [({"4.png", "copy.png"}, True)]
    assert pairs_of(facts, "near-duplicates by hash") == [({"6.png", "near.jpg"}, False)]


def test_the_page_needs_nothing_else_and_escapes_names(inspected):
    page, facts = inspected
    assert HOSTILE not in page and "&lt;script&gt;alert(1)&lt;" in page
    assert "default-src 'none'" in page and "http:" not in page.replace("http://www.w3.org", "")
    titles = ("Splits and classes", "Training batches", "Training images by class", "Duplicates", "Sizes, files and brightness")
    assert re.findall(r"<h2 [^>]*>([^<]*)</h2>", page) == list(titles)
    assert page.count('<img src="data:image/') >= 2 + 2 + 2 and "DIFFERENT LABELS: cat and" in page


def test_the_object_has_classes_sizes_kinds_and_extremes(inspected):
    _, facts = inspected
    assert facts["images"] == facts["examined"] == 31
    assert {name: sum(counts.values()) for name, counts in facts["classes"].items()} == {"cat": 16, HOSTILE: 15}
    assert facts["sizes"] == [[96, 64, 22], [64, 96, 8], [192, 128, 1]]
    assert facts["modes"] == {"RGB": 30, "L": 1} and facts["file_kinds"] == {"PNG": 30, "JPEG": 1}
    assert Path(facts["darkest"]["where"]).name == "dark.png" and facts["darkest"]["contrast"] == 0
    train = [counts["train"] for counts in facts["classes"].values()]
    assert facts["imbalance"] == max(train) / min(train)


@pytest.mark.parametrize("more", [{"mixup": 0.5, "cutmix": 1.0}, {"augment": "trivialaugment", "random_erasing": 0.5}])
def test_the_first_batch_is_that_of_a_run_with_the_same_settings(run_training, tmp_path, more):
    _, run_dir = run_training(**more)
    shown = first_batches(parts_of_run(Config(**{"output_dir": str(tmp_path), **SMALL_RUN, **more})))
    assert len(shown) == 2 and shown[0] == samples_path(run_dir).read_bytes() != shown[1]


def test_photos_are_shown_as_a_run_crops_them(folder, run_training, tmp_path):
    more = {"dataset": str(folder), "image_size": 32, "batch_size": 4, "num_workers": 0, "max_train_samples": None, "epochs": 1}
    _, run_dir = run_training(**more)
    shown = first_batches(parts_of_run(Config(**{"output_dir": str(tmp_path), **SMALL_RUN, **more})))
    assert shown[0] == samples_path(run_dir).read_bytes()


def test_a_sample_has_each_split_and_class_in_proportion(capsys, tmp_path):
    dataset = load_image_dataset("digits")
    rows = sampled_rows(splits_of(dataset), 400)
    assert {name: len(found) for name, found in rows.items()} == {"train": 288, "val": 32, "test": 79}
    counts = np.bincount(dataset.train.labels[rows["train"]])
    assert counts.sum() == 288 and set(counts) <= {28, 29, 30}
    assert main(["digits", "--max_images", "400", "--output", str(tmp_path / "page.html"), "--model_name", "simple_mlp"]) == 0
    assert capsys.readouterr().out.startswith("399 of 1,797 images examined")
    assert "399 of 1,797 images, each split and class in proportion" in (tmp_path / "page.html").read_text()


def test_unreadable_images_are_listed(folder, tmp_path, capsys):
    bad = tmp_path / "photos"
    for number in range(12):
        write(bad / ("cat", "dog")[number % 2] / f"{number}.png", photo(number))
    whole = (bad / "dog" / "3.png").read_bytes()
    (bad / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    page = tmp_path / "page.html"
    assert main([str(bad), "--output", str(page), "--json", "--model_name=simple_mlp", "--image_size=32", "--batch_size=4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["examined"] == 12 and len(facts["unreadable"]) == 1 and "3.png" in facts["unreadable"][0]
    assert "Unreadable images" in page.read_text()
    skipping = ["--on_bad_image=skip", "--model_name=simple_mlp", "--image_size=32", "--batch_size=4"]
    assert main([str(bad), "--output", str(page), *skipping]) == 0
    assert capsys.readouterr().out.startswith("12 of 12 images examined") and "each split and class" not in page.read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["digits", "--agument", "none"], "Unknown option '--agument'. Did you mean '--augment'"),
        (["--augment", "none", "digits"], "The first argument is '--augment'; it must be the dataset."),
        (["digits", "--output", "."], "--output . is a folder"),
        (["digits", "--loader", "stream"], "loader stream does not support"),
        (["digits", "--features", "resnet18.none"], "Unknown tag 'none' of model 'resnet18'"),
        (["nowhere"], "Unknown dataset 'nowhere'"),
    ],
)
def test_invalid_arguments_exit_with_status_2(arguments, words, capsys):
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2 and words in capsys.readouterr().err


def facts_from(levels: np.ndarray, split: str = "train", digest: bytes = b"", phash: int = 0) -> ImageFacts:
    image = np.asarray(Image.fromarray(levels).resize((32, 32)))
    return ImageFacts(split, 0, 0, 32, 32, "L", "PNG", 100, 0.5, 0.5, digest, phash, image)


def test_copies_are_paired_with_the_first_of_each_split():
    splits = ("train", "train", "train", "val", "test", "test")
    images = [facts_from(np.zeros((8, 8), np.uint8), split, digest=b"same") for split in splits]
    pairs = [(pair.first, pair.second) for pair in exact_copies(images).pairs]
    assert pairs == [(0, 1), (0, 2), (0, 3), (0, 4), (3, 4), (0, 5), (3, 5), (4, 5)]


def test_plain_images_and_images_of_like_hashes_are_no_duplicates():
    generator = np.random.default_rng(0)
    blank = [facts_from(np.full((8, 8), level, np.uint8), digest=bytes([level])) for level in (0, 255)]
    noise = [facts_from(generator.integers(0, 256, (8, 8), dtype=np.uint8), digest=bytes([9, place])) for place in range(5)]
    assert near_duplicates([*blank, *noise]).pairs == []
    again = facts_from(np.asarray(Image.fromarray(noise[2].thumbnail).resize((8, 8))), digest=b"other", phash=0b111)
    assert [(pair.first, pair.second) for pair in near_duplicates([*blank, *noise, again]).pairs] == [(4, 7)]
    far = facts_from(np.asarray(Image.fromarray(noise[2].thumbnail).resize((8, 8))), digest=b"other", phash=0b1111111)
    assert near_duplicates([*blank, *noise, far]).pairs == []


def test_near_duplicates_across_blocks_are_those_of_all_pairs(monkeypatch):
    generator = np.random.default_rng(1)
    images = [facts_from(generator.integers(0, 256, (8, 8), dtype=np.uint8), digest=bytes([place])) for place in range(50)]
    features = generator.normal(size=(50, 4)).astype(np.float32)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    rows, columns = np.nonzero(np.triu(units @ units.T >= LEAST_COSINE, 1))
    expected = set(zip(rows.tolist(), columns.tolist()))
    monkeypatch.setattr("pipeline.inspect.duplicates.BLOCK", 7)
    found = similar_features(images, features).pairs
    assert {(pair.first, pair.second) for pair in found} == expected and len(found) == len(expected) > 2


def test_pairs_are_kept_up_to_a_number_and_exact_copies_are_not_among_them(monkeypatch):
    images = [facts_from(np.zeros((8, 8), np.uint8), digest=bytes([place // 2])) for place in range(6)]
    features = np.ones((6, 3), np.float32)
    pairs = [(first, second) for first in range(6) for second in range(first + 1, 6) if first // 2 != second // 2]
    found = similar_features(images, features)
    assert [(pair.first, pair.second) for pair in found.pairs] == pairs and found.complete
    monkeypatch.setattr("pipeline.inspect.duplicates.MOST_PAIRS", 5)
    found = similar_features(images, features)
    assert [(pair.first, pair.second) for pair in found.pairs] == pairs[:5] and not found.complete


def test_thousands_of_copies_of_one_image_are_paired_at_once():
    images = 20_000 * [facts_from(np.zeros((8, 8), np.uint8), digest=b"same")]
    assert [(pair.first, pair.second) for pair in exact_copies(images).pairs] == [(0, place) for place in range(1, 20_000)]


def test_every_two_splits_are_compared():
    names = ("train", "val", "test")
    assert set(SPLIT_PAIRS) == {(first, second) for place, first in enumerate(names) for second in names[place:]}
    assert SPLIT_PAIRS[0] == ("train", "test")


def test_a_large_jpeg_is_decoded_smaller():
    assert [reduction(*size) for size in ((1000, 800), (500, 375), (200, 130), (96, 64), (5000, 127))] == [8, 4, 2, 1, 1]


def test_wrong_labels_are_the_most_confident_contradictions():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(120) % 3
    features = torch.eye(3)[truth] * 4 + torch.randn(120, 3, generator=generator) * 0.3
    labels = truth.clone()
    labels[[5, 50, 100]] = (labels[[5, 50, 100]] + 1) % 3
    level = np.zeros((8, 8), np.uint8)
    images = [ImageFacts("train", row, int(label), 8, 8, "L", "PNG", 1, 0, 0, b"", 0, level) for row, label in enumerate(labels)]
    found, accuracy = contradictions(images, features.numpy(), 3)
    assert {each.place for each in found} == {5, 50, 100} and accuracy == 117 / 120
    assert [each.confidence for each in found] == sorted((each.confidence for each in found), reverse=True)
    assert all(each.predicted == truth[each.place] and each.own < 0.5 < each.confidence for each in found)


def test_features_are_those_of_the_model_without_its_classifier(finished_run, monkeypatch, capsys, tmp_path):
    """In batches of any size; and the page names the model's contradictions."""
    _, run_dir = finished_run()
    dataset = load_image_dataset("digits")
    saved = load_features(str(run_dir))
    images = examine(dataset, 100).images
    whole = features_of(saved, splits_of(dataset), images)
    monkeypatch.setattr(features_module, "BATCH", 7)
    assert features_of(saved, splits_of(dataset), images) == pytest.approx(whole, abs=1e-5)
    assert whole.shape[0] == len(images) and whole.shape[1] > 10
    arguments = ["digits", "--features", str(run_dir), "--max_images", "300", "--model_name", "simple_mlp", "--json"]
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path / "page.html")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0.5 < facts["leave_one_out_accuracy"] < 1
    assert len(facts["contradicted_labels"]) == round((1 - facts["leave_one_out_accuracy"]) * facts["examined"])
    assert "Labels that look wrong" in (tmp_path / "page.html").read_text()
    assert [kind["kind"] for kind in facts["duplicates"]][2] == "near-duplicates by features"


def test_a_grey_photo_of_16_bits_is_examined():
    levels = (np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).astype(np.uint16)
    buffer = BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    facts = examine_image("train", 0, 0, buffer.getvalue(), 65535)
    assert (facts.mode, facts.kind) == ("I;16", "PNG") and facts.brightness == pytest.approx(0.5, abs=0.01)
