"""The only file that knows a Keras or TensorFlow version, or uses their private API.

Every entry says why it is needed and on which versions it was run; `tests/test_compat.py` has a
test for each that fails when Keras has changed underneath it or when the entry can go.
"""

import contextlib
import copy
import functools
import inspect
import os
from typing import Any, NamedTuple

OLDEST_TENSORFLOW = (2, 16)
OLDEST_KERAS = (3, 8)


def _version_tuple(version):
    return tuple(int(part) for part in version.split(".")[:2])


def check_installation():
    """Raises ImportError unless Keras 3 runs on TensorFlow, both recent enough."""
    remedy = 'Install them with: pip install "tensorflow>=2.16" "keras>=3.8"'
    # Keras imports its backend at once, so a missing jax or torch would hide the reason.
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend == "tensorflow":
        import keras

        if keras.__version__.startswith("2."):
            raise ImportError(
                "gradient_accumulator_tf needs Keras 3 (3.8 or newer). "
                f"Received: keras {keras.__version__}. {remedy}"
            )
        backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ImportError(
            "gradient_accumulator_tf accumulates in TensorFlow variables and needs Keras to run "
            f"on the TensorFlow backend. Received: the {backend} backend. Install tensorflow and "
            "set the environment variable KERAS_BACKEND=tensorflow (or `backend` in "
            "~/.keras/keras.json) before Keras is imported."
        )
    import tensorflow as tf

    for name, version, oldest in (
        ("tensorflow", tf.__version__, OLDEST_TENSORFLOW),
        ("keras", keras.__version__, OLDEST_KERAS),
    ):
        if _version_tuple(version) < oldest:
            raise ImportError(
                f"gradient_accumulator_tf needs {name} {'.'.join(map(str, oldest))} or newer. "
                f"Received: {name} {version}. {remedy}"
            )


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
    import keras

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


@contextlib.contextmanager
def replaced_losses(model, replace):
    """Puts `replace(loss)` in place of each of the model's compiled losses.

    The metrics that Keras keeps per output are left alone meanwhile: they are to be told the
    effective batch's loss, not a micro-batch's. `CompileLoss._flat_losses` and `_metrics`
    (Keras 3.8 to 3.15); the model must be built for training. Yields the number of losses, which
    is 0 where a `compute_loss` of the model's own calls none of them.
    """
    compiled = model._compile_loss
    if compiled is None or compiled._flat_losses is None:
        yield 0
        return
    losses, metrics = compiled._flat_losses, list(compiled._metrics)
    compiled._flat_losses = [entry._replace(loss=replace(entry.loss)) for entry in losses]
    compiled._metrics[:] = [_SilentMetric() for _ in metrics]
    try:
        yield len(losses)
    finally:
        compiled._flat_losses = losses
        compiled._metrics[:] = metrics


@contextlib.contextmanager
def replaced_added_losses(model, replace):
    """Puts `replace(loss, value)` in place of what Keras makes of a loss given to `add_loss`.

    `loss` is that tensor, of any rank but 0, and `value` the sum that Keras adds to the total.
    Regularisers of weights are left alone, which are among `model.losses` and may have a rank too.
    `Trainer._aggregate_additional_loss` and `Layer._get_own_losses` (Keras 3.8 to 3.15).
    """
    aggregate = model._aggregate_additional_loss

    def replaced(loss):
        value = aggregate(loss)
        if loss.shape.rank == 0:
            return value
        added = any(loss is own for layer in all_layers(model) for own in layer._get_own_losses())
        return replace(loss, value) if added else value

    vars(model)["_aggregate_additional_loss"] = replaced
    try:
        yield
    finally:
        del vars(model)["_aggregate_additional_loss"]


def clear_added_losses(model):
    """Forgets what `add_loss` was given (`Layer._clear_losses`, Keras 3.8 to 3.15).

    Keras does it where a model is called.
    """
    model._clear_losses()


@contextlib.contextmanager
def activity_regularizers_by_rank(model):
    """Within this context an activity regulariser's loss tells by its rank how it counts.

    `Layer.__call__` divides it by the number of examples in Keras 3.14 and 3.15: it is a mean, and
    a scalar here. It does not in Keras 3.8 to 3.13: it is a sum, and has one dimension here, as
    what `add_loss` adds up. The regulariser itself may return any rank. Each replica enters.
    """
    layers = [v for v in all_layers(model) if vars(v).get("activity_regularizer") is not None]
    for layer in layers:
        if not isinstance(layer.activity_regularizer, _ActivityRegularizer):
            wrapped = _ActivityRegularizer(layer.activity_regularizer)
            vars(layer)["activity_regularizer"] = wrapped
        layer.activity_regularizer.entered += 1
    try:
        yield
    finally:
        for layer in layers:
            wrapped = layer.activity_regularizer
            wrapped.entered -= 1
            if not wrapped.entered:
                vars(layer)["activity_regularizer"] = wrapped.regularizer


class _ActivityRegularizer:
    def __init__(self, regularizer):
        self.regularizer, self.entered = regularizer, 0

    def __call__(self, outputs):
        import keras

        loss = keras.ops.sum(self.regularizer(outputs))
        divided = _version_tuple(keras.__version__) >= (3, 14)
        return loss if divided else keras.ops.reshape(loss, (1,))


class _SilentMetric:
    def update_state(self, *args, **kwargs):
        pass


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
    import keras

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
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def replicas_need_no_merge_call():
    """Whether the strategy in force lets a replica synchronise inside a loop or conditional.

    `tf.__internal__.distribute.strategy_supports_no_merge_call` (TensorFlow 2.16 to 2.21): true
    for XLA with GPUs only, where Keras's own optimizers ask it as well.
    """
    import tensorflow as tf

    return tf.__internal__.distribute.strategy_supports_no_merge_call()


def replica_local(variable):
    """This replica's own variable of one that is read as a sum over replicas.

    `DistributedVariable._get` (TensorFlow 2.16 to 2.21): such a variable takes `assign_add`, and
    not `scatter_add`, on a replica's behalf.
    """
    import tensorflow as tf

    return variable._get() if isinstance(variable, tf.distribute.DistributedValues) else variable


@contextlib.contextmanager
def replicas_agree(optimizer):
    """Within this context `optimizer` updates every replica alike, without a word between them.

    To be entered on each replica, with gradients that are already summed over replicas. Three
    things that Keras 3.8 to 3.15 does then are in the way, the last two on a single replica too:

    - It sums the gradients over replicas after it clipped each replica's
      (`Optimizer._all_reduce_sum_gradients`): clipnorm=1 on two replicas lets a norm of 2 through.
    - It tells all replicas of replica 0's `iterations`, in a merge call, which TensorFlow does
      not take in a conditional on a replica (where `replicas_need_no_merge_call`).
    - It overwrites weights with their moving average in a merge call within a conditional
      (`Optimizer._overwrite_model_variables_with_average_value`).
    """
    import tensorflow as tf

    if not tf.distribute.has_strategy():
        yield
        return
    optimizer = innermost(optimizer)
    changed = []
    for o in [optimizer, *getattr(optimizer, "optimizers", [])]:
        changed.append((o.__dict__, "_all_reduce_sum_gradients", list))
        overwrite = functools.partial(_overwrite_with_average, o)
        changed.append((o.__dict__, "_overwrite_model_variables_with_average_value", overwrite))
        assign = functools.partial(assign_on_replica, o._iterations)
        changed.append((o._iterations.__dict__, "_direct_assign", assign))
    # Every replica's thread enters, and the first to leave must not undo it for the others.
    for attributes, name, value in changed:
        attributes[name] = value
        attributes[f"{name}_entered"] = attributes.get(f"{name}_entered", 0) + 1
    try:
        yield
    finally:
        for attributes, name, _ in changed:
            attributes[f"{name}_entered"] -= 1
            if not attributes[f"{name}_entered"]:
                del attributes[name], attributes[f"{name}_entered"]


def gradients_over_replicas(optimizer, gradients, variables):
    """Gradients as the innermost optimizer would sum them over replicas, or as they are already.

    `Optimizer._all_reduce_sum_gradients` (Keras 3.8 to 3.15), which `replicas_agree` puts out of
    action where gradients are summed: what acts before the optimizer has no other way to know.
    """
    import tensorflow as tf

    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return gradients
    optimizer = innermost(optimizer)
    pairs = zip(gradients, variables, strict=True)
    summed = iter(optimizer._all_reduce_sum_gradients([p for p in pairs if p[0] is not None]))
    return [None if gradient is None else next(summed)[0] for gradient in gradients]


def assign_on_replica(variable, value):
    """Assigns to this replica's own copy of a Keras variable."""
    import tensorflow as tf

    own = replica_local(variable.value)
    own.assign(tf.cast(value, own.dtype))


def _overwrite_with_average(optimizer, variables):
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(variables, averages, strict=True):
        if average is not None:
            assign_on_replica(variable, replica_local(average.value))


_OF_A_CYCLE = (
    "micro_step",
    "steps_in_cycle",
    "just_updated",
    "ended_in_update",
    "dropped_micro_steps",
    "dropped_cycles",
    "accumulates",
    "reduction",
    "non_finite",
    "flush",
    "reset",
    "rebuild",
)


def route_loss_scaling(accumulating):
    """Lets a `LossScaleOptimizer` around an optimizer of the class `accumulating` act per update.

    Left alone (Keras 3.8 to 3.15) it looks at each micro-batch: it drops one that overflowed,
    which shifts every later cycle, and changes its scale several times per update; and it looks
    at replica 0's gradients only. `compile` makes it by itself, so it can only be reached here.
    Around any other optimizer it stays as it is. What tells of the cycle or ends it is passed on,
    since `model.optimizer` is where users look for it. So is `accum_steps`, which they set there:
    on a Python object of its own it would be lost without a word.

    It saves its variables and all of its inner optimizer's by number, and loads only what has as
    many: a cycle's sums, which are saved by name anyway, would cost it its scale where they are
    not. It saves what it would around the innermost optimizer, and loads its own part.
    """
    import keras
    import numpy as np

    cls = keras.optimizers.LossScaleOptimizer
    build, apply = cls.build, cls.apply
    save, load = cls.save_own_variables, cls.load_own_variables

    @functools.wraps(build)
    def routed_build(self, var_list):
        build(self, var_list)
        if isinstance(self.inner_optimizer, accumulating):
            self.inner_optimizer.scaled_by(self)
            load_own(self, vars(self).pop("_own_to_load", {}))

    def own_variables(self):
        return self.variables[: len(self.variables) - len(self.inner_optimizer.variables)]

    def load_own(self, store):
        for i, variable in enumerate(own_variables(self)):
            if str(i) in store:
                variable.assign(store[str(i)])

    @functools.wraps(save)
    def routed_save(self, store):
        if not isinstance(self.inner_optimizer, accumulating):
            save(self, store)
            return
        saved = [*own_variables(self), *self.inner_optimizer.inner_optimizer.variables]
        for i, variable in enumerate(saved):
            store[str(i)] = variable.numpy()

    @functools.wraps(load)
    def routed_load(self, store):
        if not isinstance(self.inner_optimizer, accumulating):
            load(self, store)
            return
        state = {name: np.array(store[name]) for name in store.keys()}
        if self.built:
            load_own(self, state)
        else:  # past what Keras tracks, which would take the dict for state
            vars(self)["_own_to_load"] = state

    @functools.wraps(apply)
    def routed_apply(self, grads, trainable_variables=None):
        inner = self.inner_optimizer
        if not isinstance(inner, accumulating) or inner.is_updating:
            apply(self, grads, trainable_variables)
            return
        if not self.built:
            self.build(trainable_variables)
        inner.apply(grads, trainable_variables)

    def get_accum_steps(self):
        return self.inner_optimizer.accum_steps

    def set_accum_steps(self, value):
        if not isinstance(self.inner_optimizer, accumulating):
            kind = type(self.inner_optimizer).__name__
            raise AttributeError(
                "`accum_steps` is what an accumulating optimizer has. Received: "
                f"accum_steps={value!r} for a LossScaleOptimizer around {kind}. Wrap {kind} in a "
                "GradientAccumulateOptimizer."
            )
        self.inner_optimizer.accum_steps = value

    def passed_on(name):
        def get(self):
            if not isinstance(self.inner_optimizer, accumulating):
                kind = type(self.inner_optimizer).__name__
                raise AttributeError(
                    f"`{name}` is what an accumulating optimizer has. Received: a "
                    f"LossScaleOptimizer around {kind}."
                )
            return getattr(self.inner_optimizer, name)

        return property(get, doc=f"The accumulating inner optimizer's `{name}`.")

    cls.build, cls.apply = routed_build, routed_apply
    cls.save_own_variables, cls.load_own_variables = routed_save, routed_load
    cls.accum_steps = property(get_accum_steps, set_accum_steps)
    for name in _OF_A_CYCLE:
        setattr(cls, name, passed_on(name))


def mend_fit_on_several_workers():
    """Lets Keras's `fit` and `evaluate` run under a MultiWorkerMirroredStrategy of several workers.

    Two bugs of Keras 3.8 to 3.15 are in the way. `Trainer._maybe_symbolic_build` averages the
    first batch over replicas, for its shapes, which fails for a nested batch; the worker's own
    part has the same shapes. `reduce_per_replica` averages the logs, which are scalars, over
    their first axis; replicas are what is to be averaged over. Nothing changes elsewhere.
    """
    import tensorflow as tf
    from keras.src.backend.tensorflow import trainer

    original_build = trainer.TensorFlowTrainer._maybe_symbolic_build
    original_reduce = trainer.reduce_per_replica
    if hasattr(original_reduce, "__wrapped__"):
        return

    @functools.wraps(original_build)
    def build_from_local_shapes(self, iterator=None, data_batch=None):
        strategy = self.distribute_strategy
        if iterator is not None and trainer._collective_all_reduce_multi_worker(strategy):
            batch = next(next(iter(iterator))[-1])
            data_batch = tf.nest.map_structure(
                lambda v: strategy.experimental_local_results(v)[0], batch
            )
            iterator = None
        original_build(self, iterator, data_batch)

    @functools.wraps(original_reduce)
    def reduce_scalars(values, strategy, reduction):
        averages = reduction in ("auto", "mean")
        if averages and trainer._collective_all_reduce_multi_worker(strategy):
            return tf.nest.map_structure(
                lambda v: strategy.reduce(tf.distribute.ReduceOp.MEAN, v, axis=None), values
            )
        return original_reduce(values, strategy, reduction)

    trainer.TensorFlowTrainer._maybe_symbolic_build = build_from_local_shapes
    trainer.reduce_per_replica = reduce_scalars


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


def rebuilt_optimizer(optimizer, variables):
    """A copy of a built Keras optimizer for other variables, with the state of those it knows.

    Keras's optimizers take no other variables once they are built. Their slots are in lists in the
    order of `_trainable_variables` (Keras 3.8 to 3.15), by which a slot is known again: several
    may have one path. Two things are neither in a config nor a variable's own: what is excluded
    from weight decay (`_exclude_from_weight_decay`, and the patterns with it), and that a moving
    average, `_model_variables_moving_average`, begins with the variable itself only in the first
    update.
    """
    copy = type(optimizer).from_config(optimizer.get_config())
    copy.build(variables)
    new, old = innermost(copy), innermost(optimizer)
    assigned = set()
    for o, like in zip(_with_inner(new), _with_inner(old), strict=True):
        for slot, value in _slots_of_same_variables(o, like):
            slot.assign(value)
            assigned.add(id(slot))
    # The rest is no variable's, such as the learning rate, or has the variable's path in its own.
    in_lists = {id(slot) for o in _with_inner(new) for _, slots in _slots(o) for slot in slots}
    kept = {variable.path: variable for variable in optimizer.variables}
    for variable in copy.variables:
        if id(variable) not in in_lists and variable.path in kept:
            variable.assign(kept[variable.path])
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    averages = getattr(new, "_model_variables_moving_average", ())
    for variable, average in zip(new._trainable_variables, averages, strict=False):
        if average is not None and id(average) not in assigned:
            average.assign(variable)
    return copy


def _with_inner(optimizer):
    """An optimizer and those that it gives its variables to (`MultiOptimizer`)."""
    return [optimizer, *getattr(optimizer, "optimizers", [])]


def _slots(optimizer):
    """The names and lists of an optimizer's slots, each with one for each variable or None."""
    variables = getattr(optimizer, "_trainable_variables", [])
    for name, slots in vars(optimizer).items():
        all_of_them = name in ("_variables", "_trainable_variables")
        if isinstance(slots, list) and len(slots) == len(variables) and not all_of_them:
            yield name, slots


def _slots_of_same_variables(new, old):
    """Pairs of the slots that two optimizers of a kind keep of one variable."""
    indices = {variable_key(old, v): i for i, v in enumerate(old._trainable_variables)}
    kept = dict(_slots(old))
    for name, slots in _slots(new):
        for variable, slot in zip(new._trainable_variables, slots, strict=True):
            index = indices.get(variable_key(new, variable))
            if slot is not None and index is not None and name in kept:
                yield slot, kept[name][index]


def copied_optimizer(optimizer, pairs):
    """A copy of a Keras optimizer for the variables of a copy of its model, with the same state.

    The variables of two optimizers of a kind are in one order if those that they are for are
    (`Optimizer._trainable_variables`). What is excluded from weight decay
    (`Optimizer._use_weight_decay`, Keras 3.8 to 3.15) is in no config.

    Args:
        optimizer: The optimizer, built or not.
        pairs: List of tuples (variable of its model, the same of the copy).

    Raises:
        ValueError: If it has the state of other variables.
    """
    copy = type(optimizer).from_config(optimizer.get_config())
    old, new = innermost(optimizer), innermost(copy)
    if getattr(old, "_exclude_from_weight_decay", None) is not None:
        excluded = [b for a, b in pairs if not old._use_weight_decay(a)]
        new.exclude_from_weight_decay(var_list=excluded)
    if not optimizer.built:
        return copy
    by_key = {variable_key(old, a): b for a, b in pairs}
    keys = [variable_key(old, v) for v in old._trainable_variables]
    unknown = [v for v, k in zip(old._trainable_variables, keys, strict=True) if k not in by_key]
    if unknown:
        names = ", ".join(getattr(v, "path", v.name) for v in unknown)
        raise ValueError(f"the optimizer trains {names}, which the model does not have.")
    copy.build([by_key[key] for key in keys])
    for variable, value in zip(copy.variables, optimizer.variables, strict=True):
        variable.assign(value)
    return copy


def innermost(optimizer):
    """The optimizer that all wrappers are around."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def is_functional(model):
    """Whether a model is a graph of layers that `clone_model` can rebuild.

    `keras.src.models.functional.Functional` (Keras 3.8 to 3.15), which has no public name. A
    Sequential is one as well.
    """
    import keras
    from keras.src.models.functional import Functional

    return isinstance(model, (Functional, keras.Sequential))


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


def own_attributes(model, plain):
    """Dict of the attributes that a functional model has and a plain one has not.

    Args:
        model: A functional or Sequential model of a class of its own.
        plain: A model of Keras's class, for what Keras itself keeps (Keras 3.8 to 3.15).
    """
    import keras

    compiled = keras.Sequential([keras.Input((1,))])
    compiled.compile("sgd", "mse")
    fitted = ("history", "stop_training", "_eval_epoch_iterator")
    kept = {*vars(plain), *vars(compiled), *fitted}
    return {
        name: value
        for name, value in vars(model).items()
        if name not in kept and not name.startswith("_self_")
    }


def become(model, cls, attributes, layers):
    """Makes a functional model one of a subclass of its class, without calling a constructor.

    Past `Layer.__setattr__`, as a layer that is built takes no new ones; and with `Layer._layers`
    (both Keras 3.8 to 3.15), whose order, that of the constructor, is the order of the weights.
    """
    model.__class__ = cls
    vars(model).update(attributes)
    model._layers[:] = layers


def is_plain_functional(layer):
    """Whether a layer is a functional or Sequential model with Keras's own `call`.

    `keras.src.models.functional.Functional` (Keras 3.8 to 3.15); see `is_functional`.
    """
    import keras
    from keras.src.models.functional import Functional

    return is_functional(layer) and type(layer).call in (Functional.call, keras.Sequential.call)


class GraphNode(NamedTuple):
    """One call in a functional model; tensors are told apart by their `id`."""

    operation: Any
    fill_in: Any
    inputs: list
    outputs: list
    has_mask: bool


class Graph(NamedTuple):
    """The calls of a functional model, in the order in which it makes them."""

    inputs: list
    nodes: list
    outputs: list


def graph_of(model):
    """The `Graph` of a built functional or Sequential model.

    `Function._nodes_by_depth`, `Node.arguments.fill_in` and `Sequential._functional` (Keras 3.8 to
    3.15), by which Keras itself runs such models; `fill_in` takes a dict of tensors by `id`.
    """
    import keras

    functional = model._functional if isinstance(model, keras.Sequential) else model
    nodes = [
        GraphNode(
            node.operation,
            node.arguments.fill_in,
            list(dict.fromkeys(map(id, node.input_tensors))),
            list(map(id, node.outputs)),
            any(keras_mask(t) is not None for t in [*node.input_tensors, *node.outputs]),
        )
        for depth in sorted(functional._nodes_by_depth, reverse=True)
        for node in functional._nodes_by_depth[depth]
        if node.operation and not node.is_input
    ]
    return Graph(list(map(id, functional.inputs)), nodes, list(map(id, functional.outputs)))


def standardized_inputs(model, inputs):
    """Flat list of tensors in the order and with the dtypes of a functional model's `inputs`.

    `Functional._standardize_inputs` (Keras 3.8 to 3.15), which its `call` begins with.
    """
    import keras

    functional = model._functional if isinstance(model, keras.Sequential) else model
    return functional._standardize_inputs(inputs)


def packed_outputs(model, outputs):
    """A functional model's outputs in the structure that its `call` returns them in.

    `Functional._outputs_struct` and `unpack_singleton` (Keras 3.8 to 3.15), which its `call` ends
    with.
    """
    import keras
    from keras.src.models.functional import unpack_singleton

    functional = model._functional if isinstance(model, keras.Sequential) else model
    return unpack_singleton(keras.tree.pack_sequence_as(functional._outputs_struct, outputs))


def sublayers(layer):
    """The layers directly in a layer (`Layer._flatten_layers`, Keras 3.8 to 3.15)."""
    return layer._flatten_layers(include_self=False, recursive=False)


def held_layers(layer):
    """The layers that `replace_layers` reaches: attributes, and lists, tuples and dicts there."""
    return list(held_layers_by_path(layer).values())


def held_layers_by_path(layer):
    """Dict of the layers in `layer`'s attributes, and in lists, tuples and dicts there, by path.

    A path is a tuple of the attribute's name and the places in it. Without those in which Keras
    and TensorFlow list what was ever assigned: `Layer._layers` (Keras 3.8 to 3.15) and names that
    begin with `_self_` (TensorFlow 2.16 to 2.21).
    """
    attributes = _attributes(layer).items()
    return {path: held for name, value in attributes for path, held in _layers_in(value, (name,))}


def attributes_of(layer):
    """Dict of a layer's attributes, without what Keras and TensorFlow list; see `held_layers`."""
    return _attributes(layer)


def _attributes(layer):
    return {
        name: value
        for name, value in vars(layer).items()
        if name != "_layers" and not name.startswith("_self_")
    }


def _layers_in(value, path):
    import keras

    if isinstance(value, keras.Layer):
        yield path, value
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _layers_in(item, (*path, key))


def replace_layers(layer, replacements):
    """Puts other layers in place of some that `layer` holds, at the same place in its `layers`.

    `Layer._tracker` (Keras 3.8 to 3.15): a layer that is built takes no new layers, and assigning
    another one to an attribute leaves the first among the layers that are trained and saved.

    Args:
        layer: A layer or subclassed model, built or not.
        replacements: Dict of the new layers by the old ones.
    """
    tracker = layer._tracker
    for old in sublayers(layer):
        if old in replacements:
            tracker.replace_tracked_value("layers", old, replacements[old])
    for name, value in _attributes(layer).items():
        replaced = _with_replaced(value, replacements)
        if replaced is not value:
            setattr(layer, name, replaced)


def _with_replaced(value, replacements):
    import keras

    if isinstance(value, keras.Layer):
        return replacements.get(value, value)
    if isinstance(value, (list, dict)):
        # In place, since other attributes may hold the same list.
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            replaced = _with_replaced(item, replacements)
            if replaced is not item:
                value[key] = replaced
    elif isinstance(value, tuple):
        items = [_with_replaced(item, replacements) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            # Of the tuple's own class: what TensorFlow puts in its place has another `type`.
            kind = value.__class__
            return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value
