"""Postprocessing in NumPy (docs/reference.md, Postprocessing): one image, one class at a time, in float64."""

import cv2
import numpy as np

MEAN, STD = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
PAIRS = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))  # width and height of the anchors that effdet has
CANDIDATES, MAX_DETECTIONS = 5000, 100


def network_input(image, size):
    """(float32 [1, size, size, 3], (height, width) of the picture in it, factor back to the original)."""
    scale = min(size / image.shape[0], size / image.shape[1])
    height, width = int(image.shape[0] * scale), int(image.shape[1] * scale)
    picture = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    padded = np.zeros((1, size, size, 3), np.float32)  # after normalising: the mean colour
    padded[0, :height, :width] = (picture - MEAN) / STD
    return padded, (height, width), 1 / scale


def anchors(size, scale=4.0):
    """[N, 4]: centre y, centre x, height, width; by level, y, x, octave, ratio."""
    rows = []
    for stride in (8, 16, 32, 64, 128):
        for y in range(size // stride):
            for x in range(size // stride):
                for octave in range(3):
                    side = scale * stride * 2 ** (octave / 3)
                    rows += [((y + 0.5) * stride, (x + 0.5) * stride, side * h, side * w) for w, h in PAIRS]
    return np.array(rows)


def detect(class_logits_NK, regressions_N4, anchors_N4, picture_hw, to_original, nms):
    """(boxes xyxy in original pixels, scores, labels), best first; `nms` is `hard` or `gaussian`.

    Boxes that lie beside the picture are no candidates; the others are cut at its edges once NMS is done.
    """
    num_classes = class_logits_NK.shape[1]
    flat = class_logits_NK.astype(np.float64).ravel()
    pairs = np.argsort(-flat, kind='stable')[:CANDIDATES]
    scores, labels = 1 / (1 + np.exp(-flat[pairs])), pairs % num_classes
    ty, tx, th, tw = regressions_N4[pairs // num_classes].astype(np.float64).T
    ya, xa, ha, wa = anchors_N4[pairs // num_classes].T
    y, x, h, w = ty * ha + ya, tx * wa + xa, np.exp(th) * ha, np.exp(tw) * wa
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    edges = np.array([picture_hw[1], picture_hw[0]] * 2)
    cut = np.clip(boxes, 0, edges)
    inside = np.all(cut[:, 2:] > cut[:, :2], axis=1)

    found = []
    for label in range(num_classes):
        (of_class,) = np.nonzero(inside & (labels == label))
        found += [(score, of_class[i], label) for i, score in nms(boxes[of_class], scores[of_class])]
    found = sorted(found, key=lambda row: -row[0])[:MAX_DETECTIONS]
    kept_scores, indices, kept_labels = (np.array(column) for column in zip(*found, strict=True))
    return cut[indices] * to_original, kept_scores, kept_labels


def hard(boxes, scores, threshold=0.5):
    """[(index, score)]: no two boxes with an IoU above the threshold."""
    kept = []
    for i in np.argsort(-scores, kind='stable'):
        if all(_iou(boxes[i], boxes[j]) <= threshold for j, _ in kept):
            kept.append((i, scores[i]))
    return kept


def gaussian(boxes, scores, sigma=0.5, threshold=0.001):
    """[(index, decayed score)]: every box kept weakens those that overlap it."""
    left, kept = scores.copy(), []
    while len(kept) < MAX_DETECTIONS and len(left) and left.max() > threshold:
        best = int(left.argmax())
        kept.append((best, left[best]))
        left = left * np.exp([-(_iou(boxes[best], box) ** 2) / sigma for box in boxes])
        left[best] = -np.inf
        left[[i for i, _ in kept]] = -np.inf
    return kept


def _iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
