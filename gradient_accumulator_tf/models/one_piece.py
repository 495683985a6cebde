"""Warns where `micro_batch_size` cuts nothing: small batches, and a `fit` past the model."""

import functools
import warnings

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf.replicated.variables import counter

# As a micro-batch size: one piece is what is meant.
UNLIMITED = np.iinfo("int32").max


class LargestBatch:
    """The most examples that a replica has had in one step. No checkpoint saves it.

    Attributes:
        reported: Whether a warning was given.
    """

    def __init__(self):
        self._size = counter("largest_batch")
        self.reported = False

    def see(self, examples):
        """Takes note of a step's number of examples, an int or an int32 scalar."""
        self._size.assign(tf.maximum(self._size.value(), tf.cast(examples, tf.int64)))

    def __int__(self):
        return int(self._size.numpy())


class WarnOfOnePiece(keras.callbacks.Callback):
    """Warns once of a model that has never cut a batch, at the end of its first epoch.

    A batch's size may be unknown until it is there, and the first need not be the largest. Few
    examples in a fit with a larger `batch_size`, or after one that was cut, are no mistake.

    Args:
        batch_size: What `fit` was given.
        largest: The model's `LargestBatch`.
    """

    def __init__(self, batch_size, largest):
        super().__init__()
        self._batch_size, self._largest = batch_size, largest

    def on_train_begin(self, logs=None):
        """Finds out whether there is anything to look for."""
        size = self.model.micro_batch_size
        replicas = self.model.distribute_strategy.num_replicas_in_sync
        is_cut = self._batch_size is not None and self._batch_size > size * replicas
        self._is_known = self._largest.reported or size >= UNLIMITED or is_cut

    def on_epoch_end(self, epoch, logs=None):
        """Looks at the largest batch."""
        if self._is_known:
            return
        largest, micro_batch_size = int(self._largest), self.model.micro_batch_size
        self._is_known = largest > micro_batch_size
        if not 0 < largest <= micro_batch_size:
            return
        self._is_known = self._largest.reported = True
        default = ", which is 32 for arrays" if self._batch_size is None else ""
        warnings.warn(
            "Nothing accumulates: `micro_batch_size` must be smaller than a batch (on each "
            f"replica). Received: micro_batch_size={micro_batch_size}, and batches of at most "
            f"{largest} examples (batch_size={self._batch_size} was given to `fit`{default}). Pass "
            "the effective batch as batch_size to `fit`, or a smaller micro_batch_size.",
            stacklevel=2,
        )


class OwnFit:
    """A wrapped model's own `fit`, which is to end in the wrapper's.

    Args:
        model: The wrapper, with the `fit` of the model in it.
        micro_batch_size: The wrapper's, for the message.
    """

    def __init__(self, model, micro_batch_size):
        self._model, self._fit, self._micro_batch_size = model, model.fit, micro_batch_size
        self._went_through_model = False

    def note_training(self):
        """Notes that a training goes through the wrapper."""
        self._went_through_model = True

    def watched(self):
        """The `fit`, which warns once if a training did not go through the wrapper."""

        @functools.wraps(self._fit)
        def watched(*args, **kwargs):
            self._went_through_model = False
            result = self._fit(*args, **kwargs)
            if not self._went_through_model:
                vars(self._model)["fit"] = self._fit
                self._warn()
            return result

        return watched

    def _warn(self):
        warnings.warn(
            "With `micro_batch_size` it is `keras.Model.fit`, `train_on_batch` and "
            f"`train_step` that split batches. Received: {type(self._model.model).__name__}.fit, "
            f"which called none of them, with micro_batch_size={self._micro_batch_size}: it saw "
            "whole batches. Let it end in super().fit(...), or train it without a wrapper, "
            "compiled with a GradientAccumulateOptimizer.",
            stacklevel=3,
        )
