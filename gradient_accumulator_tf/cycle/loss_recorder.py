"""What sees the terms of a model's loss, and finds out what Keras divided each of them by."""

import contextlib

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._keras.substitutions import SUBSTITUTIONS
from gradient_accumulator_tf.cycle.batches import checked_targets
from gradient_accumulator_tf.cycle.losses import Term, counts_as_sum
from gradient_accumulator_tf.replicated.replicas import undo_averaging


class _Ones(keras.losses.Loss):
    """A loss of one for each element, in the shape and with the mask of another loss's values."""

    def __init__(self, values, reduction, dtype):
        super().__init__(name="ones", reduction=reduction, dtype=dtype)
        self._values = values

    def call(self, y_true, y_pred):
        del y_true, y_pred
        return _keras.set_keras_mask(tf.ones_like(self._values), _keras.keras_mask(self._values))


def denominator(loss, values, y_true, y_pred, sample_weight):
    """What Keras divides the sum of a loss's weighted values by.

    Keras reduces a loss of one for each element to `S / D`, and with the reduction "sum" to `S`.
    The quotient of the two is `D` for every reduction, mask and broadcast that Keras knows.

    Args:
        loss: The `keras.losses.Loss`, of a reduction that averages.
        values: What its `call` returned.
        y_true: Targets.
        y_pred: Predictions, with their mask if they have one.
        sample_weight: Weights or None.

    Returns:
        Scalar of the loss's dtype; 0 if nothing counts.
    """
    if loss.reduction != "mean_with_sample_weight":
        sample_weight = None  # these weigh the values, but are not what Keras divides by
    total = _Ones(values, "sum", loss.dtype)(y_true, y_pred, sample_weight)
    mean = _Ones(values, loss.reduction, loss.dtype)(y_true, y_pred, sample_weight)
    return tf.math.divide_no_nan(total, undo_averaging(mean))


class LossRecorder:
    """Sees the terms of a model's loss while `model.compute_loss` runs.

    Args:
        tape: The `tf.GradientTape` that the loss is computed under.
        same_shapes: Whether all micro-batches of a cycle have the same shape per example, as
            slices of one batch do. Otherwise only a static shape tells it.
        examples: int or int32 scalar, examples of the micro-batch.
        times_weighed: Dict of scalars by the `id` of weights: how many micro-batches these are
            in, if it is not one. None if each is in one.

    Attributes:
        whole: List of the names of the losses that returned one number for the micro-batch.
    """

    def __init__(self, tape, same_shapes, examples, times_weighed=None):
        self._tape = tape
        self._same_shapes = same_shapes
        self._examples = examples
        self._times_weighed = times_weighed or {}
        self._compiled, self._added = [], []
        self.whole = []

    @property
    def terms(self):
        """List of `Term`: the compiled losses' first, in their order."""
        return self._compiled + self._added

    @contextlib.contextmanager
    def recording(self, model):
        """The context to call `model.compute_loss` in."""
        with (
            _keras.replaced_losses(model, self._replace),
            _keras.replaced_added_losses(model, self._replace_added),
        ):
            yield

    def _watched(self, value):
        leaf = tf.stop_gradient(value)
        self._tape.watch(leaf)
        return leaf

    def _replace(self, loss):
        """The function to call in place of the compiled loss `loss`."""

        def recorded(y_true, y_pred, sample_weight=None):
            if self._same_shapes:
                y_true = checked_targets(y_true, y_pred, self._examples)
            value, values = call_and_keep_values(loss, y_true, y_pred, sample_weight)
            if value.shape == (0,):
                value = tf.reduce_sum(value)  # of a batch without examples Keras reduces nothing
            if value.shape.rank != 0:
                raise ValueError(
                    "A loss must be reduced to a scalar for training. Received: the loss "
                    f"{loss.name!r} with reduction={loss.reduction!r}, of shape {value.shape}. "
                    'Use the reduction "sum_over_batch_size", "mean_with_sample_weight" or "sum".'
                )
            averaged = loss.reduction != "sum"
            if averaged and values is not None and values.shape.rank == 0:
                self.whole.append(loss.name)
            divisor = None
            if averaged and not self._in_proportion(loss, values, y_pred, sample_weight):
                divisor = denominator(loss, values, y_true, y_pred, sample_weight)
                if not self._masks(values, y_pred):
                    # The effective batch is divided once by weights that all micro-batches have.
                    times = self._times_weighed.get(id(sample_weight), 1)
                    value = value * tf.cast(times, value.dtype)
            leaf = None
            if divisor is not None or not averaged:
                leaf = self._watched(value)
            self._compiled.append(Term(value, divisor, averaged, leaf))
            return value if leaf is None else leaf

        return recorded

    def _replace_added(self, loss, value):
        """What counts in place of `value`, the sum of the tensor that `add_loss` was given."""
        known = isinstance(self._examples, int) or tf.executing_eagerly()
        if not counts_as_sum(loss, int(self._examples) if known else None):
            return value
        leaf = self._watched(value)
        self._added.append(Term(value, None, averaged=False, leaf=leaf, compiled=False))
        return leaf

    @staticmethod
    def _masks(values, y_pred):
        """Whether a mask takes part in what the loss is divided by."""
        tensors = [values, *tf.nest.flatten(y_pred)]
        return any(_keras.keras_mask(t) is not None for t in tensors)

    def _in_proportion(self, loss, values, y_pred, sample_weight):
        """Whether the denominator is known to be in proportion to the examples."""
        if values is None or values.shape.rank == 0:
            return True  # reduced by the user's function: the documented rule is examples
        predictions = tf.nest.flatten(y_pred)
        if self._masks(values, y_pred):
            return False
        if loss.reduction == "mean_with_sample_weight" and sample_weight is not None:
            return False
        return self._same_shapes or all(
            t.shape.rank is not None and t.shape[1:].is_fully_defined() for t in predictions
        )


def call_and_keep_values(loss, y_true, y_pred, sample_weight):
    """The loss, and the unreduced values that its `call` returned (None if it has no `call`)."""
    kept = []

    def call(method, *args, **kwargs):
        kept.append(method(*args, **kwargs))
        return kept[-1]

    with SUBSTITUTIONS.routed(loss, "call", call):
        value = loss(y_true, y_pred, sample_weight)
    return value, kept[0] if kept else None
