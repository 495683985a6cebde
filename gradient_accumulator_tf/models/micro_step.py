"""Loss and gradients of one micro-batch, which both modes run, and the logs of a step."""

import warnings
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.cycle_end import model_ends_cycle
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm
from gradient_accumulator_tf.cycle.batches import batch_size, by_identity
from gradient_accumulator_tf.cycle.loss_recorder import LossRecorder
from gradient_accumulator_tf.cycle.losses import (
    MicroBatchLoss,
    check_micro_batch_weight,
    check_total_loss,
    with_coefficients,
)
from gradient_accumulator_tf.cycle.non_finite import policy_of


class Effective(NamedTuple):
    """What is known of the effective batch that a micro-batch is a slice of.

    Attributes:
        total: Float64 scalar, its examples on an average replica; None if some may be dropped.
        weighed: As `Batch.times_weighed` returns it.
    """

    total: Any
    weighed: Any


class MicroStep(NamedTuple):
    """What one micro-batch's forward and backward pass found.

    Attributes:
        contributions: List of `Contribution`; empty if there is nothing to train.
        loss: `MicroBatchLoss`.
        y_pred: The predictions, nested.
    """

    contributions: list
    loss: MicroBatchLoss
    y_pred: Any


def run_micro_step(model, micro_batch, effective=None):
    """Runs one micro-batch forward and backward.

    Args:
        model: The `GradientAccumulateModel`.
        micro_batch: Tuple `(x, y, sample_weight)`.
        effective: `Effective` batch that it is a slice of; None across steps.

    Returns:
        `MicroStep`.
    """

    def predict(tape):
        del tape  # which records it anyway
        return call_model(model, micro_batch[0])

    loss, y_pred = find_loss(model, micro_batch, predict, effective)
    contributions = []
    if model.trainable_weights:
        multiply = effective is None and not _computes_in_half(model)
        scale = gradient_scale(model, loss)
        contributions = loss.contributions(model.trainable_weights, scale, multiply)
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return MicroStep(contributions, loss, y_pred)


def call_model(model, x, training=True):
    """The predictions of a model, in training or not."""
    arguments = {"training": training} if _keras.call_has_training_argument(model) else {}
    return model(x, **arguments)


def find_loss(model, micro_batch, predict, effective=None):
    """Runs one micro-batch forward, where `activity_regularizers_by_rank` is in force.

    Args:
        model: The `GradientAccumulateModel`.
        micro_batch: Tuple `(x, y, sample_weight)`.
        predict: Function of the tape that returns the predictions.
        effective: As for `run_micro_step`.

    Returns:
        `MicroBatchLoss`, and the predictions.
    """
    finite_only = policy_of(model.non_finite).finite_only
    with (
        model_ends_cycle(finite_only),
        _keras.added_losses_of_each_replica(model),
        tf.GradientTape(persistent=True) as tape,
    ):
        _keras.clear_added_losses(model)
        y_pred = predict(tape)
        found = _compute_loss(model, micro_batch, y_pred, tape, effective, training=True)
    return _loss_of(model, micro_batch, found, tape, effective), y_pred


def find_test_loss(model, micro_batch, effective):
    """As `find_loss` for evaluation: no tape records the forward pass.

    Args:
        model: The `GradientAccumulateModel`.
        micro_batch: Tuple `(x, y, sample_weight)`.
        effective: `Effective` batch that it is a slice of.

    Returns:
        `MicroBatchLoss`, and the predictions.
    """
    with _keras.added_losses_of_each_replica(model):
        _keras.clear_added_losses(model)
        y_pred = call_model(model, micro_batch[0], training=False)
        # This one is only for what each term counts for in the total loss.
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            found = _compute_loss(model, micro_batch, y_pred, tape, effective, training=False)
    return _loss_of(model, micro_batch, found, tape, effective), y_pred


def _compute_loss(model, micro_batch, y_pred, tape, effective, training):
    """The `LossRecorder` that has seen the loss, and the loss, within the tape's context."""
    x, y, sample_weight = micro_batch
    examples = batch_size(micro_batch, model.shared_inputs)
    weighed = None if effective is None else effective.weighed
    times = None if weighed is None else by_identity(sample_weight, weighed)
    recorder = LossRecorder(tape, effective is not None, examples, times)
    with recorder.recording(model):
        total = _keras.compute_loss(model, x, y, y_pred, sample_weight, training)
    return recorder, check_total_loss(total)


def _loss_of(model, micro_batch, found, tape, effective):
    """The `MicroBatchLoss` of what `_compute_loss` found."""
    recorder, total = found
    weight = check_micro_batch_weight(model.micro_batch_weight(*micro_batch))
    share, whole = None, ()
    if weight is None:
        weight = batch_size(micro_batch, model.shared_inputs)
        share, whole = _share_of(weight, effective), tuple(recorder.whole)
    terms = with_coefficients(recorder.terms, tape, total)
    return MicroBatchLoss(tape, total, terms, weight, share, whole)


def gradient_scale(model, loss):
    """Scalar that a `MicroBatchLoss` is multiplied by for its gradients: the loss scale."""
    return model.optimizer.scale_loss(tf.ones((), loss.total.dtype))


def update_metrics(model, data, y_pred):
    """Updates the model's metrics with `(x, y, sample_weight)`; returns their values by name."""
    x, y, sample_weight = data
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def log_loss(model, logs, loss, values, policy):
    """The logs after the metrics of the loss, and of each output's, have seen a step's.

    Args:
        model: The `GradientAccumulateModel`.
        logs: Dict of the metrics' values before that; None for `model.get_metrics_result()`.
        loss: Tuple of the total loss and its weight in the mean over the epoch.
        values: List of the same for each compiled loss.
        policy: What becomes of a loss that is not finite.
    """
    _keras.track_loss(model, *policy.logged(*loss))
    for metric, pair in zip(_keras.per_output_loss_metrics(model), values, strict=False):
        value, weight = policy.logged(*pair)
        metric.update_state(value, sample_weight=weight)
    results = model.get_metrics_result()
    return results if logs is None else {n: results.get(n, value) for n, value in logs.items()}


def log_losses_of_batch(model, logs, losses, batch, policy):
    """As `log_loss`, with the `LossSums` of all examples of a `Batch`, over all replicas."""
    examples = batch.examples
    # Keras weights the outputs' losses by the batch size where it is static.
    weight = examples if isinstance(examples, int) else None
    values = [(value, weight) for value in losses.values]
    return log_loss(model, logs, (losses.total, examples), values, policy)


def batch_norms_of(model):
    """The AccumBatchNorm layers, whose cycle is the model's."""
    return [v for v in _keras.all_layers(model) if isinstance(v, AccumBatchNorm) and v.built]


def _computes_in_half(model):
    return model.compute_dtype == "float16" or isinstance(
        model.optimizer, keras.optimizers.LossScaleOptimizer
    )


def _share_of(examples, effective):
    """The micro-batch's share in its effective batch; None if that is not known yet."""
    if effective is None or effective.total is None:
        return None
    total = effective.total
    part = tf.math.divide_no_nan(tf.cast(examples, total.dtype), total)
    # A batch without examples is one micro-batch, whose regularisers count.
    return tf.where(tf.equal(total, 0), tf.ones_like(total), part)
