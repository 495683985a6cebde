"""The copies of a model that check_equivalence trains: on large batches, and accumulated."""

import inspect
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_positive_int
from gradient_accumulator_tf._keras.model_copies import carry_state, copy_model
from gradient_accumulator_tf.models.accumulate import GradientAccumulateModel
from gradient_accumulator_tf.models.wrapper import overridden_methods
from gradient_accumulator_tf.optimizers.accumulate import (
    GradientAccumulateOptimizer,
    accumulating_optimizer,
)

_WRAPPERS = {"model": "GradientAccumulateModel", "optimizer": "GradientAccumulateOptimizer"}


class Copy(NamedTuple):
    """A compiled copy of the checked model.

    Attributes:
        model: The copy.
        pairs: List of tuples (variable of the checked model, the same of the copy).
    """

    model: Any
    pairs: list

    def values_of(self, variables):
        """What the copy has in place of variables of the checked model, as arrays."""
        twins = {id(a): b for a, b in self.pairs}
        return [twins[id(v)].numpy() for v in variables]

    def moved(self):
        """The checked model's variables that have another value in the copy."""
        return [a for a, b in self.pairs if np.any(a.numpy() != b.numpy())]

    def updates(self):
        """How many updates its optimizer has made."""
        return int(tf.convert_to_tensor(_keras.innermost(self.model.optimizer).iterations))

    def state(self):
        """The values of all its variables and its optimizer's; the reverse of `set_state`."""
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        return [v.numpy() for v in self._variables()]

    def set_state(self, values):
        """Takes what `state` returned."""
        for variable, value in zip(self._variables(), values, strict=True):
            variable.assign(value)

    def _variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]


# What an argument counts, and what to pass in place of a number below 1.
_ARGUMENTS = {
    "micro_batch_size": (
        "examples per micro-batch",
        "Pass fewer examples than an effective batch has, such as micro_batch_size=8.",
    ),
    "accum_steps": (
        "micro-batches per update",
        "Pass accum_steps=2 or more, into which the effective batch can be divided.",
    ),
}


class Way:
    """How a model accumulates: makes the copy that does, and the one for the large batch.

    Args:
        model: The compiled and built model.
        make: The function that it comes from, or None.
        micro_batch_size: As for `check_equivalence`.
        accum_steps: As for `check_equivalence`.

    Attributes:
        wrapper: "model" or "optimizer".
        has_own_step: Whether the model has a `train_step` of its own.
        calls_optimizer: Whether Keras's or that step hands its gradients to an optimizer that
            accumulates, and takes the "mean" or "sum" of a cycle.
        reduction: Which of the two.

    Raises:
        ValueError: If not exactly one way to accumulate is given, or none for this model.
    """

    def __init__(self, model, make, micro_batch_size, accum_steps):
        self._model, self._make = model, make
        self._compiled = _keras.compile_arguments(model)
        self._arguments = {"micro_batch_size": micro_batch_size, "accum_steps": accum_steps}
        given = [name for name, value in self._arguments.items() if value is not None]
        received = f"micro_batch_size={micro_batch_size!r}, accum_steps={accum_steps!r}"
        self._own = accumulating_optimizer(model.optimizer)
        self._is_wrapped = isinstance(model, GradientAccumulateModel)
        if self._is_wrapped or self._own is not None:
            if given:
                raise ValueError(
                    "A model that accumulates by itself is checked as it is. Received: "
                    f"{received}. Leave them out, or pass the model without its wrapper."
                )
            owner = model if self._is_wrapped else self._own
            self._arguments = {
                "micro_batch_size": getattr(owner, "micro_batch_size", None),
                "accum_steps": owner.accum_steps,
            }
            if not isinstance(self._arguments["accum_steps"], int | None):
                raise ValueError(
                    "A schedule of accum_steps cannot be checked as a whole. Received: "
                    f"accum_steps={owner.accum_steps!r}. Pass a copy with an integer."
                )
        elif len(given) != 1:
            raise ValueError(
                "Exactly one of `micro_batch_size` and `accum_steps` must be given. Received: "
                f"{received}."
            )
        else:
            (name,) = given
            meaning, instead = _ARGUMENTS[name]
            check_positive_int(name, self._arguments[name], meaning, instead)
        overridden = overridden_methods(model)
        by_optimizer = self._own is not None or overridden
        self.wrapper = "model" if self._is_wrapped or not by_optimizer else "optimizer"
        if self.wrapper == "optimizer" and micro_batch_size is not None:
            raise ValueError(
                "A model that overrides a training method accumulates with the optimizer, across "
                f"calls. Received: micro_batch_size={micro_batch_size} for "
                f"{type(model).__name__} with its own {', '.join(overridden)}. Pass accum_steps."
            )
        steps = (keras.Model.train_step, GradientAccumulateModel.train_step)
        self.has_own_step = type(model).train_step not in steps
        self.calls_optimizer = self.wrapper == "optimizer" or self.has_own_step
        self.reduction = "mean" if self._own is None else self._own.reduction

    def setting(self, size, updates):
        """What is compared, in words."""
        arguments = ", ".join(f"{k}={v}" for k, v in self._arguments.items() if v is not None)
        return (
            f"{_WRAPPERS[self.wrapper]}({arguments}) against the large batch of {size}, "
            f"{updates} update{'s' if updates > 1 else ''}"
        )

    def batch_size(self, size):
        """What `fit` takes at a time of an effective batch.

        Raises:
            ValueError: If an effective batch is not cut into several micro-batches, all of
                `accum_steps` alike.
        """
        micro, steps = self._arguments["micro_batch_size"], self._arguments["accum_steps"]
        rule = "or nothing is accumulated, and there is nothing to compare. Received:"
        if micro is not None:
            if micro >= size:
                smaller = f"micro_batch_size={size // 2}" if size > 1 else "more examples"
                raise ValueError(
                    f"`micro_batch_size` must be smaller than the effective batch, {rule} "
                    f"micro_batch_size={micro} for an effective batch of {size}. Pass {smaller}"
                    f"{' or less, or a larger batch' if size > 1 else ''}."
                )
            return size
        if steps == 1:
            raise ValueError(
                f"`accum_steps` must be at least 2, {rule} accum_steps=1 for an effective batch of "
                f"{size}. Pass accum_steps=2 or more, or a model that was given it."
            )
        if size % steps:
            raise ValueError(
                "`batch_size` must be a multiple of `accum_steps`. Received: "
                f"batch_size={size}, accum_steps={steps}. Pass a batch_size such as "
                f"{max(size // steps, 1) * steps}."
            )
        return size // steps

    def large(self, x):
        """The `Copy` for large batches; built with `x`."""
        copy, pairs = self._copy(x)
        optimizer = self._optimizer(pairs)
        if isinstance(copy, GradientAccumulateModel):
            # A subclass with methods of its own: in one piece.
            if copy.micro_batch_size is None:
                copy.accum_steps = 1
            else:
                copy.micro_batch_size = np.iinfo("int32").max
        if self._own is not None and self.has_own_step:
            # Its step may pass weights, or ask for what a plain optimizer does not have.
            optimizer = self._accumulating(optimizer, accum_steps=1)
        return self._compile(copy, optimizer, pairs)

    def accumulated(self, x, reduction=None):
        """The `Copy` that accumulates, with another reduction if one is given."""
        copy, pairs = self._copy(x)
        optimizer = self._optimizer(pairs)
        if self._own is not None or self.wrapper == "optimizer":
            optimizer = self._accumulating(optimizer, reduction=reduction or self.reduction)
        if self.wrapper == "model" and not self._is_wrapped:
            copy = GradientAccumulateModel(model=copy, **self._arguments)
        elif self._is_wrapped and self._model.model is not None:
            config = {**self._model.get_config(), **self._arguments, "model": copy}
            copy = type(self._model)(**config)
        return self._compile(copy, optimizer, pairs)

    def _accumulating(self, optimizer, **changed):
        """An optimizer that accumulates as the model's does, or by `accum_steps`."""
        config = {"accum_steps": self._arguments["accum_steps"]}
        if self._own is not None:
            config = {k: v for k, v in self._own.get_config().items() if k != "optimizer"}
        return GradientAccumulateOptimizer(optimizer, **{**config, **changed})

    def _copy(self, x):
        """A copy of the model, without a GradientAccumulateModel around it, and its pairs."""

        def inner(model):
            wrapped = isinstance(model, GradientAccumulateModel) and model.model is not None
            return model.model if wrapped else model

        if self._make is None:
            copy, pairs = copy_model(inner(self._model), x)
        else:
            copy = inner(self._make())
            try:
                pairs = carry_state(inner(self._model), copy, x)
            except ValueError as error:
                raise ValueError(
                    "A function must return the same model each time, but for its weights. "
                    f"Received: two of {type(copy).__name__} that differ: {error} Let it take no "
                    "layers from outside, and draw nothing but weights."
                ) from error
        known = {id(v) for v, _ in pairs}
        lost = [v.path for v in self._model.variables if id(v) not in known]
        if lost:
            raise ValueError(
                "A GradientAccumulateModel around a model must have no variables beside it, to be "
                f"copied. Received: {', '.join(lost)}. Put their layers into the model in it."
            )
        return copy, pairs

    def _optimizer(self, pairs):
        """A copy of the innermost optimizer, which no wrapper is around."""
        optimizer = self._model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        if isinstance(optimizer, GradientAccumulateOptimizer):
            optimizer = optimizer.inner_optimizer
        try:
            return _keras.copied_optimizer(optimizer, pairs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "The optimizer must be one that can be copied through its config for the model's "
                f"variables. Received: {type(optimizer).__name__}: {error} Compile the model again "
                "with a new one."
            ) from error

    def _compile(self, copy, optimizer, pairs):
        scaler = self._model.optimizer
        if isinstance(scaler, keras.optimizers.LossScaleOptimizer):
            # It starts with the scale that the model's has come to.
            scale = scaler.dynamic_scale if scaler.built else scaler.initial_scale
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer,
                initial_scale=float(tf.convert_to_tensor(scale)),
                dynamic_growth_steps=scaler.dynamic_growth_steps,
            )
        compiled = {**self._compiled, "optimizer": optimizer, "steps_per_execution": 1}
        base = GradientAccumulateModel if isinstance(copy, GradientAccumulateModel) else keras.Model
        if self._make is not None:
            # The function compiled it, with what a `compile` of its own takes.
            base.compile(copy, **compiled)
            return Copy(copy, pairs)
        try:
            inspect.signature(copy.compile).bind(**compiled)
        except TypeError as error:
            raise ValueError(
                "A model whose `compile` takes other arguments than Keras's must come from a "
                f"function that compiles it. Received: {type(copy).__name__}.compile, which says: "
                f"{error}. Pass a function that returns the compiled model in its place."
            ) from error
        copy.compile(**compiled)
        return Copy(copy, pairs)


def check_model(model):
    """Raises unless `model` is one that can be copied and trained.

    Raises:
        TypeError: If it is not a Keras model.
        ValueError: If it is not compiled, with one optimizer, or not built, or on replicas.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a compiled Keras 3 model, or a function that returns one. "
            f"Received: {model!r} (of type {type(model).__name__}). Pass the model that `fit` "
            "trains, or a function of no arguments that makes it."
        )
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled, so that its copies can be trained. Received: "
            f"{type(model).__name__} {model.name!r}, which is not. Call "
            "model.compile(optimizer, loss) first."
        )
    known, optimizer = [], model.optimizer
    while optimizer is not None:
        known.append(optimizer)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    others = [
        name
        for name, value in vars(model).items()
        if isinstance(value, keras.optimizers.Optimizer) and all(value is not o for o in known)
    ]
    if others:
        raise ValueError(
            "`model` must train with `model.optimizer` alone, which `check_equivalence` puts a "
            f"wrapper around. Received: {type(model).__name__} {model.name!r} with the optimizers "
            f"{', '.join(others)}. Train two such models yourself, one with a "
            "GradientAccumulateOptimizer around each of these, and compare their weights."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built, so that its copies start with its weights. Received: "
            f"{type(model).__name__} {model.name!r}, which is not. Give it a keras.Input, or call "
            "it on some inputs first."
        )
    if model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "`model` must be made outside of a strategy, as `check_equivalence` trains on one "
            f"device. Received: a model on {model.distribute_strategy.num_replicas_in_sync} "
            "replicas. Check one that is made in the same way outside of the scope."
        )
