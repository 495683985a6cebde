"""Four methods of `keras.Model`, for models that were compiled with an accumulating optimizer.

Why: a plain model knows nothing of cycles. It drops an optimizer that holds gradients, it leaves a
cycle open when its training breaks off, and it makes its training step only once. Keras calls
nothing of an optimizer at these moments: when another one replaces it, when a `fit` breaks off,
when weights are set, when a training step is made.

Where it takes effect: in `compile`, `fit`, `set_weights` and `make_train_function` of every model,
but only if its optimizer accumulates. Other models run Keras's methods and nothing else.

When it can go: each method when Keras calls the optimizer at that moment.
"""

import warnings

import keras

from gradient_accumulator_tf._keras.patches.replaced import replace_function


def hook_into_models(model_class, cycle_of):
    """Wraps the four methods. A second call takes the place of the first.

    Args:
        model_class: `keras.Model`.
        cycle_of: Function that returns the `Cycle` of a model's optimizer; None if the optimizer
            does not accumulate.
    """

    def held_by(cycle):
        return None if cycle is None else cycle.held

    def compile(original, self, *args, **kwargs):
        before = cycle_of(self)
        original(self, *args, **kwargs)
        held = held_by(before)
        if held and cycle_of(self) is not before:
            warnings.warn(
                "`compile` took another optimizer in place of one in mid-cycle, and the gradients "
                f"of {held} are lost. Call model.optimizer.flush() before, to update with them, "
                "or model.optimizer.reset(), to drop them.",
                stacklevel=3,
            )

    def fit(original, self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            held = held_by(cycle_of(self))
            if held:
                warnings.warn(
                    f"`fit` broke off in mid-cycle. The gradients of {held} are kept, and count "
                    "in the next update. Call model.optimizer.flush() to update with them now, or "
                    "model.optimizer.reset() to drop them.",
                    stacklevel=3,
                )
            raise

    def set_weights(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        held = held_by(cycle_of(self))
        if held:
            warnings.warn(
                "`set_weights` in mid-cycle changed weights under gradients that were computed for "
                f"the old ones. Those of {held} are kept, and count in the next update. Call "
                "model.optimizer.reset() to drop them, or model.optimizer.flush() before "
                "`set_weights`, to update with them.",
                stacklevel=3,
            )

    def make_train_function(original, self, *args, **kwargs):
        before = self.train_function
        made = original(self, *args, **kwargs)
        cycle = cycle_of(self)
        if cycle is not None and self.train_function is not before:
            if not cycle.accumulates:
                self.train_function = cycle.traces.of_model(self, self.train_function)
        return made

    for function in (compile, fit, set_weights, make_train_function):
        replace_function(_owner_of(model_class, function.__name__), function.__name__, function)


def _owner_of(model_class, name):
    """The class to replace a method in: where it is defined, or `model_class`.

    Keras tells by the defining class whether a model has a method of its own. A method of
    `keras.Layer` is replaced in `model_class`, because layers have no optimizer.
    """
    owner = next(c for c in model_class.__mro__ if name in vars(c))
    return model_class if issubclass(owner, keras.Layer) else owner
