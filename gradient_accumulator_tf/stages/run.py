"""The computation of one stage of a graph, for one micro-batch."""

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.replicated.side_effects import RecordingScope
from gradient_accumulator_tf.stages.cuts import cut
from gradient_accumulator_tf.stages.engine import StagedGradients
from gradient_accumulator_tf.stages.graph import flat_graph
from gradient_accumulator_tf.stages.repeatable import (
    check_repeatable,
    trace,
    watched_operations,
)


class StageRunner:
    """Computes stages of a model as its training call would.

    What layers assign stays in a scope, so that a stage can be computed again from the same start.

    Args:
        model: The built functional or Sequential model.
        graph: Its `Graph`.
        kind: The `BarrierKind` that the graph was made with.
    """

    def __init__(self, model, graph, kind):
        self._model, self._graph, self._kind = model, graph, kind
        self._checked = set()
        self._training = _Training(name="training", dtype=model.dtype_policy, autocast=False)

    def forward(self, stage, micro_batch, reads, statistics):
        """Computes a stage; its random states move on.

        Args:
            stage: The `Stage`.
            micro_batch: Tuple that begins with the model's inputs; anything for a stage that reads
                none of these.
            reads: List of the tensors `stage.reads`.
            statistics: Dict of the barriers' statistics, by node.

        Returns:
            Dict of the tensors of the graph that were read or computed, and list of the values
            that `stage.states` began with.

        Raises:
            ValueError: If a layer does what a second computation would not repeat.
        """
        starts = [tf.identity(v.value) for v in stage.states]
        if tf.executing_eagerly() and stage not in self._checked:
            trace(lambda: self._run(stage, micro_batch, reads, statistics, starts))
            self._checked.add(stage)
        tensors, ends = self._run(stage, micro_batch, reads, statistics, starts)
        for variable, value in zip(stage.states, ends, strict=True):
            variable.assign(value)
        return tensors, starts

    def preview(self, stage, micro_batch, reads, statistics):
        """What `forward` would compute next; nothing moves."""
        starts = [tf.identity(v.value) for v in stage.states]
        return self.replay(stage, micro_batch, reads, statistics, starts)

    def replay(self, stage, micro_batch, reads, statistics, starts):
        """Computes a stage again; nothing moves.

        Args:
            stage: As for `forward`.
            micro_batch: As for `forward`.
            reads: As for `forward`.
            statistics: As for `forward`.
            starts: List of the values that `forward` began with.

        Returns:
            The dict that `forward` returned.
        """
        return self._run(stage, micro_batch, reads, statistics, starts)[0]

    def predictions(self, tensors):
        """The model's outputs, nested as its call returns them, from what the last stage made."""
        return _keras.packed_outputs(self._model, [tensors[key] for key in self._graph.outputs])

    def ends(self, tensors, micro_batch, loss):
        """Dict of what a loss over all examples reads, by what `loss.inputs` then has.

        Args:
            tensors: What the last stage computed.
            micro_batch: Tuple `(x, y, sample_weight)`.
            loss: `LossNode`.
        """
        del micro_batch
        return loss.take(self.predictions(tensors))

    def _run(self, stage, micro_batch, reads, statistics, starts):
        tensors = dict(zip(stage.reads, reads, strict=True))
        if stage.inputs:
            inputs = _keras.standardized_inputs(self._model, micro_batch[0])
            tensors.update(zip(self._graph.inputs, inputs, strict=True))

        def compute():
            for node in stage.nodes:
                inputs = [tensors[key] for key in node.inputs]
                if node.barrier:
                    outputs = node.barrier.apply(inputs, statistics[node])
                else:
                    outputs = _call(node, inputs)
                tensors.update(zip(node.outputs, outputs, strict=True))
            return ()

        states = list(zip(stage.states, starts, strict=True))
        with (
            watched_operations() as operations,
            RecordingScope(states, collect_losses=True) as scope,
        ):
            self._training((), function=compute, training=True)
        check_repeatable(stage, scope, operations, self._kind)
        return tensors, [scope.get_current_value(v) for v in stage.states]


class _Training(keras.layers.Layer):
    """A layer to call others in: they take `training` from the outermost call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.built = True

    def call(self, inputs, function, training=None):
        return function()


def _call(node, inputs):
    args, kwargs = node.fill_in(dict(zip(node.slots, inputs, strict=True)))
    layer = node.operation
    if isinstance(layer, keras.Layer) and _keras.call_has_training_argument(layer):
        kwargs = {**kwargs, "training": True}  # as Keras overrides it
    return keras.tree.flatten(layer(*args, **kwargs))


def staged_at_barriers(model, kind):
    """`StagedGradients` for a model that is cut at each of its barriers.

    Args:
        model: A functional or Sequential model, built. Its `trainable` flags count as they are
            now.
        kind: `BarrierKind`, which of its layers look across examples.

    Raises:
        ValueError: If the model's graph cannot be cut at each barrier.
    """
    graph = flat_graph(model, kind)
    return StagedGradients(cut(graph), StageRunner(model, graph, kind))
