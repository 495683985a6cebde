"""One rule per variable: what the gradients of micro-batches make of an effective batch's.

A rule is chosen once, from the variable. Both ways to accumulate ask it: across steps, where the
sums are variables, and within a step, where they are loop variables.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.gradients import (
    accumulation_dtype,
    add_gradient,
    in_shape_of,
    scale_gradient,
    weighted_mean,
)
from gradient_accumulator_tf.replicated.conditionals import run_if
from gradient_accumulator_tf.replicated.replicas import number_of_replicas, sum_over_replicas


class Sums(NamedTuple):
    """What micro-batches add up to, for gradients that share a denominator.

    Attributes:
        gradients: List with a tensor or None for each variable.
        weight: Scalar, the sum of the weights; None if the gradients are not divided.
    """

    gradients: list
    weight: Any

    def without(self, places):
        """The same without the gradients of some variables, given by their indices."""
        gradients = [None if i in places else g for i, g in enumerate(self.gradients)]
        return self._replace(gradients=gradients)


class Mean:
    """The rule of most variables: `sum_k w_k g_k`, to be divided by `sum_k w_k`.

    Args:
        variable: The variable, or a `tf.TensorSpec` of it.

    Attributes:
        sum_dtype: Dtype of the sum.
    """

    adds_up_over_replicas = True

    def __init__(self, variable):
        self._shape, self._dtype = tf.TensorShape(variable.shape), tf.as_dtype(variable.dtype)
        self.sum_dtype = accumulation_dtype(self._dtype)

    def zero(self):
        """The sum over no micro-batch."""
        return tf.zeros(self._shape, self.sum_dtype)

    def add(self, total, gradient, factor):
        """The sum after another micro-batch; `factor` as of a `Contribution`."""
        gradient = in_shape_of(gradient, self._shape)
        return add_gradient(total, scale_gradient(gradient, factor, self.sum_dtype))

    def add_to(self, variable, gradient, factor, begun):
        """Adds a gradient to a variable, or replaces what it holds.

        A cycle need not begin with zeros that are written, read and copied again. XLA adds and
        selects in one pass. Elsewhere a conditional hands the gradient's own buffer to the
        variable.

        Args:
            variable: The sum.
            gradient: Tensor or `tf.IndexedSlices`.
            factor: As for `add`.
            begun: Scalar bool tensor, whether the variable holds the sum of this cycle.
        """
        gradient = scale_gradient(gradient, factor, variable.dtype)
        if isinstance(gradient, tf.IndexedSlices):
            _scatter_to(variable, gradient, begun)
        elif _keras.compiles_with_xla():
            variable.assign(tf.where(begun, variable, tf.zeros_like(variable)) + gradient)
        else:

            def add():
                variable.assign_add(gradient)

            def replace():
                variable.assign(gradient)

            tf.cond(begun, add, replace)

    def result(self, parts):
        """The gradient of the effective batch.

        Args:
            parts: List of (sum or None, weight or None), one for each denominator.

        Returns:
            Tensor; None if there is no sum.
        """
        means = [
            total if weight is None else weighted_mean(total, weight)
            for total, weight in parts
            if total is not None
        ]
        if not means:
            return None
        mean = tf.add_n(means)
        # The optimizer casts it to the variable's dtype, which cuts off decimals.
        return tf.round(mean) if self._dtype.is_integer else mean


class Largest:
    """The rule of a variable whose "gradient" is its new value, such as a scale of float8.

    It takes the largest value of each element, as with Keras's own accumulation. The largest input
    of an effective batch is the largest of its micro-batches', and what does not depend on inputs
    is the same in all of them.

    Args:
        variable: The variable, or a `tf.TensorSpec` of it.

    Attributes:
        sum_dtype: Dtype of what is kept.
    """

    adds_up_over_replicas = False

    def __init__(self, variable):
        self._shape = tf.TensorShape(variable.shape)
        self.sum_dtype = accumulation_dtype(variable.dtype)

    def zero(self):
        """What is kept before the first micro-batch."""
        return tf.zeros(self._shape, self.sum_dtype)

    def add(self, total, gradient, factor):
        """The larger of both."""
        del factor
        return tf.maximum(total, tf.cast(in_shape_of(gradient, self._shape), self.sum_dtype))

    def add_to(self, variable, gradient, factor, begun):
        """Assigns the larger of both; arguments as for `Mean.add_to`."""
        del factor
        gradient = tf.cast(gradient, self.sum_dtype)
        variable.assign(tf.where(begun, tf.maximum(variable, gradient), gradient))

    def result(self, parts):
        """The largest over all denominators and all replicas; as `Mean.result`."""
        values = [value for value, _ in parts if value is not None]
        if not values:
            return None
        values = tf.stack(values)
        if number_of_replicas() > 1:
            values = tf.distribute.get_replica_context().all_gather(values, axis=0)
        return tf.reduce_max(values, axis=0)


def rule_of(variable):
    """The rule of a variable."""
    overwritten = getattr(variable, "overwrite_with_gradient", False)
    return (Largest if overwritten else Mean)(variable)


def rules_of(variables):
    """Tuple of the rules of variables."""
    return tuple(rule_of(v) for v in variables)


class Summation:
    """Adds up what micro-batches find, in loop variables.

    A micro-batch brings `(summands, others)`: a list with a `Summand` for each denominator, and a
    nested structure of tensors and None that simply add up. The sum is `(sums, others)`, with
    `Sums` in place of each summand.

    Args:
        variables: List of the variables that the gradients are of.
    """

    def __init__(self, variables):
        self._rules = rules_of(variables)

    def zeros(self, found):
        """The sum of no micro-batch, for micro-batches that bring tensors like these."""
        summands, others = found
        sums = [
            Sums(
                [
                    None if g is None else rule.zero()
                    for rule, g in zip(self._rules, s.gradients, strict=True)
                ],
                None if s.counted is None else tf.zeros((), tf.float64),
            )
            for s in summands
        ]
        others = tf.nest.map_structure(
            lambda t: None if t is None else tf.zeros(t.shape, t.dtype), others
        )
        return sums, others

    def add(self, total, found):
        """The sum after another micro-batch."""
        (sums, others), (summands, more) = total, found
        added = []
        for s, new in zip(sums, summands, strict=True):
            gradients = [
                None if g is None else rule.add(t, g, new.factor)
                for rule, t, g in zip(self._rules, s.gradients, new.gradients, strict=True)
            ]
            added.append(Sums(gradients, None if s.weight is None else s.weight + new.counted))
        others = tf.nest.map_structure(lambda t, m: None if t is None else t + m, others, more)
        return added, others

    def both(self, gradients, others):
        """What the same examples found in two places, as one.

        Args:
            gradients: List with a tensor, a `tf.IndexedSlices` or None for each variable.
            others: The same from another place.

        Returns:
            Such a list without slices.
        """
        found = []
        for rule, *pair in zip(self._rules, gradients, others, strict=True):
            present = [g for g in pair if g is not None]
            total = rule.zero() if present else None
            for gradient in present:
                total = rule.add(total, gradient, None)
            found.append(total)
        return found


def over_replicas(rules, sums, others=()):
    """The gradients of the effective batch over all replicas, which synchronise here.

    Args:
        rules: Tuple of the rules of the variables.
        sums: List of `Sums` of this replica, one for each denominator.
        others: Nested structure of tensors and None that are added up over replicas as well.

    Returns:
        List with a tensor or None for each variable, and the sum of `others`.
    """

    def parts_of(place):
        return [(s.gradients[place], s.weight) for s in sums]

    results = {
        i: rule.result(parts_of(i))
        for i, rule in enumerate(rules)
        if not rule.adds_up_over_replicas
    }
    sums = [s.without(results) for s in sums]
    sums, others = sum_over_replicas((sums, others))
    for i, rule in enumerate(rules):
        if rule.adds_up_over_replicas:
            results[i] = rule.result(parts_of(i))
    return [results[i] for i in range(len(rules))], others


def _scatter_to(variable, slices, begun):
    """Adds slices to a variable, which holds zeros first if its sum is yet to begin."""
    local = _keras.replica_local(variable)

    def make_zero():
        if _keras.compiles_with_xla():
            variable.assign(tf.zeros_like(variable))
        else:  # in place, where `assign` would copy
            zero, rows = tf.zeros((), variable.dtype), tf.range(variable.shape[0])
            local.scatter_update(tf.IndexedSlices(zero, rows))

    # Rows that get no slice in this cycle must be zero all the same.
    run_if(tf.logical_not(begun), make_zero)
    local.scatter_add(slices)
