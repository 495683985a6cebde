"""AccumBatchNorm: batch normalisation whose moving statistics are those of the effective batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_positive_int
from gradient_accumulator_tf.batch_norm.cycle_end import current_cycle_end
from gradient_accumulator_tf.batch_norm.moments import (
    are_finite,
    elements_per_channel,
    moved,
    pooled_moments,
    sums_of_sample,
)
from gradient_accumulator_tf.batch_norm.normalization import as_normalized, normalized
from gradient_accumulator_tf.replicated.conditionals import run_on_replicas_if
from gradient_accumulator_tf.replicated.replicas import sum_over_replicas
from gradient_accumulator_tf.replicated.side_effects import perform
from gradient_accumulator_tf.replicated.variables import sum_variable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradient_accumulator_tf._arguments import BatchNormArguments


def check_calls(accum_steps):
    """Returns the argument `accum_steps` of an `AccumBatchNorm` as an int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is smaller than 1.
    """
    instead = "Pass accum_steps=1 to update the moving statistics in each training call."
    return check_positive_int("accum_steps", accum_steps, "training calls per update", instead)


class _Pool(tf.Module):
    """The sums of one cycle that `pooled_moments` takes, in float64, on each replica."""

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
        """Dict of the variables, by their names in saved files."""
        names = ("micro_step", "shift", "count", "first", "second")
        return {f"pool.{name}": getattr(self, name) for name in names}

    def add(self, count, mean, variance, finite_only):
        """Adds a micro-batch.

        Args:
            count: float64 scalar, elements per channel.
            mean: Of shape (channels,).
            variance: Of shape (channels,).
            finite_only: Whether statistics that are not finite are left out.
        """
        mean, variance = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
        # Keras also runs a step's graph in the call that finds no more data. The dependency on the
        # data keeps that call from counting.
        with tf.control_dependencies([mean]):
            counts = are_finite(mean, variance) if finite_only else True
            count, first, second = sums_of_sample(count, mean, variance, self.shift, counts)
            self.first.assign_add(first)
            self.second.assign_add(second)
            self.count.assign_add(count)
            self.micro_step.assign_add(1)

    def moments(self):
        """Count, mean and variance over all replicas."""
        sums = (self.count.value(), self.first.value(), self.second.value())
        count, first, second = sum_over_replicas(sums)
        return count, *pooled_moments(count, first, second, self.shift)

    def reset(self, shift=None):
        """Sets the sums to zero, and the shift to a new value if one is given."""
        if shift is not None:
            self.shift.assign(tf.cast(shift, tf.float64))
        for variable in (self.micro_step, self.count, self.first, self.second):
            variable.assign(tf.zeros_like(variable))


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class AccumBatchNorm(keras.layers.BatchNormalization):
    """Batch normalisation for micro-batches, with the effective batch's moving statistics.

    In training each micro-batch is normalised by its own mean and variance, as with Keras's layer.
    The moving mean and variance are updated once per cycle, with the statistics of all its
    micro-batches together, over all replicas:

        n = sum_k n_k,   mean = sum_k n_k mean_k / n,
        variance = sum_k n_k (variance_k + (mean_k - mean) ** 2) / n,

    where micro-batch k has `n_k` elements per channel. These are the statistics that Keras's layer
    would record if it saw the same activations in one batch, with the same momentum. Keras's layer
    itself would record N batches, and the mean of their variances.

    Only the moving statistics are those of the large batch. Activations that are normalised by the
    micro-batch differ from the large batch's, and so do the gradients. The larger the micro-batch,
    the smaller the difference.

    A `GradientAccumulateModel` ends the cycle of the layers in it with its own, also a partial
    one. Elsewhere the layer counts `accum_steps` training calls. With `accum_steps=1` it is Keras's
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
        accum_steps: Integer >= 1, training calls per update of the moving statistics outside of a
            `GradientAccumulateModel`.
        **kwargs: Arguments of `keras.layers.BatchNormalization` except `renorm`. The layer has the
            weights of Keras's layer.

    Raises:
        TypeError: If `accum_steps` is not an integer.
        ValueError: If `accum_steps` < 1, or with `renorm=True`.

    References:
        - [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167), batch normalisation.
        - Chan, Golub and LeVeque, 1979, Updating formulae and a pairwise algorithm for computing
          sample variances.
    """

    def __init__(self, accum_steps: int = 1, **kwargs: Unpack[BatchNormArguments]) -> None:
        accum_steps = check_calls(accum_steps)
        if kwargs.get("renorm"):
            raise ValueError(
                "`renorm` must be False: batch renormalisation trains with moving statistics of "
                "micro-batches. Received: renorm=True. Leave it out, or keep "
                "keras.layers.BatchNormalization."
            )
        super().__init__(**kwargs)
        self.accum_steps = accum_steps
        self._pool: Any = None

    def build(self, input_shape: Any) -> None:
        """Creates Keras's weights, and the sums of a cycle."""
        super().build(input_shape)
        self._pool = _Pool(input_shape[self.axis])

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalises the inputs; in training by the micro-batch's mean and variance.

        Args:
            inputs: Tensor of shape (examples, ..., channels), or with the channels along `axis`.
            training: Whether the statistics are added to the cycle's; otherwise the moving
                statistics are applied.
            mask: Bool tensor without the axis of the channels: False where an element does not
                count for the statistics.

        Raises:
            ValueError: If the mask has another rank.
        """
        cycle_end = current_cycle_end()
        plain = self.accum_steps == 1 and not cycle_end.by_model
        if plain or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
            raise ValueError(
                "`mask` must have one dimension less than `inputs`. Received: mask.shape="
                f"{mask.shape}, inputs.shape={inputs.shape}. Leave out the axis of the channels."
            )
        count = elements_per_channel(inputs, self.axis, mask)
        inputs = as_normalized(inputs)
        mean, variance = _keras.batch_moments(self, inputs, mask)
        # A GradientCheckpoint calls the layer twice, and performs this once and after its scope.
        perform(lambda: self._record(count, mean, variance, cycle_end))
        return normalized(self, inputs, mean, variance)

    def _record(self, count, mean, variance, cycle_end):
        self._pool.add(count, mean, variance, cycle_end.finite_only)
        if not cycle_end.by_model:
            run_on_replicas_if(
                lambda: tf.greater_equal(self._pool.micro_step, self.accum_steps),
                lambda run: run(self.end_cycle),
            )

    def end_cycle(self) -> None:
        """Updates the moving statistics with the cycle's, if it has any; called on a replica."""
        count, *moments = self._pool.moments()
        moving = []
        for variable, value in zip((self.moving_mean, self.moving_variance), moments, strict=True):
            old = tf.cast(_keras.replica_local(variable.value), tf.float64)
            moving.append(moved(old, value, self.momentum, count))
            _keras.assign_on_replica(variable, moving[-1])
        self._pool.reset(shift=moving[0])

    def reset(self) -> None:
        """Drops what a partial cycle holds."""
        if self._pool is not None:
            self._pool.reset()

    def save_own_variables(self, store: Any) -> None:
        """Writes Keras's weights and, in mid-cycle, the cycle's sums."""
        super().save_own_variables(store)
        if self._pool is not None and int(self._pool.micro_step.numpy()):
            for name, variable in self._pool.state.items():
                store[name] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Reads the weights of this layer or of Keras's, and the cycle's sums if there are any."""
        weights = {name: store[name] for name in store.keys() if not name.startswith("pool.")}
        super().load_own_variables(weights)
        for name, variable in self._pool.state.items():
            variable.assign(store[name] if name in store.keys() else tf.zeros_like(variable))

    def get_config(self) -> dict[str, Any]:
        """Config of Keras's layer and `accum_steps`."""
        return {**super().get_config(), "accum_steps": self.accum_steps}
