"""A model of any structure as one stage, which is computed as a whole."""

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.kinds import is_known_batch_norm
from gradient_accumulator_tf.replicated.side_effects import RecordingScope, held_back
from gradient_accumulator_tf.stages.cuts import Stage
from gradient_accumulator_tf.stages.repeatable import (
    check_operations,
    trace,
    watched_operations,
)


class WholeModel:
    """Computes a model twice as if it were computed once; has the methods of a `StageRunner`.

    What layers change in the first computation counts: moving statistics, metrics, counters, random
    states. The second one begins with the values that the first began with, and what it changes is
    dropped.

    Args:
        model: The built model.
        call: Function of a micro-batch `(x, y, sample_weight)` that calls the model in training.
        weight_of: Function of a micro-batch that returns the scalar that scalars given to
            `add_loss` count for; None is the number of examples.
        argument: The argument that has the model computed twice, for the errors.
    """

    def __init__(self, model, call, weight_of, argument):
        self._model, self._call, self._weight_of = model, call, weight_of
        self._argument = argument
        self._states = []
        self._is_checked = False

    def stages(self):
        """List of the only `Stage`."""
        whole = Stage(
            nodes=[],
            inputs=["the model's"],
            reads=[],
            keeps=[],
            contributes=[],
            applies=[],
            results=[],
            variables=list(self._model.trainable_weights),
            states=[],
        )
        return [whole]

    def forward(self, stage, micro_batch, reads, statistics):
        """Computes the model; what layers change is assigned.

        Returns:
            Dict with the outputs and what was given to `add_loss`, and list of the values that
            what changes began with.

        Raises:
            ValueError: If a layer does what a second computation would not repeat.
        """
        if tf.executing_eagerly() and not self._is_checked:
            trace(lambda: self.replay(stage, micro_batch, reads, statistics, ()))
            self._is_checked = True
        with RecordingScope(collect_losses=True) as scope:
            y_pred = self._call(micro_batch)
        changes = scope.changes()
        self._refuse_assigned(changes)
        # Batch norm reads its moving statistics in training, but its outputs do not depend on them.
        unread = {
            id(v)
            for layer in _keras.all_layers(self._model)
            if is_known_batch_norm(layer)
            for v in layer.non_trainable_variables
        }
        self._states = [v for v, _ in changes if id(v) not in unread]
        starts = [tf.identity(v.value) for v in self._states]
        for variable, value in changes:
            variable.assign(value)
        return {"outputs": y_pred, "losses": scope.losses}, starts

    def replay(self, stage, micro_batch, reads, statistics, starts):
        """Computes the model again from `starts`; nothing moves."""
        del stage, reads, statistics
        states = list(zip(self._states, starts, strict=False))
        with (
            watched_operations() as operations,
            held_back(),
            RecordingScope(states, collect_losses=True) as scope,
        ):
            y_pred = self._call(micro_batch)
        check_operations(operations, self._argument, f"the model {self._model.name!r}")
        return {"outputs": y_pred, "losses": scope.losses}

    def ends(self, tensors, micro_batch, loss):
        """As of a `StageRunner`."""
        weight = self._weight_of(micro_batch)
        return loss.take(tensors["outputs"], tensors["losses"], weight)

    def _refuse_assigned(self, changes):
        for variable, _ in changes:
            if variable.trainable:
                raise ValueError(
                    f"With {self._argument} no layer may assign values to its trainable variables "
                    "in training, as each is computed twice. Received: a layer that assigns to "
                    f"{variable.path!r} (keras.layers.SpectralNormalization does). Leave that "
                    "layer out, or freeze it."
                )
