"""A Keras model around another one that looks like the model in it."""

from __future__ import annotations

from typing import Any

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_keras_model
from gradient_accumulator_tf.models.twin import make_twin

# Those that take part in a training step, which is the wrapper's own.
_STEP_METHODS = (
    "train_step",
    "test_step",
    "predict_step",
    "compute_loss",
    "compute_metrics",
)


class ModelWrapper(_keras.AnswersForModel, keras.Model):
    """Base of a model that trains another one in its own way, or has a `call` of its own.

    Around a model, layers, variables and metrics are that model's own, and what is not found on the
    wrapper is looked up on it, and set on it. Where the model's class has a `fit`, a `compile` or
    another training method of its own, that is the wrapper's too: its `super().fit` ends in the
    wrapper's class, as if it were derived from it.

    Args:
        model_or_inputs: `model` or `inputs`, whichever it is; by position.
        outputs: Outputs of a functional model, as for `keras.Model`.
        inputs: Its inputs.
        model: A `keras.Model` to wrap instead: functional, Sequential or subclassed.
        **kwargs: `name`, `trainable`, `dtype` as for `keras.Model`.

    Attributes:
        model: The wrapped model; None for a subclass with its own `call`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If `model` is given together with `inputs`, `outputs` or a `call` of its own,
            or overrides a method of a training step.
    """

    def __init__(
        self,
        model_or_inputs: Any = None,
        /,
        outputs: Any = None,
        *,
        inputs: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        inputs, model = _told_apart(model_or_inputs, inputs, model)
        wrapped = _wrapped_model(type(self), inputs, outputs, model)
        if wrapped is not None:
            # Inputs reach the wrapped model as they are; it casts them, or not, by itself.
            kwargs = {"dtype": wrapped.dtype_policy, "autocast": False, **kwargs}
        super().__init__(**kwargs)
        self.model = wrapped
        if wrapped is not None:
            self.built = wrapped.built
            # Past Keras, which would track and save the twin as a layer.
            self.__dict__["_twin"] = twin = make_twin(wrapped, self)
            for name in _overridden(wrapped, _keras.trainer_methods()):
                self.__dict__[name] = getattr(twin, name)

    def call(self, inputs: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Calls the wrapped model; a subclass without one defines its own."""
        if self.model is None:
            raise NotImplementedError(
                f"{type(self).__name__} must wrap a model or define `call`. Received: neither. "
                "Pass model=..., or inputs=... and outputs=..., or override `call`."
            )
        # By their names Keras hands on what takes all others, where it builds by a symbolic call.
        args, kwargs = kwargs.pop("args", args), kwargs.pop("kwargs", kwargs)
        # Layers take `training` from the outermost call.
        return self.model(inputs, *args, **kwargs)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """As of a plain model, with the metrics that are attributes of the wrapped one."""
        return super().metrics if self.model is None else [*self._twin.metrics, *self._metrics]

    @property
    def layers(self) -> list[keras.Layer]:
        """The wrapped model's layers, or this model's own."""
        return super().layers if self.model is None else self.model.layers

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints the wrapped model's summary; arguments as for `keras.Model.summary`."""
        # The twin's, which knows the optimizer.
        shown: Any = super() if self.model is None else self._twin
        return shown.summary(*args, **kwargs)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Exports the wrapped model for inference; arguments as for `keras.Model.export`."""
        exported: Any = super() if self.model is None else self.model
        return exported.export(*args, **kwargs)

    @property
    def input_dtype(self) -> str:
        """The dtype of the wrapped model's inputs, or of inputs to a layer of this policy."""
        graph = self.model is not None and _keras.has_graph(self.model)
        dtypes = {tensor.dtype for tensor in self.model.inputs} if graph else ()
        return next(iter(dtypes)) if len(dtypes) == 1 else super().input_dtype

    def get_build_config(self) -> dict[str, Any] | None:
        """None around a model, whose own config says how it is built."""
        return super().get_build_config() if self.model is None else None

    def __getattr__(self, name):
        if not self._is_looked_up(name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._twin, name)

    def __setattr__(self, name, value):
        own = name in vars(self) or hasattr(type(self), name) or not self._is_looked_up(name)
        if own or not hasattr(self._twin, name):
            super().__setattr__(name, value)
        else:
            setattr(self._twin, name, value)

    def _is_looked_up(self, name):
        """Whether an attribute that the wrapper does not have is the wrapped model's."""
        own = name.startswith("_") or name in _keras.TRAINER_ATTRIBUTES
        return not own and "_twin" in vars(self)

    def __dir__(self):
        # Keras saves what it finds here, and is to find what is in the plain model.
        model = self.__dict__.get("model")
        if model is None:
            return super().__dir__()
        return sorted({*super().__dir__(), *dir(model)} - {"model", "_twin"})


def overridden_methods(model):
    """Names of the methods of a training step that a model's class has of its own."""
    return _overridden(model, _STEP_METHODS)


def _overridden(model, names):
    return [name for name in names if getattr(type(model), name) is not getattr(keras.Model, name)]


def _told_apart(model_or_inputs, inputs, model):
    """`inputs` and `model`, one of which may have been passed by position instead."""
    if model_or_inputs is None:
        return inputs, model
    leaves = keras.tree.flatten(model_or_inputs)
    is_inputs = all(isinstance(leaf, keras.KerasTensor) for leaf in leaves)
    name, given = ("inputs", inputs) if is_inputs else ("model", model)
    if given is not None:
        raise ValueError(
            f"`{name}` must be given once. Received: {model_or_inputs!r} as the first argument, "
            f"and {name}={given!r}. Leave one of them out."
        )
    return (model_or_inputs, model) if is_inputs else (inputs, model_or_inputs)


def _wrapped_model(cls, inputs, outputs, model):
    """The model to wrap, or None for a subclass with its own `call`."""
    functional = inputs is not None or outputs is not None
    if model is None and not functional:
        return None
    if cls.call is not ModelWrapper.call:
        raise ValueError(
            "A subclass that defines `call` must not be given a model as well. Received: "
            f"{cls.__name__} with model={model!r}, inputs={inputs!r}, outputs={outputs!r}. "
            "Leave them out, or wrap the model in a plain GradientAccumulateModel."
        )
    if model is None:
        if inputs is None or outputs is None:
            raise ValueError(
                "`inputs` and `outputs` must be given together. "
                f"Received: inputs={inputs!r}, outputs={outputs!r}. Pass both, or a whole model "
                "as model=..."
            )
        return keras.Model(inputs=inputs, outputs=outputs)
    check_keras_model(model, "Make it with keras.Model or keras.Sequential.")
    if functional:
        raise ValueError(
            "Either `model` or `inputs` and `outputs` must be given, not both. "
            f"Received: model={model!r}, inputs={inputs!r}, outputs={outputs!r}. Pass `model` "
            "alone, or `inputs` and `outputs` alone."
        )
    if isinstance(model, ModelWrapper):
        inside = " or wrap the model in it, model.model," if model.model is not None else ""
        raise ValueError(
            f"A model is not wrapped twice. Received: {type(model).__name__} {model.name!r}, which "
            f"accumulates by itself. Train it as it is,{inside} or make it anew."
        )
    overridden = overridden_methods(model)
    if overridden:
        raise ValueError(
            "A model that overrides a method of a training step cannot be wrapped, as that method "
            f"would never be called. Received: {type(model).__name__} with its own "
            f"{', '.join(overridden)}. Derive {type(model).__name__} from "
            "GradientAccumulateModel instead of keras.Model, or keep it and compile it with a "
            "GradientAccumulateOptimizer."
        )
    return model
