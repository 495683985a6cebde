"""Which layers are batch norms, and which of them do what Keras's does and no more."""

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm


def is_like_batch_norm(layer):
    """Whether a layer is a batch norm, or looks like one."""
    return (
        isinstance(layer, keras.layers.BatchNormalization)
        or (hasattr(layer, "moving_mean") and hasattr(layer, "moving_variance"))
        or ("BatchNorm" in type(layer).__name__ and not _keras.sublayers(layer))
    )


def is_known_batch_norm(layer):
    """Whether a layer is a batch norm that does what Keras's does, and no more.

    A subclass may do anything, and renormalisation has statistics of its own.
    """
    known = type(layer) in (keras.layers.BatchNormalization, AccumBatchNorm)
    return known and not getattr(layer, "renorm", False)
