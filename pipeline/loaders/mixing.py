"""Mixup and cutmix between pairs of neighbours in the global batch."""

import numpy as np
import torch

from pipeline.common.randomness import address, uniforms
from pipeline.common.system import to_device
from pipeline.images.augment import inside
from pipeline.settings.batch_size import IGNORED

MIX, MIXUP, CUTMIX = 2004, 2005, 2006  # the purpose in the address of a draw


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    mixup: float,
    cutmix: float,
    num_classes: int,
    place: tuple[int, ...],
    first_position: int,
    global_batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes pairs of neighbours; returns images [B, C, S, S] and soft labels float32 [B, num_classes].

    images: float [B, C, S, S]; labels: int [B]. mixup (https://arxiv.org/abs/1710.09412) and cutmix
    (https://arxiv.org/abs/1905.04899) are the alphas of Beta(alpha, alpha), 0 to disable. If both are set, each pair uses one
    of them, with probability 1/2. Positions 2k and 2k + 1 of the global batch are a pair and share one draw. The draw depends
    only on `place`, the address of the global batch, so the result for a part of the batch from first_position on is a
    slice of the result for the whole. A sample stays unchanged if its partner is not in this part, or if one of the two is
    IGNORED. The soft labels of an ignored sample are zero. Raises ValueError for an alpha below 0.
    """
    if min(mixup, cutmix) < 0:
        raise ValueError(f"mixup is {mixup} and cutmix is {cutmix}; both are alphas of Beta distributions, 0 or more.")
    targets = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    if mixup == cutmix == 0:
        return images, targets
    here = np.arange(len(labels))
    positions = first_position + here
    partner_at = (positions ^ 1) - first_position
    partner_at = np.where((partner_at < 0) | (partner_at >= len(labels)), here, partner_at)
    draws = pair_draws((global_batch + 1) // 2, place, mixup=mixup, cutmix=cutmix, size=images.shape[-1])
    pixel_share, label_share, boxes = (values[positions // 2] for values in draws)
    own = np.where(partner_at == here, np.float32(1), np.stack([pixel_share, label_share]))
    arrays = (partner_at, boxes, own)
    partner, box, shares = (to_device(torch.from_numpy(array), images.device) for array in arrays)
    ignored = labels == IGNORED
    alone = ignored | ignored[partner]
    own_pixels, own_label = shares.masked_fill(alone, 1.0)[..., None]
    weights = own_pixels[..., None, None]
    if cutmix:
        weights = weights.masked_fill(inside(box, images.shape[-1]) & ~alone[:, None, None, None], 0.0)
    weights = weights.to(images.dtype)
    mixed = (images * weights).add_(images.index_select(0, partner).mul_(1 - weights))
    return mixed, targets * own_label + targets[partner] * (1 - own_label)


def pair_draws(
    num_pairs: int, place: tuple[int, ...], *, mixup: float, cutmix: float, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pair: the weight of a sample's own pixels outside the box, the weight of its own label, and the box.

    Weights are float32 [num_pairs]; boxes are int64 [num_pairs, 4], left, top, right, bottom, empty for mixup.
    """

    def shares(alpha: float, purpose: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(address(*place, purpose))).beta(alpha, alpha, num_pairs)

    choice, *centre = uniforms(np.arange(num_pairs), 3, *place, MIX).T
    cut = choice < (0.0 if not cutmix else 0.5 if mixup else 1.0)
    share = shares(mixup, MIXUP) if mixup else np.ones(num_pairs)
    boxes = np.zeros((num_pairs, 4), np.int64)
    if cutmix:
        half = (size * np.sqrt(1 - shares(cutmix, CUTMIX))).astype(np.int64) // 2
        x, y = (np.array(centre) * size).astype(np.int64)
        boxes = np.stack([x - half, y - half, x + half, y + half], axis=1).clip(0, size) * cut[:, None]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    pixel_share = np.where(cut, 1.0, share)
    label_share = np.where(cut, 1 - area / size**2, share)  # the border may clip the box, so use its true area
    return pixel_share.astype(np.float32), label_share.astype(np.float32), boxes
