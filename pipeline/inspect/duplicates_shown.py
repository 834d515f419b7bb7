"""The sections of an inspection on duplicates and on labels that look wrong."""

from pipeline.common.console import percent
from pipeline.inspect.duplicates import LEAST_COSINE, SPLIT_PAIRS, Found, Pair, disagrees, num_second
from pipeline.inspect.inspection import Inspection
from pipeline.inspect.pictures import name_of, picture_of
from pipeline.pages.blocks import Block, Gallery, Picture, Row, Section, Table, count, words

PAIRS_SHOWN = 12  # of each kind and pair of splits
CONTRADICTIONS_SHOWN = 24


def duplicates_section(found: Inspection) -> Section:
    images, kinds = found.images, found.duplicates
    rows = []
    for splits in SPLIT_PAIRS:
        pairs_of = [found.pairs_between(kind, splits) for kind in kinds]
        if any(pairs_of):
            different = sum(disagrees(pair, images) for pairs in pairs_of for pair in pairs)
            cells = (words(where_text(splits)), *(count(num_second(pairs)) for pairs in pairs_of), count(different))
            rows.append(Row(cells))
    if not rows:
        none = f"No two of the {len(images):,} examined images are duplicates."
        return Section("duplicates", "Duplicates", (none,))
    columns = ("images", *(kind.kind for kind in kinds), "pairs with different labels")
    blocks: list[Block] = [Table("duplicates", "Duplicates", duplicates_note(found), columns, tuple(rows))]
    for splits in SPLIT_PAIRS:
        for kind in kinds:
            blocks += [gallery_of_pairs(found, kind, splits)] if found.pairs_between(kind, splits) else []
    return Section("duplicates", "Duplicates", tuple(blocks))


def duplicates_note(found: Inspection) -> str:
    note = (
        "The number of images that repeat another one. Copies of training images in the test split raise the test accuracy. "
        "Equal images with different labels are errors of the labels. Exact copies have the same bytes. Near-duplicates by hash "
        "have similar perceptual hashes (imagehash's phash) and thumbnails. Look at them: digits may only look alike."
    )
    if len(found.duplicates) > 2:
        note += f" Near-duplicates by features have a cosine of at least {LEAST_COSINE}."
    cut = [kind.kind for kind in found.duplicates if not kind.complete]
    return f"{note} There are more {' and '.join(cut)} than are counted." if cut else note


def where_text(splits: tuple[str, str]) -> str:
    first, second = splits
    return f"within {first}" if first == second else f"{second} images that are in {first}"


def gallery_of_pairs(found: Inspection, kind: Found, splits: tuple[str, str]) -> Gallery:
    pairs = found.pairs_between(kind, splits)
    shown = pairs[:PAIRS_SHOWN]
    pictures = [picture_of_pair(found, pair) for pair in shown]
    title = f"{kind.kind.capitalize()}: {where_text(splits)}"
    title += f", {len(shown)} of {len(pairs):,} pairs" if len(pairs) > len(shown) else ""
    return Gallery(tuple(filter(None, pictures)), title)


def picture_of_pair(found: Inspection, pair: Pair) -> Picture | None:
    both, dataset = [found.images[pair.first], found.images[pair.second]], found.dataset
    splits = found.splits
    labels = [found.class_name(image.label) for image in both]
    label = f"label {labels[0]}" if labels[0] == labels[1] else f"DIFFERENT LABELS: {labels[0]} and {labels[1]}"
    similarity = "" if pair.similarity == 1 else f", similarity {pair.similarity:.3f}"
    return picture_of(dataset, splits, both, f"{label}{similarity}", *(name_of(splits, image) for image in both))


def labels_section(found: Inspection) -> Section:
    title = "Labels that look wrong"
    if found.doubtful is None or isinstance(found.doubtful, str):
        return Section("labels", title, () if found.doubtful is None else (found.doubtful,))
    wrong, accuracy = found.doubtful
    note = (
        f"A linear classifier on the features, fitted to all other images, predicts the label of {percent(accuracy)} of the "
        f"images. It contradicts {len(wrong):,} labels."
    )
    if wrong:
        note += f" The {min(len(wrong), CONTRADICTIONS_SHOWN)} most confident contradictions:"
    splits, pictures = found.splits, []
    for each in wrong[:CONTRADICTIONS_SHOWN]:
        image = found.images[each.place]
        lines = (
            f"label: {found.class_name(image.label)}, {percent(each.own)}",
            f"predicted: {found.class_name(each.predicted)}, {percent(each.confidence)}",
            name_of(splits, image),
        )
        pictures.append(picture_of(found.dataset, splits, [image], *lines))
    return Section("labels", title, (note, Gallery(tuple(filter(None, pictures)))))
