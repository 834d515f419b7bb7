"""The JSON object of an inspection: what the page shows, without pictures."""

from collections import Counter
from typing import Any

from pipeline.inspect.duplicates import SPLIT_PAIRS, Found, disagrees, num_second
from pipeline.inspect.examine import ImageFacts
from pipeline.inspect.inspection import MOST_LISTED, Inspection


def facts_of(found: Inspection) -> dict[str, Any]:
    """The object. Its lists have at most MOST_LISTED entries."""
    images, counts = found.images, found.counts
    facts: dict[str, Any] = {
        "dataset": found.dataset.name,
        "source": found.dataset.source,
        "images": found.examined.num_images,
        "examined": len(images) + len(found.examined.bad),
        "classes": {
            name: {split: int(values[place]) for split, values in counts.items()}
            for place, name in enumerate(found.dataset.class_names)
        },
        "imbalance": found.imbalance,
        "notes": found.dataset.notes,
        "sizes": [[*size, number] for size, number in Counter((i.width, i.height) for i in images).most_common(MOST_LISTED)],
        "modes": dict(Counter(image.mode for image in images).most_common()),
        "file_kinds": dict(Counter(image.kind for image in images).most_common()),
        "darkest": image_facts(found, min(images, key=lambda image: image.brightness)),
        "brightest": image_facts(found, max(images, key=lambda image: image.brightness)),
        "duplicates": [duplicate_facts(found, kind) for kind in found.duplicates],
        "unreadable": found.examined.bad[:MOST_LISTED],
    }
    if isinstance(found.doubtful, tuple):
        wrong, accuracy = found.doubtful
        facts["leave_one_out_accuracy"] = accuracy
        facts["contradicted_labels"] = [
            image_facts(found, images[each.place])
            | {"predicted": found.class_name(each.predicted), "confidence": each.confidence, "own": each.own}
            for each in wrong[:MOST_LISTED]
        ]
    return facts


def image_facts(found: Inspection, image: ImageFacts) -> dict[str, Any]:
    return {
        "split": image.split,
        "row": image.row,
        "where": found.splits[image.split].where(image.row),
        "label": found.class_name(image.label),
        "width": image.width,
        "height": image.height,
        "brightness": round(image.brightness, 4),
        "contrast": round(image.contrast, 4),
    }


def duplicate_facts(found: Inspection, kind: Found) -> dict[str, Any]:
    """The repeated images by pair of splits, and the pairs."""
    images = found.images
    pairs_of = {splits: found.pairs_between(kind, splits) for splits in SPLIT_PAIRS}
    listed = [pair for pairs in pairs_of.values() for pair in pairs][:MOST_LISTED]
    return {
        "kind": kind.kind,
        "complete": kind.complete,
        "repeated": {"-".join(splits): num_second(pairs) for splits, pairs in pairs_of.items() if pairs},
        "pairs": [
            {
                "images": [image_facts(found, images[place]) for place in (pair.first, pair.second)],
                "similarity": round(pair.similarity, 4),
                "same_label": not disagrees(pair, images),
            }
            for pair in listed
        ],
    }
