"""What Keras keeps private of a layer: what is in it, its call, masks."""

import copy
import inspect

import keras


def call_has_training_argument(layer):
    """Whether `layer.call` takes `training`: `Layer._call_has_training_arg`."""
    return layer._call_has_training_arg


def batch_moments(layer, inputs, mask):
    """Mean and variance that a batch norm normalises by in training.

    `BatchNormalization._moments`. Keras's `call` computes and applies them at once, and each of its
    versions treats masks in another way.

    Args:
        layer: A built `keras.layers.BatchNormalization`.
        inputs: Tensor of at least float32.
        mask: Bool tensor without the axis of the channels, or None.

    Returns:
        Two tensors of shape (channels,) and the inputs' dtype.
    """
    return layer._moments(inputs, mask)


def all_layers(model):
    """List of the model and all layers in it, at any depth: `Layer._flatten_layers`."""
    return model._flatten_layers()


def sublayers(layer):
    """List of the layers directly in a layer: `Layer._flatten_layers`."""
    return layer._flatten_layers(include_self=False, recursive=False)


def keras_mask(tensor):
    """The mask that Keras attached to a tensor, or None.

    `keras.src.backend.get_keras_mask`. The mask travels on the tensor from the layer to the loss.
    """
    from keras.src import backend

    return backend.get_keras_mask(tensor)


def set_keras_mask(tensor, mask):
    """Attaches a mask to a tensor, where a loss finds it, and returns the tensor.

    `keras.src.backend.set_keras_mask`.
    """
    from keras.src import backend

    if mask is not None:
        backend.set_keras_mask(tensor, mask)
    return tensor


def keras_logits(tensor):
    """The logits that losses compute from in place of these probabilities, or None.

    `_keras_logits`, which Keras's activations attach to what they return.
    """
    return getattr(tensor, "_keras_logits", None)


def set_keras_logits(tensor, logits):
    """Attaches logits to probabilities, where a loss finds them: `_keras_logits`."""
    if logits is not None:
        tensor._keras_logits = logits


def adopt_call_arguments(layer, other):
    """Lets Keras read the arguments of a call of `layer` as those of a call of `other`.

    The `call(*args, training=None, **kwargs)` of `layer` hands all arguments on to `other`. Keras
    looks in `Layer._call_signature` for tensors and for their masks. It takes `**kwargs` for one
    argument, which must not hold both tensors and Python values. `_call_has_mask_arg` is read by
    containers, `_convert_input_args` and `_allow_non_tensor_positional_args` are read for models
    and preprocessing layers.
    """
    signature = other._call_signature
    parameters = dict(signature.parameters)
    if "training" not in parameters:
        own = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
        last = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        rest = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        signature = signature.replace(parameters=[*rest, own, *last])
    layer._call_signature = signature
    layer._call_has_mask_arg = other._call_has_mask_arg
    layer._convert_input_args = other._convert_input_args
    layer._allow_non_tensor_positional_args = other._allow_non_tensor_positional_args


def outside_graph(tensor):
    """A symbolic tensor like a given one, but in no functional graph. Others are returned as is.

    `KerasTensor._keras_history` and `_keras_mask`. A layer that is called with the tensor or with
    its mask becomes a part of that graph.
    """
    if not isinstance(tensor, keras.KerasTensor):
        return tensor
    alone = copy.copy(tensor)
    for name in ("_keras_history", "_keras_mask"):
        vars(alone).pop(name, None)
    return alone
