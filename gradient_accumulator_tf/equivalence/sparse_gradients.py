"""Keras's treatment of repeated rows, and a large batch without it.

The gradient of an embedding is a `tf.IndexedSlices`: rows, and an index for each. An index that a
batch has twice has two rows, and the gradient is their sum. Keras's optimizers that are not linear
in the gradient (Adam squares it, `clipnorm` measures it) take the rows one by one, before they are
added. Accumulation adds the rows first.
"""

import tensorflow as tf


def watch_sparse_gradients(optimizer, *, add_rows):
    """Notes which variables an optimizer is given a `tf.IndexedSlices` for.

    It sets `apply` on the optimizer, which must be a copy that nobody else has. An optimizer around
    it would hide what a `train_step` may ask of its own optimizer.

    Args:
        optimizer: A Keras optimizer.
        add_rows: Whether the optimizer is given dense gradients in place of these, in which
            repeated rows are added.

    Returns:
        Dict that gets the variables' paths as keys while a training step is traced or runs.
    """
    apply, paths = optimizer.apply, {}

    def watched(grads, trainable_variables=None, **arguments):
        grads = list(grads)
        known = [None] * len(grads) if trainable_variables is None else list(trainable_variables)
        for i, (gradient, variable) in enumerate(zip(grads, known, strict=True)):
            if isinstance(gradient, tf.IndexedSlices):
                paths[getattr(variable, "path", f"gradient {i}")] = None
                grads[i] = _dense(gradient) if add_rows else gradient
        return apply(grads, None if trainable_variables is None else known, **arguments)

    vars(optimizer)["apply"] = watched
    return paths


def _dense(slices):
    """A `tf.IndexedSlices` with its rows added, as a tensor. XLA needs its shape to be constant."""
    static = tf.get_static_value(slices.dense_shape)
    rows = slices.dense_shape[0] if static is None else int(static[0])
    return tf.math.unsorted_segment_sum(slices.values, slices.indices, rows)
