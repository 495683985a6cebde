"""What each micro-batch counts for: the denominators that Keras divides losses by.

Keras reduces a loss to `N / D`: `N` sums what each element loses, times its weight and mask, and
`D` is the number of elements (of unmasked ones, under a mask), or the sum of the weights for the
reduction "mean_with_sample_weight". Of an effective batch in micro-batches k the loss is

    sum_k N_k / sum_k D_k  =  sum_k D_k (N_k / D_k) / sum_k D_k,

the mean of the micro-batches' losses weighted by their denominators, and so is its gradient.
With the reduction "sum" it is `sum_k N_k`, and so it is of what `add_loss` was given unreduced,
which Keras adds up. Other terms that no compiled loss is the source of (regularisers, scalars
given to `add_loss`, a `compute_loss` of the user's) count for the examples.
"""

import contextlib
import numbers
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.batches import checked_targets
from gradient_accumulator_tf.cycle.gradients import Contribution
from gradient_accumulator_tf.replicated.replicas import number_of_replicas


class Term(NamedTuple):
    """One compiled loss of one micro-batch, or one tensor that `add_loss` was given unreduced.

    Attributes:
        value: Scalar, the loss as Keras computed it.
        denominator: Scalar that it was divided by; None if that is in proportion to the
            examples, or if it was not divided.
        averaged: False for the reduction "sum", and for `add_loss`.
        leaf: The tensor that stands for `value` in the total loss, where its gradient has to be
            taken apart from the total's; otherwise None.
        coefficient: Scalar, the derivative of the total loss by `leaf` (its loss weight); None
            without a leaf.
        compiled: False for `add_loss`.
    """

    value: Any
    denominator: Any
    averaged: bool
    leaf: Any
    coefficient: Any = None
    compiled: bool = True


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
    # Under a strategy Keras divides what averages by the number of replicas as well.
    return tf.math.divide_no_nan(total, mean * number_of_replicas())


class LossRecorder:
    """Sees the terms of a model's loss while `model.compute_loss` runs.

    Args:
        tape: The `tf.GradientTape` that the loss is computed under.
        same_shapes: Whether all micro-batches of a cycle have the same shape per example, as
            slices of one batch do. Otherwise only a static shape tells it.
        examples: int or int32 scalar, examples of the micro-batch.
        times_weighed: Dict of scalars by the `id` of weights: how many micro-batches these are
            in, if it is not one.
    """

    def __init__(self, tape, same_shapes, examples, times_weighed=None):
        self._tape = tape
        self._same_shapes = same_shapes
        self._examples = examples
        self._times_weighed = times_weighed or {}
        self._compiled, self._added = [], []

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
        shape = loss.shape
        if shape.rank is None:
            raise ValueError(
                "A loss given to `add_loss` must have a known rank: a scalar is a mean over the "
                f"examples, and all else a sum over them. Received: {loss}, of an unknown shape. "
                "Tell its shape with tf.ensure_shape."
            )
        known = isinstance(self._examples, int) or tf.executing_eagerly()
        examples = int(self._examples) if known else None
        if shape[0] not in (None, examples) and shape.num_elements() != 1:
            warnings.warn(
                "A loss given to `add_loss` counts as a sum over the examples if it is not a "
                f"scalar. Received: shape {shape} for a micro-batch of "
                f"{examples or 'any number of'} examples, which is not a value for "
                "each of them. If it is a mean over the examples, or does not depend on them, pass "
                "the scalar keras.ops.sum(loss). If it is a sum, pass "
                "keras.ops.reshape(keras.ops.sum(loss), (1,)), which does not warn.",
                stacklevel=2,
            )
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

    def call(*args, **kwargs):
        kept.append(type(loss).call(loss, *args, **kwargs))
        return kept[-1]

    loss.call = call
    try:
        value = loss(y_true, y_pred, sample_weight)
    finally:
        del loss.call
    return value, kept[0] if kept else None


def check_total_loss(loss):
    """Returns what `compute_loss` returned, if it is a scalar to be differentiated.

    Raises:
        TypeError: If it is not a tensor of floats.
        ValueError: If it is not a scalar.
    """
    rule = "`compute_loss` must return a scalar tensor of floats."
    if not isinstance(loss, tf.Tensor) or not loss.dtype.is_floating:
        raise TypeError(
            f"{rule} Received: {loss!r} (of type {type(loss).__name__}). Compute it with "
            "keras.ops or tf from the predictions."
        )
    if loss.shape.rank is None:
        return tf.ensure_shape(loss, ())
    if loss.shape.rank > 0:
        raise ValueError(
            f"{rule} Received: a tensor of shape {loss.shape}, which an update of plain Keras "
            "would add up. If it is to be averaged over the examples, return keras.ops.mean(loss). "
            "If it is to be added up over them, call self.add_loss(loss) and return "
            "super().compute_loss(x, y, y_pred, sample_weight)."
        )
    return loss


def check_micro_batch_weight(weight):
    """Returns what `micro_batch_weight` returned, if something can count for it.

    Raises:
        TypeError: If it is not None, a real number or a real tensor.
        ValueError: If it is not a scalar, or known to be negative or not finite.
    """
    if weight is None:
        return None
    rule = "`micro_batch_weight` must return a finite scalar >= 0, or None for the examples."
    remedy = "Return what the micro-batch's loss was divided by, such as the number of tokens."
    try:
        tensor = tf.convert_to_tensor(weight)
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or not (tensor.dtype.is_floating or tensor.dtype.is_integer):
        raise TypeError(f"{rule} Received: {weight!r} (of type {type(weight).__name__}). {remedy}")
    if tensor.shape.rank != 0:
        raise ValueError(f"{rule} Received: {weight!r}, of shape {tensor.shape}. {remedy}")
    value = tf.get_static_value(tensor)
    if value is not None and not (value >= 0 and np.isfinite(value)):
        raise ValueError(f"{rule} Received: {weight!r}. {remedy}")
    return weight if isinstance(weight, numbers.Real) else tensor


def with_coefficients(terms, tape, loss):
    """The terms with their coefficients in the total loss `loss`, recorded on `tape`."""
    return [
        t
        if t.leaf is None
        else t._replace(coefficient=tape.gradient(loss, t.leaf, unconnected_gradients="zero"))
        for t in terms
    ]


def contributions(tape, loss, terms, variables, scale, weight, share, multiply):
    """The gradients of one micro-batch's loss, apart by their denominators.

    Args:
        tape: Persistent `tf.GradientTape` that recorded the loss.
        loss: Scalar, the total loss.
        terms: List of `Term` with coefficients.
        variables: List of variables to take the gradients of.
        scale: Scalar factor on every gradient (the loss scale).
        weight: Scalar that what no compiled loss measures counts for: the examples.
        share: Scalar, `weight` by the whole effective batch's on an average replica; None if it
            is not known yet.
        multiply: Whether to multiply the gradients by their weights, which costs nothing on the
            scalar loss but could overflow in a backward pass in float16.

    Returns:
        Non-empty list of `Contribution`; without one for a denominator that no variable's
        gradient depends on.
    """

    def gradients(targets, seeds):
        seeds = [tf.cast(scale * seed, t.dtype) for t, seed in zip(targets, seeds, strict=True)]
        return tape.gradient(targets, variables, output_gradients=seeds)

    def weighted(target, coefficient, weight):
        if not multiply:
            return Contribution(gradients([target], [coefficient]), weight)
        # Under a strategy, what averages was divided by the number of replicas.
        factor = number_of_replicas() * tf.cast(weight, scale.dtype)
        seed = factor * tf.cast(coefficient, scale.dtype)
        return Contribution(gradients([target], [seed]), weight, multiplied=True)

    summed = [t for t in terms if not t.averaged]
    values, coefficients = [t.value for t in summed], [t.coefficient for t in summed]
    if share is not None:
        share = tf.cast(share, scale.dtype)
        groups = [Contribution(gradients([loss, *values], [share, *coefficients]), None, False)]
    else:
        groups = [weighted(loss, tf.ones_like(scale), weight)]
        if summed:
            groups.append(Contribution(gradients(values, coefficients), None, False))
    groups += [
        weighted(t.value, t.coefficient, t.denominator) for t in terms if t.denominator is not None
    ]
    used = [c for c in groups if any(g is not None for g in c.gradients)]
    return used or groups[:1]


def denominators(terms, weight, share):
    """What has to be summed over an effective batch to know the weights of its parts."""
    weight = tf.cast(weight, tf.float64) if share is None else None
    parts = [None if t.denominator is None else tf.cast(t.denominator, tf.float64) for t in terms]
    return weight, parts


def targets_and_seeds(loss, terms, scale, weight, share, totals):
    """A micro-batch's part in the effective batch's loss, as targets to differentiate.

    Args:
        loss: As for `contributions`, and so are `terms`, `scale`, `weight` and `share`.
        terms: See there.
        scale: See there.
        weight: See there.
        share: See there.
        totals: The sum of `denominators` on an average replica.

    Returns:
        List of scalar targets, and list of the output gradients that go with them.
    """
    total_weight, totals = totals
    if share is None:
        share = tf.math.divide_no_nan(tf.cast(weight, tf.float64), total_weight)
    targets, seeds = [loss], [tf.cast(share, scale.dtype)]
    for t, total in zip(terms, totals, strict=True):
        if t.leaf is not None:
            part = tf.ones((), tf.float64)
            if total is not None:
                part = tf.math.divide_no_nan(tf.cast(t.denominator, tf.float64), total)
            targets.append(t.value)
            seeds.append(tf.cast(t.coefficient, scale.dtype) * tf.cast(part, scale.dtype))
    return targets, [tf.cast(scale * s, t.dtype) for s, t in zip(seeds, targets, strict=True)]


def loss_sums(loss, terms, weight, share):
    """What to add up over the micro-batches of an effective batch to know its loss.

    Args:
        loss: As for `contributions`, and so are `terms`, `weight` and `share`.
        terms: See there.
        weight: See there.
        share: See there.

    Returns:
        List of (numerator, numerator times coefficient, denominator): for each term, and last
        for the rest of the loss, that no leaf stands for. A denominator of None is 1, a
        numerator times coefficient of None is part of the rest.
    """

    def counted(value):
        factor, divisor = (weight, weight) if share is None else (share, None)
        divisor = None if divisor is None else tf.cast(divisor, value.dtype)
        return value * tf.cast(factor, value.dtype), divisor

    rest, parts = loss, []
    for t in terms:
        if t.leaf is None:
            numerator, divisor = counted(t.value)
            parts.append((numerator, None, divisor))
            continue
        rest -= tf.cast(t.coefficient * t.value, loss.dtype)
        numerator = t.value if t.denominator is None else t.value * t.denominator
        parts.append((numerator, t.coefficient * numerator, t.denominator))
    numerator, divisor = counted(rest)
    return [*parts, (numerator, numerator, divisor)]


def loss_from_sums(sums):
    """The effective batch's total loss and its list of terms, from the sum of `loss_sums`."""

    def divided(numerator, divisor):
        if divisor is None:
            return numerator
        # Under a strategy, what averages was divided by the number of replicas.
        return number_of_replicas() * tf.math.divide_no_nan(numerator, divisor)

    total = tf.add_n(
        [
            tf.cast(divided(weighted, divisor), sums[-1][0].dtype)
            for _, weighted, divisor in sums
            if weighted is not None
        ]
    )
    return total, [divided(numerator, divisor) for numerator, _, divisor in sums[:-1]]
