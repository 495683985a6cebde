"""The state of one cycle: what the micro-batches since the last update add up to."""

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.gradients import (
    accumulation_dtype,
    largest,
    overwritten_of,
    received_of,
    scale_gradient,
    sum_of_means,
)
from gradient_accumulator_tf.replicated.conditionals import run_if
from gradient_accumulator_tf.replicated.replicas import number_of_replicas, sum_over_replicas
from gradient_accumulator_tf.replicated.variables import counter, sum_variable


def _add_to(total, gradient, started):
    """Adds a gradient to the variable `total`, or replaces it where the sum is yet to start.

    A cycle need not begin with zeros that are written, read and copied again. XLA adds and selects
    in one pass; elsewhere a conditional hands the gradient's own buffer to the variable.
    """
    xla = _keras.compiles_with_xla()
    if isinstance(gradient, tf.IndexedSlices):
        local = _keras.replica_local(total)

        def make_zero():
            if xla:
                total.assign(tf.zeros_like(total))
            else:  # in place, where `assign` would copy
                zero, rows = tf.zeros((), total.dtype), tf.range(total.shape[0])
                local.scatter_update(tf.IndexedSlices(zero, rows))

        # Rows that get no slice in this cycle must be zero all the same.
        run_if(tf.logical_not(started), make_zero)
        local.scatter_add(gradient)
    elif xla:
        total.assign(tf.where(started, total, tf.zeros_like(total)) + gradient)
    else:

        def add():
            total.assign_add(gradient)

        def replace():
            total.assign(gradient)

        tf.cond(started, add, replace)


class _Group(tf.Module):
    """`sum_k w_k g_k` for each variable and `sum_k w_k`, for gradients of one denominator.

    Of the variables `overwritten`, by index, the largest `g_k` instead.

    A sum counts only where `received` says that this cycle has begun it. Those of the indices
    `scattered` got rows of an `IndexedSlices` in any call or trace so far.
    """

    def __init__(self, variables, overwritten, name):
        super().__init__(name=name)
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.weight = sum_variable((), tf.float64, f"{name}_weight")
        self.received = sum_variable((len(variables),), tf.bool, f"{name}_received", first)
        self._overwritten = overwritten
        self.scattered = set()
        self.sums = [
            sum_variable(v.shape, accumulation_dtype(v.dtype), f"{name}_gradient_sum_{i}")
            for i, v in enumerate(variables)
        ]

    def add(self, gradients, weight, averaged, multiplied):
        # Under a strategy, what averages was divided by the number of replicas. A weight undoes
        # it; without one, a micro-step counts 1 over all replicas.
        replicas = number_of_replicas()
        factor = None if multiplied else weight
        if factor is not None and averaged and replicas > 1:
            factor = replicas * tf.cast(weight, tf.float64)
        started = tf.unstack(self.received)
        for i, (total, gradient, begun) in enumerate(
            zip(self.sums, gradients, started, strict=True)
        ):
            if gradient is None:
                continue
            if isinstance(gradient, tf.IndexedSlices):
                self.scattered.add(i)
            if i in self._overwritten:
                gradient = tf.cast(gradient, total.dtype)
                total.assign(tf.where(begun, tf.maximum(total, gradient), gradient))
            else:
                _add_to(total, scale_gradient(gradient, factor, total.dtype), begun)
        mask = [g is not None for g in gradients]
        self.received.assign(tf.logical_or(self.received, mask))
        part = tf.ones((), self.weight.dtype) / replicas
        if not averaged:
            self.weight.assign(part)
        elif weight is None:
            self.weight.assign_add(part)
        else:
            self.weight.assign_add(tf.cast(weight, self.weight.dtype))

    def sum_of(self, index, certain):
        """The sum for one variable; zero if it was not begun, unless that is certain."""
        total = self.sums[index].value()
        if index in certain:
            return total
        return tf.where(self.received[index], total, tf.zeros((), total.dtype))

    def reset(self):
        self.weight.assign(tf.zeros_like(self.weight))
        self.received.assign(tf.zeros_like(self.received))


class GradientAccumulator(tf.Module):
    """The variables of one cycle: `sum_k w_k g_k` per variable, `sum_k w_k`, and the micro-step.

    Where several losses of one model are divided by different denominators, each denominator
    has sums of its own (a group); the mean is the sum of the groups' means. There is one group
    until a micro-batch brings more.

    Args:
        variables: List of the trainable variables (Keras or TensorFlow) in the order of the
            gradients that will be added.

    Attributes:
        micro_step: int64 scalar `tf.Variable`, the micro-batches added since the last reset.
        steps_in_cycle: int64 scalar `tf.Variable`, the micro-batches of a complete cycle, which
            `begin` sets.
        dropped: float64 scalar `tf.Variable`, how many of these were added as nothing.
        ever_received: Python set of the indices that got a gradient in any call or trace so far.
    """

    def __init__(self, variables, name="gradient_accumulator"):
        super().__init__(name=name)
        self._shapes = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
        self._overwritten = overwritten_of(variables)
        self.ever_received = set()
        self.micro_step = counter("micro_step")
        self.steps_in_cycle = counter("steps_in_cycle")
        self.dropped = sum_variable((), tf.float64, "dropped")
        self._groups = [_Group(self._shapes, self._overwritten, "group_0")]

    @property
    def number_of_groups(self):
        """Denominators that there are sums for."""
        return len(self._groups)

    @property
    def variables_from_build(self):
        """List of the variables that are always there: those of the first group."""
        group = self._groups[0]
        cycle = [self.micro_step, self.steps_in_cycle, self.dropped]
        return [*cycle, group.weight, group.received, *group.sums]

    @property
    def variables_of_further_groups(self):
        """List of the variables of all other groups, as many for each."""
        return [v for g in self._groups[1:] for v in (g.weight, g.received, *g.sums)]

    def make_groups_for(self, variables):
        """Makes the groups of which `variables_of_further_groups` is as long as this, if any."""
        number, rest = divmod(variables, 2 + len(self._shapes))
        if rest == 0:
            self.make_groups(1 + number)

    @property
    def state(self):
        """Dict of name to `tf.Variable`: all that a checkpoint in mid-cycle must hold."""
        state = {
            "micro_step": self.micro_step,
            "steps_in_cycle": self.steps_in_cycle,
            "dropped": self.dropped,
        }
        for group in self._groups:
            state[f"{group.name}.weight"] = group.weight
            state[f"{group.name}.received"] = group.received
            state |= {f"{group.name}.gradient_sum_{i}": v for i, v in enumerate(group.sums)}
        return state

    def load(self, state):
        """Sets `state` from a dict of arrays; what it does not hold becomes zero."""
        self.make_groups(len({name.split(".")[0] for name in state if "." in name}))
        for name, variable in self.state.items():
            variable.assign(state.get(name, tf.zeros_like(variable)))

    def take_over(self, other, indices):
        """Goes on with the cycle of another accumulator.

        Args:
            other: A `GradientAccumulator`.
            indices: For each variable of this one, its index in the other; None for one that it
                has not got, which has no gradient yet.
        """
        old = {name: variable.numpy() for name, variable in other.state.items()}
        state = {name: value for name, value in old.items() if "gradient_sum" not in name}
        for group in other._groups:
            received = f"{group.name}.received"
            state[received] = [i is not None and old[received][i] for i in indices]
            for new, i in enumerate(indices):
                if i is not None:
                    state[f"{group.name}.gradient_sum_{new}"] = old[
                        f"{group.name}.gradient_sum_{i}"
                    ]
        self.load(state)

    def begin(self, steps):
        """Sets the length of a cycle that has not begun; one that has keeps its own.

        Args:
            steps: int64 scalar, the micro-batches that it takes.
        """
        begun = tf.greater(self.micro_step, 0)
        self.steps_in_cycle.assign(tf.where(begun, self.steps_in_cycle, steps))

    @property
    def is_complete(self):
        """Scalar bool tensor: whether the cycle has all its micro-batches."""
        return tf.greater_equal(self.micro_step, self.steps_in_cycle)

    @property
    def just_ended(self):
        """Scalar bool tensor: whether a cycle ended with the last micro-batch."""
        ended = tf.greater(self.steps_in_cycle, 0)
        return tf.logical_and(ended, tf.equal(self.micro_step, 0))

    def add(self, *contributions, dropped=None):
        """Adds one micro-batch.

        Args:
            *contributions: A `Contribution` for each denominator, always in one order.
            dropped: float64 scalar, 1 if they were made to count for nothing; None if they never
                are.
        """
        present = sorted(set().union(*map(received_of, contributions)))
        if not present:
            raise ValueError(
                "At least one gradient must not be None. Received: None for every one of "
                f"{len(self._shapes)} variables. Does the loss depend on these variables, and "
                "was it computed inside the `tf.GradientTape`?"
            )
        self.ever_received.update(present)
        self.make_groups(len(contributions))
        # Backpropagation computes the last gradient first. Nothing may be counted before it is
        # there: the graph of a step also runs in the call that finds the data at its end.
        last = [c.gradients[present[-1]] for c in contributions]
        ready = [t for t in tf.nest.flatten(last, expand_composites=True) if t is not None]
        with tf.control_dependencies(ready):
            for group, contribution in zip(self._groups, contributions, strict=False):
                group.add(*contribution)
            if dropped is not None:
                self.dropped.assign_add(dropped)
            self.micro_step.assign_add(1)

    def any_received(self, indices):
        """Scalar bool tensor: whether any variable of `indices` got a gradient in this cycle."""
        return tf.reduce_any([tf.gather(group.received, indices) for group in self._groups])

    def received(self):
        """For each group, the set of variables that got a gradient in this cycle; eagerly."""
        return [set(tf.where(g.received)[:, 0].numpy().tolist()) for g in self._groups]

    def take_result(self, indices, certain=()):
        """What the cycle holds over all replicas, which talk to each other here and nowhere else.

        On one replica the means take the sums' place, so that there is no second copy: `reset`
        must follow. Not what is scattered into: TensorFlow copies such a variable in each read.

        Args:
            indices: Indices of variables.
            certain: For each group, a set of those that got a gradient in this cycle for
                certain. Those of other groups are looked up.

        Returns:
            List of the mean gradients of the variables `indices`, None for every other one; and
            a float64 scalar, `dropped`.
        """
        indices = set(indices)
        certain = [*certain, *[set()] * (len(self._groups) - len(certain))]

        weights = [group.weight.value() for group in self._groups]

        def groups(chosen):
            return [
                ([group.sum_of(i, known) if i in indices else None for i in chosen], weight)
                for group, known, weight in zip(self._groups, certain, weights, strict=True)
            ]

        overwritten = self._overwritten & indices
        indices -= overwritten
        dropped = self.dropped.value()
        if number_of_replicas() > 1 or _keras.compiles_with_xla():
            everything = (groups(range(len(self._shapes))), dropped)
            summed, dropped = sum_over_replicas(everything)
            means = sum_of_means(summed)
        else:
            means, written = [], []
            for i, place in enumerate(self._groups[0].sums):
                with tf.control_dependencies(written):
                    (mean,) = sum_of_means(groups([i]))
                    if mean is not None and i not in self._groups[0].scattered:
                        written = [place.assign(mean, read_value=False)]
                        mean = place.value()
                means.append(mean)
        for i, (mean, v) in enumerate(zip(means, self._shapes, strict=True)):
            if mean is not None and v.dtype.is_integer:
                means[i] = tf.round(mean)  # the optimizer will cut off what is behind the point
        for i in sorted(overwritten):
            means[i] = largest(
                [group.sum_of(i, known) for group, known in zip(self._groups, certain, strict=True)]
            )
        return means, dropped

    def reset(self):
        """Starts a new cycle."""
        self.micro_step.assign(tf.zeros_like(self.micro_step))
        self.dropped.assign(tf.zeros_like(self.dropped))
        for group in self._groups:
            group.reset()

    def drop(self):
        """Starts a new cycle as if there had been none before."""
        self.reset()
        self.steps_in_cycle.assign(tf.zeros_like(self.steps_in_cycle))

    def make_groups(self, number):
        """Makes sums for `number` denominators, where there are fewer."""
        for i in range(len(self._groups), number):
            self._groups.append(_Group(self._shapes, self._overwritten, f"group_{i}"))
