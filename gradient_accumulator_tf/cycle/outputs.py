"""An output of a model in the tensors that have to be kept of it, and put together again."""

import tensorflow as tf

from gradient_accumulator_tf import _keras

# Keras's cross entropies compute from the input of these operations, where they find one behind
# probabilities. Behind rows that were gathered they would not, so it is applied to gathered inputs.
_ACTIVATIONS = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}

# The kinds of an output's parts.
KINDS = ("output", *_ACTIVATIONS, "logits", "mask")


def parts_of(output):
    """The tensors that an output consists of.

    Args:
        output: Tensor, with the mask and the logits that Keras may have attached to it.

    Returns:
        Dict of tensors by kind: "output", or "Softmax" or "Sigmoid" for the input of one; and
        "logits" and "mask" where there are any.
    """
    logits, mask = _keras.keras_logits(output), _keras.keras_mask(output)
    kind, tensor = "output", output
    if isinstance(output, tf.Tensor) and not tf.executing_eagerly():
        made_by = output.op
        if made_by.type in _ACTIVATIONS and (logits is None or logits is made_by.inputs[0]):
            kind, tensor, logits = made_by.type, made_by.inputs[0], None
    parts = {kind: tensor, "logits": logits, "mask": mask}
    return {kind: part for kind, part in parts.items() if part is not None}


def put_together(parts):
    """The reverse of `parts_of`."""
    logits = parts.get("logits")
    if "output" in parts:
        output = parts["output"]
    else:
        ((output, logits),) = [
            (activation(parts[kind]), parts[kind])
            for kind, activation in _ACTIVATIONS.items()
            if kind in parts
        ]
    _keras.set_keras_logits(output, logits)
    return _keras.set_keras_mask(output, parts.get("mask"))
