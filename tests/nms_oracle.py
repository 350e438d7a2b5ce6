"""Non-maximum suppression as one would write it on a blackboard, and boxes to try it on."""

import numpy as np


def slow_nms(boxes, scores, classes, kind, iou_threshold=0.5, sigma=0.5, score_threshold=0.001, max_outputs=100):
    """A loop over lists, in float64: what `detection.nms` selects, places left over filled with (-1, 0)."""
    left = {i: float(score) for i, score in enumerate(scores)}
    kept = []
    while left and len(kept) < max_outputs:
        best = max(left, key=lambda i: (left[i], -i))
        score = left.pop(best)
        if not score > score_threshold:
            break
        kept.append((best, score))
        for i in [i for i in left if classes[i] == classes[best]]:
            iou = overlap(boxes[i], boxes[best])
            if kind == 'gaussian':
                left[i] *= np.exp(-(iou**2) / sigma)
            elif iou > iou_threshold:
                del left[i]
    kept += [(-1, 0.0)] * (max_outputs - len(kept))
    indices, scores = zip(*kept, strict=True)
    return np.array(indices), np.array(scores)


def random_boxes(rng, count, extent=20):
    corners = rng.integers(0, extent, (count, 2))
    return np.concatenate([corners, corners + rng.integers(1, extent, (count, 2))], axis=1).astype(np.float32)


def overlap(a, b):
    height, width = (max(min(a[2 + i], b[2 + i]) - max(a[i], b[i]), 0.0) for i in range(2))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return height * width / (sum(areas) - height * width) if height * width > 0 else 0.0
