"""Tensors with one row for each example: of the effective batch, and of its micro-batches."""

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.batches import Batch, with_rows
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches


def gathered(kept, batch, micro_batch_size, name):
    """The rows of all micro-batches as one tensor, in the order of the examples.

    Args:
        kept: `Kept`, whose tensors have a row for each example of their micro-batch.
        batch: The effective `Batch`.
        micro_batch_size: Examples in a micro-batch.
        name: What the rows are, for errors.

    Returns:
        Tensor of shape (examples, ...).

    Raises:
        ValueError: If the tensors have another number of rows, or with XLA no static shape.
    """
    looped = kept.looped
    shape = kept.rest.shape if isinstance(looped, list) else looped.element_shape
    if shape[1:].is_fully_defined():
        return _scattered(kept, batch, micro_batch_size, name)
    if _keras.compiles_with_xla():
        raise ValueError(
            "With XLA all dimensions but the first must be static where rows of several "
            f"micro-batches meet. Received: {name} of shape {shape}. Give the model's "
            "inputs a static shape, or compile with jit_compile=False."
        )
    if not isinstance(looped, list):
        rows = looped.concat()
    else:
        rows = tf.concat(looped, 0) if looped else kept.rest
    return _with_a_row_for_each(batch.examples, rows, name)


def _scattered(kept, batch, micro_batch_size, name):
    """Each row is written into its place. XLA knows no concatenation of two sizes."""

    def step(numbers, rows):
        (numbers,) = numbers
        examples = tf.shape(numbers)[0] if numbers.shape[0] is None else numbers.shape[0]
        return (numbers, _with_a_row_for_each(examples, rows, name)), [], None

    def zeros(like):
        _, rows = like
        return tf.zeros([batch.examples, *rows.shape[1:]], rows.dtype)

    def add(total, numbers_and_rows):
        numbers, rows = numbers_and_rows
        return tf.tensor_scatter_nd_update(total, numbers[:, tf.newaxis], rows)

    total, _, _ = sum_over_micro_batches(
        step, batch.counter(), micro_batch_size, zeros, add, kept=[kept]
    )
    return total


def _with_a_row_for_each(examples, rows, name):
    """The rows, once they are known to be as many as the examples: an int or an int32 scalar."""
    rule = "Rows must be as many as the examples where all examples meet. Received:"
    remedy = "Reshape them to (examples, ...): two rows for each example are (examples, 2, ...)."
    found = rows.shape[0]
    if not isinstance(examples, int) or found is None:
        received = [rule, f"{name} of shape", tf.shape(rows), "for", examples, remedy]
        return with_rows(rows, examples, received, f"{name} must have a row for each example")
    if examples != found:
        raise ValueError(f"{rule} {name} of shape {rows.shape} for {examples}. {remedy}")
    return rows


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
