"""What a later stage computes again, so that it need not be kept for the whole effective batch.

Whatever a stage reads of an earlier one is kept for every example of the effective batch. Tensors
that cost little to compute from what is kept anyway are not kept (Chen et al. 2016, Training deep
nets with sublinear memory cost).
"""

import keras

from gradient_accumulator_tf.stages.graph import Entry, states_of

# Their outputs are not smaller than their inputs, so keeping the inputs costs no more.
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
# Their outputs are smaller than all inputs together, so this pays only if the inputs are kept
# anyway.
_MERGING = (
    keras.layers.Add,
    keras.layers.Subtract,
    keras.layers.Multiply,
    keras.layers.Average,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
)
# The number of operations in a row that are computed again.
_LONGEST_RECOMPUTATION = 4


def cheap_to_recompute(graph):
    """Set of the tensors that a later stage computes again rather than reads.

    Args:
        graph: `Graph`.
    """
    # Keras computes the loss of a softmax from its logits where it finds the operation behind the
    # predictions, so the operations that make the model's outputs run in the last stage.
    ends = {node for node in graph.nodes if not set(graph.outputs).isdisjoint(node.outputs)}
    # In every later stage anyway: the batch, the inputs of barriers, and what follows from these.
    free = set(graph.inputs)
    free.update(*(node.inputs for node in graph.nodes if node.barrier))
    length, cheap = dict.fromkeys(graph.inputs, 0), set()
    for node in graph.nodes:
        long = 1 + max((length.get(i, 0) for i in node.inputs), default=0)
        all_free = free.issuperset(node.inputs)
        if node.barrier:
            is_cheap = node.barrier.cheap_to_apply
        else:
            is_cheap = isinstance(node.operation, (Entry, *_NOT_SHRINKING)) or (
                all_free and isinstance(node.operation, _MERGING)
            )
        if (is_cheap and long <= _LONGEST_RECOMPUTATION) or (
            node in ends and not states_of([node])
        ):
            cheap.update(node.outputs)
            length.update(dict.fromkeys(node.outputs, long))
            if all_free:
                free.update(node.outputs)
    return cheap
