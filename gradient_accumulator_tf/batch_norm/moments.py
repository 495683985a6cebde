"""Arithmetic of batch norm's statistics: pure functions of tensors.

Means and variances of parts of the data do not add up, but sums over the elements do. So a cycle
adds up sums, and its mean and variance come from them at the end.
"""

import tensorflow as tf


def pooled_moments(count, first, second, shift):
    """Mean and variance of the union of samples, from sums over the samples.

    The variance is that within the samples plus that between their means (Chan, Golub and LeVeque
    1979), not the mean of the variances.

    Args:
        count: Scalar, `sum_k n_k`, the number of elements in all samples.
        first: `sum_k n_k (mean_k - shift)`, of shape (channels,).
        second: `sum_k n_k (variance_k + (mean_k - shift) ** 2)`, of shape (channels,).
        shift: Of shape (channels,), any values near the means. They make the sums small, so that
            no digits are lost in a difference of large numbers.

    Returns:
        Mean and variance, both of shape (channels,) and of the arguments' dtype.
    """
    offset = first / count
    return shift + offset, second / count - offset**2


def sums_of_sample(count, mean, variance, shift, counts=True):
    """What one sample adds to the sums of `pooled_moments`.

    Args:
        count: float64 scalar, the number of elements per channel.
        mean: The sample's mean, float64 of shape (channels,).
        variance: The sample's biased variance, likewise.
        shift: As for `pooled_moments`, float64.
        counts: True or a bool scalar: whether the sample is taken into the sums.

    Returns:
        `(count, first, second)`, float64; zeros if the sample is empty, and so has no mean, or
        does not count.
    """
    offset = mean - shift
    first, second = count * offset, count * (variance + offset**2)
    left_out = tf.equal(count, 0)
    if counts is not True:
        left_out |= tf.logical_not(counts)
        count = tf.where(left_out, tf.zeros_like(count), count)
    return count, *(tf.where(left_out, tf.zeros_like(v), v) for v in (first, second))


def are_finite(mean, variance):
    """Bool scalar: whether all of a sample's statistics are finite."""
    return tf.reduce_all(tf.math.is_finite(mean) & tf.math.is_finite(variance))


def moved(old, value, momentum, count):
    """A moving statistic after an update: `old` where there were no elements.

    Args:
        old: The moving mean or variance.
        value: The new mean or variance, of the same dtype.
        momentum: float, the weight of `old`.
        count: Scalar, the number of elements that `value` was computed from.
    """
    new = old * momentum + value * (1.0 - momentum)
    return tf.where(tf.equal(count, 0), old, new)


def elements_per_channel(inputs, axis, mask=None):
    """float64 scalar: how many elements the mean of one channel is over.

    Args:
        inputs: Tensor with the channels along `axis`.
        axis: int.
        mask: Bool tensor without the axis of the channels; None if all elements count.
    """
    size = tf.cast(tf.size(inputs), tf.float64) / tf.cast(inputs.shape[axis], tf.float64)
    if mask is None:
        return size
    return tf.reduce_sum(tf.cast(mask, tf.float64)) * (
        size / tf.cast(tf.maximum(tf.size(mask), 1), tf.float64)
    )
