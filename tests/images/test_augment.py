"""Cropping, augmentation and mixing of images, batches and pairs of samples."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.common.randomness import uniforms
from pipeline.images import randaugment
from pipeline.images.augment import AUGMENTS, BatchTransform, cropped_on_cpu, erased_boxes
from pipeline.images.crop import NUM_FIT_DRAWS, fit_for_eval, fit_for_training, random_part
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.randaugment import NUM_BINS, RANDAUGMENT, TRIVIALAUGMENT
from pipeline.loaders.mixing import mix
from pipeline.settings.batch_size import IGNORED

POLICIES = {"randaugment": RANDAUGMENT, "trivialaugment": TRIVIALAUGMENT}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(num_images: int, channels: int, side: int) -> torch.Tensor:
    """Coloured gradients, so that an error in position is an error in level; uint8."""
    coarse = noise(num_images, channels, 4, 4).float()
    return torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255).to(torch.uint8)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    coarse = np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width // 8, height // 8)).resize((width, height))


def photos(size: int = 24, channels: int = 3, **settings: Any) -> Preprocessing:
    statistics: dict[str, Any] = {"mean": (0.4, 0.5, 0.6)[:channels], "std": (0.2, 0.25, 0.3)[:channels]}
    return Preprocessing(image_size=size, channels=channels, **{**statistics, **settings})


def small(size: int = 16, channels: int = 3, **settings: Any) -> Preprocessing:
    return photos(channels=channels, **{"size": size, "source_size": size, **settings})


def transform(preprocessing: Preprocessing, **settings: Any) -> BatchTransform:
    return BatchTransform(preprocessing, **{"device": "cpu", "flip": True, "seed": 3, **settings})


def raw(preprocessing: Preprocessing, **settings: Any) -> BatchTransform:
    """A transform whose output is the unnormalised levels."""
    neutral = {"mean": (0.0,) * preprocessing.channels, "std": (1 / 255,) * preprocessing.channels}
    return transform(Preprocessing(**{**vars(preprocessing), **neutral}), **settings)


# Fitting an image on the CPU


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (64, 64), (24, 24), (101, 67), (300, 33)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_eval_fit_equals_resize_then_centre_crop(size: tuple[int, int], crop_pct: float) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    steps = [Resize(math.floor(24 / crop_pct), InterpolationMode.BICUBIC), CenterCrop(24), PILToTensor()]
    expected = Compose(steps)(photo(*size))
    fitted = fit_for_eval(photo(*size), photos(crop_pct=crop_pct))
    assert fitted.dtype == torch.uint8 and fitted.shape == (3, 24, 24) and fitted.is_contiguous()
    difference = (fitted.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02  # torch rounds its weights differently


def test_an_image_of_the_right_size_is_unchanged() -> None:
    pixels = noise(24, 24, 3)
    assert torch.equal(fit_for_eval(Image.fromarray(pixels.numpy()), photos()), pixels.permute(2, 0, 1))
    grey = noise(16, 16)
    assert torch.equal(fit_for_eval(Image.fromarray(grey.numpy()), small(channels=1)), grey[None])


def test_fitted_channels_are_the_models_except_for_small_grey_images() -> None:
    grey, colour = photo(40, 40, "L"), photo(40, 40)
    assert fit_for_eval(grey, photos()).shape == (3, 24, 24)
    assert fit_for_eval(colour, photos(channels=1)).shape == (1, 24, 24)
    assert fit_for_eval(grey, small()).shape == (1, 16, 16)
    assert fit_for_eval(colour, small(channels=1)).shape == (1, 16, 16)
    assert torch.equal(fit_for_eval(grey, photos())[:1], fit_for_eval(grey, photos(channels=1)))


def test_training_fit_is_the_drawn_part_resized() -> None:
    image, draws = photo(120, 90), uniforms(np.array([5]), NUM_FIT_DRAWS, 1)[0]
    part = random_part(*image.size, draws)
    assert part != (0, 0, 120, 90)
    expected = np.asarray(image.crop(part).resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    fitted = fit_for_training(image, photos(), draws).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(fitted - expected).max() <= 1 and (fitted != expected).mean() < 0.02  # torch rounds its weights differently


def test_only_photos_that_are_augmented_are_cropped_before_the_device() -> None:
    assert cropped_on_cpu(photos(), "light")
    assert not cropped_on_cpu(photos(), "none")
    assert not cropped_on_cpu(photos(kept_size=32), "light")
    assert not cropped_on_cpu(small(), "light")


def test_random_parts_have_the_published_areas_and_ratios() -> None:
    from torchvision.transforms import RandomResizedCrop

    draws = uniforms(np.arange(2000), NUM_FIT_DRAWS, 2)
    left, top, right, bottom = np.array([random_part(400, 300, row) for row in draws]).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 400).all() and (bottom <= 300).all()
    area, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.078 < area.min() < 0.09 and 0.95 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 0.77 and 1.30 < ratio.max() < 1.35
    torch.manual_seed(0)
    image = photo(400, 300)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1000)]
    _, _, their_height, their_width = np.array(theirs).T
    assert abs(area.mean() - (their_width * their_height / 120_000).mean()) < 0.03
    assert abs(ratio.mean() - (their_width / their_height).mean()) < 0.03
    assert left.min() == 0 and right.max() == 400 and top.min() == 0 and bottom.max() == 300


def test_a_part_that_never_fits_becomes_the_largest_centre() -> None:
    draws = np.full(NUM_FIT_DRAWS, 0.999)
    assert random_part(1000, 30, draws) == (480, 0, 520, 30)
    assert random_part(30, 1000, draws) == (0, 480, 30, 520)


# Batches without randomness


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_eval_is_the_naive_formula(channels: int, channels_last: bool) -> None:
    preprocessing, images = photos(channels=channels), noise(6, channels, 24, 24)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    output = transform(preprocessing, channels_last=channels_last).eval(images)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, (images.float() / 255 - mean) / std, rtol=0, atol=1e-6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert output.is_contiguous(memory_format=layout)


def test_training_without_augmentation_equals_evaluation() -> None:
    for preprocessing in (photos(), small(), small(channels=1)):
        images = noise(4, preprocessing.channels, preprocessing.fitted_size, preprocessing.fitted_size)
        batch = transform(preprocessing, augment="none")
        assert torch.equal(batch.train(images, np.arange(4), 0), batch.eval(images))


def test_grey_images_of_a_colour_model_are_normalised_in_every_channel() -> None:
    grey = noise(4, 1, 16, 16)
    batch = transform(small())
    assert torch.equal(batch.eval(grey), batch.eval(grey.expand(-1, 3, -1, -1)))
    samples = np.arange(4)
    assert torch.equal(batch.train(grey, samples, 1), batch.train(grey.expand(-1, 3, -1, -1), samples, 1))


@pytest.mark.parametrize("interpolation, crop_pct", [("nearest", 1.0), ("bilinear", 0.9), ("bicubic", 0.9)])
def test_small_images_are_resized_on_the_device_as_pillow_would(interpolation: str, crop_pct: float) -> None:
    images = smooth(3, 3, 16)
    settings: dict[str, Any] = {"size": 48, "interpolation": interpolation, "crop_pct": crop_pct}
    batch = raw(small(source_size=16, **settings), augment="none")
    as_photos = [
        fit_for_eval(Image.fromarray(image.permute(1, 2, 0).numpy()), photos(**settings)).float() for image in images
    ]
    output = batch.eval(images)
    assert output.shape == (3, 3, 48, 48)
    tolerance = 1e-4 if interpolation == "nearest" else 3.0  # Pillow rounds and clips between its two passes
    torch.testing.assert_close(output, torch.stack(as_photos), rtol=0, atol=tolerance)
    assert batch.train(images, np.arange(3), 0).shape == (3, 3, 48, 48)


def test_resizing_clips_overshoot() -> None:
    edge = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    edge[..., 8:] = 255
    output = raw(small(40, 1, source_size=16), augment="none").eval(edge)
    assert output.min() == 0 and output.max() <= 255.001


# Random crop, flip and erasing


def test_crop_and_flip_are_windows_of_the_padded_image() -> None:
    images = noise(96, 3, 24, 24)
    output = raw(small(24)).train(images, np.arange(96), 0).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3))
    seen = set()
    for image, original in zip(output, padded, strict=True):
        found = [
            (flipped, top, left)
            for flipped in (False, True)
            for top in range(7)
            for left in range(7)
            if torch.equal((original.flip(2) if flipped else original)[:, top : top + 24, left : left + 24], image)
        ]
        assert len(found) == 1
        seen.update(found)
    assert {top for _, top, _ in seen} == {left for _, _, left in seen} == set(range(7))
    assert {flipped for flipped, _, _ in seen} == {False, True}


def test_half_of_the_photos_are_flipped_and_none_if_not_allowed() -> None:
    images = noise(1, 1, 4, 4).expand(2000, -1, -1, -1)
    samples = np.arange(2000)
    output = raw(photos(4, 1)).train(images, samples, 0).round().to(torch.uint8)
    kept = (output == images).all(dim=(1, 2, 3))
    mirrored = (output == images.flip(3)).all(dim=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 920 < mirrored.sum() < 1080
    assert torch.equal(raw(photos(4, 1), flip=False).train(images, samples, 0).round().to(torch.uint8), images)


def test_alternate_mirrors_each_image_in_every_second_epoch() -> None:
    images, samples = noise(2000, 3, 16, 16), np.arange(2000)
    alternating, random, kept = (raw(small(), flip=flip) for flip in ("alternate", True, False))
    mirrored = []
    for epoch in range(4):
        output, window = alternating.train(images, samples, epoch), kept.train(images, samples, epoch)
        # a mirrored image is another window: that of the mirror image at the same offsets
        is_kept = (output == window).flatten(1).all(1)
        is_mirrored = (output == kept.train(images.flip(3), samples, epoch)).flatten(1).all(1)
        assert (is_kept ^ is_mirrored).all()
        mirrored.append(is_mirrored)
        # neither other samples nor their order change it
        assert torch.equal(alternating.train(images[[7, 3]], samples[[7, 3]], epoch), output[[7, 3]])
    assert 920 < mirrored[0].sum() < 1080 and torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0]) and torch.equal(mirrored[3], mirrored[1])
    other_seed = raw(small(), flip="alternate", seed=4).train(images, samples, 0)
    assert not torch.equal(other_seed, alternating.train(images, samples, 0))
    assert not torch.equal(random.train(images, samples, 0), alternating.train(images, samples, 0))


def test_offsets_are_uniform() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(5000, -1, -1, -1)
    output = raw(small(channels=1), flip=False).train(ramp, np.arange(5000), 0)
    places = output[:, 0, 8, 8].round().long() - 8 * 17
    rows, columns = (places + 34) // 16, (places + 34) % 16
    counts = torch.bincount(rows * 5 + columns, minlength=25)
    assert counts.sum() == 5000 and 150 < counts.min() and counts.max() < 255


def test_random_erasing_erases_one_rectangle_in_the_given_fraction_of_images() -> None:
    images = torch.full((1000, 3, 16, 16), 255, dtype=torch.uint8)
    samples = np.arange(1000)
    output = transform(photos(16), random_erasing=0.3).train(images, samples, 0)
    blank = (output == 0).all(dim=1)
    assert torch.equal(blank, (output == 0).any(dim=1))
    is_erased = blank.flatten(1).any(dim=1)
    assert 250 < is_erased.sum() < 350
    for mask in blank[is_erased]:
        height, width = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert mask.sum() == height * width
    assert torch.equal(
        output[~is_erased], transform(photos(16)).train(images, samples, 0)[~is_erased]
    ), "images that are not erased stay as they are"


def test_erased_boxes_have_the_published_areas_and_ratios() -> None:
    boxes = erased_boxes(uniforms(np.arange(3000), 22, 4), 200)
    left, top, right, bottom = boxes.T
    area, ratio = (right - left) * (bottom - top) / 200**2, (right - left) / (bottom - top)
    assert 0.019 < area.min() < 0.022 and 0.32 < area.max() < 0.34
    assert 0.28 < ratio.min() < 0.32 and 3.1 < ratio.max() < 3.5
    assert (left >= 0).all() and (top >= 0).all() and (right <= 200).all() and (bottom <= 200).all()


# The same sample gets the same augmentation everywhere


@pytest.mark.parametrize("augment", sorted(AUGMENTS))
@pytest.mark.parametrize(
    "preprocessing",
    [small(), small(27, 1), small(24, source_size=16), photos(), photos(channels=1)],
    ids=["small", "small grey", "enlarged", "photos", "grey photos"],
)
def test_a_sample_does_not_depend_on_its_batch(augment: str, preprocessing: Preprocessing) -> None:
    size = preprocessing.fitted_size
    images, samples = noise(40, preprocessing.channels, size, size), np.arange(100, 140)
    batch = transform(preprocessing, augment=augment, random_erasing=0.25)
    whole = batch.train(images, samples, 7)
    shuffled = np.random.default_rng(0).permutation(40)
    assert torch.equal(batch.train(images[shuffled], samples[shuffled], 7), whole[shuffled])
    alone = [batch.train(images[row : row + 1], samples[row : row + 1], 7) for row in range(40)]
    assert torch.equal(torch.cat(alone), whole)
    parts = [batch.train(images[rows], samples[rows], 7) for rows in (slice(0, 5), slice(5, 40))]
    assert torch.equal(torch.cat(parts), whole)
    same_again = transform(preprocessing, augment=augment, random_erasing=0.25).train(images, samples, 7)
    assert torch.equal(same_again, whole)


@pytest.mark.parametrize("augment", ["light", "randaugment", "trivialaugment"])
def test_epoch_sample_and_seed_change_the_augmentation(augment: str) -> None:
    images, samples = noise(1, 3, 16, 16).expand(32, -1, -1, -1), np.arange(32)
    batch = transform(small(), augment=augment)
    first = batch.train(images, samples, 0)
    for other in (
        batch.train(images, samples, 1),
        batch.train(images, samples + 32, 0),
        transform(small(), augment=augment, seed=4).train(images, samples, 0),
    ):
        assert (first != other).flatten(1).any(dim=1).sum() > 24


def test_global_generators_and_the_callers_images_are_unchanged() -> None:
    images = noise(16, 3, 16, 16)
    before, torch_state = images.clone(), torch.get_rng_state()
    numpy_state = np.random.get_state(legacy=False)["state"]["key"].copy()
    for augment in AUGMENTS:
        transform(small(), augment=augment, random_erasing=0.5).train(images, np.arange(16), 0)
        transform(photos(16), augment=augment, random_erasing=0.5).train(images, np.arange(16), 0)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


# RandAugment and TrivialAugment against torchvision


def torchvision_policy(name: str) -> dict:
    from torchvision.transforms import v2

    return {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}[name]._AUGMENTATION_SPACE


def torchvision_operation(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    """The operation of torchvision on an image or batch, with bilinear sampling."""
    from torchvision.transforms import v2

    ids = {"color": "Color", "autocontrast": "AutoContrast"}
    operation = ids.get(name, "".join(word.capitalize() for word in name.split("_")))
    bilinear = v2.InterpolationMode.BILINEAR
    policy = v2.TrivialAugmentWide(interpolation=bilinear)
    return policy._apply_image_or_video_transform(image, operation, magnitude, bilinear, policy._fill)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("side", [32, 45])
def test_magnitudes_are_torchvisions(name: str, side: int) -> None:
    theirs = torchvision_policy(name)
    policy, bins = POLICIES[name], randaugment.magnitude_bins(POLICIES[name], side)
    assert [op.name.replace("_", "") for op in policy.operations] == [key.lower() for key in theirs]
    for operation, magnitudes, (their_bins, signed) in zip(policy.operations, bins, theirs.values(), strict=True):
        expected = their_bins(NUM_BINS, side, side)
        assert operation.signed == signed
        if operation.name == "posterize":
            magnitudes = magnitudes.round()
        assert np.array_equal(magnitudes, np.zeros(NUM_BINS) if expected is None else expected.numpy()), operation.name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", TRIVIALAUGMENT.operations, ids=lambda operation: operation.name)
def test_every_operation_and_magnitude_equals_torchvisions(channels: int, operation: randaugment.Operation) -> None:
    row = TRIVIALAUGMENT.operations.index(operation)
    magnitudes = randaugment.magnitude_bins(TRIVIALAUGMENT, 20)[row]
    magnitudes = magnitudes.round() if operation.name == "posterize" else magnitudes
    magnitudes = np.concatenate([magnitudes, -magnitudes]) if operation.signed else magnitudes
    is_affine = operation.name in randaugment.MATRICES
    images = smooth(len(magnitudes), channels, 20) if is_affine else noise(len(magnitudes), channels, 40, 40)
    images[0] = 77  # constant images are a special case for contrast, autocontrast and equalize
    names = np.array([operation.name] * len(magnitudes))
    output = randaugment.operate(images, names, magnitudes)
    expected = torch.stack(
        [
            torchvision_operation(image, operation.name, float(magnitude))
            for image, magnitude in zip(images, magnitudes, strict=True)
        ]
    )
    assert output.dtype == torch.uint8
    if is_affine:
        difference = (output.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference == 0).float().mean() > 0.99
    else:
        assert torch.equal(output, expected)


def test_every_image_gets_its_own_operation_and_keeps_its_place() -> None:
    names = np.array([operation.name for operation in RANDAUGMENT.operations] * 3)
    magnitudes = np.linspace(0.1, 0.9, len(names), dtype=np.float32)
    images = noise(len(names), 3, 20, 20)
    whole = randaugment.operate(images, names, magnitudes)
    for row in range(len(names)):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], randaugment.operate(images[one], names[one], magnitudes[one])), names[row]


@pytest.mark.parametrize("name", POLICIES)
def test_choices_are_uniform(name: str) -> None:
    policy = POLICIES[name]
    num_operations = len(policy.operations)
    names, magnitudes = randaugment.choose(uniforms(np.arange(14_000), 3, 5), policy, 32)
    counts = [(names == operation.name).sum() for operation in policy.operations]
    assert len(counts) == num_operations == 14
    assert min(counts) > 880 and max(counts) < 1120
    rotations = magnitudes[names == "rotate"]
    assert 0.43 < (rotations < 0).mean() < 0.57
    steps = np.unique(np.abs(rotations))
    expected = randaugment.magnitude_bins(policy, 32)[5]
    assert np.array_equal(steps, expected[9:10] if name == "randaugment" else expected)


def test_randaugment_applies_two_operations_one_after_the_other() -> None:
    images, draws = noise(40, 3, 20, 20), uniforms(np.arange(40), 6, 6)
    once = randaugment.operate(images, *randaugment.choose(draws[:, :3], RANDAUGMENT, 20))
    twice = randaugment.operate(once, *randaugment.choose(draws[:, 3:], RANDAUGMENT, 20))
    assert not torch.equal(once, twice)
    assert torch.equal(randaugment.augment(images, draws, RANDAUGMENT), twice)


# mixup and cutmix

ALPHAS = [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)]


def mixed(
    images: torch.Tensor, labels: torch.Tensor, mixup: float, cutmix: float, **where: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    where = {"place": (3, 11), "first_position": 0, "global_batch": len(labels), **where}
    return mix(images, labels, mixup=mixup, cutmix=cutmix, num_classes=5, **where)


@pytest.mark.parametrize("mixup, cutmix", ALPHAS)
def test_mixed_slices_equal_the_whole(mixup: float, cutmix: float) -> None:
    images, labels = torch.rand(21, 3, 16, 16), torch.arange(21) % 5
    whole_images, whole_labels = mixed(images, labels, mixup, cutmix)
    assert not torch.equal(whole_images, images)
    for bounds in ([0, 10, 21], [0, 2, 8, 20, 21]):
        parts = [
            mixed(images[a:b], labels[a:b], mixup, cutmix, first_position=a, global_batch=21)
            for a, b in zip(bounds, bounds[1:])
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole_images)
        assert torch.equal(torch.cat([part[1] for part in parts]), whole_labels)
    other_place, _ = mixed(images, labels, mixup, cutmix, place=(3, 12))
    assert not torch.equal(other_place, whole_images)


def test_mixup_blends_images_and_labels_with_one_weight_per_pair() -> None:
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 1, 4, 4)
    output, soft = mixed(images, torch.arange(40) % 2, 0.4, 0.0)
    first, second = output[0::2, 0, 0, 0], output[1::2, 0, 0, 0]
    torch.testing.assert_close(first + second, images[0::2, 0, 0, 0] + images[1::2, 0, 0, 0])
    share = 1 - (first - images[0::2, 0, 0, 0])
    torch.testing.assert_close(soft[0::2, 0], share, rtol=0, atol=1e-5)
    torch.testing.assert_close(soft[1::2, 1], share, rtol=0, atol=1e-5)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(40))
    assert len(share.unique()) > 15


def test_cutmix_pastes_the_partners_box_and_weights_labels_by_its_true_area() -> None:
    images = torch.arange(64.0).view(64, 1, 1, 1).repeat(1, 1, 16, 16)
    output, soft = mixed(images, torch.arange(64) % 2, 0.0, 1.0)
    pasted = output != images
    assert torch.equal(pasted[0::2], pasted[1::2])
    partners = images.view(32, 2, 1, 16, 16).flip(1).view_as(images)
    assert torch.equal(output, torch.where(pasted, partners, images))
    torch.testing.assert_close(soft[torch.arange(64), torch.arange(64) % 2], 1 - pasted.float().mean(dim=(1, 2, 3)))
    for mask in pasted[0::2, 0]:
        assert mask.sum() == mask.any(dim=0).sum() * mask.any(dim=1).sum()
    share = pasted.float().mean()
    assert 0.25 < share < 0.55 and len(pasted.flatten(1).sum(dim=1).unique()) > 15


def test_mixup_shares_follow_their_beta_distribution() -> None:
    images = torch.zeros(8000, 1, 1, 1)
    images[1::2] = 1
    output, _ = mixed(images, torch.zeros(8000, dtype=torch.int64), 0.4, 0.0)
    shares = output[1::2].double()
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01


def test_with_both_alphas_half_of_the_pairs_are_cut() -> None:
    images = torch.zeros(4000, 1, 8, 8)
    images[1::2] = 1
    output, _ = mixed(images, torch.zeros(4000, dtype=torch.int64), 1.0, 1.0)
    is_blended = ((output > 0) & (output < 1)).flatten(1).any(dim=1)[0::2]
    assert 900 < is_blended.sum() < 1100


@pytest.mark.parametrize("mixup, cutmix", ALPHAS)
def test_an_odd_last_one_and_the_partners_of_padding_stay_unmixed(mixup: float, cutmix: float) -> None:
    images, labels = torch.rand(9, 3, 8, 8), torch.tensor([0, 1, IGNORED, 3, 4, IGNORED, 1, 2, 3])
    output, soft = mixed(images, labels, mixup, cutmix)
    for row in (2, 3, 4, 5, 8):
        assert torch.equal(output[row], images[row])
    assert torch.equal(soft[[2, 5]], torch.zeros(2, 5))
    assert torch.equal(soft[[3, 4, 8]], torch.eye(5)[[3, 4, 3]])
    whole = mixed(images, torch.zeros(9, dtype=torch.int64), mixup, cutmix)[0]
    assert torch.equal(output[[0, 1, 6, 7]], whole[[0, 1, 6, 7]])


def test_no_mixing_returns_the_images_and_exact_labels() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 4, IGNORED, 1])
    output, soft = mixed(images, labels, 0.0, 0.0)
    assert output is images
    assert torch.equal(soft, torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]))


# Errors


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"interpolation": "bicubik"}, "Did you mean 'bicubic'"),
        ({"channels": 2, "mean": (0.5, 0.5), "std": (0.5, 0.5)}, "channels is 2"),
        ({"mean": (0.5,)}, "must each have 3 values"),
        ({"std": (0.2, 0.0, 0.2)}, "above 0"),
        ({"crop_pct": 1.2}, "crop_pct is 1.2"),
        ({"image_size": 0}, "must be 1 or more"),
    ],
)
def test_preprocessing_refuses_inconsistent_values(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{**vars(photos()), **wrong})


def test_wrong_settings_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="Unknown augment 'lihgt'. Did you mean 'light'. Known: none, light, "):
        transform(small(), augment="lihgt")
    with pytest.raises(ValueError, match="random_erasing is 1.5"):
        transform(small(), random_erasing=1.5)
    with pytest.raises(ValueError, match="mixup is -0.1"):
        mixed(torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), -0.1, 0.0)


def test_the_smallest_images_are_not_moved_and_a_digit_not_mirrored() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 1, 8, 8), generator=generator, dtype=torch.uint8)
    tiny = Preprocessing(image_size=8, channels=1, mean=(0.3,), std=(0.4,), source_size=8)
    transform = BatchTransform(tiny, device="cpu", augment="light", flip=False, seed=0)
    assert torch.equal(transform.train(images, np.arange(16), epoch=3), transform.eval(images))
