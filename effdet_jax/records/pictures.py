"""Pictures of boxes for README, TensorBoard and folders: RGB uint8 arrays in, RGB uint8 arrays out."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from effdet_jax.errors import UserError
from effdet_jax.records.files import replacing

# The colour-blind safe palette of Okabe and Ito; further classes get darker and lighter shades.
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (0, 114, 178), (213, 94, 0))
SHADES = ((0, 0.0), (0, 0.45), (255, 0.5))  # (grey to blend with, its share)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
MIN_LONG_SIDE = 640  # smaller images are enlarged, to make the text readable
GAP = 12  # pixels between the pictures of a grid


class _Tag(NamedTuple):
    text: str
    color: tuple[int, int, int]
    box_xyxy: np.ndarray


def draw_boxes(
    image: UInt8[np.ndarray, 'H W 3'],
    boxes_xyxy: Float[np.ndarray, 'N 4'],
    labels: Int[np.ndarray, 'N'],
    names: Sequence[str],
    scores: Float[np.ndarray, 'N'] | None = None,
    *,
    enlarge: bool = True,
) -> UInt8[np.ndarray, 'H2 W2 3']:
    """A copy of the RGB image with every box, the name of its class and its score.

    A class has the same colour in every picture. Boxes are in pixels of `image`. An image whose longer side is below
    640 pixels is enlarged unless `enlarge` is False, as for video frames. Boxes with the best scores are drawn on top,
    and their tags are placed first.
    """
    factor = max(1.0, MIN_LONG_SIDE / max(image.shape[:2])) if enlarge else 1.0
    canvas = (
        cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1 else image.copy()
    )
    width, font_size = _line_width(canvas), _font_size(canvas)
    limits_4 = np.array(canvas.shape[1::-1] * 2) - 1
    corners_N4 = np.clip(np.round(boxes_xyxy * factor), 0, limits_4).astype(int)
    tags: list[_Tag] = []
    for n in range(len(labels)) if scores is None else np.argsort(scores, kind='stable'):
        label, score = int(labels[n]), '' if scores is None else f' {scores[n]:.2f}'
        tags.append(_Tag(names[label] + score, class_color(label), corners_N4[n]))
    rims = canvas.copy()
    for tag in tags:
        _draw_frame(rims, tag.box_xyxy, BLACK, width + 2)
    canvas = cv2.addWeighted(canvas, 0.4, rims, 0.6, 0)  # a dark rim shows a line on any background
    for tag in tags:
        _draw_frame(canvas, tag.box_xyxy, tag.color, width)
    _draw_tags(canvas, tags, width, font_size)
    return canvas


def detections_beside_truth(
    image: UInt8[np.ndarray, 'H W 3'],
    truth_boxes_xyxy: Float[np.ndarray, 'M 4'],
    truth_labels: Int[np.ndarray, 'M'],
    boxes_xyxy: Float[np.ndarray, 'N 4'],
    labels: Int[np.ndarray, 'N'],
    scores: Float[np.ndarray, 'N'],
    names: Sequence[str],
    min_score: float = 0.3,
) -> UInt8[np.ndarray, 'H2 W2 3']:
    """Ground truth on the left, detections of at least `min_score` on the right; boxes in pixels of the RGB image."""
    shown_N = scores >= min_score
    right = draw_boxes(image, boxes_xyxy[shown_N], labels[shown_N], names, scores[shown_N])
    captions = f'Ground truth: {len(truth_labels)}', f'Detected with a score of {min_score:g} or more: {shown_N.sum()}'
    return side_by_side(draw_boxes(image, truth_boxes_xyxy, truth_labels, names), right, captions)


def side_by_side(
    left: UInt8[np.ndarray, 'H1 W1 3'], right: UInt8[np.ndarray, 'H2 W2 3'], captions: tuple[str, str]
) -> UInt8[np.ndarray, 'H W 3']:
    """Two RGB pictures in a row, each under its caption."""
    return grid([_with_caption(left, captions[0]), _with_caption(right, captions[1])], columns=2)


def grid(images: Sequence[UInt8[np.ndarray, '_ _ 3']], columns: int) -> UInt8[np.ndarray, 'H W 3']:
    """At least one RGB picture in rows of `columns`, on white, in tiles of the largest height and width."""
    height, width = np.max([image.shape[:2] for image in images], axis=0)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def write_image(path: Path, rgb: UInt8[np.ndarray, 'H W 3']) -> None:
    """Writes a PNG, JPEG or WebP, by the suffix of `path`, atomically. Creates parent folders.

    Raises:
        UserError: for another suffix.
    """
    if path.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
        raise UserError(f'{path}: cannot write a picture of this type: choose a name that ends in .png, .jpg or .webp')
    _, content = cv2.imencode(path.suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    with replacing(path) as temporary:
        temporary.write_bytes(content.tobytes())


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class; 21 colours, then they repeat."""
    grey, amount = SHADES[label // len(PALETTE) % len(SHADES)]
    red, green, blue = (round((1 - amount) * channel + amount * grey) for channel in PALETTE[label % len(PALETTE)])
    return red, green, blue


def _draw_frame(canvas: np.ndarray, box_xyxy: np.ndarray, color: tuple[int, int, int], width: int) -> None:
    x1, y1, x2, y2 = box_xyxy.tolist()
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, width, cv2.LINE_AA)


def _draw_tags(canvas: np.ndarray, tags: Sequence[_Tag], line_width: int, font_size: int) -> None:
    """Draws a filled tag at every box; the last tags are placed first and drawn on top."""
    sizes = [(_text_width(tag.text, font_size) + font_size // 2, round(1.3 * font_size)) for tag in tags]
    places: list[np.ndarray] = []
    for tag, size in zip(reversed(tags), reversed(sizes), strict=True):
        places.append(_free_place(tag.box_xyxy, size, line_width, canvas.shape, places))
    for tag, place in zip(tags, reversed(places), strict=True):
        x1, y1, x2, y2 = place.tolist()
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), tag.color, cv2.FILLED)
        _write(canvas, tag.text, (x1 + font_size // 4, y2 - round(0.3 * font_size)), _ink_on(tag.color), font_size)


def _free_place(
    box_xyxy: np.ndarray, size: tuple[int, int], line_width: int, shape: tuple[int, ...], taken: Sequence[np.ndarray]
) -> np.ndarray:
    """The place (xyxy) above, below or inside the box, but within the image, where a tag covers other tags least."""
    (width, height), (x1, y1, x2, y2), edge = size, box_xyxy.tolist(), line_width // 2 + 1
    left, right = x1 - edge, x2 + edge + 1 - width
    above, top, bottom, below = y1 - height, y1 - edge, y2 + edge + 1 - height, y2 + 1
    candidates = [(x, y) for y in (above, below, top, bottom) for x in (left, right)]
    room = np.maximum([shape[1] - width, shape[0] - height], 0)
    corners_C2 = np.clip(candidates, 0, room)
    places_C4 = np.concatenate([corners_C2, corners_C2 + size], axis=1)
    hidden_C = sum((_overlap(places_C4, other) for other in taken), np.zeros(len(places_C4)))
    return places_C4[hidden_C.argmin()]


def _overlap(boxes_C4: np.ndarray, box_4: np.ndarray) -> np.ndarray:
    sides_C2 = np.minimum(boxes_C4[:, 2:], box_4[2:]) - np.maximum(boxes_C4[:, :2], box_4[:2])
    return np.maximum(sides_C2, 0).prod(axis=1)


def _with_caption(image: np.ndarray, caption: str) -> np.ndarray:
    font_size = round(1.3 * _font_size(image))
    while font_size > 8 and _text_width(caption, font_size) > image.shape[1]:
        font_size -= 1
    strip = np.full((2 * font_size, image.shape[1], 3), 255, np.uint8)
    _write(strip, caption, (0, round(1.35 * font_size)), BLACK, font_size)
    return np.concatenate([strip, image])


def _line_width(image: np.ndarray) -> int:
    return max(2, round(max(image.shape[:2]) / 400))


def _font_size(image: np.ndarray) -> int:
    return max(14, round(max(image.shape[:2]) / 46))


def _text_width(text: str, font_size: int) -> int:
    return cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace('sans'), font_size, weight=500)[2]


def _write(image: np.ndarray, text: str, baseline_xy: tuple[int, int], color: tuple[int, int, int], size: int) -> None:
    cv2.putText(image, text, baseline_xy, color, cv2.FontFace('sans'), size, weight=500)


def _ink_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast by WCAG 2's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in color)]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return BLACK if luminance > 0.179 else WHITE
