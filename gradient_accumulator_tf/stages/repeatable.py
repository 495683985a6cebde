"""Checks that a stage does the same when it is computed again.

Each stage is computed once forward and once more for its gradients. What a layer does besides its
outputs would happen twice, or differ.
"""

import tensorflow as tf


def traced_operations():
    """List of the operations in the graph that is traced; empty where operations run at once."""
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()


def check_repeatable(stage, scope, operations, model, kind):
    """Refuses layers that do in training what a second computation would not repeat.

    Args:
        stage: The `Stage` that was computed.
        scope: The `keras.StatelessScope` that it was computed in.
        operations: List of the operations that this has traced.
        model: The model that the stage is of.
        kind: The `BarrierKind`, for the errors.

    Raises:
        ValueError: If a layer draws from a random generator of TensorFlow's, changes a variable
            other than the states in `stage.states`, or calls `add_loss`.
    """
    layers = ", ".join(node.operation.name for node in stage.nodes if not node.barrier)
    drawing = [op.type for op in operations if op.op_def.is_stateful and "Rand" in op.type]
    if drawing:
        raise ValueError(
            f"With {kind.argument} random layers must draw the same again. Received: "
            f"TensorFlow's {drawing[0]} in one of the layers {layers}. Use keras.random with a "
            "keras.random.SeedGenerator that is an attribute of the layer."
        )
    changed = set(scope.state_mapping) - {id(v) for v in stage.states}
    if changed:
        names = [v.path for v in model.variables if id(v) in changed]
        raise ValueError(
            f"With {kind.argument} no layer but {kind.layers} may change a variable in training, "
            "because each is computed twice. Received: a layer that changes "
            f"{', '.join(names) or 'a variable outside of the model'}. Give random layers a "
            "keras.random.SeedGenerator of their own as an attribute, replace or freeze "
            f"others, or pass {kind.otherwise}."
        )
    if scope.losses:
        raise ValueError(
            f"With {kind.argument} no layer may call `add_loss`. Received: "
            f"{len(scope.losses)} such losses from one of the layers {layers}. "
            f"Make it an output with a loss of its own, or pass {kind.otherwise}."
        )
