"""Copies of layers, optimizers and models, with the same state and no part in common."""

import contextlib

import keras
import tensorflow as tf

from gradient_accumulator_tf import _compat


def copy_layer(layer):
    """A layer like `layer`, with other weights."""
    config = layer.get_config()
    if isinstance(layer, keras.layers.Lambda):
        # Its config holds the function's byte code, which newer Keras does not load, without
        # what the function refers to.
        config["function"] = layer.function
        if callable(layer.mask):
            config["mask"] = layer.mask
        if isinstance(config.get("output_shape"), dict):
            config["output_shape"] = layer.compute_output_shape
        return type(layer)(**config)
    return type(layer).from_config(config)


def copy_optimizer(optimizer, variables):
    """A Keras optimizer for other variables of the same paths, with the same state."""
    if optimizer.built:
        return _compat.rebuilt_optimizer(optimizer, variables)
    return type(optimizer).from_config(optimizer.get_config())


@contextlib.contextmanager
def as_uncompiled(model):
    """Within this context a model, and those in it, pass for not compiled.

    `keras.models.clone_model` of newer Keras would compile the clone as well, by way of a config.
    """
    compiled = [v for v in _compat.all_layers(model) if getattr(v, "compiled", False)]
    for m in compiled:
        m.compiled = False
    try:
        yield
    finally:
        for m in compiled:
            m.compiled = True


def copy_model(model, x):
    """A model like `model`, with the same weights and random states, not compiled.

    Args:
        model: A built Keras model.
        x: Inputs to build the copy with.

    Raises:
        ValueError: If it cannot be copied through its config.
    """
    classes = {type(layer).__name__: type(layer) for layer in _compat.all_layers(model)}
    try:
        with keras.saving.custom_object_scope(classes), as_uncompiled(model):
            if _compat.is_functional(model):
                copy = keras.models.clone_model(model, clone_function=copy_layer, recursive=True)
            else:
                copy = type(model).from_config(model.get_config())
        carry_state(model, copy, x)
    except Exception as error:  # whatever a layer's methods raise
        raise ValueError(
            "The model must be one that can be copied through `get_config` and `from_config`, as "
            f"it is left alone itself. Received: {type(model).__name__} {model.name!r}, for which "
            f"Keras says {type(error).__name__}: {error} Give it, or the layer in question, the "
            "two methods, or pass a function that returns the compiled model."
        ) from error
    return copy


def carry_state(old, new, x):
    """Gives a model the weights, random states and `trainable` of another of the same kind.

    Args:
        old: A built model.
        new: The other one, built or not.
        x: Inputs to build it with.
    """
    if not _compat.is_functional(new):
        new(tf.nest.map_structure(tf.convert_to_tensor, x))
    layers = zip(_compat.all_layers(new), _compat.all_layers(old), strict=True)
    for layer, like in layers:
        if layer.trainable != like.trainable:
            layer.trainable = like.trainable
    shapes, wanted = ([tuple(v.shape) for v in m.variables] for m in (new, old))
    if shapes != wanted:
        raise ValueError(f"a model with variables of shapes {shapes}, in place of {wanted}.")
    for variable, value in zip(new.variables, old.variables, strict=True):
        variable.assign(value)
