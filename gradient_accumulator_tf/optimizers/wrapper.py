"""What every optimizer around another one forwards to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import refuse_arguments
from gradient_accumulator_tf.optimizers.inner import check_does_not_accumulate, checked_optimizer
from gradient_accumulator_tf.replicated.replicas import check_made_under
from gradient_accumulator_tf.replicated.variables import outside_of_tracing

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
        optimizer: The inner optimizer: a `keras.optimizers.Optimizer`, its name, or its config.
        name: Optional name.
        kwargs: Dict of further keyword arguments that were received. None is accepted.

    Raises:
        TypeError: If `optimizer` is not a Keras 3 optimizer.
        ValueError: If the inner optimizer accumulates or scales losses, or `kwargs` is not empty.
    """

    def __init__(self, optimizer: Any, name: str | None, kwargs: dict[str, Any]) -> None:
        own = type(self).__name__
        optimizer = checked_optimizer(optimizer, own)
        check_does_not_accumulate(optimizer)
        refuse_arguments(
            own,
            kwargs,
            "Pass them to the inner optimizer, where they act once per update: "
            f"{own}(keras.optimizers.Adam(clipnorm=1.0), ...).",
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

    def build(self, variables: Iterable[Any]) -> None:
        """Creates the inner optimizer's variables, and those of this one.

        Args:
            variables: List of the trainable variables, Keras's or TensorFlow's.

        Raises:
            ValueError: If the inner optimizer accumulates, or was made under another strategy.
        """
        if self.built:
            return
        variables = list(variables)
        if not variables:
            return  # as where Keras loads a legacy HDF5 file, before it knows of any
        check_made_under(tf.distribute.get_strategy(), self.inner_optimizer)
        check_does_not_accumulate(self.inner_optimizer)
        self._check_variables(variables)
        with outside_of_tracing():
            if not self.inner_optimizer.built:
                self.inner_optimizer.build(variables)
        self._trainable_variables = variables
        self._make_variables(variables)
        self.built = True

    def _check_variables(self, variables):
        """Raises an error if the optimizer cannot be built for a list of variables."""

    def _make_variables(self, variables):
        """Creates the variables that the inner optimizer does not have."""

    def _given_or_known(self, variables):
        """List of `variables`; if it is None, of those that the optimizer was built with."""
        if variables is not None:
            return list(variables)
        if self.built:
            return self._trainable_variables
        raise ValueError(
            "The optimizer must be built before `apply` is called without "
            "`trainable_variables`. Received: gradients only. Pass the variables, or "
            "call `optimizer.build(model.trainable_variables)` first."
        )

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """`apply` for pairs of (gradient, variable); returns `iterations`."""
        return self._apply_pairs(grads_and_vars)

    def _apply_pairs(self, grads_and_vars, **arguments):
        """`apply_gradients`, with further arguments of `apply`."""
        gradients, variables = zip(*grads_and_vars, strict=True)
        self.apply(gradients, variables, **arguments)
        return self.iterations

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

    def save_own_variables(self, store: Any) -> None:
        """Writes the inner optimizer's state as it would itself."""
        self.inner_optimizer.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what this optimizer or its inner optimizer wrote."""
        self.inner_optimizer.load_own_variables(store)

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
