"""The computation of Keras's BatchNormalization with statistics that are given.

Keras's layer computes the statistics, applies them and updates the moving statistics in one `call`.
Batch norm over a cycle needs the three apart. The operations here are those of Keras 3.8 to 3.15,
in the same order, so that outputs and gradients are the same bit for bit.
"""

import keras
import tensorflow as tf


def as_normalized(inputs):
    """The inputs in the dtype in which Keras normalises them: at least float32."""
    return tf.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))


def normalized(layer, inputs, mean, variance):
    """A batch norm's outputs.

    Args:
        layer: A built `keras.layers.BatchNormalization`.
        inputs: Tensor in the dtype of `as_normalized`.
        mean: Of shape (channels,) and the inputs' dtype.
        variance: Likewise.

    Returns:
        Tensor of the inputs' shape and the layer's `compute_dtype`.
    """
    outputs = keras.ops.batch_normalization(
        inputs,
        mean,
        variance,
        axis=layer.axis,
        offset=tf.cast(layer.beta, inputs.dtype) if layer.center else None,
        scale=tf.cast(layer.gamma, inputs.dtype) if layer.scale else None,
        epsilon=layer.epsilon,
    )
    return tf.cast(outputs, layer.compute_dtype)
