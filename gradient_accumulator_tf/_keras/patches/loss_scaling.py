"""A `LossScaleOptimizer` around an accumulating optimizer acts per update.

Why: left alone it looks at each micro-batch. It drops one that overflowed, which shifts every later
cycle, and changes its scale several times per update. It also looks at replica 0's gradients only.
`compile` makes it under `mixed_float16`, so it can only be reached through its class. Its state has
the same problem: it saves all variables, its own and those of its inner optimizer, by number, and
loads only a file with as many. A cycle's sums, which other files save by name, would change the
number, and the scale would be lost.

Where it takes effect: in `keras.optimizers.LossScaleOptimizer`, only if its inner optimizer is an
accumulating one. Others keep Keras's methods.

When it can go: `apply` when Keras asks the inner optimizer before it looks at gradients, the saving
when Keras saves the scale by name. The tests named `..._left_alone_...` tell.
"""

import keras
import numpy as np

from gradient_accumulator_tf._keras.patches.replaced import replace_function

# Users look at `model.optimizer`, so it passes these on to the accumulating optimizer.
_OF_A_CYCLE = (
    "micro_step",
    "steps_in_cycle",
    "just_updated",
    "ended_in_update",
    "dropped_micro_steps",
    "dropped_cycles",
    "reduction",
    "non_finite",
    "flush",
    "reset",
    "rebuild",
)


def route_loss_scaling(accumulating, cycle_of):
    """Changes `LossScaleOptimizer` around optimizers of the class `accumulating`.

    It hands gradients on to the accumulating optimizer, which uses `scaler_around` at the update.
    It saves what it would save around the innermost optimizer. A second call changes nothing.

    Args:
        accumulating: The class.
        cycle_of: Function that returns the `Cycle` of such an optimizer.
    """
    cls = keras.optimizers.LossScaleOptimizer

    def build(original, self, var_list):
        original(self, var_list)
        if isinstance(self.inner_optimizer, accumulating):
            cycle_of(self.inner_optimizer).scaled_by(self)
            _load_own_variables(self, vars(self).pop("_own_to_load", {}))

    def apply(original, self, grads, trainable_variables=None):
        inner = self.inner_optimizer
        if not isinstance(inner, accumulating):
            original(self, grads, trainable_variables)
            return
        if not self.built:
            self.build(trainable_variables)
        inner.apply(grads, trainable_variables)

    def save_own_variables(original, self, store):
        if not isinstance(self.inner_optimizer, accumulating):
            original(self, store)
            return
        saved = [*_own_variables(self), *self.inner_optimizer.inner_optimizer.variables]
        for i, variable in enumerate(saved):
            store[str(i)] = variable.numpy()

    def load_own_variables(original, self, store):
        if not isinstance(self.inner_optimizer, accumulating):
            original(self, store)
            return
        state = {name: np.array(store[name]) for name in store.keys()}
        if self.built:
            _load_own_variables(self, state)
        else:  # past Keras's tracking, which would take the dict for state
            vars(self)["_own_to_load"] = state

    for function in (build, apply, save_own_variables, load_own_variables):
        replace_function(cls, function.__name__, function)
    for name in _OF_A_CYCLE:
        setattr(cls, name, _passed_on(name, accumulating))
    cls.accum_steps = _passed_on_accum_steps(accumulating)


def scaler_around(scaler, optimizer):
    """A `LossScaleOptimizer` with the variables of `scaler`, around another inner optimizer.

    The inner optimizer of `scaler` is an accumulating one. At an update, the scaler has to act on
    the optimizer inside that one. The result is used for one update, or for the trace of one.

    Args:
        scaler: A built `LossScaleOptimizer`.
        optimizer: The inner optimizer of the result.
    """
    around = object.__new__(type(scaler))
    vars(around).update(vars(scaler))
    vars(around)["inner_optimizer"] = optimizer
    return around


def _own_variables(scaler):
    return scaler.variables[: len(scaler.variables) - len(scaler.inner_optimizer.variables)]


def _load_own_variables(scaler, store):
    for i, variable in enumerate(_own_variables(scaler)):
        if str(i) in store:
            variable.assign(store[str(i)])


def _passed_on(name, accumulating):
    """A read-only property: the accumulating inner optimizer's attribute of that name."""

    def get(self):
        if not isinstance(self.inner_optimizer, accumulating):
            kind = type(self.inner_optimizer).__name__
            raise AttributeError(
                f"`{name}` is what an accumulating optimizer has. Received: a "
                f"LossScaleOptimizer around {kind}. Wrap {kind} in a GradientAccumulateOptimizer."
            )
        return getattr(self.inner_optimizer, name)

    return property(get, doc=f"The accumulating inner optimizer's `{name}`.")


def _passed_on_accum_steps(accumulating):
    """A property like the inner optimizer's, which can be set.

    Without it an assignment would make an attribute of the scaler that nobody reads.
    """

    def get(self):
        return self.inner_optimizer.accum_steps

    def set_(self, value):
        if not isinstance(self.inner_optimizer, accumulating):
            kind = type(self.inner_optimizer).__name__
            raise AttributeError(
                "`accum_steps` is what an accumulating optimizer has. Received: "
                f"accum_steps={value!r} for a LossScaleOptimizer around {kind}. Wrap {kind} in a "
                "GradientAccumulateOptimizer."
            )
        self.inner_optimizer.accum_steps = value

    return property(get, set_)
