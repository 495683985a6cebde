"""Schedules of `accum_steps`: the micro-batches of an update as a function of the update."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gradient_accumulator_tf._checks import LARGEST_INT, check_positive_int, check_steps

if TYPE_CHECKING:
    from typing_extensions import Self

# What the argument `accum_steps` takes, for type checkers.
AccumSteps = int | Mapping[int, int] | Callable[[Any], Any]

# A schedule is called for these updates when it is given, so that mistakes show before training.
_PROBED_UPDATES = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


class AccumStepsSchedule:
    """Base class of schedules of `accum_steps`, as `LearningRateSchedule` is of learning rates.

    A subclass computes the micro-batches of an update from the number of updates before it.
    `__call__` is traced into the training step, so write it with `keras.ops` or TensorFlow. A plain
    `if` on the update becomes a conditional. Optimizer and model save the schedule with them, if it
    has a `get_config` and is registered.

    ```python
    @keras.saving.register_keras_serializable(package="my_package")
    class Doubling(AccumStepsSchedule):
        def __init__(self, every):
            self.every = every

        def __call__(self, update):
            return 2 ** keras.ops.minimum(update // self.every, 5)

        def get_config(self):
            return {"every": self.every}

    optimizer = GradientAccumulateOptimizer("adam", accum_steps=Doubling(every=1000))
    ```
    """

    def __call__(self, update: Any) -> Any:
        """Returns the micro-batches of an update.

        Args:
            update: int64 scalar tensor, the number of updates before it.

        Returns:
            Integer >= 1, or an integer scalar tensor.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `__call__(self, update)`, which returns the "
            "micro-batches that an update takes."
        )

    def get_config(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `get_config(self)` to be saved: a dict of its "
            "constructor's arguments."
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The reverse of `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class PiecewiseConstantSteps(AccumStepsSchedule):
    """A schedule of phases, each with an `accum_steps` of its own.

    `accum_steps={0: 1, 1000: 4}` is short for such a schedule.

    ```python
    steps = PiecewiseConstantSteps({0: 1, 1000: 4, 5000: 16})
    assert [int(steps(update)) for update in (0, 999, 1000, 9999)] == [1, 1, 4, 16]
    ```

    Args:
        steps: Dict of a phase's steps (integer >= 1) by its first update (integer >= 0), in any
            order. One phase must begin with update 0.

    Raises:
        TypeError: If `steps` is not a dict, or a key or value is not an integer.
        ValueError: If an update is negative, a number of steps < 1, or update 0 is missing.
    """

    def __init__(self, steps: Mapping[int, int]) -> None:
        rule = (
            "`accum_steps` as a dict must map the first update (integer >= 0) of each phase to its "
            "steps (integer >= 1)"
        )
        # Pairs, as in the config, since JSON has no integers for keys.
        phases: Any = steps
        pairs = isinstance(phases, (list, tuple)) and all(
            isinstance(phase, (list, tuple)) and len(phase) == 2 for phase in phases
        )
        if pairs:
            updates = [phase[0] for phase in phases]
            if any(updates.count(update) > 1 for update in updates):
                raise ValueError(
                    f"{rule}, each update once. Received: {steps!r}. Pass for example "
                    "{0: 1, 1000: 8}."
                )
            steps = {_hashable(update): number for update, number in phases}
        if not isinstance(steps, Mapping):
            raise TypeError(f"{rule}. Received: {steps!r}. Pass for example {{0: 1, 1000: 8}}.")
        for update in steps:
            if isinstance(update, bool) or not isinstance(update, numbers.Integral):
                raise TypeError(
                    f"{rule}. Received: the update {update!r} (of type {type(update).__name__}). "
                    "Pass for example {0: 1, 1000: 8}."
                )
        if not steps or min(steps) != 0:
            raise ValueError(
                f"{rule}, and begin with update 0. Received: accum_steps={dict(steps)!r}. Pass for "
                "example {0: 1, 1000: 8}."
            )
        if max(steps) > LARGEST_INT:
            raise ValueError(
                f"{rule}. Received: the update {max(steps)}. Pass at most {LARGEST_INT}."
            )
        self.steps = {int(update): _steps_from(update, steps) for update in sorted(steps)}

    def __call__(self, update: Any) -> Any:
        """Returns the steps of the phase that an update is in.

        Args:
            update: int64 scalar tensor, the number of updates before it.

        Returns:
            int64 scalar tensor.
        """
        begun = tf.cast(update, tf.int64) >= tf.constant(list(self.steps), tf.int64)
        phase = tf.reduce_sum(tf.cast(begun, tf.int32)) - 1
        return tf.gather(tf.constant(list(self.steps.values()), tf.int64), phase)

    def __repr__(self) -> str:
        return f"PiecewiseConstantSteps({self.steps})"

    def get_config(self) -> dict[str, Any]:
        """The phases, as pairs."""
        return {"steps": [list(phase) for phase in self.steps.items()]}


def _steps_from(update, steps):
    """The steps of the phase that begins with `update`, checked."""
    return check_positive_int(
        f"accum_steps[{update}]",
        steps[update],
        f"micro-batches per update, from update {update} on",
        f"Pass {{{update}: 1}} for a phase without accumulation.",
    )


def _hashable(update):
    return tuple(update) if isinstance(update, list) else update


def check_accum_steps(value, meaning):
    """Returns `value` as an int or as a callable, or raises if it is no number of steps.

    Args:
        value: An integer, a mapping, or a callable.
        meaning: What one step is, for the message ("micro-batches per update").

    Raises:
        TypeError: If it is of another type, or a callable that does not return an integer or
            cannot be traced.
        ValueError: If it is smaller than 1, or returns a number smaller than 1.
    """
    if isinstance(value, Mapping):
        return PiecewiseConstantSteps(value)
    if not callable(value):
        return check_steps(value, meaning)
    rule = (
        "A schedule of `accum_steps` must take the number of updates and return an integer >= 1 "
        f"({meaning})."
    )
    if isinstance(value, type):
        raise TypeError(f"{rule} Received: the class {value.__name__}. Pass an instance of it.")
    try:
        at = traced(value)
        probes = {update: at(tf.constant(update, tf.int64)) for update in _PROBED_UPDATES}
    except Exception as error:
        kind = type(error).__name__
        reason = str(error).strip().split("\n")[-1].strip().removeprefix(f"{kind}: ")
        raise TypeError(
            f"{rule} It is traced into the training step. Received: {value!r}, which raised "
            f"{kind}: {reason} Write it with keras.ops, or pass a dict such as {{0: 1, 1000: 8}}."
        ) from error
    for update, steps in probes.items():
        if not steps.dtype.is_integer or steps.shape.rank != 0:
            raise TypeError(
                f"{rule} Received: {value!r}, which returned {steps.numpy()!r} of dtype "
                f"{steps.dtype.name} and shape {steps.shape}. Cast it to an integer."
            )
        if int(steps) < 1:
            raise ValueError(
                f"{rule} Received: {value!r}, which returned {int(steps)} for update {update}. "
                "Return 1 for no accumulation."
            )
    return value


def traced(schedule):
    """A `tf.function` of an int64 scalar that returns the schedule's result as a tensor.

    AutoGraph traces the schedule once. So it does the same in a loop, in a graph and under XLA.
    """
    return tf.function(
        lambda update: tf.convert_to_tensor(schedule(update)),
        input_signature=[tf.TensorSpec((), tf.int64)],
    )


def serialize_accum_steps(value):
    """Returns an int or None as it is, and a schedule as its Keras config."""
    return (
        value
        if value is None or isinstance(value, int)
        else keras.saving.serialize_keras_object(value)
    )


def deserialize_accum_steps(config, custom_objects=None):
    """The reverse of `serialize_accum_steps`."""
    if not isinstance(config, dict) or "class_name" not in config:
        return config
    return keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)


def same_accum_steps(a, b):
    """Whether two values that `check_accum_steps` returned are the same number or schedule."""
    if a is b or a == b:
        return True
    schedules = isinstance(a, AccumStepsSchedule) and type(a) is type(b)
    return schedules and a.get_config() == b.get_config()
