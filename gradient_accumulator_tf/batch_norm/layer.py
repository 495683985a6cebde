"""AccumBatchNorm: batch normalisation whose moving statistics are those of the effective batch."""

import contextlib
import threading

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_positive_int
from gradient_accumulator_tf.replicated.conditionals import run_on_replicas_if
from gradient_accumulator_tf.replicated.replicas import sum_over_replicas
from gradient_accumulator_tf.replicated.side_effects import perform
from gradient_accumulator_tf.replicated.variables import sum_variable


def check_calls(accum_steps):
    """Returns `accum_steps` of an `AccumBatchNorm` as an int; see `check_positive_int`."""
    instead = "Pass accum_steps=1 to update the moving statistics in each training call."
    return check_positive_int("accum_steps", accum_steps, "training calls per update", instead)


def pooled_moments(count, first, second, shift):
    """Mean and variance of the union of samples, from sums over them that simply add up.

    The variance is that within the samples plus that between their means (Chan, Golub and LeVeque
    1979), not the mean of the variances.

    Args:
        count: Scalar, `sum_k n_k`, the elements in all samples.
        first: `sum_k n_k (mean_k - shift)`, of shape (channels,).
        second: `sum_k n_k (variance_k + (mean_k - shift) ** 2)`, of shape (channels,).
        shift: Of shape (channels,), anything near the means, which spares the difference of large
            numbers.
    """
    offset = first / count
    return shift + offset, second / count - offset**2


class _Pool(tf.Module):
    """The sums of one cycle, in float64, on each replica; see `pooled_moments`."""

    def __init__(self, channels):
        super().__init__()
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.micro_step = sum_variable((), tf.int64, "pool_micro_step", first)
        self.shift = sum_variable((channels,), tf.float64, "pool_shift", first)
        self.count = sum_variable((), tf.float64, "pool_count")
        self.first = sum_variable((channels,), tf.float64, "pool_first")
        self.second = sum_variable((channels,), tf.float64, "pool_second")

    @property
    def state(self):
        names = ("micro_step", "shift", "count", "first", "second")
        return {f"pool.{name}": getattr(self, name) for name in names}

    def add(self, count, mean, variance):
        mean, variance = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
        # The graph of a step also runs in the call that finds the data at its end.
        with tf.control_dependencies([mean]):
            offset = mean - self.shift
            square = variance + offset**2
            # A replica without examples has no mean.
            empty = tf.equal(count, 0)
            if _leader.finite_only:
                finite = tf.math.is_finite(mean) & tf.math.is_finite(variance)
                empty |= tf.logical_not(tf.reduce_all(finite))
                count = tf.where(empty, tf.zeros_like(count), count)
            self.first.assign_add(tf.where(empty, tf.zeros_like(offset), count * offset))
            self.second.assign_add(tf.where(empty, tf.zeros_like(square), count * square))
            self.count.assign_add(count)
            self.micro_step.assign_add(1)

    def moments(self):
        """Count, mean and variance over all replicas."""
        sums = (self.count.value(), self.first.value(), self.second.value())
        count, first, second = sum_over_replicas(sums)
        return count, *pooled_moments(count, first, second, self.shift)

    def reset(self, shift=None):
        if shift is not None:
            self.shift.assign(tf.cast(shift, tf.float64))
        for variable in (self.micro_step, self.count, self.first, self.second):
            variable.assign(tf.zeros_like(variable))


class _Leader(threading.local):
    """What this thread, which may be a replica's, is tracing: see `led`."""

    active = False
    finite_only = False


_leader = _Leader()


@contextlib.contextmanager
def led(finite_only=False):
    """Within this context AccumBatchNorm layers leave it to the caller to end their cycle.

    Args:
        finite_only: Whether they leave out statistics that are not finite.
    """
    previous = _leader.active, _leader.finite_only
    _leader.active, _leader.finite_only = True, finite_only
    try:
        yield
    finally:
        _leader.active, _leader.finite_only = previous


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class AccumBatchNorm(keras.layers.BatchNormalization):
    """Batch normalisation for micro-batches, with the effective batch's moving statistics.

    In training each micro-batch is normalised by its own mean and variance, as by Keras's layer.
    The moving mean and variance are updated once per cycle, with the statistics of all its
    micro-batches together, over all replicas:

        n = sum_k n_k,   mean = sum_k n_k mean_k / n,
        variance = sum_k n_k (variance_k + (mean_k - mean) ** 2) / n,

    where micro-batch k has `n_k` elements per channel. So they are what Keras's layer would have
    recorded had it seen the same activations in one batch, with the momentum that was chosen for
    it; Keras's layer would record N batches, and the mean of their variances.

    The activations behind a normalisation by the micro-batch are not those of the large batch,
    and neither are the gradients: with this layer training equals that of the large batch in its
    bookkeeping only. The larger the micro-batch, the closer.

    A `GradientAccumulateModel` ends the cycle of the layers in it with its own, partial ones too.
    Elsewhere the layer counts `accum_steps` training calls. With `accum_steps=1` it is Keras's
    layer, bit for bit.

    ```python
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16),
            AccumBatchNorm(accum_steps=4),
            keras.layers.Dense(1),
        ]
    )
    model.compile(GradientAccumulateOptimizer("adam", accum_steps=4), loss="mse")
    model.fit(np.ones((256, 8)), np.ones((256, 1)), batch_size=8)
    ```

    Args:
        accum_steps: Integer >= 1, training calls per update of the moving statistics where no
            `GradientAccumulateModel` leads.
        **kwargs: Arguments of `keras.layers.BatchNormalization`, all but `renorm`. The weights
            are the same as well.

    Raises:
        TypeError: If `accum_steps` is not an integer.
        ValueError: If `accum_steps` < 1, or with `renorm=True`.

    References:
        - [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167), batch normalisation.
        - Chan, Golub and LeVeque, 1979, Updating formulae and a pairwise algorithm for computing
          sample variances.
    """

    def __init__(self, accum_steps=1, **kwargs):
        accum_steps = check_calls(accum_steps)
        if kwargs.get("renorm"):
            raise ValueError(
                "AccumBatchNorm cannot do batch renormalisation, which takes moving statistics of "
                "micro-batches into training. Received: renorm=True. Leave it out, or keep "
                "keras.layers.BatchNormalization."
            )
        super().__init__(**kwargs)
        self.accum_steps = accum_steps
        self._pool = None
        self._measuring = 0

    def build(self, input_shape):
        """Creates Keras's weights, and the sums of a cycle."""
        super().build(input_shape)
        self._pool = _Pool(input_shape[self.axis])

    def call(self, inputs, training=None, mask=None):
        """Normalises; in training by the micro-batch, which is added to the cycle's statistics."""
        alone = self.accum_steps == 1 and not _leader.active
        if alone or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        with self._momentum_of_zero(), keras.StatelessScope() as scope:
            outputs = super().call(inputs, training=training, mask=mask)
        # What Keras would record with momentum 0 is the batch's mean and variance.
        mean, variance = map(scope.get_current_value, (self.moving_mean, self.moving_variance))
        count = self._elements_per_channel(inputs, mask)
        # Once, and outside of its scope, where a GradientCheckpoint calls the layer twice.
        perform(lambda: self._record(count, mean, variance))
        return outputs

    def _record(self, count, mean, variance):
        self._pool.add(count, mean, variance)
        if not _leader.active:
            run_on_replicas_if(
                lambda: tf.greater_equal(self._pool.micro_step, self.accum_steps),
                lambda run: run(self.end_cycle),
            )

    def end_cycle(self):
        """Updates the moving statistics with those of a cycle, if it has any; on a replica."""
        count, mean, variance = self._pool.moments()
        moving = []
        for variable, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = tf.cast(_keras.replica_local(variable.value), tf.float64)
            new = old * self.momentum + value * (1.0 - self.momentum)
            moving.append(tf.where(tf.equal(count, 0), old, new))
            _keras.assign_on_replica(variable, moving[-1])
        self._pool.reset(shift=moving[0])

    def reset(self):
        """Drops what a partial cycle holds."""
        if self._pool is not None:
            self._pool.reset()

    @property
    def momentum(self):
        """The share of the old moving statistics in the new ones."""
        return 0.0 if self._measuring else self._momentum

    @momentum.setter
    def momentum(self, value):
        self._momentum = value

    @contextlib.contextmanager
    def _momentum_of_zero(self):
        # Replicas' threads take turns where a synchronised layer lets them meet.
        self._measuring += 1
        try:
            yield
        finally:
            self._measuring -= 1

    def _elements_per_channel(self, inputs, mask):
        size = tf.cast(tf.size(inputs), tf.float64) / tf.cast(inputs.shape[self.axis], tf.float64)
        if mask is None:
            return size
        # The mask lacks the axis of the channels.
        return tf.reduce_sum(tf.cast(mask, tf.float64)) * (
            size / tf.cast(tf.maximum(tf.size(mask), 1), tf.float64)
        )

    def save_own_variables(self, store):
        """Writes Keras's weights and, in mid-cycle, the cycle's sums."""
        super().save_own_variables(store)
        if self._pool is not None and int(self._pool.micro_step.numpy()):
            for name, variable in self._pool.state.items():
                store[name] = variable.numpy()

    def load_own_variables(self, store):
        """Reads what this layer or Keras's wrote."""
        weights = {name: store[name] for name in store.keys() if not name.startswith("pool.")}
        super().load_own_variables(weights)
        for name, variable in self._pool.state.items():
            variable.assign(store[name] if name in store.keys() else tf.zeros_like(variable))

    def get_config(self):
        """Config of Keras's layer and `accum_steps`."""
        return {**super().get_config(), "accum_steps": self.accum_steps}


def is_like_batch_norm(layer):
    """Whether a layer is a batch norm, or looks like one."""
    return (
        isinstance(layer, keras.layers.BatchNormalization)
        or (hasattr(layer, "moving_mean") and hasattr(layer, "moving_variance"))
        or ("BatchNorm" in type(layer).__name__ and not _keras.sublayers(layer))
    )


def is_known_batch_norm(layer):
    """Whether a layer is a batch norm that does what Keras's does, and no more."""
    # A subclass may do anything, and renormalisation has statistics of its own.
    known = type(layer) in (keras.layers.BatchNormalization, AccumBatchNorm)
    return known and not getattr(layer, "renorm", False)
