"""What every optimizer around another one forwards to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import refuse_arguments

if TYPE_CHECKING:
    from typing_extensions import Self


F = TypeVar("F", bound=Callable[..., Any])


def as_it_is(method: F) -> F:
    """Keeps AutoGraph, in a user's function that calls `method`, from rewriting the library.

    `do_not_convert` has no type of its own: behind it a type checker knows no arguments.
    """
    return tf.autograph.experimental.do_not_convert(method)


def _owned_by_inner(name: str) -> Any:
    """A property that reads and sets `name` on the inner optimizer, which alone keeps it."""

    def get(self):
        return getattr(self.inner_optimizer, name)

    def set_(self, value):
        # The base class sets its defaults before there is an inner optimizer.
        if "inner_optimizer" in self.__dict__:
            setattr(self.inner_optimizer, name, value)

    return property(get, set_, doc=f"The inner optimizer's `{name}`.")


class OptimizerWrapper(keras.optimizers.Optimizer):
    """An optimizer whose hyperparameters, count of updates and slots are another one's.

    Args:
        optimizer: The inner optimizer, a `keras.optimizers.Optimizer`.
        name: Optional name.
        kwargs: Dict of further keyword arguments that were received; none is taken.
        example: How to pass them to the inner optimizer, for the message.
    """

    def __init__(
        self, optimizer: Any, name: str | None, kwargs: dict[str, Any], example: str
    ) -> None:
        refuse_arguments(
            type(self).__name__,
            kwargs,
            f"Pass them to the inner optimizer, where they act once per update: {example}.",
        )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = optimizer

    built: bool
    weight_decay = _owned_by_inner("weight_decay")
    clipnorm = _owned_by_inner("clipnorm")
    clipvalue = _owned_by_inner("clipvalue")
    global_clipnorm = _owned_by_inner("global_clipnorm")
    loss_scale_factor = _owned_by_inner("loss_scale_factor")
    use_ema = _owned_by_inner("use_ema")
    ema_momentum = _owned_by_inner("ema_momentum")
    ema_overwrite_frequency = _owned_by_inner("ema_overwrite_frequency")
    learning_rate = _owned_by_inner("learning_rate")

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """Keras's own accumulation, which is off; setting it is an error.

        Raises:
            ValueError: On setting it to anything but None.
        """
        return self.inner_optimizer.gradient_accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: None) -> None:
        if value is not None:
            raise ValueError(
                "`gradient_accumulation_steps` is Keras's own accumulation, which must stay off "
                f"here. Received: gradient_accumulation_steps={value!r}. Set accum_steps={value!r} "
                "on a GradientAccumulateOptimizer instead."
            )

    @property
    def iterations(self) -> keras.Variable:
        """int64 scalar variable: the number of updates, never of micro-steps."""
        return self.inner_optimizer.iterations

    @property
    def optimizers(self) -> list[Any]:
        """The inner `MultiOptimizer`'s list; callbacks look for it. AttributeError otherwise."""
        return self.inner_optimizer.optimizers

    @property
    def _model_variables_moving_average(self):
        # SwapEMAWeights looks for it in what is inside a LossScaleOptimizer.
        return _keras.moving_averages(self.inner_optimizer)

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables."""
        return self.inner_optimizer.variables

    def scale_loss(self, loss: Any) -> Any:
        """The loss, scaled as the inner optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Finalizes the inner optimizer; `fit` calls it last."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Passed on to the inner optimizer."""
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets `variables` from a list of arrays in the same order."""
        if len(weights) != len(self.variables):
            raise ValueError(
                f"`weights` must have one array for each of the optimizer's {len(self.variables)} "
                f"variables. Received: {len(weights)} arrays. Is the optimizer built?"
            )
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)

    def get_config(self) -> dict[str, Any]:
        """Config with the serialised inner optimizer."""
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """The reverse of `get_config`."""
        config = dict(config)
        config["optimizer"] = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**config)

    def __repr__(self):
        inner = self.inner_optimizer
        wrapped = repr(inner) if isinstance(inner, OptimizerWrapper) else type(inner).__name__
        arguments = [f"{name}={value!r}" for name, value in self._shown_arguments().items()]
        return f"{type(self).__name__}({', '.join([wrapped, *arguments])})"

    def _shown_arguments(self):
        """Dict of the arguments that `repr` shows."""
        return {}

    def __dir__(self):
        # Keras saves what it finds here; the inner optimizer's state is in `save_own_variables`.
        return [name for name in super().__dir__() if name != "inner_optimizer"]


def parts_of(optimizer):
    """An optimizer and all that it is made of: inner ones, and those of a `MultiOptimizer`."""
    yield optimizer
    inner = [getattr(optimizer, "inner_optimizer", None)]
    if not isinstance(optimizer, OptimizerWrapper):  # which passes on its inner one's
        inner += getattr(optimizer, "optimizers", [])
    for part in inner:
        if part is not None:
            yield from parts_of(part)


def check_does_not_accumulate(optimizer):
    """Raises ValueError if an inner optimizer, or a part of it, accumulates by itself."""
    for part in parts_of(optimizer):
        kind = type(part).__name__
        if hasattr(part, "accum_steps"):
            raise ValueError(
                f"`optimizer` must not accumulate itself. Received: a {kind} with accum_steps="
                f"{part.accum_steps}. Wrap once, with the product of the two."
            )
        if getattr(part, "gradient_accumulation_steps", None):
            raise ValueError(
                f"The inner optimizer must not accumulate itself. Received: {kind}("
                f"gradient_accumulation_steps={part.gradient_accumulation_steps}). Leave that "
                "argument out and pass accum_steps instead."
            )
        if part is not optimizer and isinstance(part, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "A LossScaleOptimizer must be outside of all others. Received: one within a "
                f"{type(optimizer).__name__}. Put it around the whole."
            )


def check_optimizer(optimizer, place):
    """The Keras optimizer that `optimizer` names, or an error that says what to pass.

    Args:
        optimizer: What the caller passed.
        place: How to put a LossScaleOptimizer outside, for the message.

    Raises:
        TypeError: If it is no Keras 3 optimizer.
        ValueError: If it is a LossScaleOptimizer.
    """
    if not isinstance(optimizer, (str, dict, keras.optimizers.Optimizer)):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        legacy = "tf_keras" in kind or "legacy" in kind or kind.startswith("tensorflow.python")
        raise TypeError(
            "`optimizer` must be a Keras 3 optimizer, its name, or its config. "
            f"Received: {optimizer!r} (of type {kind}). "
            + (
                "Optimizers of tf_keras (Keras 2), tf.compat.v1 or keras.optimizers.legacy "
                "cannot be wrapped: pass the one of the same name from `keras.optimizers`."
                if legacy
                else 'Pass for example keras.optimizers.Adam(1e-3) or "adam".'
            )
        )
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "`optimizer` must not be a LossScaleOptimizer, whose place is outside. "
            "Received: a LossScaleOptimizer around "
            f"{type(optimizer.inner_optimizer).__name__}. Put it outside: {place}, which "
            "`compile` does by itself under the mixed_float16 policy. It acts once per update "
            "all the same."
        )
    return optimizer
