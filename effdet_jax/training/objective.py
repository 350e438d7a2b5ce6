"""What a step minimizes, before L2: the losses of a batch and, with `config.adversarial`, of attacked images."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effdet_jax.detection import assignment, losses, preprocess
from effdet_jax.model import EfficientDet
from effdet_jax.model.efficientdet import Outputs
from effdet_jax.training import adversarial

Metrics = dict[str, jax.Array]


class Examples(NamedTuple):
    """A batch, or a part of one (gradient accumulation), with its targets."""

    pixels: jax.Array  # uint8 [B, H, W, 3]
    valid_size: jax.Array  # int32 [B, 2]
    targets: assignment.Targets


class Losses(NamedTuple):
    """Divided by the normalizer; scalars, or [B] with one value per image."""

    of_class: jax.Array
    of_box: jax.Array  # weighted
    metrics: Metrics  # the single losses, not weighted

    @property
    def total(self) -> jax.Array:
        return self.of_class + self.of_box


def make_objective(config: Any, model: EfficientDet, anchors_N4: Any) -> Callable:
    """`objective(params, batch_stats, examples, normalizer, key) -> (loss, (batch statistics, metrics))`.

    It is written for one device of the mapped axis `model.axis_name`. Losses and metrics are this part's share: their
    sum over parts and devices is that of the batch.
    """
    mean, std, padding = config.image.mean, config.image.std, config.image.padding
    parts = config.train.gradient_accumulation_steps
    weight, epsilon = config.adversarial.weight, config.adversarial.epsilon
    losses_of = make_losses(config, anchors_N4)

    def normalize(pixels: jax.Array, valid_size: jax.Array) -> jax.Array:
        return preprocess.normalize(pixels, valid_size, mean, std, padding)

    def forward(params: Any, batch_stats: Any, images: jax.Array, key: Any) -> tuple[Outputs, Any]:
        variables = {'params': params, 'batch_stats': batch_stats}
        outputs, updates = model.apply(
            variables, images, train=True, mutable=['batch_stats'], rngs={'stochastic_depth': key}
        )
        return outputs, updates['batch_stats']

    def plain(
        params: Any, batch_stats: Any, examples: Examples, normalizer: jax.Array, key: Any
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        images = normalize(examples.pixels, examples.valid_size)
        outputs, new_stats = forward(params, batch_stats, images, key)
        batch_losses = losses_of(outputs, examples.targets, normalizer)
        return batch_losses.total, (new_stats, batch_losses.metrics | {'loss': batch_losses.total})

    def with_attack(
        params: Any, batch_stats: Any, examples: Examples, normalizer: jax.Array, key: Any
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        pixels, valid_size, targets = examples
        main = adversarial.main(params), adversarial.main(batch_stats)
        auxiliary = adversarial.auxiliary(params), adversarial.auxiliary(batch_stats)
        fixed = jax.lax.stop_gradient(auxiliary)  # no gradient flows through the attack

        def losses_at(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            # The same key as below, so the same blocks are dropped: the attacked network is the one that learns.
            per_image = losses_of(forward(*fixed, images, key)[0], targets, normalizer, per_image=True)
            return per_image.of_class, per_image.of_box

        images, class_won_B = adversarial.attack(losses_at, partial(normalize, valid_size=valid_size), pixels, epsilon)
        outputs, auxiliary_stats = forward(*auxiliary, images, key)
        attacked = losses_of(outputs, targets, normalizer).total
        loss, (main_stats, metrics) = plain(*main, examples, normalizer, key)
        shares = parts * (jax.lax.axis_size(model.axis_name) if model.axis_name else 1)
        metrics |= {'adversarial_loss': attacked, 'class_attacks': class_won_B.mean() / shares}
        loss += weight * attacked
        return loss, (adversarial.joined(main_stats, auxiliary_stats), metrics | {'loss': loss})

    return with_attack if weight else plain


def make_losses(config: Any, anchors_N4: Any) -> Callable[..., Losses]:
    """Returns `losses_of(outputs, targets, normalizer, per_image=False)`: sums over the batch, or over each image."""
    c = config.loss
    focal = dict(alpha=c.alpha, gamma=c.gamma, label_smoothing=c.label_smoothing)
    delta, box_weight, iou_kind, iou_weight = c.delta, c.box_weight, c.iou_kind, c.iou_weight

    def losses_of(
        outputs: Outputs, targets: assignment.Targets, normalizer: jax.Array, per_image: bool = False
    ) -> Losses:
        def summed(x: jax.Array) -> jax.Array:
            return x.sum(range(1, x.ndim)) if per_image else x.sum()

        class_loss = summed(losses.focal_loss(outputs.class_logits, targets.classes, **focal)) / normalizer
        box_loss = summed(losses.huber_loss(outputs.box_regressions, targets.regressions, delta)) / (4 * normalizer)
        metrics, of_box = {'class_loss': class_loss, 'box_loss': box_loss}, box_weight * box_loss
        if iou_kind:
            penalty_BN = losses.iou_loss(
                outputs.box_regressions, targets.regressions, jnp.asarray(anchors_N4), iou_kind
            )
            metrics['iou_loss'] = summed(penalty_BN) / (4 * normalizer)  # divided by the 4 coordinates, as officially
            of_box += iou_weight * metrics['iou_loss']
        return Losses(class_loss, of_box, metrics)

    return losses_of
