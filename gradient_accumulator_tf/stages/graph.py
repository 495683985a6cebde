"""A model as one list of nodes, in which those that are barriers are marked."""

import dataclasses
import itertools
from collections.abc import Callable

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.stages.barrier import Barrier, Refused


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of a layer or operation in a graph without nested models.

    Tensors of a graph are known by numbers.

    Attributes:
        operation: The layer, or a function of tensors.
        fill_in: Function of a dict of tensors by the numbers in `slots` that returns (args,
            kwargs) of the call.
        slots: Tuple of the numbers that `fill_in` knows the inputs by.
        inputs: Tuple of the inputs in the same order.
        outputs: Tuple of the outputs.
        barrier: The `Barrier` that runs in place of the operation; None if the operation runs.
    """

    operation: Callable
    fill_in: Callable
    slots: tuple
    inputs: tuple
    outputs: tuple
    barrier: Barrier | None = None

    def name_of(self, key):
        """What one of the inputs is called in errors."""
        return f"an input of {self.operation.name!r}"


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model as a list of nodes in the order in which Keras runs them.

    Attributes:
        inputs: List of its inputs.
        nodes: List of `Node`.
        outputs: List of its outputs.
    """

    inputs: list
    nodes: list
    outputs: list


class Entry:
    """What a nested model does with its arguments before its first layer runs."""

    def __init__(self, model):
        self._model, self.name = model, model.name

    def __call__(self, inputs, **kwargs):
        """The model's inputs as a flat list; `training` comes from the outermost call."""
        del kwargs
        return _keras.standardized_inputs(self._model, inputs)


def layers_of(nodes):
    """List of the Keras layers that nodes call, once for each call."""
    return [node.operation for node in nodes if isinstance(node.operation, keras.Layer)]


def states_of(nodes):
    """List of the variables that the nodes' layers draw random numbers with.

    A seed generator's state is among a layer's variables and not among its weights.
    """
    layers = layers_of(nodes)
    weights = {id(v) for layer in layers for v in layer.weights}
    return unique(v for layer in layers for v in layer.variables if id(v) not in weights)


def unique(variables):
    """List of variables, each once, in the order of their first place."""
    return list({id(v): v for v in variables}.values())


def flat_graph(model, kind):
    """The graph of a functional or Sequential model, with the nodes of the models in it.

    A model in it without a barrier stays one node.

    Args:
        model: A built `keras.Model`.
        kind: The `BarrierKind`.

    Returns:
        `Graph`.

    Raises:
        ValueError: If a layer that needs a barrier is refused one, or is where the graph cannot
            be cut.
    """
    nodes, numbers = [], itertools.count()

    def visit(model, path, inputs):
        graph = _keras.graph_of(model)
        has_barrier = kind.is_in(model)
        known = dict(zip(graph.inputs, inputs, strict=True))
        for node in graph.nodes:
            layer = node.operation
            layer_path = f"{path}/{layer.name}"
            slots = tuple(node.inputs)
            read = tuple(known[slot] for slot in slots)
            if node.has_mask and has_barrier:
                _refuse(kind, layer_path, "makes or takes a mask")
            if getattr(layer, "activity_regularizer", None) is not None:
                _refuse(kind, layer_path, "has an activity regulariser")
            if _keras.is_plain_functional(layer) and kind.is_in(layer):
                entered = tuple(next(numbers) for _ in _keras.graph_of(layer).inputs)
                nodes.append(Node(Entry(layer), node.fill_in, slots, read, entered))
                outputs = visit(layer, layer_path, entered)
            else:
                outputs = tuple(next(numbers) for _ in node.outputs)
                barrier = _barrier_of(kind, layer, layer_path)
                nodes.append(Node(layer, node.fill_in, slots, read, outputs, barrier))
            known.update(zip(node.outputs, outputs, strict=True))
        return [known[output] for output in graph.outputs]

    if not _keras.is_plain_functional(model):
        path = next(p for p, v in _paths(model, model.name) if kind.find(v) is not None)
        _refuse(kind, path, f"is in {_no_graph(model)}, which is not a graph of layers")
    inputs = [next(numbers) for _ in _keras.graph_of(model).inputs]
    return Graph(inputs, nodes, visit(model, model.name, inputs))


def _barrier_of(kind, layer, path):
    """The barrier of an operation, or None.

    Raises:
        ValueError: If it is refused one, or hides a layer that needs one.
    """
    if not isinstance(layer, keras.Layer):
        return None
    barrier = kind.find(layer)
    if isinstance(barrier, Refused):
        _refuse(kind, path, barrier.why)
    if barrier is None:
        for inner_path, inner in _paths(layer, path):
            if kind.find(inner) is not None:
                _refuse(kind, inner_path, f"is hidden in {_no_graph(layer)}")
    return barrier


def _no_graph(layer):
    """The words for a layer that is no graph; Keras makes none of some Sequential models."""
    kind = f"a {type(layer).__name__}"
    if layer.built and isinstance(layer, keras.Sequential) and not _keras.has_graph(layer):
        kind += " with nested inputs or a layer that takes no symbolic tensors"
    return kind


def _paths(layer, path):
    """Pairs of a path and a layer: a layer itself, and all layers in it."""
    yield path, layer
    for inner in _keras.sublayers(layer):
        yield from _paths(inner, f"{path}/{inner.name}")


def _refuse(kind, path, why):
    raise ValueError(
        f"{kind.argument} needs a graph of layers (functional or Sequential) that can be cut at "
        f"each {kind.layers}. Received: {path!r}, which {why}. {kind.instead}"
    )
