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

import dataclasses
import numbers
import warnings
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from gradient_accumulator_tf.cycle.gradients import Contribution
from gradient_accumulator_tf.replicated.replicas import undo_averaging


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


class Denominators(NamedTuple):
    """What has to be summed over an effective batch to know the weights of its parts.

    Attributes:
        weight: Float64 scalar, as of a `MicroBatchLoss`; None if its share is known.
        terms: List with a float64 scalar or None for each `Term`.
    """

    weight: Any
    terms: list


class Part(NamedTuple):
    """One part of a loss, as a quotient of what adds up over micro-batches.

    Attributes:
        numerator: Scalar.
        in_total: Scalar, the numerator times its coefficient in the total loss; None if the total
            has it within its rest.
        denominator: Scalar; None is 1.
    """

    numerator: Any
    in_total: Any
    denominator: Any

    def value(self, numerator):
        """`numerator`, divided."""
        if self.denominator is None:
            return numerator
        return undo_averaging(tf.math.divide_no_nan(numerator, self.denominator))


class LossSums(NamedTuple):
    """The loss of an effective batch, in sums over its micro-batches and replicas.

    Attributes:
        terms: List with a `Part` for each `Term`.
        rest: The `Part` of the loss that no term stands for.
    """

    terms: list
    rest: Part

    @property
    def values(self):
        """List of the value of each term."""
        return [part.value(part.numerator) for part in self.terms]

    @property
    def total(self):
        """The total loss."""
        parts = [part for part in (*self.terms, self.rest) if part.in_total is not None]
        dtype = self.rest.numerator.dtype
        return tf.add_n([tf.cast(part.value(part.in_total), dtype) for part in parts])

    @property
    def weight(self):
        """Scalar, the weight of the micro-batches that were summed, if their share is unknown."""
        return self.rest.denominator


@dataclasses.dataclass(frozen=True)
class MicroBatchLoss:
    """What one micro-batch's loss is made of, and what it counts for.

    Attributes:
        tape: Persistent `tf.GradientTape` that recorded the loss.
        total: Scalar, the total loss.
        terms: List of `Term` with coefficients.
        weight: Scalar that what no compiled loss measures counts for: the examples.
        share: Scalar, `weight` divided by the whole effective batch's on an average replica; None
            if it is not known yet.
        whole: Tuple of the names of the losses that returned one number for the micro-batch, and
            that nobody has told what they were divided by.
    """

    tape: Any
    total: Any
    terms: list
    weight: Any
    share: Any
    whole: tuple = ()

    @property
    def compiled(self):
        """List of the terms that `compile` was given."""
        return [t for t in self.terms if t.compiled]

    def weight_of(self, term):
        """What a term counts for."""
        return self.weight if term.denominator is None else term.denominator

    def contributions(self, variables, scale, multiply):
        """The gradients of the loss, apart by their denominators.

        Args:
            variables: List of variables to take the gradients of.
            scale: Scalar factor on every gradient (the loss scale).
            multiply: Whether to multiply the gradients by their weights. This costs nothing, as it
                is done on the scalar loss. A backward pass in float16 could overflow by it.

        Returns:
            List of at least one `Contribution`. A denominator without any gradient has none.
        """

        def gradients(targets, seeds):
            seeds = [tf.cast(scale * s, t.dtype) for t, s in zip(targets, seeds, strict=True)]
            return self.tape.gradient(targets, variables, output_gradients=seeds)

        def weighted(target, coefficient, weight):
            if not multiply:
                return Contribution(gradients([target], [coefficient]), weight)
            factor = undo_averaging(tf.cast(weight, scale.dtype))
            seed = factor * tf.cast(coefficient, scale.dtype)
            return Contribution(gradients([target], [seed]), weight, multiplied=True)

        summed = [t for t in self.terms if not t.averaged]
        values, coefficients = [t.value for t in summed], [t.coefficient for t in summed]
        if self.share is not None:
            seeds = [tf.cast(self.share, scale.dtype), *coefficients]
            groups = [Contribution(gradients([self.total, *values], seeds), None, False)]
        else:
            groups = [weighted(self.total, tf.ones_like(scale), self.weight)]
            if summed:
                groups.append(Contribution(gradients(values, coefficients), None, False))
        groups += [
            weighted(t.value, t.coefficient, t.denominator)
            for t in self.terms
            if t.denominator is not None
        ]
        return [c for c in groups if c.received] or groups[:1]

    def denominators(self):
        """The `Denominators` of it."""
        return Denominators(
            tf.cast(self.weight, tf.float64) if self.share is None else None,
            [
                None if t.denominator is None else tf.cast(t.denominator, tf.float64)
                for t in self.terms
            ],
        )

    def targets_and_seeds(self, scale, totals):
        """The micro-batch's part in the effective batch's loss, as targets to differentiate.

        Args:
            scale: Scalar factor on every gradient (the loss scale).
            totals: The sum of `denominators()` on an average replica.

        Returns:
            List of scalar targets, and list of the output gradients that go with them.
        """
        share = self.share
        if share is None:
            share = tf.math.divide_no_nan(tf.cast(self.weight, tf.float64), totals.weight)
        targets, seeds = [self.total], [tf.cast(share, scale.dtype)]
        for t, total in zip(self.terms, totals.terms, strict=True):
            if t.leaf is not None:
                part = tf.ones((), tf.float64)
                if total is not None:
                    part = tf.math.divide_no_nan(tf.cast(t.denominator, tf.float64), total)
                targets.append(t.value)
                seeds.append(tf.cast(t.coefficient, scale.dtype) * tf.cast(part, scale.dtype))
        return targets, [tf.cast(scale * s, t.dtype) for s, t in zip(seeds, targets, strict=True)]

    def sums(self):
        """The `LossSums` of this micro-batch alone."""

        def counted(value):
            if self.share is not None:
                return value * tf.cast(self.share, value.dtype), None
            weight = tf.cast(self.weight, value.dtype)
            return value * weight, weight

        rest, parts = self.total, []
        for t in self.terms:
            if t.leaf is None:
                numerator, divisor = counted(t.value)
                parts.append(Part(numerator, None, divisor))
                continue
            rest -= tf.cast(t.coefficient * t.value, self.total.dtype)
            numerator = t.value if t.denominator is None else t.value * t.denominator
            parts.append(Part(numerator, t.coefficient * numerator, t.denominator))
        numerator, divisor = counted(rest)
        return LossSums(parts, Part(numerator, numerator, divisor))


def with_coefficients(terms, tape, loss):
    """The terms with their coefficients in the total loss `loss`, recorded on `tape`."""
    return [
        t
        if t.leaf is None
        else t._replace(coefficient=tape.gradient(loss, t.leaf, unconnected_gradients="zero"))
        for t in terms
    ]


def counts_as_sum(loss, examples):
    """Whether what was given to `add_loss` is a sum over examples: all but a scalar is.

    It warns of a tensor that is not a value for each example.

    Args:
        loss: The tensor.
        examples: int, the examples of the micro-batch; None if they are not known.

    Raises:
        ValueError: If its rank is not known.
    """
    shape = loss.shape
    if shape.rank is None:
        raise ValueError(
            "A loss given to `add_loss` must have a known rank: a scalar is a mean over the "
            f"examples, and all else a sum over them. Received: {loss}, of an unknown shape. "
            "Tell its shape with tf.ensure_shape."
        )
    if shape.rank == 0:
        return False
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
    return True


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
