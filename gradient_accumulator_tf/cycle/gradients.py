"""Pure functions of one gradient: its dtype in sums, its shape, scaled, added, divided."""

from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import operation_name
from gradient_accumulator_tf.replicated.replicas import on_average_replica, undo_averaging


class Contribution(NamedTuple):
    """Gradients of one micro-batch that share a denominator.

    Attributes:
        gradients: List with a tensor, a `tf.IndexedSlices` or None for each variable.
        weight: Scalar that the gradients are multiplied by. None is 1 for the micro-batch over all
            replicas.
        averaged: Whether the cycle's sum is divided by the sum of the weights.
        multiplied: Whether the gradients are multiplied by the weight already.
    """

    gradients: list
    weight: Any = None
    averaged: bool = True
    multiplied: bool = False

    @property
    def received(self):
        """Set of the variables, by index, that there is a gradient for."""
        return {i for i, g in enumerate(self.gradients) if g is not None}

    @property
    def factor(self):
        """What the gradients are still to be multiplied by; None is 1.

        A weight undoes Keras's division by the number of replicas, if the gradients are a mean's.
        """
        if self.multiplied or self.weight is None:
            return None
        weight = tf.cast(self.weight, tf.float64)
        return undo_averaging(weight) if self.averaged else weight

    def as_summand(self):
        """The `Summand` of it."""
        return Summand(self.gradients, self.factor, self.counted)

    @property
    def counted(self):
        """Float64 scalar that the cycle's sum of weights grows by; None if it has no such sum."""
        if not self.averaged:
            return None
        weight = on_average_replica(1.0) if self.weight is None else self.weight
        return tf.cast(weight, tf.float64)


class Summand(NamedTuple):
    """A `Contribution` in nothing but tensors and None, as a traced function returns it.

    Attributes:
        gradients: List with a tensor, a `tf.IndexedSlices` or None for each variable.
        factor: As of a `Contribution`.
        counted: As of a `Contribution`.
    """

    gradients: list
    factor: Any = None
    counted: Any = None


def accumulation_dtype(dtype):
    """Dtype in which gradients of a variable of `dtype` are summed.

    Sixteen-bit sums lose small addends (1.0 + 63 x 0.003 is 16 % short in bfloat16) and overflow,
    so they are kept in float32. Integers cannot hold a mean, so theirs are kept in float64. Every
    other dtype is its own.
    """
    dtype = tf.as_dtype(dtype)
    if dtype.is_integer:
        return tf.float64
    return tf.float32 if dtype in (tf.float16, tf.bfloat16) else dtype


def in_shape_of(gradient, shape, path="variable"):
    """A gradient with a variable's static shape, of which it may know less.

    The product with a single feature, say, makes a gradient of shape (None, 3) for a variable of
    shape (1, 3). A sum would then broadcast, and its shape be unknown as well.

    Args:
        gradient: Tensor or `tf.IndexedSlices`.
        shape: The variable's `tf.TensorShape`.
        path: The variable's name for the user.

    Raises:
        ValueError: If it has another shape.
    """
    shape = tf.TensorShape(shape)
    if isinstance(gradient, tf.IndexedSlices):
        values = in_shape_of(gradient.values, [None, *shape[1:]], path)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    gradient = tf.convert_to_tensor(gradient)
    if not gradient.shape.is_compatible_with(shape):
        raise ValueError(
            "A gradient must have the shape of its variable. Received: a gradient of shape "
            f"{gradient.shape} for {path} of shape {shape}. Pass the gradients in the order of the "
            "variables."
        )
    if gradient.shape.rank is not None and all(
        known is not None or wanted is None
        for known, wanted in zip(gradient.shape, shape, strict=True)
    ):
        return gradient
    return tf.ensure_shape(gradient, shape, name=operation_name(f"gradient of {path}"))


def scale_gradient(gradient, factor, dtype):
    """`gradient * factor` in `dtype`; a `tf.IndexedSlices` stays one. A factor of None is 1.

    A factor of 0 gives 0, also of an inf or a nan: the mean over no examples is 0 / 0, and does
    not count.
    """
    if isinstance(gradient, tf.IndexedSlices):
        values = scale_gradient(gradient.values, factor, dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    gradient = tf.cast(gradient, dtype)
    return gradient if factor is None else tf.math.multiply_no_nan(gradient, tf.cast(factor, dtype))


def add_gradient(total, gradient):
    """`total + gradient`, tensors of one shape and dtype; slices are scattered into the sum."""
    if not isinstance(gradient, tf.IndexedSlices):
        return total + gradient
    indices = gradient.indices[:, tf.newaxis]
    if _keras.compiles_with_xla():  # which knows the first of the two only, and adds in place
        return tf.tensor_scatter_nd_add(total, indices, gradient.values)
    # In place if nobody else has the sum; the other one copies it on a CPU (TensorFlow 2.21).
    return tf.raw_ops.ScatterNdNonAliasingAdd(input=total, indices=indices, updates=gradient.values)


def weighted_mean(total, weight):
    """`total / weight`; 0 where the weight is 0, as Keras's losses do it.

    As a product: XLA keeps quotients in memory where several operations need them, and computes
    products anew.
    """
    return total * tf.cast(tf.math.reciprocal_no_nan(tf.cast(weight, tf.float64)), total.dtype)
