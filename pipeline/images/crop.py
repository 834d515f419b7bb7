"""Fits an image to size on the CPU: a centre crop for evaluation, a random crop for training."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.images.decode import pixels_of
from pipeline.images.preprocessing import INTERPOLATIONS, Preprocessing, resized_side

FIT = 2  # the purpose in the address of a draw

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # shares of the image; width / height
LARGEST_RATIO = 16  # of the sides of an image, in evaluation
NUM_TRIES = 10  # draws of a rectangle until one fits the image
NUM_BOX_DRAWS = NUM_FIT_DRAWS = 2 + 2 * NUM_TRIES  # x and y, then the areas and the ratios of the tries


def fit_for_eval(image: Image.Image | torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Resizes the short side and crops the centre; uint8 [C, S, S], S = preprocessing.fitted_size.

    image: mode "L" or "RGB", or uint8 [C, H, W]. For small images and for photos that are kept larger, BatchTransform does the
    final resize and crop on the device. A photo gets the channels of the model, because a dataset may mix grey and colour
    photos. Grey images of a dataset of small images keep one channel until they are on the device.
    """
    pixels, size = _pixels(image, preprocessing), preprocessing.fitted_size
    is_final = size == preprocessing.image_size and not preprocessing.source_size
    short = resized_side(preprocessing) if is_final else size
    height, width = pixels.shape[1:]
    if height == width == short == size:
        return pixels.contiguous()
    if max(height, width) > LARGEST_RATIO * min(height, width):  # else the resized strip would be huge
        height, width = (min(side, LARGEST_RATIO * min(height, width)) for side in (height, width))
        pixels = _centre(pixels, height, width)
    wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    return _centre(_resize_pixels(pixels, high, wide, preprocessing), size, size).contiguous()


def fit_for_training(image: Image.Image | torch.Tensor, preprocessing: Preprocessing, draws: np.ndarray) -> torch.Tensor:
    """A random crop of a photo, resized; uint8 [C, S, S], like fit_for_eval.

    draws: float64 [NUM_FIT_DRAWS] from [0, 1). The crop has 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3
    (https://arxiv.org/abs/1409.4842).
    """
    pixels, size = _pixels(image, preprocessing), preprocessing.fitted_size
    left, top, right, bottom = random_part(pixels.shape[2], pixels.shape[1], draws)
    return _resize_pixels(pixels[:, top:bottom, left:right], size, size, preprocessing).contiguous()


def shrink_of_part(width: int, height: int, preprocessing: Preprocessing, draws: np.ndarray) -> int:
    """The largest factor (1, 2, 4 or 8) by which a JPEG may be decoded smaller without upscaling its random crop."""
    left, top, right, bottom = random_part(width, height, draws)
    ratio = min(right - left, bottom - top) / preprocessing.fitted_size
    return next(factor for factor in (8, 4, 2, 1) if ratio >= factor or factor == 1)


def random_part(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop, in pixels. draws: [NUM_BOX_DRAWS] from [0, 1).

    If no try fits, it is the largest centre crop with an allowed aspect ratio.
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
    """Resizes with antialiasing; uint8 [C, height, width]. Within one level of 255 of Pillow's resize, in a third of the time.

    Small images always use bicubic here (for an image of another size than the rest); the filter of the model applies later,
    on the device.
    """
    if pixels.shape[1:] == (height, width):
        return pixels
    mode = INTERPOLATIONS["bicubic" if preprocessing.source_size else preprocessing.interpolation]
    return F.interpolate(pixels[None], (height, width), mode=mode, antialias=mode != "nearest-exact")[0]
