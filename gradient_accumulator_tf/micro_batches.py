"""Cut a nested batch into micro-batches, and sum over them in one loop."""

from typing import Any, NamedTuple

import tensorflow as tf


def batch_size(batch):
    """Number of examples in a nested batch: an int where it is static, else an int32 scalar.

    Raises:
        ValueError: If there is no tensor with a leading dimension in it.
    """
    for leaf in tf.nest.flatten(batch):
        if leaf is not None and leaf.shape.rank != 0:
            if leaf.shape.rank is not None and leaf.shape[0] is not None:
                return int(leaf.shape[0])
            return leaf.nrows(tf.int32) if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf)[0]
    raise ValueError(
        "A batch must have at least one tensor whose first dimension counts the examples. "
        f"Received: {batch}. Pass an input with a batch dimension."
    )


def slice_batch(batch, start, size):
    """Examples `start` to `start + size` of every tensor in a nested batch.

    Args:
        batch: Nested structure of dense, ragged or sparse tensors and None. A tensor without
            dimensions belongs to every example.
        start: int or int32 scalar.
        size: int or int32 scalar.
    """

    def slice_leaf(leaf):
        if leaf is None or leaf.shape.rank == 0:
            return leaf
        if isinstance(leaf, tf.RaggedTensor):
            return leaf[start : start + size]
        if isinstance(leaf, tf.SparseTensor):
            rest = leaf.dense_shape[1:]
            first, count = tf.cast([start], tf.int64), tf.cast([size], tf.int64)
            return tf.sparse.slice(
                leaf, tf.concat([first, 0 * rest], 0), tf.concat([count, rest], 0)
            )
        shape = tf.shape(leaf)
        begin = tf.concat([[start], tf.zeros_like(shape[1:])], 0)
        sliced = tf.slice(leaf, begin, tf.concat([[size], shape[1:]], 0))
        return tf.ensure_shape(sliced, [size if isinstance(size, int) else None, *leaf.shape[1:]])

    return tf.nest.map_structure(slice_leaf, batch)


def _without_nones(structure):
    """Flat list of the tensors; a loop cannot carry None."""
    return [t for t in tf.nest.flatten(structure) if t is not None]


def _with_nones(template, flat):
    """The reverse of `_without_nones`, in the structure of `template`."""
    tensors = iter(flat)
    return tf.nest.map_structure(lambda t: None if t is None else next(tensors), template)


class Kept(NamedTuple):
    """A tensor of every micro-batch.

    Attributes:
        looped: `tf.TensorArray` or list with those of all micro-batches but the last.
        last: The last one's.
    """

    looped: Any
    last: Any


def sum_over_micro_batches(step, batch, micro_batch_size, zeros, add, kept=()):
    """`step` of every micro-batch of `batch`, the first results added up, the second kept.

    In graph mode `step` is traced once. All micro-batches but the last run in a
    `tf.while_loop`, which keeps one micro-batch's activations at a time; the last, which may be
    smaller, runs after it, so that the loop is also right where the batch is smaller than a
    micro-batch.

    Args:
        step: Function of a nested batch, and of a tensor for each of `kept`, that returns
            (summands, list of tensors to keep, rest).
        batch: Nested batch of tensors.
        micro_batch_size: Examples in a micro-batch.
        zeros: Function of the summands' structure that returns what a sum of them starts from.
        add: Function of (sum, summands) that returns their sum.
        kept: List of `Kept` from an earlier call with this batch and micro-batch size.

    Returns:
        The sum, the list of `Kept`, and the last micro-batch's rest.
    """
    examples = batch_size(batch)
    kept_last = [k.last for k in kept]
    if isinstance(examples, int) and examples <= micro_batch_size:
        summands, keep, rest = step(batch, *kept_last)
        return add(zeros(summands), summands), [Kept([], t) for t in keep], rest
    turns = (examples + micro_batch_size - 1) // micro_batch_size - 1
    if tf.executing_eagerly():
        total, looped = None, []
        for turn in range(max(turns, 0) + 1):
            start = turn * micro_batch_size
            size = min(micro_batch_size, examples - start)
            inputs = [k.looped[turn] if turn < turns else k.last for k in kept]
            summands, keep, rest = step(slice_batch(batch, start, size), *inputs)
            total = add(zeros(summands) if total is None else total, summands)
            looped.append(keep)
        *looped, last = looped
        return total, [Kept([k[i] for k in looped], t) for i, t in enumerate(last)], rest

    # A static size where all micro-batches have the same; XLA compiles the loop's body also for
    # a batch that is smaller than a micro-batch, where it does not run.
    even = isinstance(examples, int) and examples % micro_batch_size == 0
    size = micro_batch_size if even else tf.minimum(micro_batch_size, examples)
    step = tf.function(step, autograph=False)
    specs = [tf.TensorSpec(k.looped.element_shape, k.last.dtype) for k in kept]
    traced = step.get_concrete_function(slice_batch(batch, 0, size), *specs)

    start_sum = zeros(traced.structured_outputs[0])
    # The loop makes no turn where there is but one micro-batch, or none.
    turns = tf.maximum(turns, 0)
    # XLA also compiles what would read from an array that is empty.
    start_arrays = [
        tf.TensorArray(t.dtype, tf.maximum(turns, 1), element_shape=t.shape)
        for t in traced.structured_outputs[1]
    ]

    def body(turn, flat, arrays):
        total = _with_nones(start_sum, flat)
        micro_batch = slice_batch(batch, turn * micro_batch_size, size)
        summands, keep, _ = step(micro_batch, *(k.looped.read(turn) for k in kept))
        arrays = [array.write(turn, t) for array, t in zip(arrays, keep, strict=True)]
        return turn + 1, _without_nones(add(total, summands)), arrays

    turn, flat, arrays = tf.while_loop(
        lambda turn, *_: turn < turns,
        body,
        (tf.constant(0), _without_nones(start_sum), start_arrays),
        parallel_iterations=1,
    )
    total = _with_nones(start_sum, flat)
    # The start from the loop's counter, so that the last micro-batch waits for the loop to end; the
    # size not, as XLA has to know it.
    last_size = micro_batch_size if even else examples - turns * micro_batch_size
    last = slice_batch(batch, turn * micro_batch_size, last_size)
    summands, keep, rest = step(last, *kept_last)
    keep = [Kept(*pair) for pair in zip(arrays, keep, strict=True)]
    return add(total, summands), keep, rest
