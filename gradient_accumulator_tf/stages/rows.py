"""Tensors with one row for each example: of the effective batch, and of its micro-batches."""

import tensorflow as tf

from gradient_accumulator_tf.cycle.batches import Batch
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches


def gathered(kept, batch, micro_batch_size):
    """The rows of all micro-batches as one tensor, in the order of the examples.

    Args:
        kept: `Kept`. With XLA, the tensors have static shapes but for the rows.
        batch: The effective `Batch`.
        micro_batch_size: Examples in a micro-batch.

    Returns:
        Tensor of shape (examples, ...).
    """
    looped = kept.looped
    if isinstance(looped, list):
        return tf.concat(looped, 0) if looped else kept.rest
    if not looped.element_shape[1:].is_fully_defined():
        return looped.concat()

    def zeros(like):
        _, rows = like
        return tf.zeros([batch.examples, *rows.shape[1:]], rows.dtype)

    def add(total, numbers_and_rows):
        numbers, rows = numbers_and_rows
        return tf.tensor_scatter_nd_update(total, numbers[:, tf.newaxis], rows)

    # Each row is written into its place. XLA knows no concatenation of micro-batches of two sizes.
    total, _, _ = sum_over_micro_batches(
        lambda numbers, rows: ((*numbers, rows), [], None),
        batch.counter(),
        micro_batch_size,
        zeros,
        add,
        kept=[kept],
    )
    return total


def spread(tensor, batch, micro_batch_size):
    """The reverse of `gathered`: a `Kept` with the rows of each micro-batch."""
    rows = Batch((tensor,), batch.examples, (False,))
    _, kept, _ = sum_over_micro_batches(
        lambda micro_batch: ((), list(micro_batch), None),
        rows,
        micro_batch_size,
        zeros=lambda summands: summands,
        add=lambda total, summands: total,
    )
    return kept[0]
