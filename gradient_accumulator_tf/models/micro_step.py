"""Loss, gradients and logs of one micro-batch; both modes run it."""

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
        logs: Dict of the metrics' values.
    """

    contributions: list
    loss: MicroBatchLoss
    logs: dict


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
    return MicroStep(contributions, loss, update_metrics(model, micro_batch, y_pred))


def call_model(model, x):
    """The predictions of a model in training."""
    training = {"training": True} if _keras.call_has_training_argument(model) else {}
    return model(x, **training)


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
    x, y, sample_weight = micro_batch
    examples = batch_size(micro_batch, model.shared_inputs)
    weighed = None if effective is None else effective.weighed
    times = None if weighed is None else by_identity(sample_weight, weighed)
    finite_only = policy_of(model.non_finite).finite_only
    with model_ends_cycle(finite_only), tf.GradientTape(persistent=True) as tape:
        _keras.clear_added_losses(model)
        y_pred = predict(tape)
        recorder = LossRecorder(tape, effective is not None, examples, times)
        with recorder.recording(model):
            total = _keras.compute_loss(model, x, y, y_pred, sample_weight)
        total = check_total_loss(total)
    terms = with_coefficients(recorder.terms, tape, total)
    weight = check_micro_batch_weight(model.micro_batch_weight(x, y, sample_weight))
    share = None
    if weight is None:
        weight, share = examples, _share_of(examples, effective)
    return MicroBatchLoss(tape, total, terms, weight, share), y_pred


def gradient_scale(model, loss):
    """Scalar that a `MicroBatchLoss` is multiplied by for its gradients: the loss scale."""
    return model.optimizer.scale_loss(tf.ones((), loss.total.dtype))


def update_metrics(model, micro_batch, y_pred):
    """Updates the model's metrics with one micro-batch; returns the dict of their values."""
    x, y, sample_weight = micro_batch
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def log_loss(model, logs, loss, values):
    """The logs after the metrics of the loss, and of each output's, have seen a step's.

    Args:
        model: The `GradientAccumulateModel`.
        logs: Dict of the metrics' values before that.
        loss: Tuple of the total loss and its weight in the mean over the epoch.
        values: List of the same for each compiled loss.
    """
    policy = policy_of(model.non_finite)
    _keras.track_loss(model, *policy.logged(*loss))
    for metric, pair in zip(_keras.per_output_loss_metrics(model), values, strict=False):
        value, weight = policy.logged(*pair)
        metric.update_state(value, sample_weight=weight)
    results = model.get_metrics_result()
    return {name: results.get(name, value) for name, value in logs.items()}


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
