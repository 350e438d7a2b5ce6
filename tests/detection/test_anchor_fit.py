"""k-means on IoU finds the anchors that boxes were made with."""

import numpy as np
import pytest

from effdet_jax import inspection
from effdet_jax.commands.plan import anchor_report
from effdet_jax.configs import default
from effdet_jax.detection import anchor_fit
from effdet_jax.detection.anchor_fit import Anchors

STRIDES = tuple((2.0**level, 2.0**level) for level in range(3, 8))
MADE_WITH = Anchors(2.5, (0.4, 1.0, 2.2))


def sides_of(anchors, octaves=3):
    """(height, width) of all anchors, row by row."""
    sizes = [anchors.scale * stride * 2 ** (octave / octaves) for stride, _ in STRIDES for octave in range(octaves)]
    return np.array([(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in anchors.aspect_ratios])


def test_anchors_that_fit_exactly_stay():
    assert anchor_fit.fit(sides_of(MADE_WITH), STRIDES, 3, MADE_WITH) == MADE_WITH


@pytest.mark.parametrize('start', [Anchors(2.3, (0.5, 1.0, 2.0)), Anchors(2.8, (0.3, 0.9, 1.9))])
def test_anchors_that_boxes_were_made_with_are_found(start):
    noise = np.random.default_rng(0).normal(0, 0.02, (20, 45, 2))
    sides = (sides_of(MADE_WITH) * np.exp(noise)).reshape(-1, 2)
    found = anchor_fit.fit(sides, STRIDES, 3, start)
    assert found.scale == pytest.approx(MADE_WITH.scale, rel=0.02)
    assert found.aspect_ratios == pytest.approx(MADE_WITH.aspect_ratios, rel=0.02)


def test_a_ratio_that_no_box_is_nearest_to_stays():
    squares = sides_of(Anchors(2.5, (1.0,)))
    assert anchor_fit.fit(squares, STRIDES, 3, Anchors(2.5, (1.0, 9.0))).aspect_ratios == (1.0, 9.0)


def test_the_proposal_fits_narrow_boxes_that_the_usual_anchors_do_not():
    config = default.get_config('d0')
    rng = np.random.default_rng(1)
    height, center = rng.uniform(40, 200, (300, 1)), rng.uniform(150, 350, (300, 2))
    sides = np.concatenate([height, height / 4.5], axis=1)
    boxes = np.concatenate([center - sides / 2, center + sides / 2], axis=1).astype(np.float32)
    assert (inspection.best_ious(config)(boxes) >= 0.5).mean() < 0.5
    proposed = anchor_report.propose(config, boxes)
    assert (inspection.best_ious(config, **proposed._asdict())(boxes) >= 0.5).mean() > 0.95
    assert min(proposed.aspect_ratios) == pytest.approx(1 / 4.5, rel=0.2)
