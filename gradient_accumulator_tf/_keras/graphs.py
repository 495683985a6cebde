"""Functional graphs, and the layers that a model or layer holds."""

from typing import Any, NamedTuple

import keras

from gradient_accumulator_tf._keras.layers import keras_mask, sublayers


def is_functional(model):
    """Whether a model is a graph of layers that `clone_model` can rebuild.

    `keras.src.models.functional.Functional`. A Sequential model counts too.
    """
    from keras.src.models.functional import Functional

    return isinstance(model, (Functional, keras.Sequential))


def has_graph(model):
    """Whether a functional or Sequential model is a graph of layers by now.

    `Sequential._functional`. Keras makes no graph of a Sequential model before it is built, nor if
    its inputs are nested or a layer of it raises NotImplementedError for symbolic tensors. Such a
    model is built all the same, and calls its layers one after the other.
    """
    return is_functional(model) and _functional(model) is not None


def _functional(model):
    return model._functional if isinstance(model, keras.Sequential) else model


def own_attributes(model, plain):
    """Dict of the attributes that a functional model has and a plain one has not.

    Args:
        model: A functional or Sequential model of a class of its own.
        plain: A model of Keras's class. Its attributes are those that Keras itself sets.
    """
    compiled = keras.Sequential([keras.Input((1,))])
    compiled.compile("sgd", "mse")
    fitted = ("history", "stop_training", "_eval_epoch_iterator")
    kept = {*vars(plain), *vars(compiled), *fitted}
    return {
        name: value
        for name, value in vars(model).items()
        if name not in kept and not name.startswith("_self_")
    }


def become(model, cls, attributes, layers):
    """Makes a functional model one of a subclass of its class, without calling a constructor.

    Attributes are set past `Layer.__setattr__`, because a built layer accepts no new layers. The
    order of `Layer._layers` is the order of the weights. The constructor would have made it.

    Args:
        model: The model.
        cls: The subclass.
        attributes: Dict of the attributes to add.
        layers: List of the layers in their order.
    """
    model.__class__ = cls
    vars(model).update(attributes)
    model._layers[:] = layers


def is_plain_functional(layer):
    """Whether a layer is a graph of layers that Keras's own `call` runs."""
    return has_graph(layer) and has_plain_call(layer)


def has_plain_call(layer):
    """Whether a layer is a functional or Sequential model with Keras's own `call`.

    `keras.src.models.functional.Functional`.
    """
    from keras.src.models.functional import Functional

    return is_functional(layer) and type(layer).call in (Functional.call, keras.Sequential.call)


class GraphNode(NamedTuple):
    """One call in a functional model. Tensors are identified by their `id`.

    Attributes:
        operation: The layer or operation that is called.
        fill_in: Function that takes a dict of tensors and returns args and kwargs of the call.
        inputs: List of ids.
        outputs: List of ids.
        has_mask: Whether an input or output has a mask.
    """

    operation: Any
    fill_in: Any
    inputs: list
    outputs: list
    has_mask: bool


class Graph(NamedTuple):
    """The calls of a functional model, in the order in which it makes them.

    Attributes:
        inputs: List of ids of tensors.
        nodes: List of `GraphNode`.
        outputs: List of ids of tensors.
    """

    inputs: list
    nodes: list
    outputs: list


def graph_of(model):
    """The `Graph` of a functional or Sequential model that has one.

    `Function._nodes_by_depth`, `Node.arguments.fill_in` and `Sequential._functional`, with which
    Keras itself runs such models. `fill_in` takes a dict of tensors by `id`.
    """
    functional = _functional(model)
    nodes = [
        GraphNode(
            node.operation,
            node.arguments.fill_in,
            list(dict.fromkeys(map(id, node.input_tensors))),
            list(map(id, node.outputs)),
            any(keras_mask(t) is not None for t in [*node.input_tensors, *node.outputs]),
        )
        for depth in sorted(functional._nodes_by_depth, reverse=True)
        for node in functional._nodes_by_depth[depth]
        if node.operation and not node.is_input
    ]
    return Graph(list(map(id, functional.inputs)), nodes, list(map(id, functional.outputs)))


def standardized_inputs(model, inputs):
    """Flat list of tensors in the order and with the dtypes of a functional model's `inputs`.

    `Functional._standardize_inputs`, the first step of its `call`.
    """
    return _functional(model)._standardize_inputs(inputs)


def packed_outputs(model, outputs):
    """A functional model's outputs in the structure in which its `call` returns them.

    `Functional._outputs_struct` and `unpack_singleton`, the last step of its `call`.

    Args:
        model: A functional or Sequential model.
        outputs: Flat list in the order of its `outputs`.
    """
    from keras.src.models.functional import unpack_singleton

    structure = _functional(model)._outputs_struct
    return unpack_singleton(keras.tree.pack_sequence_as(structure, outputs))


def held_layers(layer):
    """List of the layers that `replace_layers` can replace, from `held_layers_by_path`."""
    return list(held_layers_by_path(layer).values())


def held_layers_by_path(layer):
    """Dict of the layers in a layer's attributes, and in lists, tuples and dicts there, by path.

    A path is a tuple of the attribute's name and the keys below it. `Layer._layers` and names that
    begin with `_self_` are left out: there Keras and TensorFlow list all that was ever assigned.
    """
    attributes = _attributes(layer).items()
    return {path: held for name, value in attributes for path, held in _layers_in(value, (name,))}


def attributes_of(layer):
    """Dict of a layer's attributes, without those in which Keras and TensorFlow list them."""
    return _attributes(layer)


def _attributes(layer):
    return {
        name: value
        for name, value in vars(layer).items()
        if name != "_layers" and not name.startswith("_self_")
    }


def _layers_in(value, path):
    if isinstance(value, keras.Layer):
        yield path, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _layers_in(item, (*path, key))


def replace_layers(layer, replacements):
    """Replaces layers that a layer holds, each at the same place in its `layers`.

    `Layer._tracker`. A built layer accepts no new layers. Before that, assigning a layer to an
    attribute leaves the one before among the layers that are trained and saved.

    Args:
        layer: A layer or subclassed model, built or not.
        replacements: Dict of the new layers by the old ones.
    """
    tracker = layer._tracker
    for old in sublayers(layer):
        if old in replacements:
            tracker.replace_tracked_value("layers", old, replacements[old])
    for name, value in _attributes(layer).items():
        replaced = _with_replaced(value, replacements)
        if replaced is not value:
            setattr(layer, name, replaced)


def _with_replaced(value, replacements):
    if isinstance(value, keras.Layer):
        return replacements.get(value, value)
    if isinstance(value, (list, dict)):
        # In place, since other attributes may hold the same list.
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            replaced = _with_replaced(item, replacements)
            if replaced is not item:
                value[key] = replaced
    elif isinstance(value, tuple):
        items = [_with_replaced(item, replacements) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            # Not `type`: TensorFlow wraps tuples, and only `__class__` is the tuple's own class.
            kind = value.__class__
            return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value
