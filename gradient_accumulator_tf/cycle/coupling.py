"""Losses that couple the examples of a batch, and what a user is told of them.

Accumulation adds up micro-batches' losses. That is the large batch's loss if each example has a
loss of its own, which depends on no other example. A loss couples examples if it compares them
(`Circle`), or divides a sum over all of them by another one (`Dice`). Such a loss has to be
computed over the outputs of the whole effective batch, which is what `coupled_loss=True` does.
"""

import warnings
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class CoupledLossWarning(UserWarning):
    """A loss couples the examples of a batch, or may do so, and is computed per micro-batch."""


class Coupling(NamedTuple):
    """A loss that couples examples, or may do so.

    Attributes:
        name: The loss's name.
        reason: What it does, to be read after its name.
        certain: Whether it couples them for certain. If not, it may be a mean over the examples.
    """

    name: str
    reason: str
    certain: bool


_OVER_ALL = "divides one sum over all examples of a batch by another one"
_IN_PAIRS = "compares each example with all others of the batch"
_WHOLE = "reduces to one number for a whole batch by itself"

# Losses of Keras that couple whatever their arguments are, and those that do if `axis` is None,
# which is the default.
_ALWAYS = {"Circle": _IN_PAIRS, "circle": _IN_PAIRS}
_WITHOUT_AXIS = ("Dice", "dice", "Tversky", "tversky")


def couples(loss: Any, rank: int | None = None) -> str | None:
    """Why a loss is known to couple the examples of a batch; None if it is not known to.

    Args:
        loss: A `keras.losses.Loss`, or a function of `(y_true, y_pred)`.
        rank: Dimensions of the targets, to count a negative `axis` from the end. None if they are
            not known.
    """
    name = _name_in_keras(loss)
    if name in _ALWAYS:
        return _ALWAYS[name]
    axis = getattr(loss, "axis", None)
    if axis is None:
        return _OVER_ALL if name in _WITHOUT_AXIS else None
    axes = axis if isinstance(axis, list | tuple) else (axis,)
    along_examples = 0 in axes or (rank is not None and -rank in axes)
    return f"{_OVER_ALL} (axis={axis!r})" if name is not None and along_examples else None


def reduces_by_itself(loss: Any, y_pred: Any) -> bool:
    """Whether a loss returns one number for a whole batch, rather than one for each example.

    The loss is traced, and not run. Its targets are taken to be like the predictions. A loss that
    fails with such targets counts as one that does not.

    Args:
        loss: A `keras.losses.Loss`, or a function of `(y_true, y_pred)`.
        y_pred: What has the `shape` of a prediction, of which the first dimension may be unknown.
    """
    call = loss.call if isinstance(loss, keras.losses.Loss) else loss
    spec = tf.TensorSpec(tuple(y_pred.shape), getattr(loss, "dtype", keras.config.floatx()))
    try:
        traced = tf.function(call).get_concrete_function(spec, spec)
        return has_no_rows(traced.structured_outputs, spec.shape[0])
    except Exception:  # a user's function may raise anything, and wants other targets perhaps
        return False


def has_no_rows(values: Any, examples: int | None) -> bool:
    """Whether what a loss's `call` returned has no row for each example.

    Args:
        values: Tensor or `tf.TensorSpec`.
        examples: The static number of examples; None if it is not known.
    """
    rank = values.shape.rank
    # A first dimension that is known where that of the predictions is not: classes, say.
    return rank == 0 or (bool(rank) and examples is None and values.shape[0] is not None)


def couplings_of(losses: Any, outputs: Any = None) -> list[Coupling]:
    """The losses that couple examples, or may do so, among what `compile` is given.

    Args:
        losses: The argument `loss` of `compile`: a loss, its name, or a nested structure of such.
        outputs: The model's outputs, as many as there are losses or one for all, in the same
            order or under the same keys. None if their shapes are not known; then only losses of
            Keras are found.
    """
    found = []
    for identifier, output in _pairs(losses, outputs):
        loss = _resolved(identifier)
        if loss is None:
            continue
        name = str(getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__)))
        rank = None if output is None else len(output.shape)
        reason = couples(loss, rank)
        if reason is not None:
            found.append(Coupling(name, reason, certain=True))
        elif output is None or _name_in_keras(loss) is not None:
            continue
        elif getattr(loss, "reduction", None) != "sum":  # which is a sum over micro-batches as well
            if reduces_by_itself(loss, output):
                found.append(Coupling(name, _WHOLE, certain=False))
    return list(dict.fromkeys(found))


def whole_loss(name: str) -> Coupling:
    """The `Coupling` of a loss that was seen to reduce by itself while a step was traced."""
    return Coupling(name, _WHOLE, certain=False)


def warn_of(couplings: list[Coupling], setting: str) -> None:
    """Warns of each coupling, with the argument to pass.

    Args:
        couplings: List of `Coupling`.
        setting: How the model accumulates: "micro_batch_size=8" or "accum_steps=4".
    """
    size = setting if setting.startswith("micro_batch_size") else "micro_batch_size=..."
    instead = "" if size == setting else f" in place of {setting.partition('=')[0]}"
    remedy = (
        f"GradientAccumulateModel(..., {size}, coupled_loss=True){instead}, which computes it over "
        "the whole effective batch"
    )
    for coupling in couplings:
        subject = f"The loss {coupling.name!r} {coupling.reason}"
        if coupling.certain:
            message = (
                f"{subject}, so its mean over micro-batches is not the loss of the effective "
                f"batch. Received: a model with {setting}. Use {remedy}."
            )
        else:
            message = (
                f"{subject}, and that number counts for the examples of a micro-batch. This is the "
                "loss of the effective batch if it is a mean over the examples, and not if it "
                "compares them or divides by something else, such as the sum of a mask. Received: "
                f"a model with {setting}. For a mean, let it return a value for each example. "
                f"Otherwise use {remedy}."
            )
        warnings.warn(message, CoupledLossWarning, stacklevel=3)


def _name_in_keras(loss):
    """The name of a loss of Keras, class or function, in `keras.losses`; None for any other."""
    kind = type(loss) if isinstance(loss, keras.losses.Loss) else loss
    name = getattr(kind, "__name__", None)
    return name if name is not None and getattr(keras.losses, name, None) is kind else None


def _resolved(identifier):
    """The loss that `compile` makes of a name; None if it is another one for other targets."""
    if not isinstance(identifier, str):
        return identifier if callable(identifier) else None
    try:
        return keras.losses.get(identifier)
    except ValueError:  # "crossentropy", or a slip that Keras will name
        return None


def _pairs(losses, outputs):
    """Pairs of a loss and its output; the output is None where it is not known."""
    if isinstance(losses, dict):
        by_name = outputs if isinstance(outputs, dict) else {}
        return [(loss, by_name.get(name)) for name, loss in losses.items()]
    flat = keras.tree.flatten(outputs)
    if isinstance(losses, list | tuple):
        known = flat if len(flat) == len(losses) else [None] * len(losses)
        return list(zip(losses, known, strict=True))
    return [(losses, output) for output in flat or [None]]
