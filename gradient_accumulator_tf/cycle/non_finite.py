"""Policies for gradients that hold an inf or a nan: each screens, decides and counts.

A policy is a value of `POLICIES`, and both wrappers ask it. A new one is a subclass here.
"""

from typing import Literal

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_choice
from gradient_accumulator_tf.replicated.conditionals import across_replicas, run_if
from gradient_accumulator_tf.replicated.replicas import on_average_replica
from gradient_accumulator_tf.replicated.variables import counter


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
    """`value`, or zeros in its place where `keep`, a scalar bool tensor, does not hold.

    The result is a product, which leaves no inf or nan where the factor is 0 and costs one pass. A
    conditional would copy as well.
    """
    if value is None:
        return None
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(zero_unless(keep, value.values), value.indices, value.dense_shape)
    value = tf.convert_to_tensor(value)
    if not value.dtype.is_floating:
        return value * tf.cast(keep, value.dtype)
    return tf.math.multiply_no_nan(value, tf.cast(keep, value.dtype))


class Propagate:
    """Nothing is looked at, as by the large batch: an inf or a nan reaches the weights.

    The base of the other policies. A policy has no state: what it counts is in `new_counts()`.

    Attributes:
        name: The string that users pass.
        finite_only: Whether moving statistics and logged losses leave out what is not finite, and
            gradients with a weight that is not finite are accepted.
        screens: Whether single micro-batches may be left out, so that the weight of the effective
            batch is known only behind its last micro-batch.
    """

    name = "propagate"
    finite_only = False
    screens = False

    def screen(self, contributions):
        """Looks at one micro-batch.

        Args:
            contributions: List of `Contribution` of one micro-batch.

        Returns:
            List of `Contribution` to add to the sums; and a float64 scalar, 1 if they were made to
            count for nothing and 0 if not. None if no micro-batch ever is.
        """
        return contributions, None

    def screen_losses(self, loss, sums):
        """What a micro-batch's loss adds to the logged loss.

        Args:
            loss: Scalar, the micro-batch's total loss.
            sums: Nested structure of scalars and None, what is added up.
        """
        del loss
        return sums

    def logged(self, value, weight):
        """A loss and its weight in the mean over the epoch (None is Keras's default)."""
        return value, weight

    def new_counts(self):
        """New variables that count what is dropped, and what decides on an update: see `Drops`."""
        return NoDrops()

    def callbacks(self):
        """List of the callbacks that tell the user in `fit` what was dropped."""
        return []


class DropCycle(Propagate):
    """A cycle whose mean is not finite ends without an update."""

    name = "drop_cycle"
    finite_only = True

    def logged(self, value, weight):
        """Both 0 if the loss is not finite."""
        finite = tf.math.is_finite(value)
        weight = tf.ones_like(value) if weight is None else tf.cast(weight, value.dtype)
        return zero_unless(finite, value), zero_unless(finite, weight)

    def new_counts(self):
        """New `Drops`."""
        return Drops()

    def callbacks(self):
        """Both counts are in the logs of each epoch."""
        return [LogDrops()]


class DropMicroBatch(DropCycle):
    """A micro-batch whose gradients or weight are not finite is left out of the mean.

    A cycle without a finite micro-batch ends without an update.
    """

    name = "drop_micro_batch"
    screens = True

    def screen(self, contributions):
        """Gradients and weights of zero if anything in them is not finite."""
        keep = all_finite([(c.gradients, c.weight) for c in contributions])

        def kept(contribution):
            weight = contribution.weight
            if weight is None and contribution.averaged:
                weight = on_average_replica(1.0)  # what None stands for
            weight = None if weight is None else tf.cast(weight, tf.float64)
            gradients = [zero_unless(keep, g) for g in contribution.gradients]
            return contribution._replace(gradients=gradients, weight=zero_unless(keep, weight))

        return [kept(c) for c in contributions], 1.0 - tf.cast(keep, tf.float64)

    def screen_losses(self, loss, sums):
        """Zeros if the loss is not finite."""
        finite = tf.math.is_finite(loss)
        return tf.nest.map_structure(lambda v: zero_unless(finite, v), sums)


# The names of POLICIES, for type checkers.
NonFinite = Literal["propagate", "drop_micro_batch", "drop_cycle"]
PROPAGATE = Propagate()
POLICIES = {policy.name: policy for policy in (PROPAGATE, DropMicroBatch(), DropCycle())}


def policy_of(name):
    """The policy that the argument `non_finite` names.

    Raises:
        ValueError: If `name` is not one of `POLICIES`.
    """
    check_choice("non_finite", name, tuple(POLICIES))
    return POLICIES[name]


class NoDrops:
    """Every cycle ends in an update, and nothing is counted. Has the methods of `Drops`."""

    variables = ()

    @property
    def state(self):
        """An empty dict."""
        return {}

    @property
    def dropped_micro_steps(self):
        """int64 scalar tensor, 0."""
        return tf.zeros((), tf.int64)

    @property
    def dropped_cycles(self):
        """int64 scalar tensor, 0."""
        return tf.zeros((), tf.int64)

    def update(self, gradients, dropped, micro_batches, apply, scaler=None):
        """Updates."""
        apply(gradients)

    def update_across(self, run, result, apply, scaler=None):
        """Updates on every replica."""
        run(lambda: apply(result()[0]))


class Drops(tf.Module):
    """Updates unless nothing finite is left to update with, and counts what was dropped.

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

    def update(self, gradients, dropped, micro_batches, apply, scaler=None):
        """Ends a cycle; every replica calls it with the same values.

        Args:
            gradients: The cycle's mean gradients.
            dropped: float64 scalar, micro-batches dropped in it over all replicas.
            micro_batches: float64 scalar, micro-batches in it over all replicas.
            apply: Function that updates with gradients, on a replica.
            scaler: The `LossScaleOptimizer` that `apply` goes through, or None. Its scale is
                halved, once, if anything overflowed, also where the rest is an update.
        """
        across_replicas(
            lambda run, *values: self._end(run, *values, apply, scaler),
            gradients,
            dropped,
            micro_batches,
        )

    def update_across(self, run, result, apply, scaler=None):
        """Ends a cycle; called where `across_replicas` calls its action.

        Args:
            run: Function that runs a function on every replica.
            result: Function that returns `gradients`, `dropped` and `micro_batches` on a replica;
                as for `update`.
            apply: As for `update`.
            scaler: As for `update`.
        """
        self._end(run, *run(result), apply, scaler)

    def _end(self, run, gradients, dropped, micro_batches, apply, scaler):
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
