"""The gradient of an effective batch through barriers, in micro-batches.

Micro-batches cannot be run to the end one by one where an example's output depends on the other
examples. They can stage by stage. Forward, each stage runs over all micro-batches and adds up what
the barriers behind it are finished from. Backward, from the last stage to the first, each stage is
computed again under a tape, micro-batch by micro-batch, from the same random states (Chen et al.
2016, recomputation). Its outputs receive two cotangents: what later stages found for the same
example, and what the barriers send back from all examples.

The loss ends the last stage in one of two ways:

- It is a sum over micro-batches (`gradients`). Then the last stage runs forward and backward at
  once, with the loss.
- It needs the outputs of all examples (`gradients_through`). Then it is one more barrier, behind
  the last stage.
"""

import tensorflow as tf

from gradient_accumulator_tf.cycle.rules import Summation
from gradient_accumulator_tf.replicated.replicas import on_average_replica, sum_over_replicas
from gradient_accumulator_tf.stages.state import Pass, Sources, State


class StagedGradients:
    """Loss and gradient of a model on an effective batch, as if it ran in one piece.

    Args:
        stages: List of `Stage`, first to last.
        runner: What computes them: a `StageRunner` or a `WholeModel`.
    """

    def __init__(self, stages, runner):
        self._stages = stages
        self._runner = runner

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
        state = State(batch, micro_batch_size)
        for stage in stages:
            self._forward(stage, state)
        totals = self._totals(last, state, denominators)
        head = self._head(last, state, variables, totals, differentiate)
        gradients = self._all_backward(stages, state, variables, head.gradients)
        state.end(finite_only)
        return gradients, head.sums, head.kept, head.result

    def gradients_through(self, batch, micro_batch_size, variables, loss, finite_only=False):
        """As `gradients`, for a loss that is a barrier behind the model's outputs.

        Args:
            batch: As for `gradients`.
            micro_batch_size: As for `gradients`.
            variables: As for `gradients`.
            loss: `LossNode` whose barrier is the loss.
            finite_only: As for `gradients`.

        Returns:
            List with a gradient or None for each variable, of this replica alone, without what
            reaches the variables by the loss itself; and what the barrier was `Finished` to.
        """
        *stages, last = self._stages
        state = State(batch, micro_batch_size)
        for stage in stages:
            self._forward(stage, state)
        self._forward(last, state, loss)
        found = self._backward(last, state, variables, loss)
        gradients = self._all_backward(stages, state, variables, found.gradients)
        state.end(finite_only)
        return gradients, state.finished[loss]

    def _all_backward(self, stages, state, variables, gradients):
        """The gradients after those of earlier stages are added to the last stage's."""
        positions = {id(v): i for i, v in enumerate(variables)}
        for stage in reversed(stages):
            trained = [v for v in stage.variables if id(v) in positions]
            found = [None] * len(variables)
            for v, gradient in zip(
                trained, self._backward(stage, state, trained).gradients, strict=True
            ):
                found[positions[id(v)]] = gradient
            gradients = Summation(variables).both(gradients, found)
        return gradients

    def _forward(self, stage, state, loss=None):
        """Keeps what later stages read, and finishes the barriers that the next ones apply."""
        contributing = _contributing(stage, loss)
        keeps = {}

        def step(micro_batch, *reads):
            tensors, starts = self._runner.forward(stage, micro_batch, reads, state.statistics)
            if loss is not None:
                tensors |= self._runner.ends(tensors, micro_batch, loss)
            # A loss knows what it reads once the model's outputs are known.
            keeps.update(dict.fromkeys(stage.keeps))
            keeps.update((key, None) for node in _gathering(contributing) for key in node.inputs)
            contributions = [
                node.barrier.contribute([tensors[key] for key in node.inputs])
                for node in contributing
            ]
            return Pass(sums=contributions, kept=[*(tensors[key] for key in keeps), *starts])

        found = state.loop(step, state.kept_of(stage.reads), part=_part_for(stage, loss))
        kept = dict(zip(keeps, found.kept, strict=False))
        state.starts[stage] = found.kept[len(keeps) :]
        for node, total in zip(contributing, found.sums, strict=True):
            state.finish(node, total, kept)
        state.kept.update((key, kept[key]) for key in stage.keeps)

    def _totals(self, stage, state, denominators):
        """The sum of the loss's denominators, on an average replica."""

        def step(micro_batch, *reads):
            def predict(tape):
                del tape
                tensors = self._runner.preview(stage, micro_batch, reads, state.statistics)
                return self._runner.predictions(tensors)

            return Pass(sums=denominators(predict, micro_batch))

        totals = sum_over_replicas(state.loop(step, state.kept_of(stage.reads)).sums)
        return tf.nest.map_structure(on_average_replica, totals)

    def _head(self, stage, state, variables, totals, differentiate):
        """The last stage and the loss, forward and backward."""
        sources = Sources(stage, state)

        def step(micro_batch, *kept):
            reads, pending = kept[: len(stage.reads)], kept[len(stage.reads) :]

            def predict(tape):
                sources.watch(tape, reads)
                tensors, _ = self._runner.forward(stage, micro_batch, reads, state.statistics)
                return self._runner.predictions(tensors)

            tape, targets, seeds, sums, keep, result = differentiate(predict, micro_batch, totals)
            gradients, by_statistics, by_reads = sources.gradients(
                tape, targets, seeds, variables, reads, pending
            )
            return Pass(gradients, (by_statistics, sums), [*by_reads, *keep], result)

        kept = [*state.kept_of(stage.reads), *sources.pending]
        found = state.loop(step, kept, variables)
        by_statistics, sums = found.sums
        by_reads, keep = found.kept[: sources.number], found.kept[sources.number :]
        sources.store(by_statistics, by_reads)
        return found._replace(sums=sums, kept=keep)

    def _backward(self, stage, state, variables, loss=None):
        """Gradients of `variables`; hands on the cotangents of what the stage reads."""
        contributing = _contributing(stage, loss)
        sources = Sources(stage, state)
        kept = [key for key in stage.keeps if key in state.cotangents]
        # Read from where they are kept, so that the operations that made them need not run again.
        inputs = dict.fromkeys(key for node in contributing for key in node.inputs)
        known = [key for key in inputs if key in state.kept]
        messages = {node: state.pull_back(node) for node in contributing}
        rows = [
            state.spread(t) for n in _gathering(contributing) for t in tf.nest.flatten(messages[n])
        ]
        starts = state.starts[stage]
        parts = (stage.reads, starts, kept, known, sources.pending, rows)

        def step(micro_batch, *tensors):
            tensors = iter(tensors)
            reads, own_starts, cotangents, values, pending, own_rows = [
                [next(tensors) for _ in part] for part in parts
            ]
            with tf.GradientTape(persistent=True) as tape:
                sources.watch(tape, reads)
                computed = self._runner.replay(
                    stage, micro_batch, reads, state.statistics, own_starts
                )
                if loss is not None:
                    computed |= self._runner.ends(computed, micro_batch, loss)
            values = {**computed, **dict(zip(known, values, strict=True))}
            targets = dict(zip(kept, cotangents, strict=True))
            own_rows = iter(own_rows)
            for node, message in messages.items():
                if node.barrier.gathers:
                    flat = [next(own_rows) for _ in tf.nest.flatten(message)]
                    message = tf.nest.pack_sequence_as(message, flat)
                sent_back = node.barrier.send_back([values[key] for key in node.inputs], message)
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
            return Pass(gradients, by_statistics, by_reads)

        found = state.loop(
            step,
            [
                *state.kept_of(stage.reads),
                *starts,
                *(state.cotangents.pop(key) for key in kept),
                *state.kept_of(known),
                *sources.pending,
                *rows,
            ],
            variables,
            part=_part_for(stage, loss),
        )
        for key in stage.keeps:
            del state.kept[key]
        sources.store(found.sums, found.kept)
        return found


def _contributing(stage, loss):
    """List of the nodes whose barriers a stage contributes to."""
    return [*stage.contributes, *([] if loss is None else [loss])]


def _gathering(nodes):
    return [node for node in nodes if node.barrier.gathers]


def _part_for(stage, loss):
    """What a stage reads of the batch, as for `State.loop`."""
    if loss is not None:
        return "all"
    return "inputs" if stage.inputs else "none"
