"""Copies of layers and models, with the same state, that share nothing with the originals."""

import contextlib

import keras
import tensorflow as tf

from gradient_accumulator_tf._keras.graphs import (
    has_plain_call,
    held_layers_by_path,
    is_functional,
)
from gradient_accumulator_tf._keras.layer_pairs import paired_layers, paired_variables
from gradient_accumulator_tf._keras.layers import all_layers

_TRAINING_METHODS = (
    "train_step",
    "make_train_function",
    "train_on_batch",
    "fit",
    "compute_loss",
    "compile",
)


def copy_layer(layer):
    """A layer like `layer`, with other weights."""
    config = layer.get_config()
    if isinstance(layer, keras.layers.Lambda):
        # Its config holds the function's byte code. That lacks the values the function refers to,
        # and newer Keras refuses to load it.
        config["function"] = layer.function
        if callable(layer.mask):
            config["mask"] = layer.mask
        if isinstance(config.get("output_shape"), dict):
            config["output_shape"] = layer.compute_output_shape
        return type(layer)(**config)
    return type(layer).from_config(config)


@contextlib.contextmanager
def as_uncompiled(model):
    """Within this context a model and the models in it count as not compiled.

    Otherwise `keras.models.clone_model` of newer Keras compiles the clone too, through a config.
    """
    compiled = [v for v in all_layers(model) if getattr(v, "compiled", False)]
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

    Returns:
        The copy, and the list of pairs of variables that `carry_state` returns.

    Raises:
        ValueError: If it cannot be copied through its config.
    """
    classes = {type(layer).__name__: type(layer) for layer in all_layers(model)}
    ways = [lambda: type(model).from_config(model.get_config())]
    if is_functional(model):
        ways.insert(0, lambda: _clone(model, {}))
    errors = []
    for way in ways:
        try:
            with keras.saving.custom_object_scope(classes), as_uncompiled(model):
                copy = way()
            if type(copy) is not type(model) and not _trains_as_its_graph(model):
                raise TypeError(f"it is a {type(copy).__name__}.")
            return copy, carry_state(model, copy, x)
        except Exception as error:  # a layer's methods may raise anything
            errors.append(error)
    found = dict.fromkeys(f"{type(error).__name__}: {error}" for error in errors)
    raise ValueError(
        "The model must be one that can be copied through `get_config` and `from_config`, as it is "
        f"left alone itself. Received: {type(model).__name__} {model.name!r}, whose copy is not "
        f"like it, or fails. {' '.join(found)} Give it, or the layer in question, the two methods, "
        "or pass a function that returns the compiled model."
    ) from errors[-1]


def carry_state(old, new, x):
    """Copies weights, random states and `trainable` from a model to another of its kind.

    Args:
        old: A built model.
        new: The other one, built or not.
        x: Inputs to build it with.

    Returns:
        List of tuples (variable of `old`, variable of `new`).

    Raises:
        ValueError: If the layers or variables of the two differ, with their names.
    """
    if not new.built:
        new(tf.nest.map_structure(tf.convert_to_tensor, x))
    layers = paired_layers(old, new)
    # Setting a layer's flag sets it on all layers in it, and these may be in other layers too. So
    # it takes several rounds until all flags are right.
    for _ in layers:
        for a, b in layers:
            if a.trainable != b.trainable:
                b.trainable = a.trainable
    variables = paired_variables(layers)
    for a, b in variables:
        b.assign(a)
        if a.trainable != b.trainable:
            b.trainable = a.trainable
    return variables


def _clone(model, copies):
    """A copy of a functional model's graph, and of other layers that the model holds.

    Args:
        model: The model; its copy may be of a plainer class.
        copies: Dict of copies by the `id` of the layer. This function adds to it.
    """

    def copy_of(layer):
        if id(layer) not in copies:
            is_graph = is_functional(layer)
            copies[id(layer)] = _clone(layer, copies) if is_graph else copy_layer(layer)
        return copies[id(layer)]

    def copy_in(value):
        if isinstance(value, keras.Layer):
            return copy_of(value)
        if isinstance(value, dict):
            return {key: copy_in(item) for key, item in value.items()}
        if isinstance(value, tuple):
            items = map(copy_in, value)
            return value.__class__(*items) if hasattr(value, "_fields") else tuple(items)
        return list(map(copy_in, value)) if isinstance(value, list) else value

    clone = keras.models.clone_model(model, clone_function=copy_of)
    for name in dict.fromkeys(path[0] for path in held_layers_by_path(model)):
        if name not in vars(clone):  # set neither by Keras nor in its constructor
            setattr(clone, name, copy_in(vars(model)[name]))
    return clone


def _trains_as_its_graph(model):
    """Whether a functional model's class has no methods of its own that training calls."""
    return has_plain_call(model) and all(
        getattr(type(model), name) is getattr(keras.Model, name) for name in _TRAINING_METHODS
    )
