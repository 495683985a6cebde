"""Checks that a part of a model does the same when it is computed again.

Each part is computed once forward and once more for its gradients. What a layer does besides its
outputs would happen twice, or differ. Keras's variables are held back by a scope, which records
what changes. TensorFlow's random operations and variables show in the operations that a trace has
made. Where operations run at once there is no trace, so the part is traced once for this.
"""

import contextlib
import re

import tensorflow as tf

# What TensorFlow calls the operations that draw random numbers from a state of TensorFlow's own.
_DRAWS = re.compile(r"^(Random|TruncatedNormal|ParameterizedTruncated|Multinomial|NonDeterm|Rng)")
# Those that change a `tf.Variable`.
_ASSIGNS = re.compile(r"^(Assign\w*VariableOp|Resource(Scatter|StridedSliceAssign|Apply)\w*)$")
# Those that call Python, which may do anything.
_CALLS_PYTHON = re.compile(r"^(Eager)?PyFunc")


@contextlib.contextmanager
def watched_operations():
    """Yields a list that at the end has the operations that were traced within the context.

    It stays empty where operations run at once. The functions that operations call are included.
    An operation is a pair of its name and its type.
    """
    found = []
    if tf.executing_eagerly():
        yield found
        return
    graph = tf.compat.v1.get_default_graph()
    known = set(graph.get_operations())
    yield found
    found += _with_called(graph, [op.node_def for op in graph.get_operations() if op not in known])


def trace(function):
    """Traces a function without arguments, whose checks need operations; runs none of these."""
    tf.function(lambda: (function(), None)[1], autograph=False).get_concrete_function()


def _with_called(graph, nodes):
    """List of (name, type) of nodes, and of those in the functions that they call."""
    called = [name for node in nodes for name in _functions_of(node)]
    found = [(node.name, node.op) for node in nodes]
    if not called:
        return found
    library = {f.signature.name: f.node_def for f in graph.as_graph_def().library.function}
    seen = set()
    while called:
        name = called.pop()
        if name in library and name not in seen:
            seen.add(name)
            found += [(node.name, node.op) for node in library[name]]
            called += [inner for node in library[name] for inner in _functions_of(node)]
    return found


def _functions_of(node):
    """Names of the functions that a node calls, its gradient's included."""
    for value in node.attr.values():
        if value.func.name:
            yield value.func.name
        yield from (function.name for function in value.list.func)


def check_operations(operations, argument, part):
    """Refuses operations that would not do the same again.

    Args:
        operations: List of (name, type).
        argument: The argument that has the model computed twice, for the errors.
        part: What was computed, for the errors: "one of the layers a, b".

    Raises:
        ValueError: If one draws random numbers of TensorFlow's, assigns a `tf.Variable`, or calls
            Python.
    """
    for name, kind in operations:
        where = f"{kind} ({name}) in {part}"
        if _DRAWS.match(kind):
            raise ValueError(
                f"With {argument} random layers must draw the same again. Received: TensorFlow's "
                f"{where}. Use keras.random with a keras.random.SeedGenerator that is an attribute "
                "of the layer."
            )
        if _ASSIGNS.match(kind):
            raise ValueError(
                f"With {argument} no layer may change a tf.Variable in its call, because each is "
                f"computed twice. Received: {where}. Make the variable with the layer's "
                "`add_weight`, whose changes are held back."
            )
        if _CALLS_PYTHON.match(kind):
            raise ValueError(
                f"With {argument} no layer may call Python in training, because nothing tells "
                f"whether it does the same again. Received: {where}. Compute it with keras.ops, or "
                "before the model, in the dataset."
            )


def check_repeatable(stage, scope, operations, kind):
    """Refuses layers of a stage that do in training what a second computation would not repeat.

    Args:
        stage: The `Stage` that was computed.
        scope: The `RecordingScope` that it was computed in.
        operations: List of the operations that this has traced.
        kind: The `BarrierKind`, for the errors.

    Raises:
        ValueError: As for `check_operations`; or if a layer changes a variable other than the
            states in `stage.states`, or calls `add_loss`.
    """
    layers = ", ".join(node.operation.name for node in stage.nodes if not node.barrier)
    check_operations(operations, kind.argument, f"one of the layers {layers}")
    states = {id(v) for v in stage.states}
    changed = [v.path for v, _ in scope.changes() if id(v) not in states]
    if changed:
        raise ValueError(
            f"With {kind.argument} no layer but {kind.layers} may change a variable in training, "
            "because each is computed twice. Received: a layer that changes "
            f"{', '.join(changed)}. Give random layers a "
            "keras.random.SeedGenerator of their own as an attribute, replace or freeze "
            f"others, or pass {kind.otherwise}."
        )
    if scope.losses:
        raise ValueError(
            f"With {kind.argument} no layer may call `add_loss`. Received: "
            f"{len(scope.losses)} such losses from one of the layers {layers}. "
            f"Make it an output with a loss of its own, or pass {kind.otherwise}."
        )
