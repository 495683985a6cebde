"""Where to cut a model's graph so that batch norms can wait for a whole effective batch.

A batch norm needs the mean and variance of its input over all micro-batches before any of them
can go on. The cuts are there: stage 0 holds what depends on no batch norm's output, stage s + 1
what depends on one whose input is in stage s. Each stage can run over all micro-batches, one after
the other, once the stages before it have.

What a stage reads of an earlier one has to be kept for every example of the effective batch. What
is cheap to compute again from what is kept anyway is not (Chen et al. 2016, sublinear memory).
"""

import dataclasses
import itertools
from collections.abc import Callable

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.kinds import is_known_batch_norm, is_like_batch_norm

# Their outputs are not smaller than their inputs, so that keeping the inputs costs no more.
_NOT_SHRINKING = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.Rescaling,
    keras.layers.Reshape,
    keras.layers.Flatten,
    keras.layers.Concatenate,
    keras.layers.ZeroPadding1D,
    keras.layers.ZeroPadding2D,
    keras.layers.ZeroPadding3D,
    keras.layers.UpSampling1D,
    keras.layers.UpSampling2D,
    keras.layers.UpSampling3D,
)
# Several inputs make one output, so only if these are kept anyway.
_MERGING = (
    keras.layers.Add,
    keras.layers.Subtract,
    keras.layers.Multiply,
    keras.layers.Average,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
)
# Operations that are computed again in a row.
_LONGEST_RECOMPUTATION = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of a layer or operation in a graph without nested models.

    Attributes:
        operation: What is called.
        fill_in: Function of a dict of tensors by the numbers in `slots` that returns (args,
            kwargs) of the call.
        slots: Tuple of the numbers that `fill_in` knows the inputs by.
        inputs: Tuple of the inputs, in the same order. Tensors of a graph are numbered.
        outputs: Tuple of the outputs.
        waits: Whether it is a batch norm that normalises by the batch.
    """

    operation: Callable
    fill_in: Callable
    slots: tuple
    inputs: tuple
    outputs: tuple
    waits: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What runs over all micro-batches before the next stage does.

    Attributes:
        nodes: List of `Node` in the order to run them in.
        inputs: List of the model's inputs that are read here.
        reads: List of the tensors that earlier stages kept.
        keeps: List of the tensors that later stages read.
        measures: List of the batch norms whose inputs are computed here.
        applies: List of the batch norms that run here.
        results: List of all that is wanted of the stage: `keeps`, inputs of `measures` and, of
            the last stage, the model's outputs.
        variables: List of the trainable variables in use.
        states: List of the variables that layers draw random numbers with.
    """

    nodes: list
    inputs: list
    reads: list
    keeps: list
    measures: list
    applies: list
    results: list
    variables: list
    states: list


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


def has_batch_statistics(layer):
    """Whether a layer, or one in it, normalises by the batch in training."""
    return any(is_like_batch_norm(inner) and inner.trainable for inner in _keras.all_layers(layer))


def flat_graph(model):
    """The graph of a functional or Sequential model, with the nodes of those nested in it.

    Args:
        model: A built `keras.Model`.

    Raises:
        ValueError: If a trainable batch norm is where the graph cannot be cut, or cannot be
            normalised by an effective batch's statistics.
    """
    nodes, numbers = [], itertools.count()

    def visit(model, path, inputs):
        graph = _keras.graph_of(model)
        known = dict(zip(graph.inputs, inputs, strict=True))
        for node in graph.nodes:
            layer = node.operation
            layer_path = f"{path}/{layer.name}"
            slots = tuple(node.inputs)
            read = tuple(known[slot] for slot in slots)
            if node.has_mask and has_batch_statistics(model):
                _refuse(layer_path, "makes or takes a mask")
            if getattr(layer, "activity_regularizer", None) is not None:
                _refuse(layer_path, "has an activity regulariser")
            if _keras.is_plain_functional(layer) and has_batch_statistics(layer):
                entered = tuple(next(numbers) for _ in _keras.graph_of(layer).inputs)
                entry = _Entry(layer)
                nodes.append(Node(entry, node.fill_in, slots, read, entered))
                outputs = visit(layer, layer_path, entered)
            else:
                outputs = tuple(next(numbers) for _ in node.outputs)
                waits = isinstance(layer, keras.Layer) and _waits(layer, layer_path)
                nodes.append(Node(layer, node.fill_in, slots, read, outputs, waits))
            known.update(zip(node.outputs, outputs, strict=True))
        return [known[output] for output in graph.outputs]

    if not (_keras.is_plain_functional(model) and model.built):
        path = next(
            path
            for path, layer in _paths(model, model.name)
            if is_like_batch_norm(layer) and layer.trainable
        )
        _refuse(path, f"is in a {type(model).__name__}, which is not a graph of layers")
    inputs = [next(numbers) for _ in _keras.graph_of(model).inputs]
    return Graph(inputs, nodes, visit(model, model.name, inputs))


class _Entry:
    """What a nested model does with its arguments before its first layer runs."""

    def __init__(self, model):
        self._model, self.name = model, model.name

    def __call__(self, inputs, **kwargs):
        del kwargs  # `training` comes from the outermost call
        return _keras.standardized_inputs(self._model, inputs)


def _waits(layer, path):
    """Whether a layer is a batch norm to wait for; raises where there is one that cannot be."""
    if is_like_batch_norm(layer):
        if layer.trainable and not is_known_batch_norm(layer):
            _refuse(path, f"is a {type(layer).__name__}, which may be more than batch norm")
        return layer.trainable
    for inner_path, inner in _paths(layer, path):
        if is_like_batch_norm(inner) and inner.trainable:
            _refuse(inner_path, f"is hidden in a {type(layer).__name__}")
    return False


def _paths(layer, path):
    yield path, layer
    for inner in _keras.sublayers(layer):
        yield from _paths(inner, f"{path}/{inner.name}")


def _refuse(path, why):
    raise ValueError(
        'batch_norm="exact" needs a graph of layers (functional or Sequential) that can be cut at '
        f"each trainable batch norm. Received: {path!r}, which {why}. Use another normalisation "
        '(swap_batch_norm(model, to="group")), or statistics of the micro-batch '
        '(batch_norm="micro_batch").'
    )


def cut(graph):
    """The stages of a graph, first to last; a single one without trainable batch norms.

    Args:
        graph: `Graph`.

    Returns:
        List of `Stage`.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    level = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        highest = max((level[i] for i in node.inputs), default=0) + node.waits
        level.update(dict.fromkeys(node.outputs, highest))
    cheap = _cheap_to_recompute(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}

    number = max(level.values()) + 1
    measured = [[] for _ in range(number)]
    for node in graph.nodes:
        if node.waits:
            measured[level[node.inputs[0]]].append(node)
    # What a stage reads is wanted of earlier ones, so the last stage comes first.
    keeps, stages = [{} for _ in range(number)], []
    for s in reversed(range(number)):
        results = dict.fromkeys(keeps[s])
        results |= dict.fromkeys(node.inputs[0] for node in measured[s])
        if s == number - 1:
            results |= dict.fromkeys(graph.outputs)
        nodes, inputs, reads, seen = set(), [], {}, set()
        waiting = list(results)
        while waiting:
            tensor = waiting.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            if tensor in graph.inputs:
                inputs.append(tensor)
            elif level[tensor] == s or tensor in cheap:
                nodes.add(producers[tensor])
                waiting += producers[tensor].inputs
            else:
                reads[tensor] = None
                keeps[level[tensor]][tensor] = None
        nodes = sorted(nodes, key=order.get)
        layers = _layers(nodes)
        stages.append(
            Stage(
                nodes=nodes,
                inputs=inputs,
                reads=list(reads),
                keeps=list(keeps[s]),
                measures=measured[s],
                applies=[node for node in nodes if node.waits],
                results=list(results),
                variables=_unique(v for layer in layers for v in layer.trainable_variables),
                states=_states(nodes),
            )
        )
    return stages[::-1]


def _layers(nodes):
    return [node.operation for node in nodes if isinstance(node.operation, keras.Layer)]


def _states(nodes):
    """What Keras counts among a layer's variables and not its weights: seed generators' states."""
    layers = _layers(nodes)
    weights = {id(v) for layer in layers for v in layer.weights}
    return _unique(v for layer in layers for v in layer.variables if id(v) not in weights)


def _unique(variables):
    return list({id(v): v for v in variables}.values())


def _cheap_to_recompute(graph):
    """Set of the tensors that a later stage computes again rather than reads."""
    # A loss takes a softmax apart if it is given what the softmax itself returned.
    ends = {node for node in graph.nodes if not set(graph.outputs).isdisjoint(node.outputs)}
    # In every later stage at no cost: the batch, what a batch norm is waiting with, and so on.
    free = set(graph.inputs) | {node.inputs[0] for node in graph.nodes if node.waits}
    length, cheap = dict.fromkeys(graph.inputs, 0), set()
    for node in graph.nodes:
        long = 1 + max((length.get(i, 0) for i in node.inputs), default=0)
        all_free = free.issuperset(node.inputs)
        is_cheap = (
            node.waits
            or isinstance(node.operation, (_Entry, *_NOT_SHRINKING))
            or (all_free and isinstance(node.operation, _MERGING))
        )
        if (is_cheap and long <= _LONGEST_RECOMPUTATION) or (node in ends and not _states([node])):
            cheap.update(node.outputs)
            length.update(dict.fromkeys(node.outputs, long))
            if all_free:
                free.update(node.outputs)
    return cheap
