"""Sum over the micro-batches of a batch in one loop."""

from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.replicated.replicas import lone_replica, number_of_replicas


def _without_nones(structure):
    """Flat list of the tensors; a loop cannot carry None."""
    return [t for t in tf.nest.flatten(structure) if t is not None]


def _with_nones(template, flat):
    """The reverse of `_without_nones`, in the structure of `template`."""
    tensors = iter(flat)
    return tf.nest.map_structure(lambda t: None if t is None else next(tensors), template)


def _empty(spec):
    """Zeros in the shape of a `tf.TensorSpec` or None, with none along unknown dimensions."""
    if spec is None:
        return None
    sizes = spec.shape if spec.shape.rank else []  # of an unknown rank: a scalar
    return tf.zeros([size or 0 for size in sizes], spec.dtype)


class Kept(NamedTuple):
    """A tensor of every micro-batch.

    Attributes:
        looped: `tf.TensorArray` or list with those of the micro-batches in the loop.
        rest: That of the one after it; something empty if there is none.
    """

    looped: Any
    rest: Any


def sum_over_micro_batches(step, batch, micro_batch_size, zeros, add, kept=()):
    """`step` of every micro-batch of `batch`, the first results added up, the second kept.

    In graph mode `step` is traced once. The micro-batches run in a `tf.while_loop`, which keeps one
    micro-batch's activations at a time. For XLA all have one size in it: what is left runs after
    it, in a conditional by the batch's shape, of which XLA compiles only the branch that is taken.

    Args:
        step: Function of a nested batch, and of a tensor for each of `kept`, that returns
            (summands, list of tensors to keep, nested tensors).
        batch: The `Batch`.
        micro_batch_size: Examples in a micro-batch.
        zeros: Function of the summands' structure that returns what a sum of them starts from.
        add: Function of (sum, summands) that returns their sum.
        kept: List of `Kept` from an earlier call with this batch and micro-batch size.

    Returns:
        The sum, the list of `Kept`, and the third result of the last micro-batch.
    """
    examples = batch.examples
    if tf.executing_eagerly():
        examples = int(examples)  # of ragged tensors it is a tensor
    if isinstance(examples, int) and examples <= micro_batch_size:
        summands, keep, result = step(batch.data, *(k.rest for k in kept))
        return add(zeros(summands), summands), [Kept([], t) for t in keep], result
    if tf.executing_eagerly():
        total, looped = None, []
        for start in range(0, examples, micro_batch_size):
            inputs = [k.looped[len(looped)] for k in kept]
            size = min(micro_batch_size, examples - start)
            summands, keep, result = step(batch.slice(start, size), *inputs)
            total = add(zeros(summands) if total is None else total, summands)
            looped.append(keep)
        return total, [Kept(list(k), k[0]) for k in zip(*looped, strict=True)], result

    even = isinstance(examples, int) and examples % micro_batch_size == 0
    has_rest = not even and _keras.compiles_with_xla()
    if isinstance(examples, int) and not (even or has_rest):
        # Unknown to TensorFlow, which would take the first micro-batch's size for that of all.
        examples = tf.raw_ops.PlaceholderWithDefault(input=examples, shape=())
    # A batch without examples is a micro-batch, as Keras takes a step with it; but not where other
    # replicas may have examples.
    least = 1 if number_of_replicas() == 1 else 0
    if has_rest or even:
        turns = examples // micro_batch_size
    else:
        # Rounded up without a sum with the micro-batch's size, which int32 need not hold.
        turns = tf.maximum(-(-examples // micro_batch_size), least)

    def size_at(turn):
        if even:
            return micro_batch_size
        # XLA also compiles the loop for a batch that is smaller than a micro-batch.
        return tf.minimum(micro_batch_size, examples - (0 if has_rest else turn * micro_batch_size))

    step = tf.function(lone_replica()(step), autograph=False)
    specs = [tf.TensorSpec(k.looped.element_shape, k.rest.dtype) for k in kept]
    traced = step.get_concrete_function(batch.slice(0, size_at(0)), *specs)
    summands, keep_specs, result_specs = traced.structured_outputs
    template = (zeros(summands), tf.nest.map_structure(_empty, result_specs))

    def one_more(flat, *inputs):
        """The sum and the newest result, flat, after another micro-batch; and what it keeps."""
        total, _ = _with_nones(template, flat)
        summands, keep, result = step(*inputs)
        return _without_nones((add(total, summands), result)), keep

    def body(turn, flat, arrays):
        micro_batch = batch.slice(turn * micro_batch_size, size_at(turn))
        flat, keep = one_more(flat, micro_batch, *(k.looped.read(turn) for k in kept))
        arrays = [array.write(turn, t) for array, t in zip(arrays, keep, strict=True)]
        return turn + 1, flat, arrays

    # XLA also compiles what would read from an array that is empty.
    arrays = [
        tf.TensorArray(t.dtype, tf.maximum(turns, 1), element_shape=t.shape) for t in keep_specs
    ]
    shapes = [t.shape for t in _without_nones((template[0], result_specs))]
    turn, flat, arrays = tf.while_loop(
        lambda turn, *_: turn < turns,
        body,
        (tf.constant(0), _without_nones(template), arrays),
        shape_invariants=(None, shapes, [None] * len(arrays)),
        parallel_iterations=1,
    )

    def run_rest():
        # The start from the loop's counter, so that this waits for the loop to end; the size not,
        # as XLA has to know it.
        left = examples % micro_batch_size
        micro_batch = batch.slice(turn * micro_batch_size, left)
        return one_more(flat, micro_batch, *(k.rest for k in kept))

    def run_nothing():
        return flat, [_empty(t) for t in keep_specs]

    if has_rest:
        # Of `tf.cond` XLA would compile both branches.
        left = tf.where(tf.equal(examples, 0), least, examples % micro_batch_size)
        index = tf.minimum(left, 1)
        flat, rest = tf.switch_case(index, [run_nothing, run_rest])
    else:
        flat, rest = run_nothing()
    total, result = _with_nones(template, flat)
    return total, [Kept(*pair) for pair in zip(arrays, rest, strict=True)], result
