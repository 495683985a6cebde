"""The metrics of one step over an effective batch: each is that of the large batch."""

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.additive_metrics import DECLARATION, adds_up
from gradient_accumulator_tf.cycle.gathering import Gathering
from gradient_accumulator_tf.models.micro_step import update_metrics


class StepMetrics:
    """Updates a model's metrics with an effective batch in micro-batches.

    Metrics that add up are updated with each micro-batch. For others the outputs that they see are
    kept, and they are updated once, with those of all examples. So it is with a `compute_metrics`
    of the user's.

    Args:
        model: The `GradientAccumulateModel`.
        batch: The effective `Batch` of `(x, y, sample_weight)`.
        micro_batch_size: Examples in a micro-batch.
    """

    def __init__(self, model, batch, micro_batch_size):
        self._model, self._batch = model, batch
        self._gathering = Gathering(batch, micro_batch_size, model.shared_inputs)
        own = getattr(model.compute_metrics, "__func__", None)
        self._computes_by_itself = own is not keras.Model.compute_metrics
        self._streams_all = self._computes_by_itself and bool(
            getattr(model.compute_metrics, DECLARATION, False)
        )
        self._updates, self._y_pred = [], None

    def update(self, micro_batch, y_pred):
        """Updates with a micro-batch what adds up.

        Args:
            micro_batch: Tuple `(x, y, sample_weight)`, a slice of the batch.
            y_pred: The model's outputs.

        Returns:
            List of tensors to keep; and the dict of the metrics' values, or None if only `finish`
            knows them.
        """
        self._gathering.begin(micro_batch)
        self._updates = []
        if self._computes_by_itself and not self._streams_all:
            self._y_pred = self._want(y_pred, "`compute_metrics`")
            return self._gathering.kept, None
        metrics = _keras.compiled_metrics(self._model)
        with _keras.replaced_updates(metrics, self._update_or_want):
            if self._streams_all:
                logs = update_metrics(self._model, micro_batch, y_pred)
                return self._gathering.kept, logs
            _, y, sample_weight = micro_batch
            _keras.update_compiled_metrics(self._model, y, y_pred, sample_weight)
        return self._gathering.kept, None

    def finish(self, kept, logs):
        """Updates with the effective batch what does not add up.

        Args:
            kept: List of the `Kept` that became of the tensors to keep.
            logs: What `update` returned of the last micro-batch.

        Returns:
            Dict of the metrics' values; None for those that `model.get_metrics_result` returns.
        """
        if self._computes_by_itself and not self._streams_all:
            y_pred = self._gathering.whole(self._y_pred, kept)
            return update_metrics(self._model, self._batch.data, y_pred)
        metrics = [metric for metric, _ in self._updates]
        arguments = self._gathering.whole([wanted for _, wanted in self._updates], kept)
        for metric, (y_true, y_pred, sample_weight) in zip(metrics, arguments, strict=True):
            metric.update_state(y_true, y_pred, sample_weight=sample_weight)
        return logs

    def _update_or_want(self, metric, update_state):
        """The function to call in place of `metric.update_state` for a micro-batch."""

        def update(y_true, y_pred, sample_weight=None):
            if adds_up(metric, y_true, y_pred, sample_weight):
                update_state(y_true, y_pred, sample_weight=sample_weight)
                return
            arguments = (y_true, y_pred, sample_weight)
            self._updates.append((metric, self._want(arguments, f"the metric {metric.name!r}")))

        return update

    def _want(self, structure, seen_by):
        remedy = (
            "Give each example one row of outputs. If what sees them adds up over micro-batches, "
            "set its attribute `additive` to True: it is updated with each micro-batch."
        )
        return self._gathering.want(structure, f"outputs that {seen_by} sees", remedy)
