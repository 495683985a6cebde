"""Trainings of a model's copies on the same effective batches, and how they are compared."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.coupling import CoupledLossWarning
from gradient_accumulator_tf.equivalence.copies import Copy
from gradient_accumulator_tf.equivalence.data import rows
from gradient_accumulator_tf.equivalence.evidence import (
    Evidence,
    compiled_losses,
    random_layers,
)
from gradient_accumulator_tf.equivalence.report import VariableDifference
from gradient_accumulator_tf.equivalence.ways import Way

_REORDERED = 3  # how much further than the reordered batch a variable may be
_BY_ORDER = 0.1  # of the movement: a larger effect of the order is not rounding


class Reference(NamedTuple):
    """Where the large batches take the weights; the measure for other trainings.

    Attributes:
        weights: The checked model's weights.
        start: Their values before the training, arrays.
        end: Their values after the large batches.
        reordered: Their values after the large batches with their examples in another order.
        random: Paths of the layers whose random states moved.
        tolerance: The largest difference, relative to the movement.
    """

    weights: list[Any]
    start: list[np.ndarray]
    end: list[np.ndarray]
    reordered: list[np.ndarray]
    random: tuple[str, ...]
    tolerance: float

    @property
    def by_order(self) -> bool:
        """Whether the large batch ends elsewhere with its examples in another order, as a whole.

        Rounding moves single variables so far, such as a bias before a batch norm, which has no
        gradient.
        """
        effect = _distance(self.end, self.reordered)
        return bool(effect > _BY_ORDER * _distance(self.start, self.end))

    def differences(self, copy: Copy) -> tuple[VariableDifference, ...]:
        """The difference of each weight of a trained copy."""
        # Another order shows more than rounding if something depends on the order, and other
        # random numbers if something draws them.
        factor = 0 if self.random or self.by_order else _REORDERED
        differences = []
        values = (self.start, self.end, copy.values_of(self.weights), self.reordered)
        for weight, *arrays in zip(self.weights, *values, strict=True):
            start, end, value, other = (np.asarray(a, "float64") for a in arrays)
            movement, difference, reordered = (
                float(np.linalg.norm(a)) for a in (end - start, value - end, other - end)
            )
            # False if the difference is nan.
            within = difference <= max(self.tolerance * movement, factor * reordered)
            differences.append(
                VariableDifference(weight.path, movement, difference, reordered, within)
            )
        return tuple(differences)

    def is_met_by(self, copy: Copy) -> bool:
        """Whether all weights of a trained copy are within the tolerance."""
        return all(v.within for v in self.differences(copy))


class Trials:
    """Trains copies of one model on the same effective batches.

    Args:
        model: The checked model.
        way: The `Way` in which it accumulates.
        data: `(x, y, sample_weight)`, as from `effective_batches`.
        order: Indices of the examples, an integer array of shape `(updates, batch_size)`.
        tolerance: As for `check_equivalence`.

    Attributes:
        reference: The `Reference` that two trainings on large batches made.
        repeated_rows: Paths of the weights whose repeated rows were added first in the reference,
            which made a difference; empty if it is plain Keras.
    """

    def __init__(self, model: Any, way: Way, data: tuple, order: np.ndarray, tolerance: float):
        self._model, self._way, self._data, self._order = model, way, data, order
        self._updates, self._size = order.shape
        self._micro_batch = way.cut.batch_size(self._size)
        self._one = rows(data, slice(0, 1))[0]
        self._tolerance = tolerance
        self.repeated_rows: tuple[str, ...] = ()
        self._take_reference(add_rows=False)

    def _take_reference(self, add_rows):
        """Trains on the large batches; their end is what other trainings are compared with."""
        weights = self._model.weights
        start = [v.numpy() for v in weights]
        self._large = self._way.large(self._one, add_rows)
        self._start = self._large.state()
        updates_before = self._large.updates()
        self._train(self._large, self._size)
        self._updates_made = self._large.updates() - updates_before
        other = np.random.default_rng(0).permuted(self._order, axis=1)
        reordered = self._train(self._way.large(self._one, add_rows), self._size, order=other)
        self._moved = self._large.moved()
        self.reference = Reference(
            weights,
            start,
            self._large.values_of(weights),
            reordered.values_of(weights),
            random_layers(self._model, self._moved),
            self._tolerance,
        )

    def add_repeated_rows(self) -> None:
        """Compares with large batches whose repeated rows are added first, where that differs."""
        sparse, plain = self._large.got_sparse_gradients(), self.reference
        if sparse:
            self._take_reference(add_rows=True)
            if not plain.is_met_by(self._large):
                self.repeated_rows = sparse

    def accumulated(self) -> Copy:
        """A copy that accumulated over the effective batches; its warnings are shown."""
        return self._train(self._way.accumulated(self._one), self._micro_batch, show_warnings=True)

    def evidence(self) -> Evidence:
        """What further trainings show of a model that is not equivalent."""
        updates_per_batch = self._updates_made / self._updates
        moved = self._moved
        if self._way.has_own_step:
            moved = self._moved_in_first_micro_batch() if updates_per_batch <= 1 else []
        with _quietly(show_warnings=False):
            first_batch = rows(self._data, self._order[0])
            losses = compiled_losses(self._large.model, first_batch)
        better_reduction, loss_vector = self._other_reduction()
        return Evidence(
            model=self._model,
            way=self._way,
            random=self.reference.random,
            by_order=self.reference.by_order,
            updates_per_batch=updates_per_batch,
            weighted=self._data[2] is not None,
            moved=moved,
            losses=losses,
            better_reduction=better_reduction,
            loss_vector=loss_vector,
            repeats=self._repeats(),
            repeated_rows=self.repeated_rows,
        )

    def is_equal_if_coupled(self) -> bool:
        """Whether the model equals the large batches with `coupled_loss=True`."""
        micro_batch_size = self._way.cut.micro_batch_size or self._micro_batch
        try:
            copy = self._way.coupled(self._one, micro_batch_size)
            return copy is not None and self.reference.is_met_by(self._train(copy, self._size))
        except Exception:  # it refuses some models, with an error that is not for this user
            return False

    def _train(self, copy, batch_size, *, order=None, show_warnings=False, **fit):
        x, y, sample_weight = rows(self._data, (self._order if order is None else order).ravel())
        fit = {"batch_size": batch_size, "shuffle": False, "verbose": 0, **fit}
        with _quietly(show_warnings):
            copy.model.fit(x, y, sample_weight=sample_weight, **fit)
        return copy

    def _other_reduction(self):
        """The optimizer's other reduction if it is the right one, and a loss's shape; or None."""
        if not self._way.calls_optimizer:
            return None, None
        reduction = "sum" if self._way.reduction == "mean" else "mean"
        with _keras.recorded_vectors() as vectors:
            copy = self._train(self._way.accumulated(self._one, reduction), self._micro_batch)
        is_right = self.reference.is_met_by(copy)
        return reduction if is_right else None, next(iter(vectors), None)

    def _moved_in_first_micro_batch(self):
        """Variables that a `train_step` of the model's own moves before there is an update."""
        copy, moved = self._way.accumulated(self._one), []
        # As the batch ends, since the end of `fit` makes an update of what there is.
        end_of_batch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: moved.extend(copy.moved())
        )
        first = self._order[0, : self._micro_batch]
        self._train(copy, self._micro_batch, order=first, callbacks=[end_of_batch])
        return moved

    def _repeats(self):
        """Whether the large batches' training ends in the same weights a second time."""
        self._large.set_state(self._start)
        return self.reference.is_met_by(self._train(self._large, self._size))


def _distance(starts, ends):
    """L2 norm of the difference of two lists of arrays."""
    norms = [
        float(np.linalg.norm(np.asarray(b, "float64") - np.asarray(a, "float64")))
        for a, b in zip(starts, ends, strict=True)
    ]
    return np.linalg.norm(norms)


@contextlib.contextmanager
def _quietly(show_warnings: bool) -> Iterator[None]:
    """Hides what each copy would say: of many traces, and of a loss that couples examples.

    Args:
        show_warnings: Whether all other warnings are shown, as they are of one copy.
    """

    def is_not_of_tracing(record):
        return "triggered tf.function retracing" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(is_not_of_tracing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoupledLossWarning if show_warnings else Warning)
            yield
    finally:
        logger.removeFilter(is_not_of_tracing)
