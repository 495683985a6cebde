"""The computation of one stage for one micro-batch, which changes nothing."""

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.stages.repeatable import check_repeatable, traced_operations


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
        self._training = _Training(name="training", dtype=model.dtype_policy, autocast=False)

    def run(self, stage, micro_batch, reads, statistics, draws):
        """Computes a stage.

        Args:
            stage: The `Stage`.
            micro_batch: Tuple that begins with the model's inputs; anything for a stage that reads
                none of these.
            reads: List of the tensors `stage.reads`.
            statistics: Dict of the barriers' statistics, by node.
            draws: List of the values that `stage.states` begin with.

        Returns:
            Dict of the tensors of the graph that were read or computed, and list of the values
            that `stage.states` end with.

        Raises:
            ValueError: If a layer does what a second computation would not repeat.
        """
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

        known = set(traced_operations())
        states = zip(stage.states, draws, strict=True)
        with keras.StatelessScope(state_mapping=states, collect_losses=True) as scope:
            self._training((), function=compute, training=True)
        traced = [op for op in traced_operations() if op not in known]
        check_repeatable(stage, scope, traced, self._model, self._kind)
        return tensors, [scope.get_current_value(v) for v in stage.states]

    def predictions(self, tensors):
        """The model's outputs, nested as its call returns them, from what the last stage made."""
        return _keras.packed_outputs(self._model, [tensors[key] for key in self._graph.outputs])


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


def start_of(states):
    """List of the values that random states hold now."""
    return [tf.identity(v.value) for v in states]


def assign_all(states, values):
    """Assigns the values that random states end with."""
    for variable, value in zip(states, values, strict=True):
        variable.assign(value)
