"""Mosaic and MixUp: several training images become one. The partners are the four images of a group.

A group is four neighbours in the *global* batch, so the partners do not depend on the number of devices. A device with
a multiple of four images holds whole groups; one with one or two images gathers the rest of its group from its
neighbours, never the whole batch. The price: a batch must be divisible into groups, and the four mosaics of a group
show the same images.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effdet_jax.errors import UserError
from effdet_jax.training.augmentations.color import to_uint8
from effdet_jax.training.augmentations.geometry import Fill, interpolate
from effdet_jax.training.augmentations.sample import Sample, cut, inside, largest

GROUP = 4  # images of a mosaic


def with_partners(samples: Sample, axis: str | None) -> tuple[Sample, Int[Array, 'B']]:
    """Returns (P images in whole groups, the place of each of this device's B images among them).

    Groups begin at every fourth place. `axis` is the mapped axis of devices.

    Raises:
      UserError: if the batch cannot be divided into groups.
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
    """Puts the four images of a group into the four quarters around a random point (Bochkovskiy et al. 2020, YOLOv4).

    The point lies in the middle half of the input, and no padding is left. Each image is halved, or scaled to cover its
    quarter where half is too small, and a random part of it is shown. Boxes are clipped to their quarter and dropped by
    the rule of `cut`; the M largest are kept.
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
    """share * image + (1 - share) * another image of the group, with share from Beta(alpha, alpha).

    The result has the larger height and width of the two; where one image does not reach, `fill` takes its place. The
    M largest boxes of both are kept, all with weight 1, because the loss has no weights. (Zhang et al. 2019, "Bag of
    Freebies for Training Object Detection Neural Networks", weight an object by the share of its image, with alpha
    1.5.) So choose an alpha with which both images stay visible.
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
