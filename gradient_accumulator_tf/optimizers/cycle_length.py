"""How many micro-batches a cycle takes: a number that can be set, or a schedule of it."""

from collections.abc import Mapping

import tensorflow as tf

from gradient_accumulator_tf._checks import check_steps
from gradient_accumulator_tf.cycle.schedules import traced
from gradient_accumulator_tf.replicated.variables import counter


class CycleLength:
    """`accum_steps` of an optimizer.

    A checkpoint does not look into this object, so that it neither saves nor needs its variable.

    Args:
        accum_steps: Integer or callable, as `check_accum_steps` returns it.

    Attributes:
        is_schedule: Whether it is a schedule, which cannot be set.
    """

    def __init__(self, accum_steps):
        self._steps = self._first = accum_steps
        self.is_schedule = callable(accum_steps)
        self._at = traced(accum_steps) if self.is_schedule else None
        self._next = None

    @property
    def accum_steps(self):
        """The integer or the schedule."""
        if self._next is None:
            return self._steps
        with tf.init_scope():
            return int(self._next.numpy())

    @property
    def set_by_hand(self):
        """`accum_steps`, if it is a number that the constructor was not given; or None."""
        steps = self.accum_steps
        return None if self.is_schedule or steps == self._first else steps

    def checked(self, value, owner):
        """What `accum_steps` may be set to.

        Args:
            value: What the user sets.
            owner: Name of the optimizer's class, for the message.

        Raises:
            TypeError: If it is no integer, or would take the place of a schedule.
            ValueError: If it is smaller than 1.
        """
        if self.is_schedule or callable(value) or isinstance(value, Mapping):
            raise TypeError(
                "`accum_steps` can be set to an integer, if it was one: a schedule is for the "
                f"constructor. Received: accum_steps={value!r}, in place of {self._steps!r}. "
                f"Compile with {owner}(optimizer.inner_optimizer, accum_steps=...), "
                "which keeps the inner optimizer's state."
            )
        return check_steps(value, "micro-batches per update")

    def set(self, steps):
        """Sets an integer. It holds from the next cycle on, without a new trace."""
        self._steps = steps
        if self._next is not None:
            self._next.assign(steps)

    def make_variable(self):
        """Keeps the integer in a variable, which functions that are traced from now on read."""
        if not self.is_schedule and self._next is None:
            self._next = counter("accum_steps", self._steps)

    def next(self, updates):
        """int64 scalar tensor: the micro-batches of a cycle that begins now.

        Args:
            updates: int scalar variable, the updates so far.
        """
        if not self.is_schedule:
            return self._next.value()
        steps = self._at(tf.cast(tf.convert_to_tensor(updates), tf.int64))
        # A schedule that was at least 1 where it was probed may not be so everywhere.
        return tf.maximum(tf.cast(steps, tf.int64), 1)
