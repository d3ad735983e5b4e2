"""The controls of images, and how well an image agrees with one."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

BLUR = 1.5  # pixels
THRESHOLD = 0.25  # grey levels from 0 to 1, per pixel
BLOCK = 4  # pixels
CROSS = ndimage.generate_binary_structure(2, 1)[None]  # a pixel and its four neighbours


def edges(images: np.ndarray) -> np.ndarray:
    """Thin edges (n, height, width) of images from 0 to 255: steep, and steepest across the edge.

    The gradient is Sobel's, of the blurred image. An edge is where its length exceeds a threshold
    and both neighbours in its direction, to the nearest axis.
    """
    blurred = ndimage.gaussian_filter(images / 255.0, (0, BLUR, BLUR))
    gy, gx = (ndimage.sobel(blurred, axis) / 8 for axis in (1, 2))
    steep = np.hypot(gx, gy)
    padded = np.pad(steep, ((0, 0), (1, 1), (1, 1)))
    across = (steep >= padded[:, 1:-1, :-2]) & (steep > padded[:, 1:-1, 2:])
    along = (steep >= padded[:, :-2, 1:-1]) & (steep > padded[:, 2:, 1:-1])
    return np.where(np.abs(gx) >= np.abs(gy), across, along) & (steep > THRESHOLD)


def mask(images: np.ndarray) -> np.ndarray:
    """Blocks (n, height, width) of 4x4 pixels whose mean exceeds a quarter of the white level."""
    n, height, width = images.shape
    blocks = images.reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean((2, 4))
    return np.kron(blocks > 255 / 4, np.ones((1, BLOCK, BLOCK), bool))


def within_a_pixel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each pair of edge images, (n,), with a tolerance of one pixel.

    An edge pixel of one image is matched if the other has one there or next to it. The intersection
    is the mean of the matched pixels of both.
    """
    matched = sum(
        (x & ndimage.binary_dilation(y, CROSS)).sum((1, 2)) / 2 for x, y in ((a, b), (b, a))
    )
    return _share(matched, a, b)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each pair of masks, (n,)."""
    return _share((a & b).sum((1, 2)), a, b)


def _share(intersection, a, b):
    """Two empty images agree."""
    union = a.sum((1, 2)) + b.sum((1, 2)) - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


class Control(NamedTuple):
    """A control and its measure."""

    of: Callable[[np.ndarray], np.ndarray]
    """the control of images"""
    agreement: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """of two controls, from 0 to 1"""


CONTROLS = {"edges": Control(edges, within_a_pixel), "mask": Control(mask, overlap)}
