"""What is known of an effective batch on its way through the stages, and loops over it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf.cycle.gradients import Summand
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from gradient_accumulator_tf.cycle.rows import gathered, spread
from gradient_accumulator_tf.cycle.rules import Summation


class Pass(NamedTuple):
    """What a pass over a micro-batch found; after a loop, over all micro-batches.

    Attributes:
        gradients: List with a tensor or None for each variable, summed over micro-batches; None
            if none are taken.
        sums: Nested structure of tensors and None, summed over micro-batches.
        kept: List of tensors of the micro-batch; after a loop, of `Kept`.
        result: Nested tensors; after a loop, those of the last micro-batch.
    """

    gradients: list | None = None
    sums: Any = ()
    kept: Sequence = ()
    result: Any = None


class State:
    """What is known of an effective batch while it is on its way through the stages.

    Attributes:
        kept: Dict of `Kept` by tensor: values.
        starts: Dict of lists of `Kept` by stage: what its runner needs to compute it again.
        finished: Dict of `Finished` by node of a barrier.
        statistics: Dict of the statistics in these.
        cotangents: Dict of `Kept` by tensor: the loss's derivatives with respect to it so far.
        by_statistics: Dict of the loss's derivatives with respect to a barrier's statistics so
            far, in float64, by node.
    """

    def __init__(self, batch, micro_batch_size):
        self._parts = {"all": batch, "inputs": batch.inputs(), "none": batch.counter()}
        self._micro_batch_size = micro_batch_size
        self.kept, self.starts, self.cotangents = {}, {}, {}
        self.finished, self.statistics, self.by_statistics = {}, {}, {}

    def kept_of(self, keys):
        """List of the values that are kept of tensors."""
        return [self.kept[key] for key in keys]

    def finish(self, node, total, kept):
        """Finishes the barrier of a node, once all micro-batches have contributed.

        Args:
            node: The node.
            total: The sum of the contributions.
            kept: Dict of `Kept` by tensor: its inputs, if the barrier gathers.
        """
        inputs = None
        if node.barrier.gathers:
            batch, size = self._parts["none"], self._micro_batch_size
            inputs = [gathered(kept[key], batch, size, node.name_of(key)) for key in node.inputs]
        self.finished[node] = node.barrier.finish(total, inputs)
        self.statistics[node] = self.finished[node].statistics

    def pull_back(self, node):
        """The message of a node's barrier, once all later stages ran backward."""
        # No stage applies a loss, which has no statistics.
        by_statistics = self.by_statistics.pop(node, ())
        return node.barrier.pull_back(self.finished[node], by_statistics)

    def end(self, finite_only):
        """Has each barrier assign what the effective batch leaves behind."""
        for node, finished in self.finished.items():
            node.barrier.end(finished, finite_only)

    def spread(self, rows):
        """`Kept` of each micro-batch's rows of a tensor with one for each example."""
        return spread(rows, self._parts["none"], self._micro_batch_size)

    def loop(self, step, kept, variables=(), part="all"):
        """Runs a step over all micro-batches.

        Args:
            step: Function of a micro-batch, and of a tensor for each of `kept`; returns `Pass`.
            kept: List of `Kept`.
            variables: List of the variables that the step takes gradients of.
            part: What the step reads of the batch: "all", "inputs" or "none". Slicing what no
                operation of the stage reads would be a third of a deep net's graph.

        Returns:
            `Pass`.
        """

        def summed(*args):
            found = step(*args)
            groups = [] if found.gradients is None else [Summand(found.gradients)]
            return (groups, found.sums), list(found.kept), found.result

        summation = Summation(variables)
        (sums, others), kept, result = sum_over_micro_batches(
            summed,
            self._parts[part],
            self._micro_batch_size,
            summation.zeros,
            summation.add,
            kept,
        )
        return Pass(sums[0].gradients if sums else None, others, kept, result)


class Sources:
    """What a stage is differentiated with respect to, besides variables: reads and statistics.

    Attributes:
        pending: List of `Kept`: the cotangents that later stages have left for what is read.
        number: How many tensors are read that the loss is differentiated with respect to.
    """

    def __init__(self, stage, state):
        self._stage, self._state = stage, state
        self._keys = [key for key in stage.reads if state.kept[key].rest.dtype.is_floating]
        self.number = len(self._keys)
        self._started = [key for key in self._keys if key in state.cotangents]
        self.pending = [state.cotangents[key] for key in self._started]

    def _tensors(self, reads):
        by_key = dict(zip(self._stage.reads, reads, strict=True))
        statistics = [self._state.statistics[node] for node in self._stage.applies]
        return [by_key[key] for key in self._keys], statistics

    def watch(self, tape, reads):
        """Has a tape record them; `reads` is the list of the tensors that the stage reads."""
        tape.watch(self._tensors(reads))

    def gradients(self, tape, targets, seeds, variables, reads, pending):
        """Gradients of a micro-batch.

        Args:
            tape: Persistent tape that recorded the stage.
            targets: List of tensors.
            seeds: List of their output gradients.
            variables: List of variables.
            reads: As for `watch`.
            pending: List of this micro-batch's tensors of `self.pending`.

        Returns:
            Gradients of the variables, float64 derivatives nested like the statistics of each
            barrier, and cotangents of what is read, those pending included.
        """
        tensors, statistics = self._tensors(reads)
        seeds = [tf.cast(seed, t.dtype) for seed, t in zip(seeds, targets, strict=True)]
        gradients, by_statistics, cotangents = tape.gradient(
            targets, (list(variables), statistics, tensors), output_gradients=seeds
        )
        by_statistics = tf.nest.map_structure(_or_zeros, by_statistics, statistics)
        by_statistics = tf.nest.map_structure(lambda t: tf.cast(t, tf.float64), by_statistics)
        cotangents = [_or_zeros(*pair) for pair in zip(cotangents, tensors, strict=True)]
        earlier = dict(zip(self._started, pending, strict=True))
        cotangents = [
            c + earlier[key] if key in earlier else c
            for key, c in zip(self._keys, cotangents, strict=True)
        ]
        return gradients, by_statistics, cotangents

    def store(self, by_statistics, cotangents):
        """Hands the sums and the `Kept` of `gradients` on to the stages before."""
        state = self._state
        state.cotangents.update(zip(self._keys, cotangents, strict=True))
        for node, new in zip(self._stage.applies, by_statistics, strict=True):
            old = state.by_statistics.get(node)
            state.by_statistics[node] = (
                new if old is None else tf.nest.map_structure(tf.add, old, new)
            )


def _or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else tf.convert_to_tensor(gradient)
