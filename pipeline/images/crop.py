"""An image is fitted to size on the CPU: its centre for evaluation, for training a random part."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.images.decode import pixels_of
from pipeline.images.preprocessing import INTERPOLATIONS, Preprocessing, resized_side

FIT = 2  # what a draw is for: the last part of its address

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # shares of the image; width / height
LARGEST_RATIO = 16  # of an image's sides, in evaluation
NUM_TRIES = 10  # a drawn rectangle that does not fit the image is drawn again
NUM_BOX_DRAWS = NUM_FIT_DRAWS = 2 + 2 * NUM_TRIES  # place, then the areas and the ratios of the tries


def fit_for_eval(image: Image.Image | torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """The image's centre at the size that travels to the device; uint8 [C, S, S], S = preprocessing.fitted_size.

    image: mode "L" or "RGB", or uint8 [C, H, W]. The short side is resized and the centre cut out; of small images and
    of photos that are kept larger, BatchTransform does that later. A photo has the model's channels, since photos of
    one set may be grey or in colour; a grey image of a small set keeps one channel until it is on the device.
    """
    pixels, size = _pixels(image, preprocessing), preprocessing.fitted_size
    is_final = size == preprocessing.image_size and not preprocessing.source_size
    short = resized_side(preprocessing) if is_final else size
    height, width = pixels.shape[1:]
    if height == width == short == size:
        return pixels.contiguous()
    if max(height, width) > LARGEST_RATIO * min(height, width):  # else a strip would grow huge to be cut at its centre
        height, width = (min(side, LARGEST_RATIO * min(height, width)) for side in (height, width))
        pixels = _centre(pixels, height, width)
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    return _centre(_resize_pixels(pixels, high, wide, preprocessing), size, size).contiguous()


def fit_for_training(image: Image.Image | torch.Tensor, preprocessing: Preprocessing, draws: np.ndarray) -> torch.Tensor:
    """A random part of a photo, resized; uint8 [C, S, S], as fit_for_eval.

    draws: float64 [NUM_FIT_DRAWS] from [0, 1). The part covers 8 to 100 % of the area with a side ratio of 3:4 to 4:3
    (https://arxiv.org/abs/1409.4842).
    """
    pixels, size = _pixels(image, preprocessing), preprocessing.fitted_size
    left, top, right, bottom = random_part(pixels.shape[2], pixels.shape[1], draws)
    return _resize_pixels(pixels[:, top:bottom, left:right], size, size, preprocessing).contiguous()


def shrink_of_part(width: int, height: int, preprocessing: Preprocessing, draws: np.ndarray) -> int:
    """1, 2, 4 or 8: how much smaller a JPEG may be decoded so that its random part still has the fitted size."""
    left, top, right, bottom = random_part(width, height, draws)
    ratio = min(right - left, bottom - top) / preprocessing.fitted_size
    return next(factor for factor in (8, 4, 2, 1) if ratio >= factor or factor == 1)


def random_part(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image, in pixels. draws: [NUM_BOX_DRAWS] from [0, 1).

    If no try fits, the largest centre with an allowed side ratio.
    """
    x_draw, y_draw, *tries = draws.tolist()
    for area_draw, ratio_draw in zip(tries[:NUM_TRIES], tries[NUM_TRIES:], strict=True):
        area = width * height * (CROP_AREA[0] + area_draw * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** ratio_draw
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(x_draw * (width - wide + 1)), int(y_draw * (height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _pixels(image: Image.Image | torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image
    if preprocessing.channels == 1 and image.mode != "L":
        image = image.convert("L")
    elif preprocessing.channels == 3 and image.mode == "L" and not preprocessing.source_size:
        image = image.convert("RGB")
    return pixels_of(image)


def _centre(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = round((pixels.shape[1] - height) / 2), round((pixels.shape[2] - width) / 2)
    return pixels[:, top : top + height, left : left + width]


def _resize_pixels(pixels: torch.Tensor, height: int, width: int, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 [C, height, width], antialiased; within one level of 255 of Pillow's resize, in a third of the time.

    The odd image of another size in a set of small ones does not depend on the model: it gets its filter on the device.
    """
    if pixels.shape[1:] == (height, width):
        return pixels
    mode = INTERPOLATIONS["bicubic" if preprocessing.source_size else preprocessing.interpolation]
    return F.interpolate(pixels[None], (height, width), mode=mode, antialias=mode != "nearest-exact")[0]
