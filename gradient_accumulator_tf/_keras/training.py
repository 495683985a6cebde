"""What Keras keeps private of a model's training: its arguments, losses, logs and backups."""

import functools
import inspect
import os

import keras

# The attributes that a model keeps for training. `Trainer.__init__`, `compile`, `fit`, `evaluate`
# and `predict` set them. Nothing public tells them from those that the model has for itself.
TRAINER_ATTRIBUTES = (
    "_compile_config",
    "_compile_loss",
    "_compile_metrics",
    "_compiled_trainable_state",
    "_compute_loss_has_training_arg",
    "_distribute_reduction_method",
    "_distribute_strategy",
    "_eval_epoch_iterator",
    "_initial_epoch",
    "_jit_compile",
    "_loss_tracker",
    "_run_eagerly",
    "compiled",
    "history",
    "loss",
    "optimizer",
    "predict_function",
    "steps_per_execution",
    "stop_evaluating",
    "stop_predicting",
    "stop_training",
    "test_function",
    "train_function",
    "unrolled_steps_per_execution",
)


def trainer_methods():
    """Names of the methods that make a layer a model that trains, private ones included.

    They are in the base classes of `keras.Model` whose names end in Trainer.
    """
    trainers = [c for c in keras.Model.__mro__ if c.__name__.endswith("Trainer")]
    return [
        name
        for name in dict.fromkeys(name for c in trainers for name in vars(c))
        if inspect.isfunction(getattr(keras.Model, name))
        and not name.startswith("__")
        and name not in TRAINER_ATTRIBUTES
    ]


def compile_arguments(model):
    """Dict of the arguments that a model was compiled with, without metrics, which keep state.

    `Trainer._compile_config`. The public `get_compile_config` returns the arguments serialised,
    which is not possible for a loss that is a plain function.
    """
    config = dict(model._compile_config.config)
    return {name: value for name, value in config.items() if "metrics" not in name}


def compute_loss(model, x, y, y_pred, sample_weight, training=True):
    """`model.compute_loss`, whether or not an override takes `training`.

    `Trainer._compute_loss`, which Keras's own `train_step` and `test_step` call.
    """
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def track_loss(model, loss, batch_size):
    """Adds a step's loss to the loss in the logs: `Trainer._loss_tracker`."""
    model._loss_tracker.update_state(loss, sample_weight=batch_size)


def build_for_training(model, data):
    """Creates the variables of a model, its losses and its metrics, from the shapes in `data`.

    `Trainer._symbolic_build`. Keras calls it itself under a strategy. Here it must run before each
    loop over micro-batches, because a loop's body cannot create the variables that it updates.
    """
    model._symbolic_build(data_batch=data)


def clear_added_losses(model):
    """Drops the losses that `add_loss` collected, as Keras does when it calls a model.

    `Layer._clear_losses`.
    """
    model._clear_losses()


def added_losses(model):
    """List of what the layers of a model have given to `add_loss`: `Layer._get_own_losses`.

    `model.losses` has the regularisers of weights too.
    """
    return [loss for layer in model._flatten_layers() for loss in layer._get_own_losses()]


def per_output_loss_metrics(model):
    """List of the metrics of single outputs' losses, in the order of the losses. May be empty."""
    return [] if model._compile_loss is None else list(model._compile_loss._metrics)


def compiled_metrics(model):
    """List of the metrics that `compile` was given, once they are built.

    `Trainer._compile_metrics`. `model.metrics` has others as well.
    """
    return [] if model._compile_metrics is None else list(model._compile_metrics.metrics)


def update_compiled_metrics(model, y, y_pred, sample_weight):
    """Updates the metrics that `compile` was given, and computes no results.

    `Trainer._compile_metrics`. `model.compute_metrics` computes the results of all metrics too.
    """
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight)


def metric_function(metric):
    """The function of `(y_true, y_pred)` that a metric takes the mean of; None if it has none.

    `MeanMetricWrapper._fn` and `_fn_kwargs`.
    """
    if not isinstance(metric, keras.metrics.MeanMetricWrapper):
        return None
    return functools.partial(metric._fn, **metric._fn_kwargs)


def use_backup_folder(callback, folder):
    """Lets a `BackupAndRestore` read and write its two files in another folder.

    `BackupAndRestore._weights_path`, `_training_metadata_path`, and the paths of the second copies
    that it keeps. The public `backup_dir`, which it deletes at the end, stays as it is.
    """
    for name in ("weights_path", "training_metadata_path"):
        path = os.path.join(folder, os.path.basename(getattr(callback, f"_{name}")))
        setattr(callback, f"_{name}", path)
        setattr(callback, f"_prev_{name}", f"{path}.bkp")


def set_backup_epoch(callback, epoch):
    """Sets the epoch that a `BackupAndRestore` writes into its backups.

    `BackupAndRestore._current_epoch`. It is 0 until the first epoch ends, also in a training that
    resumes at a later one. A backup within that epoch would start the training anew.
    """
    callback._current_epoch = epoch
