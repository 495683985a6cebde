"""What any Keras model tells the accumulating optimizer that it was compiled with.

A plain model knows nothing of cycles. It lets an optimizer go that holds gradients, it leaves a
cycle open where its training breaks off, and it makes its training step only once.
"""

import functools
import warnings

import keras
import tensorflow as tf


def held_by(optimizer):
    """What an optimizer holds in mid-cycle, such as "2 of 4 micro-batches"; None if nothing.

    Args:
        optimizer: A `GradientAccumulateOptimizer` or None.
    """
    if optimizer is None:
        return None
    with tf.init_scope():
        micro_step = int(tf.convert_to_tensor(optimizer.micro_step))
        steps = int(tf.convert_to_tensor(optimizer.steps_in_cycle))
    return f"{micro_step} of {steps} micro-batches" if micro_step else None


def hook_into_models(model_class, optimizer_of):
    """Wraps four methods of `keras.Model` for models that have an accumulating optimizer.

    Nothing changes for others. Keras (3.8 to 3.15) calls nothing of an optimizer when it is
    replaced, when a `fit` breaks off, when weights are set, or when a training step is made.

    Args:
        model_class: `keras.Model`.
        optimizer_of: Function that returns a model's accumulating optimizer, or None.
    """

    def hooked(method):
        name = method.__name__
        owner = next(c for c in model_class.__mro__ if name in vars(c))
        if issubclass(owner, keras.Layer):
            owner = model_class  # layers that are no models have no optimizer
        original = getattr(owner, name)

        @functools.wraps(original)  # Keras and others read the signature
        def call(self, *args, **kwargs):
            return method(self, original, *args, **kwargs)

        # Where it is defined: Keras tells by that whether a model has one of its own.
        setattr(owner, name, call)

    @hooked
    def compile(self, original, *args, **kwargs):
        before = optimizer_of(self)
        original(self, *args, **kwargs)
        held = held_by(before)
        if held and optimizer_of(self) is not before:
            warnings.warn(
                "`compile` took another optimizer in place of one in mid-cycle, and the gradients "
                f"of {held} are lost. Call model.optimizer.flush() before, to update with them, "
                "or model.optimizer.reset(), to drop them.",
                stacklevel=3,
            )

    @hooked
    def fit(self, original, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            held = held_by(optimizer_of(self))
            if held:
                warnings.warn(
                    f"`fit` broke off in mid-cycle. The gradients of {held} are kept, and count "
                    "in the next update. Call model.optimizer.flush() to update with them now, or "
                    "model.optimizer.reset() to drop them.",
                    stacklevel=3,
                )
            raise

    @hooked
    def set_weights(self, original, *args, **kwargs):
        original(self, *args, **kwargs)
        held = held_by(optimizer_of(self))
        if held:
            warnings.warn(
                "`set_weights` in mid-cycle changed weights under gradients that were computed for "
                f"the old ones. Those of {held} are kept, and count in the next update. Call "
                "model.optimizer.reset() to drop them, or model.optimizer.flush() before "
                "`set_weights`, to update with them.",
                stacklevel=3,
            )

    @hooked
    def make_train_function(self, original, *args, **kwargs):
        before = self.train_function
        made = original(self, *args, **kwargs)
        optimizer = optimizer_of(self)
        if optimizer is not None and self.train_function is not before:
            if not optimizer.accumulates:
                self.train_function = optimizer.traces.of_model(self, self.train_function)
        return made
