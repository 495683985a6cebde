"""The cycle of an accumulating optimizer: takes contributions, and ends in an update.

Users do not see it. `cycle_of` hands it to the other folders.
"""

import contextlib
import weakref

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.accumulator import CycleUpdate, GradientAccumulator, NoSums
from gradient_accumulator_tf.cycle.non_finite import PROPAGATE, NoDrops
from gradient_accumulator_tf.optimizers.traces import Traces
from gradient_accumulator_tf.optimizers.trained_variables import TrainedVariables
from gradient_accumulator_tf.optimizers.update_order import one_by_one
from gradient_accumulator_tf.replicated.replicas import number_of_replicas


class Cycle:
    """What an optimizer does between two updates of its inner optimizer, and in an update.

    Args:
        optimizer: The `GradientAccumulateOptimizer`.
        length: Its `CycleLength`.
        policy: What it does with gradients that are not finite; see `cycle/non_finite.py`.
        track: Function to call when `accumulator` or `drops` is another one. Checkpoints see them
            as attributes of the optimizer.

    Attributes:
        length: As given.
        policy: As given.
        accumulator: The `Accumulator`.
        drops: What the policy counts.
        traces: `Traces`.
        groups_to_make: Number of the denominators that `build` makes sums for, because a file or
            the cycle before holds them.
    """

    def __init__(self, optimizer, length, policy, track):
        self._optimizer, self._track = optimizer, track
        self.length, self.policy = length, policy
        self.accumulator = self._no_sums()
        self.drops = NoDrops()
        self.traces = Traces()
        self.groups_to_make = 0
        self._trained = TrainedVariables(optimizer)
        self._followers = ()
        self._loss_scaler = None
        self._strategy = tf.distribute.get_strategy()

    @property
    def accumulates(self):
        """Whether gradients are added up.

        False if every gradient goes straight to the inner optimizer (`accum_steps=1`, one replica,
        `non_finite="propagate"`). With several replicas `accum_steps=1` accumulates too: gradients
        are summed over replicas before clipping, and weighed by every replica's examples.
        """
        if self._optimizer.built:
            return self.accumulator.keeps_sums
        each_is_an_update = self.length.accum_steps == 1 and self.policy is PROPAGATE
        return bool(self.groups_to_make) or not each_is_an_update or number_of_replicas() > 1

    @property
    def held(self):
        """What is held in mid-cycle, such as "2 of 4 micro-batches"; None if nothing."""
        with tf.init_scope():
            micro_step, steps = (int(tf.convert_to_tensor(v)) for v in self.accumulator.in_cycle())
        return f"{micro_step} of {steps} micro-batches" if micro_step else None

    def lead(self, followers):
        """Tells other state of a cycle when it ends.

        Args:
            followers: List of objects with `end_cycle()`, called on every replica in each update,
                and `reset()`, called when a partial cycle is dropped.
        """
        self._followers = followers

    def scaled_by(self, loss_scaler):
        """Takes gradients scaled by the `LossScaleOptimizer` that is around the optimizer.

        They are summed as they are. At the update the loss scaler looks at the mean, divides it
        by its scale or drops it, and changes the scale, as it does for a large batch.
        """
        self._loss_scaler = weakref.ref(loss_scaler)

    @property
    def loss_scaler(self):
        """The `LossScaleOptimizer` around the optimizer, or None."""
        return None if self._loss_scaler is None else self._loss_scaler()

    def build(self, variables):
        """Makes the variables of a cycle for a list of trainable variables."""
        self._trained = TrainedVariables(self._optimizer, variables)
        if self.accumulates:
            self._make_sums()

    def indices_of(self, variables):
        """List of the indices of variables; None for each that it was not built with."""
        return self._trained.indices_of(variables)

    def build_anew(self):
        """Forgets its variables, until `build` makes others.

        Returns:
            The accumulator until now.
        """
        accumulator, self.accumulator = self.accumulator, self._no_sums()
        self.groups_to_make = accumulator.number_of_groups
        self._track()
        return accumulator

    def set_steps(self, steps):
        """Sets an integer `accum_steps`, and makes the sums that it needs."""
        if self._optimizer.built and steps > 1:
            self.begin_to_accumulate()
        self.length.set(steps)

    def begin_to_accumulate(self):
        """Makes the sums of an optimizer that was built without, unless it has them by now."""
        if self.accumulator.keeps_sums:
            return
        if self.traces.of_users:
            kind = type(self._optimizer).__name__
            raise ValueError(
                "A tf.function that was traced with accum_steps=1 keeps no sums, and cannot begin "
                "to accumulate. Received: more than one micro-batch per update, for an optimizer "
                "that such a function of your own calls. Trace a new function with "
                f"{kind}(optimizer.inner_optimizer, accum_steps=...), which keeps "
                "the inner optimizer's state; or begin with the schedule accum_steps={0: 1, ...}."
            )
        with self.in_strategy(), tf.init_scope():
            self._make_sums()
        self.traces.renew(cycle_of_model)

    def in_strategy(self):
        """The scope of the strategy that the optimizer was made in, where none is entered."""
        if tf.distribute.has_strategy():
            return contextlib.nullcontext()
        return self._strategy.scope()

    def take(self, contributions, variables):
        """Takes one micro-batch, and ends the cycle if it is the last one.

        Args:
            contributions: List of `Contribution`, one for each denominator, always in one order.
                One only if there is nothing to accumulate.
            variables: List of the variables of each contribution's gradients.
        """
        self._optimizer.build(variables)
        aligned = [
            c._replace(gradients=self._trained.aligned(c.gradients, variables))
            for c in contributions
        ]
        contributions, dropped = self.policy.screen(aligned)
        self.accumulator.take(contributions, dropped, self._steps_of_next, self._update())

    def flush(self):
        """Updates with the mean over a partial cycle, if there is one. A new cycle begins."""
        with self.in_strategy():
            self.accumulator.flush(self._update())

    def drop(self):
        """Drops what a partial cycle holds, without an update."""
        with self.in_strategy():
            self.accumulator.drop()
            for follower in self._followers:
                follower.reset()

    def _no_sums(self):
        return NoSums(self._updates, self._note_trace)

    def _updates(self):
        return self._optimizer.iterations

    def _note_trace(self):
        if self._optimizer.built:
            self.traces.note()

    def _steps_of_next(self):
        return self.length.next(self._updates())

    def _make_sums(self):
        accumulator = GradientAccumulator(self._trained.variables)
        accumulator.make_groups(self.groups_to_make)
        if self._optimizer.built and self._updates().numpy():
            accumulator.steps_in_cycle.assign(1)  # the last micro-batch was a cycle
        self.accumulator = accumulator
        if isinstance(self.drops, NoDrops):
            self.drops = self.policy.new_counts()
        # A checkpoint that was restored before writes its values here.
        self._track()
        self.length.make_variable()

    def _update(self):
        return CycleUpdate(
            apply=self._apply,
            movable=self._trained.movable,
            drops=self.drops,
            loss_scaler=self.loss_scaler,
            ended=self._end_followers,
        )

    def _end_followers(self):
        for follower in self._followers:
            follower.end_cycle()

    def _apply(self, gradients):
        """Hands gradients that are summed over replicas to the inner optimizer.

        By way of the loss scaler, if there is one.
        """
        inner, scaler = self._optimizer.inner_optimizer, self.loss_scaler
        optimizer = inner if scaler is None else _keras.scaler_around(scaler, inner)
        movable, pairs = self._trained.movable, zip(gradients, self._trained.variables, strict=True)
        trained = [
            (gradient, variable)
            for i, (gradient, variable) in enumerate(pairs)
            if gradient is not None or i in movable
        ]
        if trained:
            with _keras.replicas_agree(inner), one_by_one(optimizer):
                optimizer.apply(*map(list, zip(*trained, strict=True)))


def cycle_of(optimizer):
    """The `Cycle` of an optimizer, or of the one that its loss scaler is around; None if none."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    cycle = getattr(optimizer, "_cycle", None)
    return cycle if isinstance(cycle, Cycle) else None


def cycle_of_model(model):
    """The `Cycle` of the optimizer that a model was compiled with, or None."""
    # Not `getattr`: a model wrapper looks up what it lacks on the model in it.
    return cycle_of(vars(model).get("optimizer"))
