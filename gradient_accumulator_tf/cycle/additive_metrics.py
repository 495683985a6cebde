"""Which metrics add up: after all micro-batches they are what they are after the large batch.

Keras's own metrics keep sums over the examples. So each micro-batch may update them, and nothing
has to be kept. A metric that reduces by itself has to see the effective batch in one piece: a
function that returns one number for all its examples, whose mean over micro-batches is another
number, or a `Metric` with an `update_state` of the user's, which may do anything.
"""

import weakref

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras

# The name of the attribute by which the author of a metric says whether it adds up.
DECLARATION = "additive"

# For each metric a dict of what `_has_row_per_example` has found, by the shapes of its arguments.
_found: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def adds_up(metric, y_true, y_pred, sample_weight):
    """Whether a metric may be updated with one micro-batch after the other.

    What an attribute `additive` of the metric, or of the function that it takes the mean of, says
    is true. Otherwise it is known of Keras's metrics, and of functions of the user's that return a
    value for each example, which is what Keras asks of them.

    Args:
        metric: `keras.Metric`.
        y_true: Targets of a micro-batch.
        y_pred: Predictions.
        sample_weight: Weights or None.
    """
    function = _keras.metric_function(metric)
    for owner in (metric, getattr(function, "func", None)):
        declared = getattr(owner, DECLARATION, None)
        if declared is not None:
            return bool(declared)
    if getattr(keras.metrics, type(metric).__name__, None) is not type(metric):
        return False
    if sample_weight is not None and tf.TensorShape(getattr(sample_weight, "shape", ())).rank == 0:
        return False  # a mean with one weight for all counts a micro-batch as one example
    if function is None:
        return True
    arguments = _with_other_rows(y_true, y_pred)
    if arguments is None:
        return False
    known = _found.setdefault(metric, {})
    if arguments not in known:
        known[arguments] = _has_row_per_example(function, arguments)
    return known[arguments]


def _with_other_rows(y_true, y_pred):
    """Tensor specs of both, with a number of rows that no other dimension has; None without rows.

    The number is a prime and larger than all dimensions, and so is not a product of them either.
    """
    tensors = (y_true, y_pred)
    if not all(isinstance(t, tf.Tensor) and t.shape.rank for t in tensors):
        return None
    rows = _prime_above(max(size or 0 for t in tensors for size in t.shape))
    examples = y_pred.shape[0]

    def spec(tensor):
        one_for_all = tensor.shape[0] == 1 and examples != 1
        return tf.TensorSpec([1 if one_for_all else rows, *tensor.shape[1:]], tensor.dtype)

    return spec(y_true), spec(y_pred)


def _has_row_per_example(function, specs):
    """Whether a function's value has a row for each example: it is traced, and nothing is run."""
    try:
        values = tf.function(function, autograph=False).get_concrete_function(*specs).outputs[0]
    except Exception:  # whatever a user's function raises, it says nothing about its rows
        return False
    return bool(values.shape.rank) and values.shape[0] == specs[1].shape[0]


def _prime_above(number):
    number = max(number, 100) + 1
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
