"""What stands in for a part of Keras within a context, on one object, and is gone after it."""

import contextlib
import functools

import keras
import tensorflow as tf

from gradient_accumulator_tf._installation import _version_tuple
from gradient_accumulator_tf._keras.names import (
    all_layers,
    assign_on_replica,
    innermost,
    replica_local,
)


@contextlib.contextmanager
def replaced_losses(model, replace):
    """Puts `replace(loss)` in place of each of the model's compiled losses.

    The metrics that Keras keeps per output are left alone meanwhile: they are to be told the
    effective batch's loss, not a micro-batch's. `CompileLoss._flat_losses` and `_metrics`
    (Keras 3.8 to 3.15); the model must be built for training. Yields the number of losses, which
    is 0 where a `compute_loss` of the model's own calls none of them.
    """
    compiled = model._compile_loss
    if compiled is None or compiled._flat_losses is None:
        yield 0
        return
    losses, metrics = compiled._flat_losses, list(compiled._metrics)
    compiled._flat_losses = [entry._replace(loss=replace(entry.loss)) for entry in losses]
    compiled._metrics[:] = [_SilentMetric() for _ in metrics]
    try:
        yield len(losses)
    finally:
        compiled._flat_losses = losses
        compiled._metrics[:] = metrics


@contextlib.contextmanager
def replaced_added_losses(model, replace):
    """Puts `replace(loss, value)` in place of what Keras makes of a loss given to `add_loss`.

    `loss` is that tensor, of any rank but 0, and `value` the sum that Keras adds to the total.
    Regularisers of weights are left alone, which are among `model.losses` and may have a rank too.
    `Trainer._aggregate_additional_loss` and `Layer._get_own_losses` (Keras 3.8 to 3.15).
    """
    aggregate = model._aggregate_additional_loss

    def replaced(loss):
        value = aggregate(loss)
        if loss.shape.rank == 0:
            return value
        added = any(loss is own for layer in all_layers(model) for own in layer._get_own_losses())
        return replace(loss, value) if added else value

    vars(model)["_aggregate_additional_loss"] = replaced
    try:
        yield
    finally:
        del vars(model)["_aggregate_additional_loss"]


@contextlib.contextmanager
def activity_regularizers_by_rank(model):
    """Within this context an activity regulariser's loss tells by its rank how it counts.

    `Layer.__call__` divides it by the number of examples in Keras 3.14 and 3.15: it is a mean, and
    a scalar here. It does not in Keras 3.8 to 3.13: it is a sum, and has one dimension here, as
    what `add_loss` adds up. The regulariser itself may return any rank. Each replica enters.
    """
    layers = [v for v in all_layers(model) if vars(v).get("activity_regularizer") is not None]
    for layer in layers:
        if not isinstance(layer.activity_regularizer, _ActivityRegularizer):
            wrapped = _ActivityRegularizer(layer.activity_regularizer)
            vars(layer)["activity_regularizer"] = wrapped
        layer.activity_regularizer.entered += 1
    try:
        yield
    finally:
        for layer in layers:
            wrapped = layer.activity_regularizer
            wrapped.entered -= 1
            if not wrapped.entered:
                vars(layer)["activity_regularizer"] = wrapped.regularizer


class _ActivityRegularizer:
    def __init__(self, regularizer):
        self.regularizer, self.entered = regularizer, 0

    def __call__(self, outputs):
        loss = keras.ops.sum(self.regularizer(outputs))
        divided = _version_tuple(keras.__version__) >= (3, 14)
        return loss if divided else keras.ops.reshape(loss, (1,))


class _SilentMetric:
    def update_state(self, *args, **kwargs):
        pass


@contextlib.contextmanager
def replicas_agree(optimizer):
    """Within this context `optimizer` updates every replica alike, without a word between them.

    To be entered on each replica, with gradients that are already summed over replicas. Three
    things that Keras 3.8 to 3.15 does then are in the way, the last two on a single replica too:

    - It sums the gradients over replicas after it clipped each replica's
      (`Optimizer._all_reduce_sum_gradients`): clipnorm=1 on two replicas lets a norm of 2 through.
    - It tells all replicas of replica 0's `iterations`, in a merge call, which TensorFlow does
      not take in a conditional on a replica (where `replicas_need_no_merge_call`).
    - It overwrites weights with their moving average in a merge call within a conditional
      (`Optimizer._overwrite_model_variables_with_average_value`).
    """
    if not tf.distribute.has_strategy():
        yield
        return
    optimizer = innermost(optimizer)
    changed = []
    for o in [optimizer, *getattr(optimizer, "optimizers", [])]:
        changed.append((o.__dict__, "_all_reduce_sum_gradients", list))
        overwrite = functools.partial(_overwrite_with_average, o)
        changed.append((o.__dict__, "_overwrite_model_variables_with_average_value", overwrite))
        assign = functools.partial(assign_on_replica, o._iterations)
        changed.append((o._iterations.__dict__, "_direct_assign", assign))
    # Every replica's thread enters, and the first to leave must not undo it for the others.
    for attributes, name, value in changed:
        attributes[name] = value
        attributes[f"{name}_entered"] = attributes.get(f"{name}_entered", 0) + 1
    try:
        yield
    finally:
        for attributes, name, _ in changed:
            attributes[f"{name}_entered"] -= 1
            if not attributes[f"{name}_entered"]:
                del attributes[name], attributes[f"{name}_entered"]


def _overwrite_with_average(optimizer, variables):
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(variables, averages, strict=True):
        if average is not None:
            assign_on_replica(variable, replica_local(average.value))


@contextlib.contextmanager
def recorded_vectors():
    """Yields a list of the shapes, as text, of what tapes differentiate that is not a scalar.

    A change of `tf.GradientTape.gradient` itself, since the tape is made in a `train_step` that
    belongs to the user, and no other public place sees the target of a gradient (TensorFlow 2.16
    to 2.21). It takes effect within this context only, in which `check_equivalence` traces a copy
    of a model, and changes no gradient. It can go when a tape tells what it differentiates.

    Noted are gradients by variables, since a gradient by inputs is meant for each example; and
    without `output_gradients`, since those reduce the target.
    """
    original, shapes = tf.GradientTape.gradient, []

    @functools.wraps(original)
    def gradient(tape, target, sources, output_gradients=None, *args, **kwargs):
        flat = tf.nest.flatten(sources)
        if output_gradients is None and any(
            isinstance(v, tf.Variable | keras.Variable) for v in flat
        ):
            shapes.extend(
                str(t.shape)
                for t in tf.nest.flatten(target)
                if tf.is_tensor(t) and t.shape.rank != 0
            )
        return original(tape, target, sources, output_gradients, *args, **kwargs)

    tf.GradientTape.gradient = gradient
    try:
        yield shapes
    finally:
        tf.GradientTape.gradient = original
