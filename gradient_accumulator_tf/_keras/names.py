"""One-line accessors to what Keras and TensorFlow keep private.

Every entry says why it is needed and on which versions it was run.
"""

import copy
import inspect
import os

import keras
import tensorflow as tf

# What a model keeps for training, in `Trainer.__init__`, `compile`, `fit`, `evaluate` and `predict`
# (Keras 3.8 to 3.15). Nothing public tells it from what the model keeps for itself.
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

    Those of the base classes of `keras.Model` that are called Trainer (Keras 3.8 to 3.15).
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
    """Dict of what a model was compiled with: optimizer, losses, how it is run.

    `Trainer._compile_config` (Keras 3.8 to 3.15); `get_compile_config` returns it serialised, which
    a loss that is a plain function cannot be. Without metrics, which keep state.
    """
    config = dict(model._compile_config.config)
    return {name: value for name, value in config.items() if "metrics" not in name}


def variable_key(optimizer, variable):
    """Hashable identity of a trainable variable, whether Keras's or the `tf.Variable` inside it.

    `Optimizer._var_key` (Keras 3.8 to 3.15): no public function knows that a Keras variable, its
    `tf.Variable` and a replica's copy of it are the same.
    """
    return optimizer._var_key(variable)


def moving_averages(optimizer):
    """The moving averages of the variables; AttributeError where the optimizer keeps none.

    `Optimizer._model_variables_moving_average` (Keras 3.8 to 3.15), where SwapEMAWeights looks for
    them, one `inner_optimizer` deep.
    """
    return optimizer._model_variables_moving_average


def call_has_training_argument(layer):
    """Whether `layer.call` takes `training` (`Layer._call_has_training_arg`, Keras 3.8 to 3.15)."""
    return layer._call_has_training_arg


def batch_moments(layer, inputs, mask):
    """Mean and variance that a batch norm normalises by in training.

    `BatchNormalization._moments` (Keras 3.8 to 3.15). Keras's `call` computes and applies them at
    once, and masks are treated in another way in each of its versions.

    Args:
        layer: A built `keras.layers.BatchNormalization`.
        inputs: Tensor of at least float32.
        mask: Bool tensor without the axis of the channels, or None.

    Returns:
        Two tensors of shape (channels,) and the inputs' dtype.
    """
    return layer._moments(inputs, mask)


def all_layers(model):
    """The model and all layers in it, however deep (`Layer._flatten_layers`, Keras 3.8 to 3.15)."""
    return model._flatten_layers()


def compute_loss(model, x, y, y_pred, sample_weight):
    """`model.compute_loss` for training, whether or not an override takes `training`.

    `Trainer._compute_loss` (Keras 3.8 to 3.15), which Keras's own `train_step` calls.
    """
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)


def track_loss(model, loss, batch_size):
    """Adds a step's loss to the loss in the logs (`Trainer._loss_tracker`, Keras 3.8 to 3.15)."""
    model._loss_tracker.update_state(loss, sample_weight=batch_size)


def build_for_training(model, data):
    """Creates the model's, its losses' and its metrics' variables from the shapes in `data`.

    `Trainer._symbolic_build` (Keras 3.8 to 3.15): Keras calls it itself under a strategy; we need
    it because a loop's body cannot be the first to create what the loop carries.
    """
    model._symbolic_build(data_batch=data)


def clear_added_losses(model):
    """Forgets what `add_loss` was given (`Layer._clear_losses`, Keras 3.8 to 3.15).

    Keras does it where a model is called.
    """
    model._clear_losses()


def per_output_loss_metrics(model):
    """The metrics of the single outputs' losses, in the order of the losses; or an empty list."""
    return [] if model._compile_loss is None else list(model._compile_loss._metrics)


def keras_mask(tensor):
    """The mask that Keras attached to a tensor, or None.

    `keras.src.backend.get_keras_mask` (Keras 3.8 to 3.15): the mask travels on the tensor from
    the layer to the loss, and no public function reads it.
    """
    from keras.src import backend

    return backend.get_keras_mask(tensor)


def set_keras_mask(tensor, mask):
    """Attaches a mask to a tensor for a loss to find (`backend.set_keras_mask`)."""
    from keras.src import backend

    if mask is not None:
        backend.set_keras_mask(tensor, mask)
    return tensor


def adopt_call_arguments(layer, other):
    """Lets Keras read what `layer` is called with as it does for `other`.

    For a layer whose `call(*args, training=None, **kwargs)` hands all on to `other`. Keras looks in
    `Layer._call_signature` for tensors and for the masks that belong to them, and takes `**kwargs`
    for one argument, in which tensors and Python values may not be mixed. `_call_has_mask_arg` is
    what containers ask, `_convert_input_args` and `_allow_non_tensor_positional_args` are for
    models and preprocessing layers (all Keras 3.8 to 3.15).
    """
    signature = other._call_signature
    parameters = dict(signature.parameters)
    if "training" not in parameters:
        own = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
        last = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        rest = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        signature = signature.replace(parameters=[*rest, own, *last])
    layer._call_signature = signature
    layer._call_has_mask_arg = other._call_has_mask_arg
    layer._convert_input_args = other._convert_input_args
    layer._allow_non_tensor_positional_args = other._allow_non_tensor_positional_args


def outside_graph(tensor):
    """A symbolic tensor like one of a functional graph, and in none; anything else as it is.

    `KerasTensor._keras_history` and `_keras_mask` (Keras 3.8 to 3.15): a layer that is called with
    the tensor becomes a part of that graph, and one that is called with the mask as well.
    """
    if not isinstance(tensor, keras.KerasTensor):
        return tensor
    alone = copy.copy(tensor)
    for name in ("_keras_history", "_keras_mask"):
        vars(alone).pop(name, None)
    return alone


def compiles_with_xla():
    """Whether what is being traced will be compiled by XLA.

    `control_flow_util.GraphOrParentsInXlaContext` (TensorFlow 2.16 to 2.21), which TensorFlow's
    own loops and recurrent layers ask. XLA needs all sizes when it compiles, and lacks an
    operation that scatters in place; otherwise only speed depends on the answer.
    """
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def replicas_need_no_merge_call():
    """Whether the strategy in force lets a replica synchronise inside a loop or conditional.

    `tf.__internal__.distribute.strategy_supports_no_merge_call` (TensorFlow 2.16 to 2.21): true
    for XLA with GPUs only, where Keras's own optimizers ask it as well.
    """
    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def replica_local(variable):
    """This replica's own variable of one that is read as a sum over replicas.

    `DistributedVariable._get` (TensorFlow 2.16 to 2.21): such a variable takes `assign_add`, and
    not `scatter_add`, on a replica's behalf.
    """
    return variable._get() if isinstance(variable, tf.distribute.DistributedValues) else variable


def gradients_over_replicas(optimizer, gradients, variables):
    """Gradients as the innermost optimizer would sum them over replicas, or as they are already.

    `Optimizer._all_reduce_sum_gradients` (Keras 3.8 to 3.15), which `replicas_agree` puts out of
    action where gradients are summed: what acts before the optimizer has no other way to know.
    """
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return gradients
    optimizer = innermost(optimizer)
    pairs = zip(gradients, variables, strict=True)
    summed = iter(optimizer._all_reduce_sum_gradients([p for p in pairs if p[0] is not None]))
    return [None if gradient is None else next(summed)[0] for gradient in gradients]


def assign_on_replica(variable, value):
    """Assigns to this replica's own copy of a Keras variable."""
    own = replica_local(variable.value)
    own.assign(tf.cast(value, own.dtype))


def is_parameter_server(strategy):
    """Whether a strategy keeps its variables on other devices than those that compute.

    By its name: TensorFlow 2.16 to 2.21 has three classes without a common base.
    """
    return any(
        "ParameterServer" in c.__name__ or "CentralStorage" in c.__name__
        for c in type(strategy).__mro__
    )


def strategy_of(optimizer):
    """The strategy in force when a Keras optimizer was made.

    `Optimizer._distribution_strategy` (Keras 3.8 to 3.15): it makes its variables there, whatever
    is in force later.
    """
    return optimizer._distribution_strategy


def innermost(optimizer):
    """The optimizer that all wrappers are around."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def use_backup_folder(callback, folder):
    """Lets a BackupAndRestore read and write its two files in another folder.

    `BackupAndRestore._weights_path` and `_training_metadata_path`, and those of the copies that it
    makes (Keras 3.8 to 3.15). Its `backup_dir`, which it deletes at the end, stays.
    """
    for name in ("weights_path", "training_metadata_path"):
        path = os.path.join(folder, os.path.basename(getattr(callback, f"_{name}")))
        setattr(callback, f"_{name}", path)
        setattr(callback, f"_prev_{name}", f"{path}.bkp")


def set_backup_epoch(callback, epoch):
    """Tells a BackupAndRestore which epoch is running.

    `BackupAndRestore._current_epoch` (Keras 3.8 to 3.15) is 0 until the first epoch ends, in a
    training that goes on with a later one too: a backup within that epoch would begin anew.
    """
    callback._current_epoch = epoch


def sublayers(layer):
    """The layers directly in a layer (`Layer._flatten_layers`, Keras 3.8 to 3.15)."""
    return layer._flatten_layers(include_self=False, recursive=False)
