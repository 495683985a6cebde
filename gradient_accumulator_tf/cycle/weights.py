"""The weight that a user gives a micro-batch."""

import math
import numbers

import tensorflow as tf

# Products with these, and their sums, are far from where float32 over- and underflows.
SMALLEST, LARGEST = 1e-20, 1e20


def checked_weight(weight, finite=True):
    """A micro-batch's weight as a float64 scalar tensor.

    Where its value is known only when a graph runs, an assertion refuses a wrong one. XLA drops
    assertions: there, it becomes a nan, which no update can hide.

    Args:
        weight: What the caller passed: a number, a scalar tensor or variable, or None.
        finite: Whether an inf or a nan is refused.

    Returns:
        The tensor; None if `weight` is None.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is no scalar, negative, or too large or small to multiply with.
    """
    if weight is None:
        return None
    meaning = "`weight` is what a micro-batch counts for (examples or tokens) and must"
    rule = f"{meaning} be a real scalar, 0 or from {SMALLEST:g} to {LARGEST:g}."
    example = "Pass for example weight=len(x_batch)."
    try:
        # A Python number as it is: the default would be float32.
        value = tf.convert_to_tensor(
            float(weight) if isinstance(weight, numbers.Real) else weight,
            tf.float64 if isinstance(weight, numbers.Real) else None,
        )
    except (TypeError, ValueError, OverflowError) as error:
        kind = type(weight).__name__
        raise TypeError(
            f"{rule} Received: weight={weight!r} (of type {kind}). {example}"
        ) from error
    if not (value.dtype.is_floating or value.dtype.is_integer or value.dtype.is_bool):
        raise TypeError(
            f"{rule} Received: weight={weight!r} (of dtype {value.dtype.name}). {example}"
        )
    if value.shape.rank not in (0, None):
        raise ValueError(
            f"{rule} Received: weight={weight!r} (of shape {value.shape}). Pass their sum, "
            "tf.reduce_sum(weight), if these are the weights of examples."
        )
    remedy = (
        "Pass what its loss was divided by, such as weight=len(x_batch), or 0 for one that does "
        "not count."
    )
    known = tf.get_static_value(value)
    value = tf.reshape(tf.cast(value, tf.float64), ())
    if known is not None:
        number = float(known)
        if number < 0:
            rule = f"{meaning} not be negative."
        if not _is_valid(number, finite):
            raise ValueError(f"{rule} Received: weight={number!r}. {remedy}")
        return value
    valid = tf.logical_or(tf.equal(value, 0), (value >= SMALLEST) & (value <= LARGEST))
    if not finite:
        valid = tf.logical_or(valid, tf.logical_not(tf.math.is_finite(value)))
    tf.debugging.Assert(valid, [f"{rule} Received: weight=", value, remedy])
    return tf.where(valid, value, tf.constant(math.nan, tf.float64))


def _is_valid(weight, finite):
    if not math.isfinite(weight):
        return not finite
    return weight == 0 or SMALLEST <= weight <= LARGEST
