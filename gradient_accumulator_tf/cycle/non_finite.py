"""What becomes of gradients that hold an inf or a nan: the policies of both wrappers."""

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_choice
from gradient_accumulator_tf.replicated.conditionals import run_if
from gradient_accumulator_tf.replicated.replicas import number_of_replicas
from gradient_accumulator_tf.replicated.variables import counter

PROPAGATE, DROP_MICRO_BATCH, DROP_CYCLE = "propagate", "drop_micro_batch", "drop_cycle"


def check_non_finite(value):
    """Raises ValueError if `value` is not one of the policies."""
    check_choice("non_finite", value, (PROPAGATE, DROP_MICRO_BATCH, DROP_CYCLE))


def all_finite(structure):
    """Scalar bool tensor: whether nothing in a nested structure is an inf or a nan.

    Args:
        structure: Nested structure of real tensors, `tf.IndexedSlices`, numbers and None.
    """
    finite = [tf.constant(True)]
    for leaf in tf.nest.flatten(structure):
        if isinstance(leaf, tf.IndexedSlices):
            leaf = leaf.values
        if leaf is not None and tf.as_dtype(tf.convert_to_tensor(leaf).dtype).is_floating:
            finite.append(tf.reduce_all(tf.math.is_finite(leaf)))
    return tf.reduce_all(tf.stack(finite))


def zero_unless(keep, value):
    """`value`, or zeros of its kind where `keep`, a scalar bool tensor, does not hold.

    A product, which leaves no inf or nan where the factor is 0 and costs one pass; a conditional
    would copy as well.
    """
    if value is None:
        return None
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(zero_unless(keep, value.values), value.indices, value.dense_shape)
    value = tf.convert_to_tensor(value)
    if not value.dtype.is_floating:
        return value * tf.cast(keep, value.dtype)
    return tf.math.multiply_no_nan(value, tf.cast(keep, value.dtype))


def without_non_finite(contributions):
    """A micro-batch's contributions, made to count for nothing unless all of them are finite.

    Args:
        contributions: List of `Contribution` of one micro-batch.

    Returns:
        List of `Contribution` with gradients and weights of zero if anything in them was not
        finite; and a float64 scalar, 1 if so and 0 if not.
    """
    keep = all_finite([(c.gradients, c.weight) for c in contributions])

    def kept(contribution):
        weight = contribution.weight
        if weight is None and contribution.averaged:
            weight = 1 / number_of_replicas()  # what None stands for
        weight = None if weight is None else tf.cast(weight, tf.float64)
        gradients = [zero_unless(keep, g) for g in contribution.gradients]
        return contribution._replace(gradients=gradients, weight=zero_unless(keep, weight))

    return [kept(c) for c in contributions], 1.0 - tf.cast(keep, tf.float64)


class Drops(tf.Module):
    """Updates unless there is nothing finite to update with, and counts what was dropped.

    Attributes:
        dropped_micro_steps: int64 scalar variable, micro-batches over all replicas, counted as
            their cycle ends.
        dropped_cycles: int64 scalar variable, cycles that ended without an update.
    """

    def __init__(self):
        super().__init__(name="drops")
        self.dropped_micro_steps = counter("dropped_micro_steps")
        self.dropped_cycles = counter("dropped_cycles")

    @property
    def state(self):
        """Dict of name to variable."""
        return {name: getattr(self, name) for name in ("dropped_micro_steps", "dropped_cycles")}

    def update(self, run, gradients, dropped, micro_batches, apply, scaler=None):
        """Ends a cycle; to be called where `across_replicas` calls its action.

        Args:
            run: Function that runs a function on every replica.
            gradients: The cycle's mean gradients, which every replica has.
            dropped: float64 scalar, micro-batches dropped in it over all replicas.
            micro_batches: float64 scalar, micro-batches in it over all replicas.
            apply: Function that updates with gradients, on a replica.
            scaler: The `LossScaleOptimizer` that `apply` goes through, or None. Its scale is
                halved, once, if anything overflowed, also where the rest is an update.
        """
        scale = None if scaler is None else run(lambda: _own(scaler.dynamic_scale))

        def is_due(gradients, dropped, micro_batches):
            return tf.logical_and(all_finite(gradients), tf.less(dropped, micro_batches))

        # All replicas have the same sums and find the same.
        per_replica = run(is_due, args=(gradients, dropped, micro_batches))
        due = tf.distribute.get_strategy().experimental_local_results(per_replica)[0]
        run_if(due, lambda: run(apply, args=(gradients,)))

        def count(dropped, scale):
            self.dropped_micro_steps.assign_add(tf.cast(dropped, tf.int64))
            self.dropped_cycles.assign_add(tf.cast(tf.logical_not(due), tf.int64))
            if scale is not None:
                overflowed = tf.logical_or(tf.logical_not(due), tf.greater(dropped, 0))
                for variable, value in (
                    (scaler.dynamic_scale, scale / 2),
                    (scaler.step_counter, 0),
                ):
                    now = _own(variable)
                    value = tf.where(overflowed, tf.cast(value, now.dtype), now)
                    _keras.assign_on_replica(variable, value)

        run(count, args=(dropped, scale))


def _own(variable):
    """The value of this replica's own copy of a Keras variable."""
    return tf.identity(_keras.replica_local(variable.value))


class LogDrops(keras.callbacks.Callback):
    """Writes a model's counts of what was dropped into each epoch's logs."""

    def on_epoch_end(self, epoch, logs=None):
        """Before the other callbacks see them."""
        if logs is not None:
            for name in ("dropped_micro_steps", "dropped_cycles"):
                logs[name] = int(tf.convert_to_tensor(getattr(self.model, name)))
