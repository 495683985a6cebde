"""What may be the inner optimizer of another one, and what it is made of."""

import keras

from gradient_accumulator_tf._checks import is_of_older_keras, qualified_name


def parts_of(optimizer):
    """An optimizer and all that it is made of: inner ones, and those of a `MultiOptimizer`."""
    yield optimizer
    inner = getattr(optimizer, "inner_optimizer", None)
    # A wrapper has the `optimizers` of its inner optimizer.
    for part in getattr(optimizer, "optimizers", []) if inner is None else [inner]:
        yield from parts_of(part)


def check_does_not_accumulate(optimizer):
    """Raises ValueError if an inner optimizer, or a part of it, accumulates by itself."""
    for part in parts_of(optimizer):
        kind = type(part).__name__
        if hasattr(part, "accum_steps"):
            raise ValueError(
                f"`optimizer` must not accumulate itself. Received: a {kind} with accum_steps="
                f"{part.accum_steps}. Wrap once, with the product of the two."
            )
        if getattr(part, "gradient_accumulation_steps", None):
            raise ValueError(
                f"The inner optimizer must not accumulate itself. Received: {kind}("
                f"gradient_accumulation_steps={part.gradient_accumulation_steps}). Leave that "
                "argument out and pass accum_steps instead."
            )
        if part is not optimizer and isinstance(part, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "A LossScaleOptimizer must be outside of all others. Received: one within a "
                f"{type(optimizer).__name__}. Put it around the whole."
            )


def checked_optimizer(optimizer, wrapper):
    """The Keras optimizer that `optimizer` names, or an error that says what to pass.

    Args:
        optimizer: What the caller passed.
        wrapper: Name of the class around it, for the message.

    Raises:
        TypeError: If it is not a Keras 3 optimizer.
        ValueError: If it is a LossScaleOptimizer.
    """
    if not isinstance(optimizer, (str, dict, keras.optimizers.Optimizer)):
        kind = qualified_name(optimizer)
        raise TypeError(
            "`optimizer` must be a Keras 3 optimizer, its name, or its config. "
            f"Received: {optimizer!r} (of type {kind}). "
            + (
                "Optimizers of tf_keras (Keras 2), tf.compat.v1 or keras.optimizers.legacy "
                "cannot be wrapped: pass the one of the same name from `keras.optimizers`."
                if is_of_older_keras(kind)
                else 'Pass for example keras.optimizers.Adam(1e-3) or "adam".'
            )
        )
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "`optimizer` must not be a LossScaleOptimizer, whose place is outside. "
            "Received: a LossScaleOptimizer around "
            f"{type(optimizer.inner_optimizer).__name__}. Put it outside: "
            f"LossScaleOptimizer({wrapper}(...)). `compile` does so under the mixed_float16 "
            "policy. It still acts once per update."
        )
    return optimizer
