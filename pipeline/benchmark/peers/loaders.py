"""The loaders of the peers: `datasets` with torchvision's transforms in torch's DataLoader, and timm's with its prefetcher."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms

from pipeline.images.augment import SMALLEST_MOVED
from pipeline.images.crop import CROP_AREA, CROP_RATIO

POLICIES = {"randaugment": transforms.RandAugment, "trivialaugment": transforms.TrivialAugmentWide}


def image_transforms(data: dict[str, Any], augment: str) -> list[Any]:
    """The transforms of our loaders for training images, by torchvision's classes; data: the result of sets.peer_set."""
    filters = transforms.InterpolationMode
    mode = {"nearest": filters.NEAREST, "bilinear": filters.BILINEAR, "bicubic": filters.BICUBIC}[data["interpolation"]]
    side, source = data["image_size"], data["source_size"]
    steps: list[Any] = []
    if source is None:
        if augment == "none":
            steps += [transforms.Resize(int(side / data["crop_pct"]), mode), transforms.CenterCrop(side)]
        else:
            steps.append(transforms.RandomResizedCrop(side, CROP_AREA, CROP_RATIO, mode))
    elif augment != "none" and source >= SMALLEST_MOVED:
        steps.append(transforms.RandomCrop(source, padding=source // 8))
    if augment != "none" and data["flip"]:
        steps.append(transforms.RandomHorizontalFlip())
    if augment in POLICIES:
        steps.append(POLICIES[augment]())
    if source not in (None, side):
        steps.append(transforms.Resize(side, mode))
    return steps


def read_set(data: dict[str, Any]) -> Any:
    import datasets

    return datasets.load_dataset("parquet", data_files=data["parquet"], split="train")


def pil_mode(data: dict[str, Any]) -> str:
    return "L" if data["channels"] == 1 else "RGB"


def stack(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([sample["image"] for sample in samples]), torch.tensor([sample["label"] for sample in samples])


def plain_loader(
    data: dict[str, Any], augment: str, batch_size: int, workers: int, device: torch.device
) -> torch.utils.data.DataLoader:
    """Batches of images float [B, C, S, S] and labels int64 [B] on the CPU, as in Hugging Face's examples."""
    to_input = transforms.Compose(
        [*image_transforms(data, augment), transforms.ToTensor(), transforms.Normalize(data["mean"], data["std"])]
    )
    mode = pil_mode(data)

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"image": [to_input(image.convert(mode)) for image in rows["image"]], "label": rows["label"]}

    return torch.utils.data.DataLoader(
        read_set(data).with_transform(transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=stack,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


class Samples(torch.utils.data.Dataset):
    """A dataset in the form that timm's loader requires: pairs of transform(image) and label."""

    def __init__(self, data: dict[str, Any]):
        self.rows, self.mode, self.transform = read_set(data), pil_mode(data), None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        sample = self.rows[row]
        image = sample["image"].convert(self.mode)
        return image if self.transform is None else self.transform(image), sample["label"]


def timm_loader(
    data: dict[str, Any], augment: str, batch_size: int, workers: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """timm's loader, https://huggingface.co/docs/timm: uint8 images from the workers, normalised on the device."""
    from timm.data import create_loader
    from timm.data.transforms import ToNumpy

    side = data["image_size"]
    loader: Any = create_loader(
        Samples(data),
        input_size=(data["channels"], side, side),
        batch_size=batch_size,
        is_training=True,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        device=device,
        use_prefetcher=True,
    )
    loader.dataset.transform = transforms.Compose(
        [*image_transforms(data, augment), ToNumpy()]
    )  # the same work as ours
    return loader
