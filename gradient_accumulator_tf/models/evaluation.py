"""Loss, metrics and outputs of an effective batch without training, in micro-batches."""

import tensorflow as tf

from gradient_accumulator_tf.cycle.gathering import Gathering
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from gradient_accumulator_tf.cycle.non_finite import PROPAGATE
from gradient_accumulator_tf.cycle.rules import Summation
from gradient_accumulator_tf.models.coupled_loss import run_coupled_test
from gradient_accumulator_tf.models.micro_step import (
    Effective,
    call_model,
    find_test_loss,
    log_loss,
    log_losses_of_batch,
)
from gradient_accumulator_tf.models.step_metrics import StepMetrics
from gradient_accumulator_tf.replicated.replicas import (
    on_average_replica,
    sum_over_replicas,
    undo_averaging,
)


def evaluated(model, batch, micro_batch_size):
    """The logs of a test step, where `activity_regularizers_by_rank` is in force.

    Args:
        model: The `GradientAccumulateModel`, built.
        batch: The effective `Batch` of `(x, y, sample_weight)`.
        micro_batch_size: Examples in a micro-batch.

    Returns:
        Dict of the metrics' values.
    """
    if model.coupled_loss:
        loss, logs = run_coupled_test(model, batch, micro_batch_size)
        # Keras divides losses by the number of replicas, and logs them undivided.
        return log_loss(model, logs, (undo_averaging(loss), batch.examples), [], PROPAGATE)
    total = on_average_replica(sum_over_replicas(tf.cast(batch.examples, tf.float64)))
    effective = Effective(total, batch.times_weighed(micro_batch_size))
    metrics = StepMetrics(model, batch, micro_batch_size)

    def step(micro_batch):
        loss, y_pred = find_test_loss(model, micro_batch, effective)
        return ([], loss.sums()), *metrics.update(micro_batch, y_pred)

    summation = Summation([])
    (_, losses), kept, logs = sum_over_micro_batches(
        step, batch, micro_batch_size, summation.zeros, summation.add
    )
    logs = metrics.finish(kept, logs)
    return log_losses_of_batch(model, logs, sum_over_replicas(losses), batch, PROPAGATE)


def outputs_of(model, batch, micro_batch_size):
    """What the model returns for all examples of an effective batch.

    Args:
        model: The `GradientAccumulateModel`, built.
        batch: The effective `Batch`, whose first part are the inputs.
        micro_batch_size: Examples in a micro-batch.

    Returns:
        Nested tensors, as the model returns them for the whole batch.

    Raises:
        NotRowsError: If an output is known not to have a row for each example.
    """
    gathering = Gathering(batch, micro_batch_size, model.shared_inputs, attached=False)
    wanted = None

    def step(micro_batch):
        nonlocal wanted
        gathering.begin(micro_batch)
        wanted = gathering.want(
            call_model(model, micro_batch[0], training=False),
            "outputs of `predict`",
            "Give each example one row of outputs, or predict with the plain model, model.model.",
        )
        return (), gathering.kept, None

    _, kept, _ = sum_over_micro_batches(
        step,
        batch,
        micro_batch_size,
        zeros=lambda summands: summands,
        add=lambda total, summands: total,
    )
    return gathering.whole(wanted, kept)
