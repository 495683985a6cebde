"""A loss that compares examples: computed once, from the outputs of all of them.

No sum of micro-batches' gradients is the gradient of such a loss. But it needs only the outputs of
all examples, and these are small. So the model runs forward over all micro-batches, the loss and
its derivatives with respect to the outputs are computed once, and each micro-batch runs again and
gets the derivatives of its own outputs (Gao et al. 2021, Scaling deep contrastive learning batch
size under memory limited setup).
"""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.cycle_end import model_ends_cycle
from gradient_accumulator_tf.cycle.losses import check_micro_batch_weight, check_total_loss
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from gradient_accumulator_tf.cycle.non_finite import policy_of
from gradient_accumulator_tf.cycle.rows import gathered
from gradient_accumulator_tf.cycle.rules import Summation
from gradient_accumulator_tf.models.micro_step import batch_norms_of, call_model, update_metrics
from gradient_accumulator_tf.replicated.replicas import (
    as_on_one_device,
    number_of_replicas,
    on_average_replica,
    own_rows,
    rows_of_all_replicas,
)
from gradient_accumulator_tf.replicated.side_effects import RecordingScope
from gradient_accumulator_tf.stages.barrier import Barrier, Finished
from gradient_accumulator_tf.stages.engine import StagedGradients
from gradient_accumulator_tf.stages.graph import unique
from gradient_accumulator_tf.stages.loss import LossNode
from gradient_accumulator_tf.stages.whole import WholeModel


def check_coupled_loss(value):
    """Raises ValueError if the argument `coupled_loss` is none of its choices."""
    if not (isinstance(value, bool) or value == "all_replicas"):
        raise ValueError(
            '`coupled_loss` must be False, True or "all_replicas". Received: '
            f"coupled_loss={value!r}. Pass True for a loss that compares the examples of a batch."
        )


class CoupledStep(NamedTuple):
    """What an effective batch with a coupled loss found on this replica.

    Attributes:
        gradients: List with a tensor or None for each trainable variable.
        total: Scalar, the loss as Keras computes it on this replica.
        logs: Dict of the metrics' values.
    """

    gradients: list
    total: Any
    logs: dict


def staged_whole(model):
    """`StagedGradients` for a model of any structure."""

    def weight_of(micro_batch):
        return check_micro_batch_weight(model.micro_batch_weight(*micro_batch))

    runner = WholeModel(
        model,
        call=lambda micro_batch: call_model(model, micro_batch[0]),
        weight_of=weight_of,
        argument=f"coupled_loss={model.coupled_loss!r}",
    )
    return StagedGradients(runner.stages(), runner)


def run_coupled_step(model, batch, staged, micro_batch_size):
    """Runs an effective batch forward and backward.

    Args:
        model: The `GradientAccumulateModel`.
        batch: The `Batch`.
        staged: `StagedGradients` of the model.
        micro_batch_size: Examples in a micro-batch.

    Returns:
        `CoupledStep`.
    """
    node, variables = LossNode(), model.trainable_weights
    node.barrier = CoupledLoss(model, batch, node)
    finite_only = policy_of(model.non_finite).finite_only
    with model_ends_cycle(finite_only):
        gradients, found = staged.gradients_through(
            batch, micro_batch_size, variables, node, finite_only
        )
    for layer in batch_norms_of(model):
        layer.end_cycle()
    loss = found.notes
    gradients = Summation(variables).both(gradients, loss.by_variables)
    return CoupledStep(gradients, loss.total, loss.logs)


class CoupledLoss(Barrier):
    """The loss of a model over the outputs of an effective batch.

    Args:
        model: The `GradientAccumulateModel`.
        batch: The `Batch`.
        node: The `LossNode` that it is the barrier of.
    """

    gathers = True

    def __init__(self, model, batch, node):
        self._model, self._batch, self._node = model, batch, node

    def contribute(self, inputs):
        """Nothing, as the loss reads the rows themselves."""
        del inputs
        return ()

    def finish(self, total, gathered):
        """Computes the loss, its derivatives, and the metrics."""
        del total
        model, over_all = self._model, _is_over_replicas(self._model)
        rows, data = _seen_by_loss(model, self._batch, gathered)
        watched = [t for t in rows if t.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            loss = _loss_of_rows(model, data, self._node, rows)
            scaled = model.optimizer.scale_loss(loss)
        by_rows, by_variables = tape.gradient(scaled, (watched, list(model.trainable_weights)))
        by_rows = [
            tf.zeros_like(t) if gradient is None else tf.convert_to_tensor(gradient)
            for t, gradient in zip(watched, by_rows, strict=True)
        ]
        if over_all:
            # Each replica has computed the whole loss, and keeps what belongs to its own examples.
            number = tf.shape(gathered[0])[0]
            by_rows = [own_rows(t, number) for t in by_rows]
            by_variables = [on_average_replica(_dense(g)) for g in by_variables]
            loss = on_average_replica(loss)
        logs = _metrics_of_rows(model, self._batch, self._node, gathered)
        return Finished((), _LossOfAll(loss, by_rows, by_variables, logs))

    def apply(self, inputs, statistics):
        """Nothing, as no stage comes behind the loss."""
        del inputs, statistics
        return []

    def pull_back(self, finished, cotangents):
        """The derivatives of the loss with respect to what it reads, where that is of floats."""
        del cotangents
        return finished.notes.by_rows

    def send_back(self, inputs, message):
        """The rows of these that belong to the micro-batch."""
        rows = iter(message)
        return [next(rows) if t.dtype.is_floating else None for t in inputs]


class _LossOfAll(NamedTuple):
    """What `CoupledLoss.finish` found.

    Attributes:
        total: Scalar, the loss.
        by_rows: List of the derivatives with respect to the rows of this replica.
        by_variables: List of the derivatives with respect to the variables, or None.
        logs: Dict of the metrics' values.
    """

    total: Any
    by_rows: list
    by_variables: list
    logs: dict


def run_coupled_test(model, batch, micro_batch_size):
    """The loss of an effective batch, and its metrics, without training.

    Args:
        model: The `GradientAccumulateModel`.
        batch: The `Batch`.
        micro_batch_size: Examples in a micro-batch.

    Returns:
        Scalar, the loss as Keras computes it on this replica; and the dict of the metrics' values.
    """
    node = LossNode()

    def step(micro_batch):
        with _keras.added_losses_of_each_replica(model):
            _keras.clear_added_losses(model)
            y_pred = call_model(model, micro_batch[0], training=False)
            added = _keras.added_losses(model)
        weight = check_micro_batch_weight(model.micro_batch_weight(*micro_batch))
        taken = node.take(y_pred, added, weight)
        return (), list(taken.values()), None

    _, kept, _ = sum_over_micro_batches(
        step, batch, micro_batch_size, zeros=lambda summands: summands, add=lambda total, _: total
    )
    rows = [
        gathered(k, batch, micro_batch_size, node.name_of(key))
        for k, key in zip(kept, node.inputs, strict=True)
    ]
    of_loss, data = _seen_by_loss(model, batch, rows)
    loss = _loss_of_rows(model, data, node, of_loss, training=False)
    if _is_over_replicas(model):
        loss = on_average_replica(loss)
    return loss, _metrics_of_rows(model, batch, node, rows)


def _seen_by_loss(model, batch, rows):
    """The rows and `(x, y, sample_weight)` that the loss is computed from on this replica."""
    if not _is_over_replicas(model):
        return rows, batch.data
    x, *rest = batch.data
    own = type(model).compute_loss is not keras.Model.compute_loss
    # Keras's own loss reads no x.
    return [rows_of_all_replicas(t) for t in rows], tf.nest.map_structure(
        lambda t: None if t is None else rows_of_all_replicas(t), (x if own else None, *rest)
    )


def _loss_of_rows(model, data, node, rows, training=True):
    """Scalar, the loss of outputs that are given in rows, and of what layers added."""

    def compute():
        y_pred, added = node.put_together(rows)
        _keras.clear_added_losses(model)
        if added:
            model.add_loss(added)
        x, y, sample_weight = data
        return _keras.compute_loss(model, x, y, y_pred, sample_weight, training)

    # A loss may wait for the other replicas, which add losses of their own meanwhile.
    with _keras.added_losses_of_each_replica(model):
        loss = _as_one_replica(model, compute) if _is_over_replicas(model) else compute()
        _keras.clear_added_losses(model)
    return check_total_loss(loss)


def _as_one_replica(model, compute):
    """The result of a function in which Keras divides no mean by the number of replicas.

    Variables belong to the strategy in force, which is another one within. So what the function
    reads of metrics is read before, and what it assigns to any variable is assigned behind it.
    """
    metrics = _keras.per_output_loss_metrics(model)
    read = [
        *model.non_trainable_variables,
        *model.metrics_variables,
        *(v for metric in metrics for v in metric.variables),
        # In a scope Keras looks up there, and nowhere else, what is regularised.
        *(v for v in model.trainable_weights if v.regularizer is not None),
    ]
    values = [(v, tf.convert_to_tensor(v)) for v in unique(read)]
    with as_on_one_device(), RecordingScope(values, collect_losses=True) as scope:
        result = compute()
    for variable, value in scope.changes():
        variable.assign(value)
    return result


def _is_over_replicas(model):
    return model.coupled_loss == "all_replicas" and number_of_replicas() > 1


def _metrics_of_rows(model, batch, node, rows):
    """Dict of the metrics' values after they have seen outputs that are given in rows."""
    y_pred, _ = node.put_together(rows)
    return update_metrics(model, batch.data, y_pred)


def _dense(gradient):
    return None if gradient is None else tf.convert_to_tensor(gradient)
