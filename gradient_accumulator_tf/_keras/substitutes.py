"""What stands in for a part of Keras within a `with` block, on one object.

These are the changes that last no longer than a training step, or its trace. The lasting ones are
in `patches`.
"""

import collections
import contextlib
import functools
import threading

import keras
import tensorflow as tf

from gradient_accumulator_tf._installation import version_tuple
from gradient_accumulator_tf._keras.execution import assign_on_replica, replica_local
from gradient_accumulator_tf._keras.layers import all_layers
from gradient_accumulator_tf._keras.optimizers import innermost
from gradient_accumulator_tf._keras.substitutions import SUBSTITUTIONS


@contextlib.contextmanager
def replaced_losses(model, replace):
    """Puts `replace(loss)` in place of each of the model's compiled losses, on this thread.

    `CompileLoss.call`, `_flat_losses` and `_metrics`. Keras keeps a metric per output, which shall
    get the loss of the effective batch and not of a micro-batch. So they record nothing meanwhile.
    The losses are replaced in a copy of the `CompileLoss`, because all replicas have one: where a
    loss sums over replicas, each of them is within this context while another one runs.

    Args:
        model: A compiled model that is built for training.
        replace: Function that takes a loss and returns another one.

    Yields:
        The number of losses. It is 0 if the model's own `compute_loss` calls none of them.
    """
    compiled = model._compile_loss
    if compiled is None or compiled._flat_losses is None:
        yield 0
        return

    def call(method, *args, **kwargs):
        del method
        copy = object.__new__(type(compiled))
        vars(copy).update(vars(compiled))
        copy._flat_losses = [e._replace(loss=replace(e.loss)) for e in compiled._flat_losses]
        copy._metrics = [_SilentMetric() for _ in compiled._metrics]
        return type(compiled).call(copy, *args, **kwargs)

    with SUBSTITUTIONS.routed(compiled, "call", call):
        yield len(compiled._flat_losses)


@contextlib.contextmanager
def replaced_added_losses(model, replace):
    """Puts `replace(loss, value)` in place of what Keras makes of an `add_loss`, on this thread.

    `Trainer._aggregate_additional_loss` and `Layer._get_own_losses`. Losses of regularisers of
    weights are left alone. They are in `model.losses` too, and may have a rank as well.

    Args:
        model: A built model.
        replace: Function that takes the tensor given to `add_loss`, of rank 1 or more, and the
            scalar that Keras would add to the total. It returns the scalar to add instead.
    """

    def replaced(aggregate, loss):
        value = aggregate(loss)
        if loss.shape.rank == 0:
            return value
        added = any(loss is own for layer in all_layers(model) for own in layer._get_own_losses())
        return replace(loss, value) if added else value

    with SUBSTITUTIONS.routed(model, "_aggregate_additional_loss", replaced):
        yield


class _ListOfEachThread(threading.local, collections.UserList):
    """A list that has other items on each thread."""

    def __getitem__(self, key):
        return self.data[key]  # a slice is a plain list


@contextlib.contextmanager
def added_losses_of_each_replica(model):
    """Within this context each replica has the losses that `add_loss` got on it, and no others.

    `Layer._losses`. Keras empties these lists when it calls the model. All replicas have one list,
    so a replica that waits in the call for another one, in a synchronised batch norm or loss, would
    lose its own losses and add the other's. Each replica's thread enters.
    """
    with contextlib.ExitStack() as stack:
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            for layer in all_layers(model):
                stack.enter_context(
                    SUBSTITUTIONS.replaced(layer, "_losses", lambda _: _ListOfEachThread())
                )
        yield


@contextlib.contextmanager
def replaced_updates(metrics, replace):
    """Puts `replace(metric, update_state)` in place of metrics' `update_state`, on this thread.

    Args:
        metrics: List of `keras.Metric`.
        replace: Function that takes a metric and its method, and returns the function to call.
    """

    def call(method, *args, metric, **kwargs):
        return replace(metric, method)(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for metric in dict.fromkeys(metrics):  # one may have been given twice
            update = functools.partial(call, metric=metric)
            stack.enter_context(SUBSTITUTIONS.routed(metric, "update_state", update))
        yield


@contextlib.contextmanager
def compiled_without(model, *names):
    """Within this context a model is one that was compiled without these parts.

    `Trainer.optimizer`, which a model that was never compiled does not have, `_compile_loss` and
    `_compile_metrics`. What builds a model for its training
    (`build_for_training`) also makes the slots of the optimizer, which nothing but training needs.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SUBSTITUTIONS.replaced(model, name, lambda _: None))
        yield


@contextlib.contextmanager
def activity_regularizers_by_rank(model):
    """Within this context the rank of an activity regulariser's loss says how it counts.

    A mean is a scalar. A sum has one dimension, like a loss given to `add_loss` that is summed.
    Keras 3.14 and newer divide the loss by the number of examples in `Layer.__call__`, so it is a
    mean. Up to Keras 3.13 it is a sum. The regulariser itself may return any rank. Each replica's
    thread enters.
    """
    with contextlib.ExitStack() as stack:
        for layer in all_layers(model):
            if vars(layer).get("activity_regularizer") is not None:
                stack.enter_context(SUBSTITUTIONS.replaced(layer, "activity_regularizer", _by_rank))
        yield


def _by_rank(regularizer):
    """The regulariser, with a loss of the rank that `activity_regularizers_by_rank` promises."""
    divided = version_tuple(keras.__version__) >= (3, 14)

    def loss_of(outputs):
        loss = keras.ops.sum(regularizer(outputs))
        return loss if divided else keras.ops.reshape(loss, (1,))

    return loss_of


class _SilentMetric:
    def update_state(self, *args, **kwargs):
        pass


@contextlib.contextmanager
def replicas_agree(optimizer):
    """Within this context `optimizer` updates every replica alike, without synchronising them.

    Each replica's thread enters, with gradients that are already summed over replicas. Three things
    that Keras does in an update are replaced. The last two also fail on a single replica:

    - `Optimizer._all_reduce_sum_gradients` sums the gradients over replicas, after it clipped each
      replica's: clipnorm=1 on two replicas lets a norm of 2 through.
    - The assignment to `iterations` copies replica 0's value to all replicas, in a merge call.
      TensorFlow accepts none in a conditional on a replica (see `replicas_need_no_merge_call`).
    - `Optimizer._overwrite_model_variables_with_average_value` overwrites weights with their moving
      average, in a merge call within a conditional.
    """
    if not tf.distribute.has_strategy():
        yield
        return
    optimizer = innermost(optimizer)
    with contextlib.ExitStack() as stack:
        for o in [optimizer, *getattr(optimizer, "optimizers", [])]:
            overwrite = functools.partial(_overwrite_with_average, o)
            assign = functools.partial(assign_on_replica, o._iterations)
            for owner, name, value in (
                (o, "_all_reduce_sum_gradients", list),
                (o, "_overwrite_model_variables_with_average_value", overwrite),
                (o._iterations, "_direct_assign", assign),
            ):
                stack.enter_context(
                    SUBSTITUTIONS.replaced(owner, name, lambda _, value=value: value)
                )
        yield


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
