"""Several training pictures become one. Partners come from the four pictures of a group.

A group is four neighbours in the *global* batch, so who meets whom does not depend on the number of devices: a device
with a multiple of four pictures has whole groups, one with one or two asks its neighbours for the rest of theirs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.errors import UserError
from effdet_jax.training.augmentations.color import to_uint8
from effdet_jax.training.augmentations.geometry import Fill, interpolate
from effdet_jax.training.augmentations.sample import Sample, cut, inside, largest

GROUP = 4  # a mosaic's pictures


def with_partners(samples: Sample, axis: str | None) -> tuple[Sample, Int[Array, 'B']]:
    """([P, ...] pictures in whole groups, place of each of this device's B pictures among them).

    Groups begin at every fourth place. `axis`: the mapped axis of devices, each of which has as many pictures.

    Raises:
      UserError: where the groups cannot be made.
    """
    batch = len(samples.image)
    devices = jax.lax.axis_size(axis) if axis else 1
    if batch % GROUP == 0:
        return samples, jnp.arange(batch)
    if GROUP % batch or batch * devices % GROUP:
        raise UserError(
            f'mosaic and mixup need groups of {GROUP} images, but each of {devices} devices has {batch}: choose a '
            f'config.train.batch_size that gives each a multiple of {GROUP}, or 1 or 2 and {GROUP} together'
        )
    neighbours = GROUP // batch
    groups = [list(range(first, first + neighbours)) for first in range(0, devices, neighbours)]
    pool = jax.lax.all_gather(samples, axis, axis_index_groups=groups, tiled=True)
    return pool, jax.lax.axis_index(axis) % neighbours * batch + jnp.arange(batch)


def mosaic(key: Array, pool: Sample, place: Int[Array, '']) -> Sample:
    """The four pictures of a group in the four quarters around a random point (Bochkovskiy et al. 2020, YOLOv4).

    The point lies in the middle half of the input, which is filled: no padding is left. Each picture is halved, or
    scaled so that it covers its quarter where half is not enough, and shows a random part of itself. Boxes are cut at
    their quarter and dropped by the rule of `cut`; of more than M the M largest are kept.
    """
    height, width = pool.image.shape[1:3]
    of_order, of_centre, of_part = jax.random.split(key, 3)
    members_4 = place // GROUP * GROUP + jax.random.permutation(of_order, GROUP)
    canvas_2 = jnp.array([height, width], jnp.float32)
    centre_2 = jnp.round(canvas_2 * jax.random.uniform(of_centre, (2,), minval=0.25, maxval=0.75))
    rows_4, columns_4 = jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
    bounds_32 = jnp.stack([jnp.zeros(2), centre_2, canvas_2])
    cells_44 = jnp.stack(  # yxyx
        [bounds_32[rows_4, 0], bounds_32[columns_4, 1], bounds_32[rows_4 + 1, 0], bounds_32[columns_4 + 1, 1]], axis=-1
    )
    sizes_42 = pool.valid_size[members_4]
    factors_4 = jnp.maximum(((cells_44[:, 2:] - cells_44[:, :2]) / sizes_42).max(axis=-1), 0.5)
    spare_42 = jnp.maximum(sizes_42 * factors_4[:, None] - (cells_44[:, 2:] - cells_44[:, :2]), 0)
    shifts_42 = cells_44[:, :2] - jnp.floor(spare_42 * jax.random.uniform(of_part, (4, 2)))

    y_H1, x_W = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
    cell_HW = 2 * (y_H1 > centre_2[0]) + (x_W > centre_2[1])
    y_HW = (y_H1 - shifts_42[cell_HW, 0]) / factors_4[cell_HW]
    x_HW = (x_W - shifts_42[cell_HW, 1]) / factors_4[cell_HW]
    starts_4 = members_4 * (height * width)
    image = interpolate(pool.image.reshape(-1, 3), starts_4[cell_HW], width, y_HW, x_HW, sizes_42[cell_HW])

    boxes_4M4 = pool.boxes[members_4] * factors_4[:, None, None] + jnp.tile(shifts_42, 2)[:, None]
    boxes_4M4, labels_4M = cut(boxes_4M4, pool.labels[members_4], cells_44[:, None])
    boxes, labels = largest(boxes_4M4.reshape(-1, 4), labels_4M.reshape(-1), most=pool.labels.shape[1])
    return Sample(image, boxes, labels, canvas_2.astype(pool.valid_size.dtype))


def mixup(key: Array, pool: Sample, place: Int[Array, ''], alpha: float, fill: Fill) -> Sample:
    """share * picture + (1 - share) * another of the group, share from Beta(alpha, alpha).

    The result is as high and as wide as the larger of the two; what one of them does not reach shows `fill` in its
    place. The boxes of both are kept, the M largest of them; all weigh the same. Zhang et al. 2019 ("Bag of Freebies
    for Training Object Detection Neural Networks") count an object as much as its picture is visible, with alpha 1.5;
    a loss without weights wants an alpha at which both can be seen.
    """
    of_partner, of_share = jax.random.split(key)
    other = place // GROUP * GROUP + (place + jax.random.randint(of_partner, (), 1, GROUP)) % GROUP
    a, b = (Sample(*(field[index] for field in pool)) for index in (place, other))
    share = jax.random.beta(of_share, alpha, alpha)
    image = to_uint8(share * _on_fill(a, fill) + (1 - share) * _on_fill(b, fill))
    boxes, labels = largest(
        jnp.concatenate([a.boxes, b.boxes]), jnp.concatenate([a.labels, b.labels]), most=len(a.labels)
    )
    return Sample(image, boxes, labels, jnp.maximum(a.valid_size, b.valid_size))


def _on_fill(sample: Sample, fill: Fill) -> Float[Array, 'H W 3']:
    return jnp.where(inside(sample), sample.image, jnp.asarray(fill, jnp.uint8)).astype(jnp.float32)
