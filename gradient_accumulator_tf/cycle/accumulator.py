"""The state of one cycle: what the micro-batches since the last update add up to.

`Accumulator` says what an optimizer asks of it. Another kind, such as one with its sums on the
host, is another class with these methods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.gradients import accumulation_dtype, scale_gradient
from gradient_accumulator_tf.cycle.rules import Sums, over_replicas, rules_of
from gradient_accumulator_tf.replicated.conditionals import run_on_replicas_if
from gradient_accumulator_tf.replicated.replicas import number_of_replicas, on_average_replica
from gradient_accumulator_tf.replicated.variables import counter, sum_variable


class CycleUpdate(NamedTuple):
    """The update that ends a cycle.

    Attributes:
        apply: Function of a list of gradients, the same on all replicas, that updates on a replica.
        movable: Set of the variables, by index, that may be updated.
        drops: What decides whether the means make an update: `Drops` or `NoDrops`.
        loss_scaler: The `LossScaleOptimizer` that `apply` goes through, or None.
        ended: Function without arguments to call on a replica once the cycle has ended.
    """

    apply: Callable
    movable: set
    drops: Any
    loss_scaler: Any
    ended: Callable


class Accumulator(Protocol):
    """What an optimizer asks of the state of its cycle.

    One that keeps sums has further methods of `GradientAccumulator`, for files and for an optimizer
    that takes other variables: `load`, `take_over`, `make_groups` and `make_groups_for`.

    Attributes:
        keeps_sums: Whether micro-batches are added up. If not, each one is an update.
        number_of_groups: Denominators that there are sums for.
        variables_from_build: List of the variables that are always there.
        variables_of_further_groups: List of the variables that come with further denominators.
        state: Dict of name to `tf.Variable`: all that a file written in mid-cycle holds.
    """

    keeps_sums: bool
    number_of_groups: int
    variables_from_build: list
    variables_of_further_groups: list
    state: dict

    def in_cycle(self):
        """Two int64 scalar tensors: the micro-batches so far in this cycle, and of all of it."""

    def just_ended(self):
        """Scalar bool tensor: whether the last micro-batch ended its cycle."""

    def take(self, contributions, dropped, steps, update):
        """Takes one micro-batch on a replica, and ends the cycle if it is the last one.

        Args:
            contributions: List of `Contribution`, one for each denominator, always in one order.
            dropped: float64 scalar, 1 if they were made to count for nothing; None if they never
                are.
            steps: Function that returns the micro-batches of a cycle that begins now.
            update: `CycleUpdate`.
        """

    def flush(self, update):
        """Ends a partial cycle if there is one; `update` as for `take`."""

    def drop(self):
        """Starts a new cycle as if there had been none before."""


class NoSums:
    """The accumulator of one micro-batch per update on one replica: each is an update.

    Args:
        iterations: Function that returns the number of updates.
        note: Function to call where micro-batches are traced without sums.
    """

    keeps_sums = False
    number_of_groups = 0
    variables_from_build = ()
    variables_of_further_groups = ()

    def __init__(self, iterations, note):
        self._iterations, self._note = iterations, note

    @property
    def state(self):
        """An empty dict."""
        return {}

    def in_cycle(self):
        """0 of 1."""
        return tf.zeros((), tf.int64), tf.ones((), tf.int64)

    def just_ended(self):
        """Whether there was any."""
        self._note()
        return tf.greater(tf.convert_to_tensor(self._iterations()), 0)

    def take(self, contributions, dropped, steps, update):
        """Hands the only contribution on."""
        del dropped, steps
        self._note()
        (only,) = contributions
        gradients = _alone(only)
        # Keras also runs a step's graph in the call that finds no more data. The dependency on the
        # gradients keeps that call from counting.
        ready = tf.nest.flatten(gradients, expand_composites=True)
        with tf.control_dependencies([t for t in ready if t is not None]):
            update.apply(gradients)

    def flush(self, update):
        """Nothing is left over."""
        self._note()

    def drop(self):
        """Nothing is left over."""
        self._note()


class _Group(tf.Module):
    """`sum_k w_k g_k` for each variable and `sum_k w_k`, for gradients of one denominator.

    A sum counts only where `received` says that this cycle has begun it. The variables `scattered`,
    by index, got rows of an `IndexedSlices` in any call or trace so far.
    """

    def __init__(self, variables, rules, name):
        super().__init__(name=name)
        first = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.weight = sum_variable((), tf.float64, f"{name}_weight")
        self.received = sum_variable((len(variables),), tf.bool, f"{name}_received", first)
        self._rules = rules
        self.scattered = set()
        self.sums = [
            sum_variable(v.shape, rule.sum_dtype, f"{name}_gradient_sum_{i}")
            for i, (v, rule) in enumerate(zip(variables, rules, strict=True))
        ]

    def add(self, contribution):
        """Adds a micro-batch's `Contribution` to the sums."""
        begun, factor = tf.unstack(self.received), contribution.factor
        for i, gradient in enumerate(contribution.gradients):
            if gradient is None:
                continue
            if isinstance(gradient, tf.IndexedSlices):
                self.scattered.add(i)
            self._rules[i].add_to(self.sums[i], gradient, factor, begun[i])
        mask = [g is not None for g in contribution.gradients]
        self.received.assign(tf.logical_or(self.received, mask))
        weight = contribution.counted
        if weight is None:  # is not divided: the weights of a cycle add up to 1
            self.weight.assign(on_average_replica(tf.ones((), self.weight.dtype)))
        else:
            self.weight.assign_add(weight)

    def sum_of(self, index, certain):
        """The sum for one variable; zero if it was not begun, unless that is certain."""
        total = self.sums[index].value()
        if index in certain:
            return total
        return tf.where(self.received[index], total, tf.zeros((), total.dtype))

    def reset(self):
        """Starts a new cycle; the sums are replaced when they begin."""
        self.weight.assign(tf.zeros_like(self.weight))
        self.received.assign(tf.zeros_like(self.received))


class GradientAccumulator(tf.Module):
    """The variables of one cycle: `sum_k w_k g_k` per variable, `sum_k w_k`, and the micro-step.

    Where several losses of one model are divided by different denominators, each denominator
    has sums of its own (a group), and the mean is the sum of the groups' means. There is one group
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

    keeps_sums = True

    def __init__(self, variables, name="gradient_accumulator"):
        super().__init__(name=name)
        self._shapes = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
        self._rules = rules_of(variables)
        self.ever_received = set()
        self.micro_step = counter("micro_step")
        self.steps_in_cycle = counter("steps_in_cycle")
        self.dropped = sum_variable((), tf.float64, "dropped")
        self._groups = [_Group(self._shapes, self._rules, "group_0")]

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

    def make_groups(self, number):
        """Makes sums for `number` denominators, where there are fewer."""
        for i in range(len(self._groups), number):
            self._groups.append(_Group(self._shapes, self._rules, f"group_{i}"))

    def make_groups_for(self, variables):
        """Makes the groups of which `variables_of_further_groups` is as long as this, if any."""
        number, rest = divmod(variables, 2 + len(self._shapes))
        if rest == 0:
            self.make_groups(1 + number)

    def load(self, state):
        """Sets `state` from a dict of arrays; what it does not hold becomes zero."""
        self.make_groups(len({name.split(".")[0] for name in state if "." in name}))
        for name, variable in self.state.items():
            variable.assign(state.get(name, tf.zeros_like(variable)))

    def take_over(self, other, indices):
        """Goes on with the cycle of another accumulator.

        Args:
            other: A `GradientAccumulator`.
            indices: For each variable of this one, its index in the other; None for one that the
                other has not got. It has no gradient yet.
        """
        old = {name: variable.numpy() for name, variable in other.state.items()}
        state = {name: value for name, value in old.items() if "gradient_sum" not in name}
        for number in range(other.number_of_groups):
            group = f"group_{number}"
            received = old[f"{group}.received"]
            state[f"{group}.received"] = [i is not None and received[i] for i in indices]
            for new, i in enumerate(indices):
                if i is not None:
                    state[f"{group}.gradient_sum_{new}"] = old[f"{group}.gradient_sum_{i}"]
        self.load(state)

    def in_cycle(self):
        """Micro-batches so far in this cycle, and of all of it (0 before the first cycle)."""
        return tf.convert_to_tensor(self.micro_step), tf.convert_to_tensor(self.steps_in_cycle)

    def just_ended(self):
        """Whether a cycle ended with the last micro-batch."""
        ended = tf.greater(self.steps_in_cycle, 0)
        return tf.logical_and(ended, tf.equal(self.micro_step, 0))

    def take(self, contributions, dropped, steps, update):
        """Adds one micro-batch; see `Accumulator`."""
        with tf.control_dependencies(_needed_to_count(contributions)):
            # A cycle that has begun keeps its length.
            begun = tf.greater(self.micro_step, 0)
            self.steps_in_cycle.assign(tf.where(begun, self.steps_in_cycle, steps()))
            self.add(*contributions, dropped=dropped)
        received = [c.received for c in contributions]
        run_on_replicas_if(
            lambda: tf.greater_equal(self.micro_step, self.steps_in_cycle),
            lambda run: self._end(run, received, update),
        )

    def flush(self, update):
        """Ends a partial cycle if there is one; see `Accumulator`."""
        run_on_replicas_if(
            lambda: tf.greater(self.micro_step, 0), lambda run: self._end(run, None, update)
        )

    def add(self, *contributions, dropped=None):
        """Adds one micro-batch to the sums; arguments as for `take`.

        Raises:
            ValueError: If there is no gradient.
        """
        present = sorted(set().union(*(c.received for c in contributions)))
        if not present:
            raise ValueError(
                "At least one gradient must not be None. Received: None for every one of "
                f"{len(self._shapes)} variables. Compute the loss from these variables, within "
                "the `tf.GradientTape`."
            )
        self.ever_received.update(present)
        self.make_groups(len(contributions))
        for group, contribution in zip(self._groups, contributions, strict=False):
            group.add(contribution)
        if dropped is not None:
            self.dropped.assign_add(dropped)
        self.micro_step.assign_add(1)

    def _end(self, run, received, update):
        """Updates with the cycle's means and starts a new cycle.

        Args:
            run: Function that runs a function on every replica.
            received: As for `_if_received`.
            update: `CycleUpdate`.
        """

        def start_anew():
            self.reset()
            update.ended()

        def update_with(indices, certain):
            def result():
                micro_steps = tf.cast(self.micro_step.value(), tf.float64)
                return *self.finish(indices, certain), micro_steps * number_of_replicas()

            update.drops.update_across(run, result, update.apply, update.loss_scaler)
            run(start_anew)

        self._if_received(update.movable, received, update_with)

    def _if_received(self, wanted, received, update):
        """Calls `update(indices, certain)` with the variables that got a gradient in this cycle.

        In a graph only the traced call is known. A variable without a gradient in it may have got
        one earlier in the cycle: then all that ever got one are updated.

        Args:
            wanted: Set of the indices of variables that may be updated.
            received: For each group, the set of variables that got a gradient in this call; None
                in a call without gradients.
            update: Function of the set of variables to update, and of a set for each group of those
                that got a gradient for certain.
        """
        if tf.executing_eagerly():
            found = [set(tf.where(g.received)[:, 0].numpy().tolist()) for g in self._groups]
            update(wanted & set().union(*found), found)
            return
        known = wanted & (self.ever_received if received is None else set().union(*received))
        others = sorted(wanted - known)
        certain = received or ()
        if not others:
            update(wanted, certain)
            return
        tf.cond(
            tf.reduce_any([tf.gather(group.received, others) for group in self._groups]),
            lambda: update(wanted, certain),
            lambda: update(known, certain),
        )

    def finish(self, indices, certain=()):
        """Turns the sums into the effective batch's gradients; replicas synchronise here only.

        On one replica the gradients take the place of the sums, so that there is no second copy.
        `reset` must follow. Sums that received `IndexedSlices` are not reused, because reading such
        a variable copies it.

        Args:
            indices: Set of indices of variables.
            certain: For each group, a set of those that got a gradient in this cycle for
                certain. Those of other groups are looked up.

        Returns:
            List of the gradients of the variables `indices`, None for every other one; and a
            float64 scalar, the micro-batches of this cycle that were dropped.
        """
        certain = [*certain, *[set()] * (len(self._groups) - len(certain))]
        weights = [group.weight.value() for group in self._groups]
        dropped = self.dropped.value()

        def sums_of(index):
            return [
                group.sum_of(index, known) if index in indices else None
                for group, known in zip(self._groups, certain, strict=True)
            ]

        if number_of_replicas() > 1 or _keras.compiles_with_xla():
            by_variable = [sums_of(i) for i in range(len(self._shapes))]
            columns = zip(*by_variable, strict=True)
            sums = [Sums(list(c), w) for c, w in zip(columns, weights, strict=True)]
            return over_replicas(self._rules, sums, dropped)
        gradients, written = [], []
        for i, rule in enumerate(self._rules):
            with tf.control_dependencies(written):
                gradient = rule.result(list(zip(sums_of(i), weights, strict=True)))
                if gradient is not None and i not in self._groups[0].scattered:
                    place = self._groups[0].sums[i]
                    written = [place.assign(gradient, read_value=False)]
                    gradient = place.value()
            gradients.append(gradient)
        return gradients, dropped

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


def _needed_to_count(contributions):
    """List of what must be there before a micro-batch may be added and counted.

    The graph of a step also runs in the call that finds no more data. In it, every operation runs
    that does not depend on the data. The gradient of a regulariser is one, so data are waited for.
    Each contribution's last gradient is waited for as well, in case data come in a way that is not
    seen. Backpropagation computes it first. To wait for all gradients would keep a copy of the
    parameters in memory.
    """
    last = []
    for contribution in contributions:
        if contribution.received:
            last.append(contribution.gradients[max(contribution.received)])
    gradients = [t for t in tf.nest.flatten(last, expand_composites=True) if t is not None]
    needed = [*gradients, *_keras.data_of_trace()]
    # One operation to wait for, in place of an edge from each tensor to each operation.
    return [tf.group(*needed)] if not tf.executing_eagerly() else []


def _alone(contribution):
    """The gradients of a cycle of one micro-batch: its own, or zero if it does not count."""
    factor = contribution.weight
    if factor is None:
        return contribution.gradients
    if contribution.averaged:
        factor = tf.math.divide_no_nan(factor, factor)
    return [
        None if g is None else scale_gradient(g, factor, accumulation_dtype(g.dtype))
        for g in contribution.gradients
    ]
