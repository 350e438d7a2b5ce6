"""The built-in dataset: images of shapes, generated from their index. Nothing to download, no two images alike.

Only a working detector scores well on it. The five classes differ in outline but not in colour. Shapes span almost
three octaves of size, have any rotation and aspect ratio, overlap, and reach beyond the image, in front of a cluttered
background. Images are the same on every machine: OpenCV draws in fixed-point arithmetic, at twice the size, and all
random numbers are integers or uniform floats.
"""

import colorsys
import dataclasses
import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float

from effdet_jax.data.example import Annotations, Example

CLASS_NAMES: tuple[str, ...] = ('ellipse', 'rectangle', 'triangle', 'star', 'ring')


def draw(index: int, size: int = 128) -> Example:
    """Draws image number `index` (>= 0): RGB `size` x `size` with 1 to 4 objects, deterministic.

    Boxes enclose the part of a shape inside the image, including what other shapes hide, to half a pixel. At least
    three quarters of that part are visible, and at most a fifth of the shape is outside.
    """
    rng = np.random.default_rng((_SEED, index))
    canvas = _background(rng, _OVERSAMPLING * size)
    shapes = _arrange(rng, _OVERSAMPLING * size)
    has_shadows = rng.random() < 0.6
    for shape in shapes:
        if has_shadows:
            _draw_shadow(canvas, shape)
        _paint(rng, canvas, shape)
    image = _degrade(rng, cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA))

    boxes_M4 = np.array([shape.box for shape in shapes], np.float32) / _OVERSAMPLING
    false_M = np.zeros(len(shapes), bool)
    annotations = Annotations(
        image_id=index,
        file_name='',
        boxes_yxyx=boxes_M4,
        labels=np.array([shape.label for shape in shapes], np.int32),
        areas=(boxes_M4[:, 2] - boxes_M4[:, 0]) * (boxes_M4[:, 3] - boxes_M4[:, 1]),
        is_crowd=false_M,
        is_difficult=false_M,
    )
    return Example(image, annotations)


_SEED = 20
_OVERSAMPLING = 2
_SHIFT = 4  # OpenCV reads points in sixteenths of a pixel
_MIN_VISIBLE = 0.75
_MAX_OUTSIDE = 0.2


@dataclasses.dataclass(frozen=True)
class _Shape:
    """One object on the canvas. `visible` is the part of `mask` that later objects do not hide, updated in place."""

    label: int
    outlines: list[np.ndarray]  # the second one, if any, is a hole
    mask: np.ndarray
    visible: np.ndarray
    area: int
    box: tuple[int, int, int, int]  # yxyx


def _arrange(rng: np.random.Generator, size: int) -> list[_Shape]:
    """Places 1 to 4 objects, later ones in front. Rejects positions that hide too much of another object."""
    shapes: list[_Shape] = []
    for _ in range(rng.integers(1, 5)):
        label = int(rng.integers(len(CLASS_NAMES)))
        # One in twenty is small; the others are uniform in log size.
        low, high = (0.1, 0.16) if rng.random() < 0.05 else (0.22, 0.65)
        radius = size * low * (high / low) ** rng.random() / 2
        for _ in range(8):
            shape = _place(rng, label, radius, size)
            if shape is not None and all(_leaves_visible(shape, under) for under in shapes):
                for under in shapes:
                    under.visible[shape.mask > 0] = 0
                shapes.append(shape)
                break
    return shapes or _arrange(rng, size)  # all eight attempts failed: start again


def _place(rng: np.random.Generator, label: int, radius: float, size: int) -> _Shape | None:
    """A shape with random aspect ratio, rotation and position; None if too much of it is outside the image."""
    angle = rng.uniform(0, 2 * math.pi)
    turn_22 = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretch_2 = radius * np.array([1, rng.uniform(0.6, 1)])
    centre_2 = rng.uniform(0, size, 2)
    outlines = [
        np.rint(((outline_P2 * stretch_2) @ turn_22 + centre_2) * 2**_SHIFT).astype(np.int32)
        for outline_P2 in _OUTLINES[label]
    ]
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, outlines, 255, cv2.LINE_8, _SHIFT)
    area = cv2.countNonZero(mask)
    whole, *hole = (cv2.contourArea(outline) / 4**_SHIFT for outline in outlines)
    if area < (1 - _MAX_OUTSIDE) * (whole - sum(hole)):
        return None
    left, top, width, height = cv2.boundingRect(mask)
    return _Shape(label, outlines, mask, mask.copy(), area, (top, left, top + height, left + width))


def _leaves_visible(over: _Shape, under: _Shape) -> bool:
    y1, x1, y2, x2 = over.box
    hidden = cv2.countNonZero(cv2.bitwise_and(under.visible[y1:y2, x1:x2], over.mask[y1:y2, x1:x2]))
    return cv2.countNonZero(under.visible) - hidden >= _MIN_VISIBLE * under.area


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: _Shape) -> None:
    """Fills the mask with a gradient, often with an outline."""
    y1, x1, y2, x2 = shape.box
    ground, mask = canvas[y1:y2, x1:x2], shape.mask[y1:y2, x1:x2]
    fill = _colour(rng, (0.45, 0.95), (0.4, 1.0))
    mean_colour = np.array(cv2.mean(ground, mask)[:3])
    if rng.random() < 0.06:
        fill = mean_colour + np.where(mean_colour < 128, 34, -34)  # low contrast
    elif np.abs(fill - mean_colour).sum() < 150:
        fill = np.where(mean_colour < 128, fill * 0.35 + 165, fill * 0.35)
    patch = _gradient(
        [fill, fill * rng.uniform(0.6, 0.95)], rng.permutation(np.array([0, 0, 1, 1])).reshape(2, 2), ground.shape
    )
    if rng.random() < 0.5:
        edge = fill * 0.45 if rng.random() < 0.5 else fill * 0.3 + 178
        moved = [outline - np.array([x1, y1], np.int32) * 2**_SHIFT for outline in shape.outlines]
        thickness = max(2, round(canvas.shape[0] * rng.uniform(0.01, 0.022)))
        cv2.polylines(patch, moved, True, edge.tolist(), thickness, cv2.LINE_AA, _SHIFT)
    cv2.copyTo(patch, mask, ground)


def _draw_shadow(canvas: np.ndarray, shape: _Shape) -> None:
    """Draws a soft shadow to the lower right of the object."""
    size = canvas.shape[0]
    offset, soft = size // 64, size // 40
    y1, x1, y2, x2 = shape.box
    y1, x1, y2, x2 = max(0, y1 - soft), max(0, x1 - soft), min(size, y2 + 2 * soft), min(size, x2 + 2 * soft)
    mask = np.zeros((y2 - y1, x2 - x1), np.uint8)
    mask[offset:, offset:] = shape.mask[y1 : y2 - offset, x1 : x2 - offset]
    shadow = cv2.cvtColor(cv2.blur(mask, (soft, soft)), cv2.COLOR_GRAY2RGB)
    region = canvas[y1:y2, x1:x2]
    cv2.subtract(region, cv2.multiply(region, shadow, scale=0.4 / 255), dst=region)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth mixture of two colours with zero to two textures."""
    value = rng.uniform(0.25, 0.95)
    colours = [_colour(rng, (0.05, 0.5), (0.75 * value, value)) for _ in range(2)]
    cells = int(rng.choice([2, 3, 6, 9]))
    canvas = _gradient(colours, rng.random((cells, cells)), (size, size))
    for texture in rng.permutation(len(_TEXTURES))[: rng.integers(0, 3)]:
        tint = np.clip(colours[0] + rng.choice([-1, 1]) * rng.uniform(18, 60), 0, 255)
        _TEXTURES[texture](rng, canvas, tint.tolist())
    return canvas


def _stripes(rng: np.random.Generator, canvas: np.ndarray, colour: list[float]) -> None:
    size = canvas.shape[0]
    pitch, angle = size * rng.uniform(0.04, 0.16), rng.uniform(0, math.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    thickness = max(1, int(pitch * rng.uniform(0.15, 0.5)))
    for step in np.arange(-0.75 * size, 0.75 * size, pitch):
        ends_22 = size / 2 + across * step + np.outer([-size, size], along)
        start, end = np.rint(ends_22 * 2**_SHIFT).astype(int).tolist()
        cv2.line(canvas, start, end, colour, thickness, cv2.LINE_AA, _SHIFT)


def _dots(rng: np.random.Generator, canvas: np.ndarray, colour: list[float]) -> None:
    size = canvas.shape[0]
    pitch = int(size * rng.uniform(0.05, 0.11))
    radius = max(2, int(pitch * rng.uniform(0.1, 0.2)))
    for row, y in enumerate(range(pitch // 2, size, pitch)):
        for x in range(pitch // 2 * (row % 2 + 1), size, pitch):
            cv2.circle(canvas, (x, y), radius, colour, -1, cv2.LINE_AA)


def _scribbles(rng: np.random.Generator, canvas: np.ndarray, colour: list[float]) -> None:
    """Arcs of large ellipses, thick and thin."""
    size = canvas.shape[0]
    for _ in range(rng.integers(3, 9)):
        centre, axes = rng.integers(0, size, 2).tolist(), rng.integers(size // 6, size // 2, 2).tolist()
        start, turn = int(rng.integers(0, 360)), int(rng.integers(0, 180))
        thickness = int(rng.integers(1, max(3, size // 40)))
        end = start + int(rng.integers(30, 120))
        cv2.ellipse(canvas, centre, axes, turn, start, end, colour, thickness, cv2.LINE_AA)


def _dashes(rng: np.random.Generator, canvas: np.ndarray, colour: list[float]) -> None:
    size = canvas.shape[0]
    starts_D2 = rng.integers(0, size, (rng.integers(15, 50), 2))
    ends_D2 = starts_D2 + rng.integers(-size // 20, size // 20 + 1, starts_D2.shape)
    for start, end in zip(starts_D2.tolist(), ends_D2.tolist(), strict=True):
        cv2.line(canvas, start, end, colour, max(1, size // 128), cv2.LINE_AA)


_TEXTURES: tuple[Callable[[np.random.Generator, np.ndarray, list[float]], None], ...] = (
    _stripes,
    _dots,
    _scribbles,
    _dashes,
)


def _degrade(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Adds a slight blur and noise."""
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.8))
    noise = int(rng.integers(1, 9))
    return cv2.add(image, rng.integers(-noise, noise + 1, image.shape, np.int8).astype(np.int16), dtype=cv2.CV_8U)


def _gradient(colours: list[np.ndarray], weights_GG: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth gradient between two colours: a small grid of mixtures, enlarged."""
    mixture_GG3 = colours[0] + weights_GG[..., None] * (colours[1] - colours[0])
    grid_GG3 = np.clip(np.rint(mixture_GG3), 0, 255).astype(np.uint8)
    return cv2.resize(grid_GG3, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> Float[np.ndarray, '3']:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return 255 * np.array(rgb)


def _on_circle(corners: int, radii: tuple[float, ...] = (1.0,), start: float = 0.0) -> np.ndarray:
    """[P, 2] points at equal angles, with the radii in turn."""
    angles_P = start + np.arange(corners) * (2 * math.pi / corners)
    radii_P = np.resize(radii, corners)[:, None]
    return radii_P * np.stack([np.cos(angles_P), np.sin(angles_P)], 1)


# Outlines of radius 1, in the order of CLASS_NAMES.
_OUTLINES = (
    (_on_circle(64),),
    (_on_circle(4, start=math.pi / 4),),
    (_on_circle(3),),
    (_on_circle(10, (1.0, 0.42)),),
    (_on_circle(64), _on_circle(64, (0.52,))),
)
