"""How a model accumulates in check_equivalence: its wrapper, its micro-batches, its reduction."""

from typing import Any, NamedTuple

import keras

from gradient_accumulator_tf._checks import check_positive_int
from gradient_accumulator_tf.equivalence.copies import Copies
from gradient_accumulator_tf.equivalence.sparse_gradients import watch_sparse_gradients
from gradient_accumulator_tf.models.accumulate import GradientAccumulateModel
from gradient_accumulator_tf.models.one_piece import UNLIMITED
from gradient_accumulator_tf.models.wrapper import overridden_methods
from gradient_accumulator_tf.optimizers.accumulate import (
    GradientAccumulateOptimizer,
    accumulating_optimizer,
)

_WRAPPERS = {"model": "GradientAccumulateModel", "optimizer": "GradientAccumulateOptimizer"}

# What an argument counts, and what to pass in place of a number below 1.
_ARGUMENTS = {
    "micro_batch_size": (
        "examples per micro-batch",
        "Pass fewer examples than an effective batch has, such as micro_batch_size=8.",
    ),
    "accum_steps": (
        "micro-batches per update",
        "Pass accum_steps=2 or more, into which the effective batch can be divided.",
    ),
}


class Cut(NamedTuple):
    """How an effective batch is cut: one of the two is a number, the other one None.

    Attributes:
        micro_batch_size: Examples per micro-batch; `fit` takes effective batches.
        accum_steps: Micro-batches per update; `fit` takes micro-batches.
    """

    micro_batch_size: int | None
    accum_steps: Any

    def __str__(self):
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return ", ".join(f"{name}={value}" for name, value in given.items())

    def set_one_piece(self, model):
        """Sets a model that is cut like this to take each of its batches in one piece."""
        for name, value in (("micro_batch_size", UNLIMITED), ("accum_steps", 1)):
            if getattr(self, name) is not None:
                setattr(model, name, value)

    def batch_size(self, size):
        """What `fit` takes at a time of an effective batch of `size` examples.

        Raises:
            ValueError: If an effective batch is not cut into several micro-batches, all of
                `accum_steps` alike.
        """
        micro, steps = self
        rule = "or nothing is accumulated, and there is nothing to compare. Received:"
        if micro is not None:
            if micro >= size:
                smaller = f"micro_batch_size={size // 2}" if size > 1 else "more examples"
                raise ValueError(
                    f"`micro_batch_size` must be smaller than the effective batch, {rule} "
                    f"micro_batch_size={micro} for an effective batch of {size}. Pass {smaller}"
                    f"{' or less, or a larger batch' if size > 1 else ''}."
                )
            return size
        if steps == 1:
            raise ValueError(
                f"`accum_steps` must be at least 2, {rule} accum_steps=1 for an effective batch of "
                f"{size}. Pass accum_steps=2 or more, or a model that was given it."
            )
        if size % steps:
            raise ValueError(
                "`batch_size` must be a multiple of `accum_steps`. Received: "
                f"batch_size={size}, accum_steps={steps}. Pass a batch_size such as "
                f"{max(size // steps, 1) * steps}."
            )
        return size // steps


class Way:
    """How a model accumulates: makes the copy that does, and the one for the large batch.

    Args:
        model: The compiled and built model.
        make: The function that it comes from, or None.
        micro_batch_size: As for `check_equivalence`.
        accum_steps: As for `check_equivalence`.

    Attributes:
        cut: The `Cut` of an effective batch.
        wrapper: "model" or "optimizer".
        has_own_step: Whether the model has a `train_step` of its own.
        calls_optimizer: Whether Keras's or that step hands its gradients to an optimizer that
            accumulates, and takes the "mean" or "sum" of a cycle.
        reduction: Which of the two.
        couples_losses: Whether the loss is computed from the outputs of the whole effective batch.

    Raises:
        ValueError: If not exactly one way to accumulate is given, or none for this model.
    """

    def __init__(self, model, make, micro_batch_size, accum_steps):
        self._model, self._copies = model, Copies(model, make)
        self._own = accumulating_optimizer(model.optimizer)
        self._is_wrapped = isinstance(model, GradientAccumulateModel)
        given = Cut(micro_batch_size, accum_steps)
        if self._is_wrapped or self._own is not None:
            self.cut = _own_cut(model if self._is_wrapped else self._own, given)
        else:
            self.cut = _given_cut(given)
        overridden = overridden_methods(model)
        by_optimizer = self._own is not None or overridden
        self.wrapper = "model" if self._is_wrapped or not by_optimizer else "optimizer"
        if self.wrapper == "optimizer" and micro_batch_size is not None:
            raise ValueError(
                "A model that overrides a training method accumulates with the optimizer, across "
                f"calls. Received: micro_batch_size={micro_batch_size} for "
                f"{type(model).__name__} with its own {', '.join(overridden)}. Pass accum_steps "
                "instead."
            )
        steps = (keras.Model.train_step, GradientAccumulateModel.train_step)
        self.has_own_step = type(model).train_step not in steps
        self.calls_optimizer = self.wrapper == "optimizer" or self.has_own_step
        self.reduction = "mean" if self._own is None else self._own.reduction
        self.couples_losses = bool(getattr(model, "coupled_loss", False))

    def setting(self, size, updates, adds_rows=False):
        """What is compared, in words."""
        rows = " with repeated rows added first" if adds_rows else ""
        return (
            f"{_WRAPPERS[self.wrapper]}({self.cut}) against the large batch of {size}{rows}, "
            f"{updates} update{'s' if updates > 1 else ''}"
        )

    def large(self, x, add_rows=False):
        """The `Copy` for large batches, whose sparse gradients are seen.

        Args:
            x: Inputs to build it with.
            add_rows: Whether its optimizer gets sparse gradients with their repeated rows added.
        """
        copy, pairs = self._copies.new_model(x)
        optimizer = self._copies.new_optimizer(pairs)
        sparse = watch_sparse_gradients(optimizer, add_rows=add_rows)
        if self._is_wrapped and type(self._model) is not GradientAccumulateModel:
            copy = self._wrapped(copy, **self.cut._asdict())
        if isinstance(copy, GradientAccumulateModel):
            # A subclass may have methods of its own, such as `compute_loss`: in one piece.
            self.cut.set_one_piece(copy)
        if self._own is not None and self.has_own_step:
            # Its step may pass weights, or ask for what a plain optimizer does not have.
            optimizer = self._accumulating(optimizer, accum_steps=1)
        return self._copies.compiled(copy, pairs, optimizer)._replace(sparse=sparse)

    def accumulated(self, x, reduction=None):
        """The `Copy` that accumulates, with another reduction if one is given."""
        copy, pairs = self._copies.new_model(x)
        optimizer = self._copies.new_optimizer(pairs)
        if self._own is not None or self.wrapper == "optimizer":
            optimizer = self._accumulating(optimizer, reduction=reduction or self.reduction)
        if self.wrapper == "model":
            copy = self._wrapped(copy, **self.cut._asdict())
        return self._copies.compiled(copy, pairs, optimizer)

    def coupled(self, x, micro_batch_size):
        """The `Copy` that accumulates with `coupled_loss=True`; None if the model cannot.

        Args:
            x: Inputs to build it with.
            micro_batch_size: Examples per micro-batch; `fit` takes effective batches.
        """
        if self.wrapper != "model" or self.has_own_step or self.couples_losses:
            return None
        copy, pairs = self._copies.new_model(x)
        if isinstance(copy, GradientAccumulateModel):
            return None  # its own constructor says whether it does
        optimizer = self._copies.new_optimizer(pairs)
        cut = Cut(micro_batch_size, None)
        copy = self._wrapped(copy, **cut._asdict(), coupled_loss=True)
        return self._copies.compiled(copy, pairs, optimizer)

    def _wrapped(self, copy, **arguments):
        """The copy in a GradientAccumulateModel like the one around the model, if there is one.

        One that is a GradientAccumulateModel without a model in it is left as it is.
        """
        if isinstance(copy, GradientAccumulateModel):
            return copy
        config = self._model.get_config() if self._is_wrapped else {}
        kind = type(self._model) if self._is_wrapped else GradientAccumulateModel
        return kind(**{**config, **arguments, "model": copy})

    def _accumulating(self, optimizer, **changed):
        """An optimizer that accumulates as the model's does, or by `accum_steps`."""
        config = {"accum_steps": self.cut.accum_steps}
        if self._own is not None:
            config = {k: v for k, v in self._own.get_config().items() if k != "optimizer"}
        return GradientAccumulateOptimizer(optimizer, **{**config, **changed})


def _own_cut(owner, given):
    """The `Cut` of a model or an optimizer that accumulates; none may be given.

    Raises:
        ValueError: If one is given, or if it is a schedule.
    """
    if given != (None, None):
        raise ValueError(
            "A model that accumulates by itself is checked as it is. Received: "
            f"{_in_full(given)}. Leave them out, or pass the model without its wrapper."
        )
    steps = owner.accum_steps
    if not isinstance(steps, int | None):
        raise ValueError(
            "A schedule of accum_steps cannot be checked as a whole. Received: "
            f"accum_steps={steps!r}. Pass a model that is made with a "
            "number that it takes, such as accum_steps=4."
        )
    return Cut(getattr(owner, "micro_batch_size", None), steps)


def _given_cut(given):
    """The `Cut` that is given for a model that does not accumulate.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is less than 1, or if there is not exactly one.
    """
    names = [name for name, value in given._asdict().items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            "Exactly one of `micro_batch_size` and `accum_steps` must be given. Received: "
            f"{_in_full(given)}. Pass micro_batch_size=8 for an effective batch of more than 8 "
            "examples, which a GradientAccumulateModel cuts; or accum_steps=4 for one of 4 "
            "micro-batches, which come one by one."
        )
    (name,) = names
    meaning, instead = _ARGUMENTS[name]
    value = check_positive_int(name, getattr(given, name), meaning, instead)
    return given._replace(**{name: value})


def _in_full(cut):
    return f"micro_batch_size={cut.micro_batch_size!r}, accum_steps={cut.accum_steps!r}"
