"""A learning rate for another batch size: rules that act only where they are called."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import keras

from gradient_accumulator_tf._checks import check_choice, check_positive_int
from gradient_accumulator_tf.cycle.schedules import (
    AccumSteps,
    check_accum_steps,
    deserialize_accum_steps,
    serialize_accum_steps,
    traced,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Rule = Literal["linear", "sqrt"]
_EXPONENTS: dict[Rule, float] = {"linear": 1.0, "sqrt": 0.5}


@overload
def scale_learning_rate(
    learning_rate: float,
    *,
    batch_size: int,
    base_batch_size: int,
    accum_steps: int = 1,
    rule: Rule = "linear",
) -> float: ...


@overload
def scale_learning_rate(
    learning_rate: Any,
    *,
    batch_size: int,
    base_batch_size: int,
    accum_steps: AccumSteps = 1,
    rule: Rule = "linear",
) -> float | ScaledLearningRate: ...


def scale_learning_rate(
    learning_rate: Any,
    *,
    batch_size: int,
    base_batch_size: int,
    accum_steps: AccumSteps = 1,
    rule: Rule = "linear",
) -> float | ScaledLearningRate:
    """Scales a learning rate that was found at one batch size to another effective batch.

        effective batch = batch_size x accum_steps
        "linear":  learning_rate x (effective batch / base_batch_size)
        "sqrt":    learning_rate x sqrt(effective batch / base_batch_size)

    The wrappers of this package never scale a learning rate. Call this function if you want it.

    "linear" is the rule for SGD, with or without momentum (Krizhevsky, 2014; Goyal et al., 2017).
    It holds while the gradient changes little over the small steps that one large step replaces.
    Goyal et al. also warm up: they raise the rate slowly over the first epochs.

    "sqrt" keeps the variance of an update (Krizhevsky, 2014). It is the rule for Adam and RMSprop
    (Malladi et al., 2022). There three other arguments change too, if the batch is r times as
    large: multiply `1 - beta_1` and `1 - beta_2` by r, and divide `epsilon` by sqrt(r).

    Both rules fail if the batch is large enough.

    ```python
    # 0.1 was found with batches of 256 examples; this optimizer updates with 8 x 128.
    learning_rate = scale_learning_rate(0.1, batch_size=128, accum_steps=8, base_batch_size=256)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(learning_rate), accum_steps=8)
    ```

    Args:
        learning_rate: The rate to scale: a number, a scalar variable such as
            `optimizer.learning_rate`, or a `keras.optimizers.schedules.LearningRateSchedule`.
        batch_size: Integer >= 1, the examples of a batch that `fit` is given, over all replicas.
        base_batch_size: Integer >= 1, the effective batch that `learning_rate` was found with.
        accum_steps: The batches per update: an integer >= 1, or a schedule as for
            `GradientAccumulateOptimizer`. The learning rate follows a schedule. The default is 1,
            for a batch that is an update, as with `micro_batch_size`.
        rule: "linear" (default) or "sqrt".

    Returns:
        A float; a `ScaledLearningRate` if `learning_rate` or `accum_steps` is a schedule.

    Raises:
        TypeError: If `learning_rate` is neither a number nor a schedule, or a size is not an
            integer.
        ValueError: If a size is < 1, the learning rate is negative, or the rule is another one.

    References:
        - [Krizhevsky, 2014](https://arxiv.org/abs/1404.5997), One weird trick for parallelizing
          convolutional neural networks.
        - [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), Accurate, large minibatch SGD:
          training ImageNet in 1 hour.
        - [Malladi et al., 2022](https://arxiv.org/abs/2205.10287), On the SDEs and scaling rules
          for adaptive gradient algorithms.
    """
    scaled = ScaledLearningRate(
        learning_rate,
        batch_size=batch_size,
        base_batch_size=base_batch_size,
        accum_steps=accum_steps,
        rule=rule,
    )
    if isinstance(scaled.learning_rate, float) and isinstance(scaled.accum_steps, int):
        return scaled.learning_rate * scaled.factor(scaled.accum_steps)
    return scaled


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class ScaledLearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of the learning rate, scaled to another batch size.

    `scale_learning_rate` returns it if the learning rate or `accum_steps` is a schedule. It has
    the formulas.

    ```python
    decay = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=1000)
    rate = ScaledLearningRate(decay, batch_size=128, accum_steps=8, base_batch_size=256)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(rate), accum_steps=8)
    ```

    Args:
        learning_rate: Number or schedule that was found at `base_batch_size`.
        batch_size: Integer >= 1, the examples of a batch that `fit` is given.
        base_batch_size: Integer >= 1, the effective batch that `learning_rate` was found with.
        accum_steps: Integer >= 1, the batches per update, or a schedule of it.
        rule: "linear" (default) or "sqrt".

    Raises:
        TypeError: If `learning_rate` is neither a number nor a schedule, or a size is not an
            integer.
        ValueError: If a size is < 1, the learning rate is negative, or the rule is another one.
    """

    def __init__(
        self,
        learning_rate: Any,
        *,
        batch_size: int,
        base_batch_size: int,
        accum_steps: AccumSteps = 1,
        rule: Rule = "linear",
    ) -> None:
        self.learning_rate = _checked_learning_rate(learning_rate)
        self.batch_size = check_positive_int(
            "batch_size",
            batch_size,
            "examples per batch",
            "Pass the batch_size that fit is given.",
        )
        self.base_batch_size = check_positive_int(
            "base_batch_size",
            base_batch_size,
            "examples that the learning rate was found with",
            "Pass the batch size that the learning rate is for, such as base_batch_size=32.",
        )
        self.accum_steps = check_accum_steps(accum_steps, "batches per update")
        check_choice("rule", rule, tuple(_EXPONENTS))
        self.rule = rule
        self._steps_at = traced(self.accum_steps) if callable(self.accum_steps) else None

    def factor(self, accum_steps: Any) -> Any:
        """The factor of the learning rate for `accum_steps` batches per update."""
        return (accum_steps * (self.batch_size / self.base_batch_size)) ** _EXPONENTS[self.rule]

    def __call__(self, step: Any) -> Any:
        """The learning rate of an update, a scalar tensor.

        Args:
            step: Integer scalar, the number of updates before that one.
        """
        rate, steps = self.learning_rate, self.accum_steps
        if callable(rate):
            rate = rate(step)
        if self._steps_at is not None:
            steps = self._steps_at(keras.ops.cast(step, "int64"))
        rate = keras.ops.convert_to_tensor(rate, "float32") if isinstance(rate, float) else rate
        return rate * keras.ops.cast(self.factor(keras.ops.cast(steps, "float32")), rate.dtype)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        rate = self.learning_rate
        if not isinstance(rate, float):
            rate = keras.saving.serialize_keras_object(rate)
        return {
            "learning_rate": rate,
            "batch_size": self.batch_size,
            "base_batch_size": self.base_batch_size,
            "accum_steps": serialize_accum_steps(self.accum_steps),
            "rule": self.rule,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The reverse of `get_config`."""
        config = {**config, "accum_steps": deserialize_accum_steps(config["accum_steps"])}
        if isinstance(config["learning_rate"], dict):
            config["learning_rate"] = keras.saving.deserialize_keras_object(config["learning_rate"])
        return cls(**config)


def _checked_learning_rate(value):
    """A number or variable as a float, or a schedule as it is."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    rule = "`learning_rate` must be a number >= 0, a scalar variable, or a LearningRateSchedule."
    if isinstance(value, (bool, str)) or callable(value):
        raise TypeError(f"{rule} Received: {value!r}. Pass for example 0.1.")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{rule} Received: {value!r}. Pass for example 0.1.") from error
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{rule} Received: {value!r}. Pass for example 0.1.")
    return number
