"""The optimizers that a model holds, and those of them that do not accumulate."""

import warnings

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.optimizers.accumulate import accumulating_optimizer
from gradient_accumulator_tf.optimizers.inner import parts_of


def optimizers_of(model):
    """The optimizers in a model's attributes, and in lists, tuples and dicts there.

    Returns:
        Dict of optimizers by the name that their attribute goes by, such as "critics[0]".
    """
    found = {}
    for name, value in _keras.attributes_of(model).items():
        if isinstance(value, keras.optimizers.Optimizer):
            found[name] = value
        elif isinstance(value, (list, tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if isinstance(item, keras.optimizers.Optimizer):
                    found[f"{name}[{key!r}]"] = item
    return found


def warn_of_those_that_do_not_accumulate(model, compiled, accum_steps):
    """Warns of optimizers beside the compiled one that update with every micro-batch.

    A `train_step` that uses them, as a GAN's, accumulates nothing, and could not be seen to.

    Args:
        model: The model, with a `train_step` of its own.
        compiled: The optimizer that accumulates for it; None without one.
        accum_steps: Batches per update, for the message.

    Returns:
        Tuple of the names of those that were found.
    """
    own = [] if compiled is None else [id(part) for part in parts_of(compiled)]
    plain = {
        name: optimizer
        for name, optimizer in optimizers_of(model).items()
        if id(optimizer) not in own and accumulating_optimizer(optimizer) is None
    }
    if plain:
        names = ", ".join(f"{name} ({type(value).__name__})" for name, value in plain.items())
        first = next(iter(plain))
        warnings.warn(
            f"`accum_steps` accumulates in the optimizer that `compile` was given, and in no "
            f"other. Received: {type(model).__name__} with accum_steps={accum_steps!r} and, beside "
            f"it, {names}. Where its train_step uses these, they update in every batch, without "
            f"accumulation. Wrap each: self.{first} = GradientAccumulateOptimizer({first}, "
            f"accum_steps={accum_steps!r}).",
            stacklevel=3,
        )
    return tuple(plain)
