"""Pure functions of gradients: scaled, added up over micro-batches, divided.

Shared by the accumulation across steps, which keeps its sums in variables, and the one within a
step, which keeps them in loop variables.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import operation_name
from gradient_accumulator_tf.replicated.replicas import number_of_replicas


class Contribution(NamedTuple):
    """Gradients of one micro-batch that share a denominator.

    Attributes:
        gradients: List with a tensor, a `tf.IndexedSlices` or None for each variable.
        weight: Scalar that the gradients are multiplied by; None is 1.
        averaged: Whether the cycle's sum is divided by the sum of the weights.
        multiplied: Whether the gradients are multiplied by the weight already.
    """

    gradients: list
    weight: Any = None
    averaged: bool = True
    multiplied: bool = False


def received_of(contribution):
    """Set of the variables, by index, that a contribution has a gradient for."""
    return {i for i, g in enumerate(contribution.gradients) if g is not None}


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


def sum_of_means(groups):
    """The gradient of a whole effective batch: each group's sum by its weight, added up.

    Args:
        groups: List of (list with a tensor or None for each variable, weight). A weight of None
            does not divide.

    Returns:
        List with a tensor or None for each variable.
    """
    means = []
    for parts in zip(*(sums for sums, _ in groups), strict=True):
        present = [
            total if weight is None else weighted_mean(total, weight)
            for total, (_, weight) in zip(parts, groups, strict=True)
            if total is not None
        ]
        means.append(tf.add_n(present) if present else None)
    return means


def overwritten_of(variables):
    """Set of the variables, by index, whose "gradient" is their new value, as of float8 scales.

    Those of a cycle's micro-batches are not averaged: a variable takes the largest of each
    element, as with Keras's own accumulation. The largest input of an effective batch is the
    largest of its micro-batches', and what does not depend on inputs is the same in all.
    """
    return {i for i, v in enumerate(variables) if getattr(v, "overwrite_with_gradient", False)}


def largest(tensors):
    """The largest of each element over a list of tensors and None, and over all replicas.

    None if there is no tensor.
    """
    present = [t for t in tensors if t is not None]
    if not present:
        return None
    values = tf.stack(present)
    if number_of_replicas() > 1:
        values = tf.distribute.get_replica_context().all_gather(values, axis=0)
    return tf.reduce_max(values, axis=0)


def zero_sums(summands, variables):
    """What a sum of one step's summands starts from; see `add_to_sums`."""

    def zeros(like):
        return None if like is None else tf.zeros(like.shape, like.dtype)

    groups, losses = summands
    sums = [
        (
            [
                None if g is None else tf.zeros(v.shape, accumulation_dtype(v.dtype))
                for g, v in zip(gradients, variables, strict=True)
            ],
            zeros(weight),
        )
        for gradients, weight in groups
    ]
    return sums, tf.nest.map_structure(zeros, losses)


def add_to_sums(total, summands, overwritten=()):
    """Adds a micro-batch's (gradients, weight) of each group, and its sums of the loss.

    Of the variables `overwritten`, by index, the larger value is kept.
    """

    def add(i, total, gradient, weight):
        if gradient is None:
            return None
        gradient = in_shape_of(gradient, total.shape)
        if i in overwritten:
            return tf.maximum(total, tf.cast(gradient, total.dtype))
        return add_gradient(total, scale_gradient(gradient, weight, total.dtype))

    (groups, losses), (new_groups, new_losses) = total, summands
    sums = [
        (
            [
                add(i, t, g, new_weight)
                for i, (t, g) in enumerate(zip(gradients, new_gradients, strict=True))
            ],
            None if weight is None else weight + new_weight,
        )
        for (gradients, weight), (new_gradients, new_weight) in zip(groups, new_groups, strict=True)
    ]
    losses = tf.nest.map_structure(
        lambda t, new: None if t is None else t + new, losses, new_losses
    )
    return sums, losses
