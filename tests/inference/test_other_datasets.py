"""Evaluation on another dataset than the run's: classes matched by name or number, and which images are scored."""

import json
import unicodedata

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from pipeline import evaluate
from pipeline.inference.class_matching import match_classes, pairs_by_name

DECOMPOSED = unicodedata.normalize("NFD", "Bär")


def names_of_pairs(ours, theirs):
    return {theirs[number]: ours[place] for number, place in pairs_by_name(ours, theirs).items()}


@pytest.mark.parametrize(
    "ours, theirs, pairs",
    [
        (["cat", "dog"], ["dog", "cat"], {"dog": "dog", "cat": "cat"}),
        (["Cat", "DOG"], ["dog", "cat", "fish"], {"dog": "DOG", "cat": "Cat"}),
        ([DECOMPOSED], [unicodedata.normalize("NFC", "bär")], {unicodedata.normalize("NFC", "bär"): DECOMPOSED}),
        (["cat", "Cat"], ["Cat", "cat"], {"Cat": "Cat", "cat": "cat"}),
        (["cat", "Cat"], ["CAT"], {}),  # it could be either
        (["cat"], ["Cat", "CAT"], {"Cat": "cat"}),
        (["cat"], ["dog"], {}),
        ([], ["dog"], {}),
    ],
)
def test_names_are_matched_in_steps(ours, theirs, pairs):
    assert names_of_pairs(ours, theirs) == pairs


class Saved:
    source, label_names = "model", ["n1", "n2", "n3"]
    shown_names, num_classes = ["cat", "dog", "fish"], 3


def test_descriptions_are_matched_if_label_names_are_not():
    match = match_classes(Saved(), ["fish", "bird", "cat"], "set")
    assert (match.order, match.numbers, match.names) == ([2, 0, 1], [0, -1, 1], ["fish", "cat", "dog"])
    assert (match.by, match.not_in_model, match.not_in_dataset) == ("name", ["bird"], ["dog"])


def test_the_same_classes_are_left_as_they_are():
    assert match_classes(Saved(), ["n1", "n2", "n3"], "set").is_identity
    assert not match_classes(Saved(), ["n1", "n3"], "set").is_identity


def test_without_a_common_name_classes_are_matched_by_number_if_their_numbers_agree():
    match = match_classes(Saved(), ["one", "two", "three"], "set")
    assert match.is_identity and match.by == "number" and "matched by number" in match.warnings(Saved(), "set")[0]
    with pytest.raises(ValueError, match=r"model predicts 3 classes, but set has 2 \(one, two\)"):
        match_classes(Saved(), ["one", "two"], "set")


# The command


COLORS = {"red": 0, "green": 1, "blue": 2}


def write(root, counts):
    """Class folders of pictures in the color of their name."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        channel = COLORS.get(name.lower(), 0)
        for index in range(count):
            pixels = np.full((12, 12, 3), 10 * (index % 5), np.uint8)
            pixels[..., channel] = 250
            Image.fromarray(pixels).save(root / name / f"{index}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors") / "photos"
    write(folder, dict.fromkeys(COLORS, 20))
    return folder


@pytest.fixture(scope="module")
def colors(finished_runs, photos):
    """The folder of a run that distinguishes the three colors."""
    settings = {"dataset": str(photos), "max_train_samples": None, "epochs": 4, "num_workers": 0, "batch_size": 8}
    summary, run_dir = finished_runs(**settings)
    assert json.loads(summary)["test"]["accuracy"] == 1
    return run_dir


def evaluated(capsys, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_classes_that_both_have_are_scored_and_the_others_listed(colors, tmp_path, capsys):
    write(tmp_path / "other", {"Blue": 3, "purple": 4, "red": 5})
    result, err = evaluated(capsys, colors, "--dataset", tmp_path / "other")
    assert (result["split"], result["num_samples"], result["accuracy"]) == ("all", 8, 1)
    assert result["classes"] == {
        "matched_by": "name",
        "not_in_model": ["purple"],
        "not_in_dataset": ["green"],
        "images_left_out": 4,
    }
    assert result["per_class_accuracy"] == {"Blue": 1, "red": 1, "green": None}
    assert result["confusion_matrix"] == [[3, 0, 0], [0, 5, 0], [0, 0, 0]]
    assert "purple" in err and "green" in err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert evaluate.main([str(colors), "--dataset", str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "all of" in out and "4 images of purple" in out and "not in dataset" in out


def test_matching_by_number_is_in_the_result(colors, tmp_path, capsys):
    write(tmp_path / "other", {"a": 3, "b": 3, "c": 3})
    result, err = evaluated(capsys, colors, "--dataset", tmp_path / "other")
    assert result["classes"]["matched_by"] == "number" and "matched by number" in err
    assert result["num_samples"] == 9 and list(result["per_class_accuracy"]) == ["a", "b", "c"]


def test_a_single_class_and_an_empty_class_are_scored(colors, tmp_path, capsys):
    write(tmp_path / "other", {"green": 4, "red": 0})
    result, _ = evaluated(capsys, colors, "--dataset", tmp_path / "other")
    assert (result["num_samples"], result["accuracy"]) == (4, 1)
    assert result["per_class_accuracy"] == {"green": 1, "red": None, "blue": None}


def test_a_test_folder_without_training_images_will_do(colors, tmp_path, capsys):
    write(tmp_path / "other" / "test", {"red": 2, "blue": 3})
    for split in ("test", None, "all"):
        result, _ = evaluated(capsys, colors, "--dataset", tmp_path / "other", *(["--split", split] if split else []))
        assert (result["split"], result["num_samples"]) == (split or "test", 5)
    assert evaluate.main([str(colors), "--dataset", str(tmp_path / "other"), "--split", "val"]) == 2
    assert "has no val split. Its splits: test" in capsys.readouterr().err


def test_test_classes_that_training_lacks_are_listed(colors, tmp_path, capsys):
    write(tmp_path / "other" / "train", {"red": 2, "blue": 3})
    write(tmp_path / "other" / "test", {"red": 2, "purple": 3})
    result, _ = evaluated(capsys, colors, "--dataset", tmp_path / "other")
    assert (result["split"], result["num_samples"], result["classes"]["not_in_model"]) == ("test", 2, ["purple"])


def test_all_images_of_a_set_with_splits_and_of_the_runs_own(colors, tmp_path, capsys):
    write(tmp_path / "other" / "train", {"red": 6, "blue": 3})
    write(tmp_path / "other" / "test", {"red": 2, "blue": 3})
    assert evaluated(capsys, colors, "--dataset", tmp_path / "other", "--split", "all")[0]["num_samples"] == 14
    result, _ = evaluated(capsys, colors, "--split", "all")
    assert (result["split"], result["num_samples"]) == ("all", 60)
    assert evaluated(capsys, colors)[0]["num_samples"] == 12


def test_the_held_out_part_of_a_plain_folder_is_scored_where_it_is_asked_for(colors, photos, capsys):
    result, _ = evaluated(capsys, colors / "model", "--dataset", photos, "--split", "test", "--batch_size", "8")
    assert (result["split"], result["num_samples"]) == ("test", 12)


def test_a_set_without_a_class_of_the_model_is_refused(colors, tmp_path, capsys):
    write(tmp_path / "other", {"purple": 3, "orange": 2})
    assert evaluate.main([str(colors), "--dataset", str(tmp_path / "other")]) == 2
    assert "predicts 3 classes, but" in capsys.readouterr().err
