"""Copies of layers and models, with the same state and no part in common."""

import contextlib

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._keras.layer_pairs import paired_layers, paired_variables

_RUN_IN_TRAINING = (
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
        # Its config holds the function's byte code, which newer Keras does not load, without
        # what the function refers to.
        config["function"] = layer.function
        if callable(layer.mask):
            config["mask"] = layer.mask
        if isinstance(config.get("output_shape"), dict):
            config["output_shape"] = layer.compute_output_shape
        return type(layer)(**config)
    return type(layer).from_config(config)


@contextlib.contextmanager
def as_uncompiled(model):
    """Within this context a model, and those in it, pass for not compiled.

    `keras.models.clone_model` of newer Keras would compile the clone as well, by way of a config.
    """
    compiled = [v for v in _keras.all_layers(model) if getattr(v, "compiled", False)]
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
        The copy, and what `carry_state` returns.

    Raises:
        ValueError: If it cannot be copied through its config.
    """
    classes = {type(layer).__name__: type(layer) for layer in _keras.all_layers(model)}
    ways = [lambda: type(model).from_config(model.get_config())]
    if _keras.is_functional(model):
        ways.insert(0, lambda: _clone(model, {}))
    errors = []
    for way in ways:
        try:
            with keras.saving.custom_object_scope(classes), as_uncompiled(model):
                copy = way()
            if type(copy) is not type(model) and not _trains_as_its_graph(model):
                raise TypeError(f"it is a {type(copy).__name__}.")
            return copy, carry_state(model, copy, x)
        except Exception as error:  # whatever a layer's methods raise
            errors.append(error)
    found = dict.fromkeys(f"{type(error).__name__}: {error}" for error in errors)
    raise ValueError(
        "The model must be one that can be copied through `get_config` and `from_config`, as it is "
        f"left alone itself. Received: {type(model).__name__} {model.name!r}, whose copy is not "
        f"like it, or fails. {' '.join(found)} Give it, or the layer in question, the two methods, "
        "or pass a function that returns the compiled model."
    ) from errors[-1]


def carry_state(old, new, x):
    """Gives a model the weights, random states and `trainable` of another of the same kind.

    Args:
        old: A built model.
        new: The other one, built or not.
        x: Inputs to build it with.

    Returns:
        List of tuples (variable of `old`, variable of `new`).

    Raises:
        ValueError: If the two have not the same layers and variables, with their names.
    """
    if not new.built:
        new(tf.nest.map_structure(tf.convert_to_tensor, x))
    layers = paired_layers(old, new)
    # A layer's flag is set on all that is in it, and what is in it may be in others as well.
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
    """A copy of a functional model's graph, and of the layers that it holds beside it.

    Args:
        model: The model; its copy may be of a plainer class.
        copies: Dict of copies by the `id` of the layer, which is added to.
    """

    def copy_of(layer):
        if id(layer) not in copies:
            is_graph = _keras.is_functional(layer)
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
    for name in dict.fromkeys(path[0] for path in _keras.held_layers_by_path(model)):
        if name not in vars(clone):  # neither Keras's own nor set in its constructor
            setattr(clone, name, copy_in(vars(model)[name]))
    return clone


def _trains_as_its_graph(model):
    """Whether a functional model's class adds nothing that training runs."""
    return _keras.is_plain_functional(model) and all(
        getattr(type(model), name) is getattr(keras.Model, name) for name in _RUN_IN_TRAINING
    )
