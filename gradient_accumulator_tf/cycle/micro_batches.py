"""Sum over the micro-batches of a batch.

The micro-batches run in one of five ways, which differ in what a size may be:

| way | when | sizes |
|---|---|---|
| `_in_one_piece` | the batch is known to be one micro-batch | any |
| `_one_by_one` | eagerly | numbers |
| `_even_loop` | the batch is known to be a multiple of micro-batches | static, all the same |
| `_uneven_loop` | anything else, without XLA | scalars at run time |
| `_loop_and_rest` | anything else, with XLA | static, as XLA needs them: the rest runs after it |
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.batches import Batch
from gradient_accumulator_tf.replicated.replicas import lone_replica, number_of_replicas


class Kept(NamedTuple):
    """A tensor of every micro-batch.

    Attributes:
        looped: `tf.TensorArray` or list with the tensors of the micro-batches in the loop.
        rest: The tensor of the micro-batch after the loop; empty if there is none.
    """

    looped: Any
    rest: Any


class _Sum(NamedTuple):
    """What is summed: the arguments of `sum_over_micro_batches`."""

    step: Callable
    batch: Batch
    micro_batch_size: int
    zeros: Callable
    add: Callable
    kept: Sequence


def sum_over_micro_batches(step, batch, micro_batch_size, zeros, add, kept=()):
    """Runs `step` on every micro-batch: adds up its summands, keeps its tensors of each.

    In graph mode `step` is traced once. The micro-batches run in a `tf.while_loop`, which has one
    micro-batch's activations in memory at a time.

    Args:
        step: Function of a nested micro-batch, and of a tensor for each of `kept`, that returns
            (nested summands, list of tensors to keep, nested tensors).
        batch: The `Batch`.
        micro_batch_size: Examples in a micro-batch.
        zeros: Function of the summands' structure that returns what a sum of them starts from.
        add: Function of (sum, summands) that returns their sum.
        kept: List of `Kept` from an earlier call with this batch and micro-batch size.

    Returns:
        The sum, a list of `Kept`, and the third result of the last micro-batch.
    """
    job = _Sum(step, batch, micro_batch_size, zeros, add, kept)
    examples = _known(batch.examples)
    if is_one_micro_batch(batch, micro_batch_size):
        return _in_one_piece(job, examples)
    if tf.executing_eagerly():
        return _one_by_one(job, examples)
    if isinstance(examples, int) and examples % micro_batch_size == 0:
        return _even_loop(job, examples)
    return (_loop_and_rest if _keras.compiles_with_xla() else _uneven_loop)(job, examples)


def is_one_micro_batch(batch, micro_batch_size):
    """Whether a batch is known to have no more examples than a micro-batch."""
    examples = _known(batch.examples)
    return isinstance(examples, int) and examples <= micro_batch_size


def _known(examples):
    """A batch's number of examples, an int if it can be known."""
    return int(examples) if tf.executing_eagerly() else examples  # of ragged tensors: a tensor


def _in_one_piece(job, examples):
    """The batch is one micro-batch: no loop, and nothing is cut."""
    del examples
    summands, keep, result = job.step(job.batch.data, *(k.rest for k in job.kept))
    return job.add(job.zeros(summands), summands), [Kept([], t) for t in keep], result


def _one_by_one(job, examples):
    """A Python loop, where operations run at once."""
    total, looped = None, []
    for start in range(0, examples, job.micro_batch_size):
        inputs = [k.looped[len(looped)] for k in job.kept]
        micro_batch = job.batch.slice(start, min(job.micro_batch_size, examples - start))
        summands, keep, result = job.step(micro_batch, *inputs)
        total = job.add(job.zeros(summands) if total is None else total, summands)
        looped.append(keep)
    return total, [Kept(list(k), k[0]) for k in zip(*looped, strict=True)], result


def _even_loop(job, examples):
    """A loop over micro-batches of one static size, so that `step` knows its shapes."""
    size = job.micro_batch_size
    return _Loop(job, turns=examples // size, size_at=lambda turn: size).run()


def _uneven_loop(job, examples):
    """A loop whose last micro-batch may be smaller, with one trace for both sizes."""
    size = job.micro_batch_size
    if isinstance(examples, int):
        # TensorFlow would take the first micro-batch's static size for that of all. It does not
        # know the value of a placeholder.
        examples = tf.raw_ops.PlaceholderWithDefault(input=examples, shape=())
    # The sum of examples and the micro-batch's size need not fit into int32, so it is not used to
    # round up.
    turns = tf.maximum(-(-examples // size), _fewest_micro_batches())
    return _Loop(job, turns, lambda turn: tf.minimum(size, examples - turn * size)).run()


def _loop_and_rest(job, examples):
    """A loop over full micro-batches for XLA, then the smaller last one in a conditional.

    XLA needs one size for all turns of a loop. The conditional is by the batch's shape, so that XLA
    compiles only the branch that is taken. It would compile both branches of a `tf.cond`.
    """
    size = job.micro_batch_size
    # XLA also compiles the loop for a batch that is smaller than a micro-batch.
    loop = _Loop(job, turns=examples // size, size_at=lambda turn: tf.minimum(size, examples))
    turn, flat, arrays = loop.looped()

    def run_rest():
        # The start comes from the loop's counter, so that this waits for the loop to end. The size
        # does not, because XLA has to know it.
        micro_batch = job.batch.slice(turn * size, examples % size)
        return loop.one_more(flat, micro_batch, *(k.rest for k in job.kept))

    left = tf.where(tf.equal(examples, 0), _fewest_micro_batches(), examples % size)
    has_rest = tf.minimum(left, 1)
    flat, rest = tf.switch_case(has_rest, [lambda: (flat, loop.nothing_kept()), run_rest])
    return loop.results(flat, arrays, rest)


def _fewest_micro_batches():
    """Micro-batches in a batch without examples.

    It is one, as Keras takes a step with such a batch; but none where other replicas may have
    examples.
    """
    return 1 if number_of_replicas() == 1 else 0


class _Loop:
    """A `tf.while_loop` over micro-batches, and what carries its result on.

    A loop variable cannot be None, so that structures are flat in it, without what is None.

    Args:
        job: The `_Sum`.
        turns: int or int32 scalar, the micro-batches in the loop.
        size_at: Function of the number of a micro-batch that returns its examples.
    """

    def __init__(self, job, turns, size_at):
        self._job, self._turns, self._size_at = job, turns, size_at
        self._step = tf.function(lone_replica()(job.step), autograph=False)
        specs = [tf.TensorSpec(k.looped.element_shape, k.rest.dtype) for k in job.kept]
        traced = self._step.get_concrete_function(job.batch.slice(0, size_at(0)), *specs)
        summands, self._keep_specs, self._result_specs = traced.structured_outputs
        empty_result = tf.nest.map_structure(_empty, self._result_specs)
        self._template = (job.zeros(summands), empty_result)

    def run(self):
        """What `sum_over_micro_batches` returns, where nothing is left after the loop."""
        _, flat, arrays = self.looped()
        return self.results(flat, arrays, self.nothing_kept())

    def looped(self):
        """The number of turns, the flat sum and newest result, and an array for what is kept."""
        job = self._job

        def body(turn, flat, arrays):
            micro_batch = job.batch.slice(turn * job.micro_batch_size, self._size_at(turn))
            inputs = [k.looped.read(turn) for k in job.kept]
            flat, keep = self.one_more(flat, micro_batch, *inputs)
            arrays = [array.write(turn, t) for array, t in zip(arrays, keep, strict=True)]
            return turn + 1, flat, arrays

        # XLA also compiles what would read from an array that is empty.
        size = tf.maximum(self._turns, 1)
        arrays = [tf.TensorArray(t.dtype, size, element_shape=t.shape) for t in self._keep_specs]
        shapes = [t.shape for t in _without_nones((self._template[0], self._result_specs))]
        return tf.while_loop(
            lambda turn, *_: turn < self._turns,
            body,
            (tf.constant(0), _without_nones(self._template), arrays),
            shape_invariants=(None, shapes, [None] * len(arrays)),
            parallel_iterations=1,
        )

    def one_more(self, flat, *inputs):
        """The sum and the newest result, flat, after another micro-batch; and what it keeps."""
        total, _ = _with_nones(self._template, flat)
        summands, keep, result = self._step(*inputs)
        return _without_nones((self._job.add(total, summands), result)), keep

    def nothing_kept(self):
        """What stands for the tensors of a micro-batch that there is not."""
        return [_empty(t) for t in self._keep_specs]

    def results(self, flat, arrays, rest):
        """What `sum_over_micro_batches` returns."""
        total, result = _with_nones(self._template, flat)
        return total, [Kept(*pair) for pair in zip(arrays, rest, strict=True)], result


def _without_nones(structure):
    """Flat list of the tensors in a structure."""
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
