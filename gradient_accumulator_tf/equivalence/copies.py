"""Copies of a compiled model, which are trained in its place."""

import contextlib
import inspect
import warnings
from collections.abc import Container
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_keras_model
from gradient_accumulator_tf._keras.model_copies import carry_state, copy_model
from gradient_accumulator_tf.cycle.coupling import CoupledLossWarning
from gradient_accumulator_tf.models.accumulate import GradientAccumulateModel
from gradient_accumulator_tf.optimizers.accumulate import GradientAccumulateOptimizer


class Copy(NamedTuple):
    """A compiled copy of the checked model.

    Attributes:
        model: The copy.
        pairs: List of tuples (variable of the checked model, the same of the copy).
        sparse: Paths of the copy's variables that sparse gradients were seen of, in a dict or
            another container; empty if nobody looks.
    """

    model: Any
    pairs: list
    sparse: Container[str] = ()

    def values_of(self, variables):
        """What the copy has in place of variables of the checked model, as arrays."""
        twins = {id(a): b for a, b in self.pairs}
        return [twins[id(v)].numpy() for v in variables]

    def moved(self):
        """The checked model's variables that have another value in the copy."""
        return [a for a, b in self.pairs if np.any(a.numpy() != b.numpy())]

    def got_sparse_gradients(self):
        """Paths of the checked model's variables whose gradients were seen to be sparse."""
        return tuple(a.path for a, b in self.pairs if b.path in self.sparse)

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


class Copies:
    """Makes copies of a compiled model, with its weights, optimizer state and random states.

    Args:
        model: The compiled and built model.
        make: The function that it comes from, or None.
    """

    def __init__(self, model, make):
        self._model, self._make = model, make
        self._compiled = _keras.compile_arguments(model)

    def new_model(self, x):
        """A copy that is not compiled, without a GradientAccumulateModel around it; and its pairs.

        Args:
            x: Inputs to build it with.

        Raises:
            ValueError: If the model cannot be copied.
        """
        if self._make is None:
            copy, pairs = copy_model(_unwrapped(self._model), x)
        else:
            with _no_word_of_coupled_losses():
                copy = _unwrapped(self._make())
            try:
                pairs = carry_state(_unwrapped(self._model), copy, x)
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

    def new_optimizer(self, pairs):
        """A copy of the optimizer, without what accumulates or scales the loss around it.

        Args:
            pairs: As `new_model` returned them.

        Raises:
            ValueError: If the optimizer cannot be copied.
        """
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

    def compiled(self, copy, pairs, optimizer):
        """The `Copy`, compiled as the model is, with another optimizer.

        Args:
            copy: What `new_model` returned, or that in a GradientAccumulateModel.
            pairs: The same.
            optimizer: What `new_optimizer` returned, or that in a GradientAccumulateOptimizer.

        Raises:
            ValueError: If the model's `compile` takes other arguments than Keras's.
        """
        arguments = {
            **self._compiled,
            "optimizer": self._scaling(optimizer),
            "steps_per_execution": 1,
        }
        with _no_word_of_coupled_losses():
            if self._make is None:
                _check_takes(copy.compile, type(copy).__name__, arguments)
                copy.compile(**arguments)
            else:
                # The function compiled it, with what a `compile` of its own takes.
                wraps = isinstance(copy, GradientAccumulateModel)
                (GradientAccumulateModel if wraps else keras.Model).compile(copy, **arguments)
        return Copy(copy, pairs)

    def _scaling(self, optimizer):
        """The optimizer within a loss scaler like the model's, if it has one."""
        scaler = self._model.optimizer
        if not isinstance(scaler, keras.optimizers.LossScaleOptimizer):
            return optimizer
        # It starts with the scale that the model's has come to.
        scale = scaler.dynamic_scale if scaler.built else scaler.initial_scale
        return keras.optimizers.LossScaleOptimizer(
            optimizer,
            initial_scale=float(tf.convert_to_tensor(scale)),
            dynamic_growth_steps=scaler.dynamic_growth_steps,
        )


@contextlib.contextmanager
def _no_word_of_coupled_losses():
    """Hides the warning of losses that couple examples, since the report names them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoupledLossWarning)
        yield


def _check_takes(function, owner, arguments):
    """Raises ValueError if a model's `compile` does not take these arguments."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            "A model whose `compile` takes other arguments than Keras's must come from a "
            f"function that compiles it. Received: {owner}.compile, which says: {error}. Pass a "
            "function that returns the compiled model in its place."
        ) from error


def _unwrapped(model):
    """The model in a GradientAccumulateModel; any other model itself."""
    wraps = isinstance(model, GradientAccumulateModel) and model.model is not None
    return model.model if wraps else model


def check_model(model):
    """Raises unless `model` is one that can be copied and trained.

    Raises:
        TypeError: If it is not a Keras model.
        ValueError: If it is not compiled, with one optimizer, or not built, or on replicas.
    """
    check_keras_model(
        model,
        "Pass the model itself, as it was given to `model.compile`, or a function of no arguments "
        "that returns it.",
        kind="a compiled Keras 3 model, or a function that returns one",
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
