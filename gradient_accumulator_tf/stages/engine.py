"""The gradient of an effective batch through barriers, in micro-batches.

Micro-batches cannot be run to the end one by one where an example's output depends on the other
examples. They can stage by stage. Forward, each stage runs over all micro-batches and adds up what
the barriers behind it are finished from. The last stage runs forward and backward at once, with the
loss. Backward, from the stage before it to the first, each stage is computed again under a tape,
micro-batch by micro-batch, from the same random states (Chen et al. 2016, recomputation). Its
outputs receive two cotangents: what later stages found for the same example, and what the barriers
send back from all examples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from gradient_accumulator_tf.cycle.gradients import Summand
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from gradient_accumulator_tf.cycle.rules import Summation
from gradient_accumulator_tf.replicated.replicas import on_average_replica, sum_over_replicas
from gradient_accumulator_tf.stages.cuts import cut
from gradient_accumulator_tf.stages.graph import flat_graph
from gradient_accumulator_tf.stages.rows import gathered, spread
from gradient_accumulator_tf.stages.run import StageRunner, assign_all, start_of


class StagedGradients:
    """Loss and gradient of a model on an effective batch, as if it ran in one piece.

    Args:
        model: A functional or Sequential model, built. Its `trainable` flags count as they are
            now.
        kind: `BarrierKind`, which of its layers look across examples.

    Raises:
        ValueError: If the model's graph cannot be cut at each barrier.
    """

    def __init__(self, model, kind):
        self._graph = flat_graph(model, kind)
        self._stages = cut(self._graph)
        self._runner = StageRunner(model, self._graph, kind)

    def gradients(
        self, batch, micro_batch_size, variables, denominators, differentiate, finite_only=False
    ):
        """Runs forward and backward over all micro-batches, and ends the effective batch.

        Args:
            batch: The `Batch` of `(x, y, sample_weight)`.
            micro_batch_size: Examples in a micro-batch.
            variables: List of the variables to take the gradients of.
            denominators: Function of `(predict, micro_batch)` that returns a nested structure of
                scalars and None, to be added up over micro-batches and replicas. `predict(tape)`
                returns the model's predictions and has the tape record them.
            differentiate: Function of `(predict, micro_batch, totals)`, where `totals` is that
                sum on an average replica. Returns (persistent tape, targets, their output
                gradients, nested scalars to add up, list of tensors to keep, anything).
            finite_only: Whether the barriers leave out what is not finite at the end.

        Returns:
            List with a gradient or None for each variable, and the sum of the scalars, both of
            this replica alone; a list of `Kept` of the tensors to keep; and what the last
            micro-batch made of "anything".
        """
        *stages, last = self._stages
        state = _State(batch, micro_batch_size)
        for stage in stages:
            self._forward(stage, state)
        totals = self._totals(last, state, denominators)
        head = self._head(last, state, variables, totals, differentiate)
        gradients = head.gradients
        positions = {id(v): i for i, v in enumerate(variables)}
        for stage in reversed(stages):
            trained = [v for v in stage.variables if id(v) in positions]
            for v, gradient in zip(trained, self._backward(stage, state, trained), strict=True):
                i = positions[id(v)]
                if gradient is not None:
                    gradients[i] = gradient if gradients[i] is None else gradients[i] + gradient
        for node, finished in state.finished.items():
            node.barrier.end(finished, finite_only)
        return gradients, head.sums, head.kept, head.result

    def _forward(self, stage, state):
        """Keeps what later stages read, and finishes the barriers that the next ones apply."""
        keeps = dict.fromkeys(stage.keeps)
        keeps |= dict.fromkeys(key for node in _gathering(stage) for key in node.inputs)

        def step(micro_batch, *reads):
            draws = start_of(stage.states)
            tensors, ends = self._runner.run(stage, micro_batch, reads, state.statistics, draws)
            assign_all(stage.states, ends)
            contributions = [
                node.barrier.contribute([tensors[key] for key in node.inputs])
                for node in stage.contributes
            ]
            return _Pass(sums=contributions, kept=[*(tensors[key] for key in keeps), *draws])

        found = state.loop(step, state.kept_of(stage.reads), part=_part_for(stage))
        kept = dict(zip(keeps, found.kept, strict=False))
        state.draws[stage] = found.kept[len(keeps) :]
        for node, total in zip(stage.contributes, found.sums, strict=True):
            state.finish(node, total, kept)
        state.kept.update((key, kept[key]) for key in stage.keeps)

    def _totals(self, stage, state, denominators):
        """The sum of the loss's denominators, on an average replica."""

        def step(micro_batch, *reads):
            def predict(tape):
                del tape
                draws = start_of(stage.states)
                tensors, _ = self._runner.run(stage, micro_batch, reads, state.statistics, draws)
                return self._runner.predictions(tensors)

            return _Pass(sums=denominators(predict, micro_batch))

        totals = sum_over_replicas(state.loop(step, state.kept_of(stage.reads)).sums)
        return tf.nest.map_structure(on_average_replica, totals)

    def _head(self, stage, state, variables, totals, differentiate):
        """The last stage and the loss, forward and backward."""
        sources = _Sources(stage, state)

        def step(micro_batch, *kept):
            reads, pending = kept[: len(stage.reads)], kept[len(stage.reads) :]
            draws = start_of(stage.states)

            def predict(tape):
                sources.watch(tape, reads)
                tensors, ends = self._runner.run(stage, micro_batch, reads, state.statistics, draws)
                y_pred = self._runner.predictions(tensors)
                assign_all(stage.states, ends)
                return y_pred

            tape, targets, seeds, sums, keep, result = differentiate(predict, micro_batch, totals)
            gradients, by_statistics, by_reads = sources.gradients(
                tape, targets, seeds, variables, reads, pending
            )
            return _Pass(gradients, (by_statistics, sums), [*by_reads, *keep], result)

        kept = [*state.kept_of(stage.reads), *sources.pending]
        found = state.loop(step, kept, variables)
        by_statistics, sums = found.sums
        by_reads, keep = found.kept[: sources.number], found.kept[sources.number :]
        sources.store(by_statistics, by_reads)
        return found._replace(sums=sums, kept=keep)

    def _backward(self, stage, state, variables):
        """Gradients of `variables`; hands on the cotangents of what the stage reads."""
        sources = _Sources(stage, state)
        kept = [key for key in stage.keeps if key in state.cotangents]
        contributing = dict.fromkeys(key for node in stage.contributes for key in node.inputs)
        # Read from where they are kept, so that the operations that made them need not run again.
        known = [key for key in contributing if key in state.kept]
        messages = {node: state.pull_back(node) for node in stage.contributes}
        rows = [state.spread(t) for n in _gathering(stage) for t in tf.nest.flatten(messages[n])]
        parts = (stage.reads, stage.states, kept, known, sources.pending, rows)

        def step(micro_batch, *tensors):
            tensors = iter(tensors)
            reads, draws, cotangents, values, pending, own_rows = [
                [next(tensors) for _ in part] for part in parts
            ]
            with tf.GradientTape(persistent=True) as tape:
                sources.watch(tape, reads)
                computed, _ = self._runner.run(stage, micro_batch, reads, state.statistics, draws)
            values = {**computed, **dict(zip(known, values, strict=True))}
            targets = dict(zip(kept, cotangents, strict=True))
            own_rows = iter(own_rows)
            for node, message in messages.items():
                if node.barrier.gathers:
                    flat = [next(own_rows) for _ in tf.nest.flatten(message)]
                    message = tf.nest.pack_sequence_as(message, flat)
                inputs = [values[key] for key in node.inputs]
                sent_back = node.barrier.send_back(inputs, message)
                for key, cotangent in zip(node.inputs, sent_back, strict=True):
                    if cotangent is not None:
                        targets[key] = cotangent + targets[key] if key in targets else cotangent
            gradients, by_statistics, by_reads = sources.gradients(
                tape,
                [computed[key] for key in targets],
                list(targets.values()),
                variables,
                reads,
                pending,
            )
            return _Pass(gradients, by_statistics, by_reads)

        found = state.loop(
            step,
            [
                *state.kept_of(stage.reads),
                *state.draws[stage],
                *(state.cotangents.pop(key) for key in kept),
                *state.kept_of(known),
                *sources.pending,
                *rows,
            ],
            variables,
            part=_part_for(stage),
        )
        for key in stage.keeps:
            del state.kept[key]
        sources.store(found.sums, found.kept)
        return found.gradients


class _Pass(NamedTuple):
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


class _State:
    """What is known of an effective batch while it is on its way through the stages.

    Attributes:
        kept: Dict of `Kept` by tensor: values.
        draws: Dict of lists of `Kept` by stage: the states that its random layers started with.
        finished: Dict of `Finished` by node of a barrier.
        statistics: Dict of the statistics in these.
        cotangents: Dict of `Kept` by tensor: the loss's derivatives with respect to it so far.
        by_statistics: Dict of the loss's derivatives with respect to a barrier's statistics so
            far, in float64, by node.
    """

    def __init__(self, batch, micro_batch_size):
        self._parts = {"all": batch, "inputs": batch.inputs(), "none": batch.counter()}
        self._micro_batch_size = micro_batch_size
        self.kept, self.draws, self.cotangents = {}, {}, {}
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
            inputs = [gathered(kept[key], batch, size) for key in node.inputs]
        self.finished[node] = node.barrier.finish(total, inputs)
        self.statistics[node] = self.finished[node].statistics

    def pull_back(self, node):
        """The message of a node's barrier, once all later stages ran backward."""
        return node.barrier.pull_back(self.finished[node], self.by_statistics.pop(node))

    def spread(self, rows):
        """`Kept` of each micro-batch's rows of a tensor with one for each example."""
        return spread(rows, self._parts["none"], self._micro_batch_size)

    def loop(self, step, kept, variables=(), part="all"):
        """Runs a step over all micro-batches.

        Args:
            step: Function of a micro-batch, and of a tensor for each of `kept`; returns `_Pass`.
            kept: List of `Kept`.
            variables: List of the variables that the step takes gradients of.
            part: What the step reads of the batch: "all", "inputs" or "none". Slicing what no
                operation of the stage reads would be a third of a deep net's graph.

        Returns:
            `_Pass`.
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
        return _Pass(sums[0].gradients if sums else None, others, kept, result)


class _Sources:
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


def _gathering(stage):
    return [node for node in stage.contributes if node.barrier.gathers]


def _part_for(stage):
    return "inputs" if stage.inputs else "none"


def _or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else tf.convert_to_tensor(gradient)
