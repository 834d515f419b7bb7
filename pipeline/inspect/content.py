"""The page of an inspection, and what it is made from."""

from typing import Any

from pipeline.images.decode import BadImage
from pipeline.inspect.batches import first_batches, parts_of_run
from pipeline.inspect.charts import class_counts
from pipeline.inspect.duplicates import exact_copies, near_duplicates, num_second, similar_features
from pipeline.inspect.duplicates_shown import duplicates_section, labels_section
from pipeline.inspect.examine import Examined, examine, splits_of
from pipeline.inspect.facts import facts_of
from pipeline.inspect.features import Contradiction, contradictions, features_of, load_features
from pipeline.inspect.images_shown import images_section
from pipeline.inspect.inspection import MOST_LISTED, Inspection
from pipeline.inspect.pictures import class_samples
from pipeline.models.linear_probe import Unfittable
from pipeline.pages.blocks import Gallery, Page, Picture, Row, Section, Table, count, fraction, words
from pipeline.pages.drawing import Drawing
from pipeline.pages.render import html_page
from pipeline.settings.config import Config
from pipeline.training.build import Parts

UNEVEN = 2  # factor between the largest and the smallest class above which the page says what to do


def inspect(config: Config, most: int, features_model: str | None) -> tuple[str, dict[str, Any]]:
    """The HTML page and the JSON object of the dataset of the settings. Raises ValueError as train.py does."""
    saved = None if features_model is None else load_features(features_model)
    parts = parts_of_run(config)
    examined = examine(parts.dataset, most)
    if not examined.images:
        raise ValueError(f"No image of {config.dataset} can be read. The first: {examined.bad[0]}")
    duplicates = [exact_copies(examined.images), near_duplicates(examined.images)]
    doubtful: tuple[list[Contradiction], float] | str | None = None
    if saved is not None:
        features = features_of(saved, splits_of(parts.dataset), examined.images)
        duplicates.append(similar_features(examined.images, features))
        try:
            doubtful = contradictions(examined.images, features, len(parts.dataset.class_names))
        except Unfittable as error:
            doubtful = f"No classifier could be fitted to the features of {features_model}: {error}."
    found = Inspection(parts, examined, duplicates, doubtful)
    return html_page(make_page(found), {}), facts_of(found)


def make_page(found: Inspection) -> Page:
    dataset = found.dataset
    drawing = Drawing(dataset.class_names)
    sections = (
        classes_section(found, drawing),
        batches_section(found.parts),
        Section("samples", "Training images by class", (class_samples(dataset),)),
        duplicates_section(found),
        labels_section(found),
        images_section(found, drawing),
        bad_section(found.examined),
    )
    return Page(f"Inspection of {dataset.name}", overview(found), tuple(part for part in sections if part.blocks))


def overview(found: Inspection) -> tuple[tuple[str, str], ...]:
    dataset, images = found.dataset, found.images
    terms = [("Dataset", f"{dataset.name} ({dataset.source})")]
    terms.append(("Images", ", ".join(f"{len(split):,} {name}" for name, split in found.splits.items())))
    terms.append(("Classes", f"{len(dataset.class_names):,}: {imbalance_text(found)}"))
    if len(images) + len(found.examined.bad) < found.examined.num_images:
        text = f"{len(images):,} of {found.examined.num_images:,} images, each split and class in proportion. Duplicates of the "
        text += f"others are not found; --max_images {found.examined.num_images} examines all."
        terms.append(("Sample", text))
    shared = [(kind.kind, num_second(found.pairs_between(kind, ("train", "test")))) for kind in found.duplicates]
    text = ", ".join(f"{number:,} {kind}" for kind, number in shared)
    terms.append(("Test images that are in train", f"{text}{' (see Duplicates)' if any(n for _, n in shared) else ''}"))
    terms += [("Note", note) for note in dataset.notes]
    if found.examined.bad:
        terms.append(("Unreadable", f"{len(found.examined.bad):,} images"))
    return tuple(terms)


def imbalance_text(found: Inspection) -> str:
    train, factor = found.counts["train"], found.imbalance
    largest, smallest = int(train.argmax()), int(train.argmin())
    if largest == smallest:
        return f"each has {train[largest]:,} training images"
    text = f"the largest, {found.class_name(largest)}, has {train[largest]:,} training images, "
    text += f"the smallest, {found.class_name(smallest)}, {train[smallest]:,}"
    return text + (f": a factor of {factor:.1f}" if factor is not None else "")


def classes_section(found: Inspection, drawing: Drawing) -> Section:
    counts, names = found.counts, found.dataset.class_names
    shares = counts["train"] / counts["train"].sum()
    rows = tuple(
        Row((words(name), *(count(int(values[place])) for values in counts.values()), fraction(float(shares[place]))))
        for place, name in enumerate(names)
    )
    factor = found.imbalance
    note = f"{len(names):,} classes: {imbalance_text(found)}."
    if factor is None or factor > UNEVEN:
        note += " The accuracy over all images says little about the small classes: read the accuracy by class as well."
    table = Table("classes", "Splits and classes", note, ("class", *counts, "share of train"), rows)
    figure = drawing.figure("classes", "Images by class and split", lambda: class_counts(counts, names))
    return Section("classes", "Splits and classes", (table,) if figure is None else (table, figure))


def batches_section(parts: Parts) -> Section:
    config = parts.config
    note = (
        f"The first images of the first training batches of a run with these settings, as the model receives them: "
        f"{parts.preprocessing.image_size} x {parts.preprocessing.image_size} pixels, batch {config.batch_size}, augment "
        f"{config.augment}, mixup {config.mixup:g}, cutmix {config.cutmix:g}, random_erasing {config.random_erasing:g}, seed "
        f"{config.seed}. A mixed label shows its two largest shares."
    )
    try:
        contents = first_batches(parts)
    except BadImage as error:
        return Section("batches", "Training batches", (f"A run would stop in its first batches: {error}",))
    pictures = tuple(
        Picture(f"batch_{number}", f"Images of training batch {number}", (f"batch {number}",), content)
        for number, content in enumerate(contents, 1)
    )
    return Section("batches", "Training batches", (note, Gallery(pictures, wide=True)))


def bad_section(examined: Examined) -> Section:
    listed = examined.bad[:MOST_LISTED]
    more = [f"and {len(examined.bad) - len(listed):,} more"] if len(examined.bad) > len(listed) else []
    note = "A run stops at the first of these images; with --on_bad_image skip it leaves them out."
    return Section("bad", "Unreadable images", (note, *listed, *more) if listed else ())
