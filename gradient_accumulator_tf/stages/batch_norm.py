"""Batch norm as a barrier: mean and variance of the effective batch.

The derivatives with respect to mean and variance reach each of the n elements `a` of a channel as

    (mean_bar + 2 variance_bar (a - mean)) / n.

References:
    - Ioffe and Szegedy, 2015, Batch normalization (the derivatives with respect to both).
    - Chan, Golub and LeVeque, 1979 (moments of a union of samples).
"""

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.kinds import is_known_batch_norm, is_like_batch_norm
from gradient_accumulator_tf.batch_norm.moments import (
    elements_per_channel,
    moved,
    pooled_moments,
    sums_of_sample,
)
from gradient_accumulator_tf.batch_norm.normalization import as_normalized, normalized
from gradient_accumulator_tf.replicated.replicas import sum_over_replicas
from gradient_accumulator_tf.stages.barrier import Barrier, BarrierKind, Finished, Refused


class BatchNormBarrier(Barrier):
    """One call of a batch norm that normalises by the effective batch.

    The statistics are (mean, variance), of shape (channels,) and in the dtype that Keras
    normalises in; the note is the number of elements per channel, a float64 scalar.

    Args:
        layer: A built `keras.layers.BatchNormalization` or `AccumBatchNorm`. With
            `synchronized=True` the effective batch is that of all replicas.
    """

    cheap_to_apply = True

    def __init__(self, layer):
        self._layer = layer

    def contribute(self, inputs):
        """The sums that `pooled_moments` takes, shifted by the moving mean."""
        values = self._values(inputs)
        axis = self._layer.axis % values.shape.rank
        others = [i for i in range(values.shape.rank) if i != axis]
        moments = [tf.cast(m, tf.float64) for m in tf.nn.moments(values, others)]
        return sums_of_sample(elements_per_channel(values, axis), *moments, self._shift())

    def finish(self, total, gathered):
        """Mean and variance; not finite on a replica without examples."""
        del gathered
        count, first, second = self._over_replicas(total)
        dtype = keras.backend.result_type(self._layer.compute_dtype, "float32")
        moments = pooled_moments(count, first, second, self._shift())
        return Finished(tuple(tf.cast(moment, dtype) for moment in moments), count)

    def apply(self, inputs, statistics):
        """The normalised inputs."""
        return [normalized(self._layer, self._values(inputs), *statistics)]

    def pull_back(self, finished, cotangents):
        """The mean, and the derivatives with respect to mean and variance per element."""
        mean, _ = finished.statistics
        cotangents = self._over_replicas(cotangents)
        return mean, *(tf.cast(c / finished.notes, mean.dtype) for c in cotangents)

    def send_back(self, inputs, message):
        """The sum of both derivatives in the formula above."""
        values = self._values(inputs)
        shape = [1] * values.shape.rank
        shape[self._layer.axis] = -1
        mean, by_mean, by_variance = (tf.reshape(part, shape) for part in message)
        cotangent = by_mean + 2.0 * by_variance * (values - mean)
        return [tf.cast(cotangent, inputs[0].dtype)]

    def end(self, finished, finite_only):
        """Updates the moving statistics."""
        layer = self._layer
        moving = (layer.moving_mean, layer.moving_variance)
        for variable, value in zip(moving, finished.statistics, strict=True):
            old = tf.cast(variable.value, value.dtype)
            new = moved(old, value, layer.momentum, count=finished.notes)
            if finite_only:
                new = tf.where(tf.reduce_all(tf.math.is_finite(new)), new, old)
            variable.assign(tf.cast(new, variable.dtype))

    def _values(self, inputs):
        """The input in the dtype that is normalised. Nobody else casts it as Keras's call does."""
        (values,) = inputs
        return as_normalized(tf.cast(values, self._layer.compute_dtype))

    def _shift(self):
        return tf.cast(_keras.replica_local(self._layer.moving_mean.value), tf.float64)

    def _over_replicas(self, tensors):
        return sum_over_replicas(tensors) if self._layer.synchronized else tensors


def _barrier_of(layer):
    if not (is_like_batch_norm(layer) and layer.trainable):
        return None
    if not is_known_batch_norm(layer):
        return Refused(f"is a {type(layer).__name__}, which may be more than batch norm")
    return BatchNormBarrier(layer)


BATCH_NORM = BarrierKind(
    find=_barrier_of,
    argument='batch_norm="exact"',
    layers="trainable batch norm",
    instead=(
        'Use another normalisation (swap_batch_norm(model, to="group")), or statistics of the '
        'micro-batch (batch_norm="micro_batch").'
    ),
    otherwise='batch_norm="micro_batch"',
)
