"""Every lasting change to Keras's own classes: why, where it takes effect, and when it can go."""

import functools

import keras
import numpy as np
import tensorflow as tf

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
        if not isinstance(inner, accumulating):
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


def scaler_around(scaler, optimizer):
    """A `LossScaleOptimizer` with the variables of `scaler`, around another inner optimizer.

    An accumulating optimizer is the inner one of `scaler`. At its update the scaler is to act on
    the optimizer in that one. The object is as short-lived as the update that it traces.

    Args:
        scaler: A built `LossScaleOptimizer`.
        optimizer: The inner optimizer of the result.
    """
    around = object.__new__(type(scaler))
    vars(around).update(vars(scaler))
    vars(around)["inner_optimizer"] = optimizer
    return around


def mend_fit_on_several_workers():
    """Lets Keras's `fit` and `evaluate` run under a MultiWorkerMirroredStrategy of several workers.

    Two bugs of Keras 3.8 to 3.15 are in the way. `Trainer._maybe_symbolic_build` averages the
    first batch over replicas, for its shapes, which fails for a nested batch; the worker's own
    part has the same shapes. `reduce_per_replica` averages the logs, which are scalars, over
    their first axis; replicas are what is to be averaged over. Nothing changes elsewhere.
    """
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
