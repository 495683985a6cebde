"""What the trainings of a model's copies showed, as the detectors of causes need it."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.coupling import couples
from gradient_accumulator_tf.cycle.loss_recorder import call_and_keep_values
from gradient_accumulator_tf.equivalence.ways import Way
from gradient_accumulator_tf.models.accumulate import GradientAccumulateModel


class Losses(NamedTuple):
    """What is known of the compiled losses.

    Attributes:
        whole: Names of those whose own function returns one number for a whole batch.
        coupled: Dict of the names of others that are known to look across the examples, and of what
            each does.
    """

    whole: tuple[str, ...]
    coupled: dict[str, str]


class Evidence(NamedTuple):
    """What is known of a model whose accumulated training differs from the large batches'.

    Attributes:
        model: The checked model.
        way: The `Way` in which it accumulates.
        random: Paths of the layers whose random states moved.
        by_order: Whether the large batch ends elsewhere with its examples in another order.
        updates_per_batch: Number of updates that the large batches' training made for each.
        weighted: Whether there are sample weights.
        moved: Variables of the model that moved. With a `train_step` of its own: in the first
            micro-batch of a cycle, where none should. Otherwise: in the large batches' training.
        losses: The `Losses` that the model was compiled with.
        better_reduction: "sum" or "mean" if the optimizer equals the large batch with it, and not
            with its own reduction; else None.
        loss_vector: Shape, as text, of a target with several elements that the training asked the
            gradient of; or None.
        repeats: Whether the large batches' training, made again, ended in the same weights.
        repeated_rows: As of `Trials`.
        coupled_is_equal: Whether it was found to equal the large batch with `coupled_loss=True`.
    """

    model: Any
    way: Way
    random: tuple[str, ...]
    by_order: bool
    updates_per_batch: float
    weighted: bool
    moved: list[Any]
    losses: Losses
    better_reduction: str | None
    loss_vector: str | None
    repeats: bool
    repeated_rows: tuple[str, ...] = ()
    coupled_is_equal: bool = False

    @property
    def layers(self) -> list[tuple[str, Any]]:
        """Pairs (path, layer) of all layers in the model."""
        return list(layers_by_path(self.model))

    @property
    def has_own_loss(self) -> bool:
        """Whether the model computes its loss by itself."""
        return type(self.model).compute_loss not in (
            keras.Model.compute_loss,
            GradientAccumulateModel.compute_loss,
        )


def layers_by_path(layer, path=None):
    """Pairs (path, layer) of all layers in a model, a shared one once for each of its paths."""
    for inner in _keras.sublayers(layer):
        inner_path = inner.name if path is None else f"{path}/{inner.name}"
        yield inner_path, inner
        yield from layers_by_path(inner, inner_path)


def random_layers(model, moved):
    """Paths of the layers whose random states are among the variables that training moved."""
    moved = {id(v) for v in moved}

    def states(layer):
        weights = {id(v) for v in layer.non_trainable_weights}
        return {id(v) for v in layer.non_trainable_variables} - weights

    return tuple(
        path
        for path, layer in layers_by_path(model)
        if moved & states(layer) - set().union(*(states(v) for v in _keras.sublayers(layer)))
    )


def compiled_losses(model: Any, batch: tuple) -> Losses:
    """Runs each compiled loss on a batch.

    Args:
        model: A model that was trained.
        batch: `(x, y, sample_weight)` for it.
    """
    whole, coupled = [], {}

    def replace(loss):
        def seen(y_true, y_pred, sample_weight=None):
            value, values = call_and_keep_values(loss, y_true, y_pred, sample_weight)
            rank = tf.nest.flatten(y_pred)[0].shape.rank
            reason = couples(loss, rank)
            if reason is not None:
                coupled[loss.name] = reason
            elif values is not None and values.shape.rank == 0:
                whole.append(loss.name)
            return value

        return seen

    x, y, sample_weight = batch
    try:
        y_pred = model.predict(x, verbose=0)
        y_pred = tf.nest.map_structure(tf.convert_to_tensor, y_pred)
        with _keras.replaced_losses(model, replace):
            _keras.compute_loss(model, x, y, y_pred, sample_weight)
    except Exception:  # a model that trains may do neither of the two by itself
        pass
    return Losses(tuple(whole), coupled)
