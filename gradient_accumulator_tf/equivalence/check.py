"""check_equivalence: does a model that accumulates train as on the large batch, and if not, why?"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf._checks import check_number, check_positive_int
from gradient_accumulator_tf.equivalence.causes import (
    Cause,
    Evidence,
    causes_of,
    random_layers,
    recorded_vectors,
    reduced_by_themselves,
)
from gradient_accumulator_tf.equivalence.data import effective_batches, rows
from gradient_accumulator_tf.equivalence.ways import Way, check_model

SHOWN = 12  # rows of the table
REORDERED = 3  # how much further than the reordered batch a variable may be
BY_ORDER = 0.1  # of the movement: what is further off in another order is not by rounding


class VariableDifference(NamedTuple):
    """How far one variable is from the large batch's; L2 norms.

    Attributes:
        path: The variable's `path`.
        movement: What the large batch moved it by.
        difference: Between the large batch's and the accumulated value.
        reordered: Between the large batch's, and its own with its examples in another order: what
            rounding alone does.
        within: Whether the difference is within the tolerance.
    """

    path: str
    movement: float
    difference: float
    reordered: float
    within: bool

    @property
    def relative(self) -> float:
        """`difference / movement`; 0 for a variable that nothing moved."""
        return _quotient(self.difference, self.movement)


class EquivalenceReport(NamedTuple):
    """What `check_equivalence` found; its `str` is the table.

    Attributes:
        equivalent: Whether every variable is within the tolerance.
        variables: Tuple of a `VariableDifference` for each weight of the model.
        causes: Tuple of what was found, each a `Cause`; empty if equivalent.
        setting: What was compared, in words.
    """

    equivalent: bool
    variables: tuple[VariableDifference, ...]
    causes: tuple[Cause, ...]
    setting: str

    def __str__(self) -> str:
        worst = sorted(self.variables, key=lambda v: v.relative, reverse=True)
        rows: list[tuple[str, ...]] = [
            ("variable", "movement", "difference", "relative", "reordered", "")
        ]
        for v in worst[:SHOWN]:
            reordered = _quotient(v.reordered, v.movement)
            numbers = (v.movement, v.difference, v.relative, reordered)
            rows.append((v.path, *(f"{n:.1e}" for n in numbers), "" if v.within else "differs"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.setting, ""]
        for path, *cells in rows:
            cells = [c.rjust(width) for c, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([path.ljust(widths[0]), *cells]).rstrip())
        if len(worst) > SHOWN:
            lines.append(f"... and {len(worst) - SHOWN} more that differ less")
        far = sum(not v.within for v in self.variables)
        if self.equivalent:
            lines += ["", "Equivalent: every variable is where the large batch takes it."]
        else:
            lines += ["", f"Not equivalent: {far} of {len(worst)} variables differ. Found:"]
        for cause in self.causes:
            where = ", ".join(cause.where[:5]) + (", ..." if len(cause.where) > 5 else "")
            lines.append(f"- {cause.kind}{' (' + where + ')' if where else ''}: {cause.advice}")
        return "\n".join(lines)


def check_equivalence(
    model: keras.Model | Callable[[], keras.Model],
    x: Any,
    y: Any = None,
    *,
    micro_batch_size: int | None = None,
    accum_steps: int | None = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
    updates: int = 3,
    tolerance: float = 1e-3,
    verbose: int = 1,
) -> EquivalenceReport:
    """Trains copies of a compiled model on large batches and accumulated, and compares them.

    Three copies start from the model's weights, optimizer state and random states: one makes
    `updates` updates on large batches of `batch_size` examples, one accumulates over the same
    examples, and one takes the large batches with their examples in another order, which shows
    what rounding alone does. If the second differs from the first, two more are trained to find
    out why. The model itself is not touched.

    What accumulates is

    - a `GradientAccumulateModel` as it is; leave `micro_batch_size` and `accum_steps` out;
    - a model compiled with a `GradientAccumulateOptimizer` as it is; the same;
    - any other compiled model in a `GradientAccumulateModel` with the one of the two that is given,
      or, if it overrides a training method (`train_step`, ...), with a
      `GradientAccumulateOptimizer` of these `accum_steps`.

    A variable is within the tolerance if its difference from the large batch (L2 norm) is at most
    `tolerance` times its movement, or three times what the other order does. In float32 with few
    updates, what is equal differs by about 1e-6 of the movement, and what is not by 1e-2 to 1.

    ```python
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    )
    model.compile("adam", "mse")
    x, y = np.random.rand(64, 8), np.random.rand(64, 4)
    report = check_equivalence(model, x, y, micro_batch_size=16)
    assert not report.equivalent
    assert report.causes[0].kind == "batch_norm"
    ```

    Args:
        model: A compiled and built Keras model, made outside of any strategy, which is copied
            through its config; or a function of no arguments that returns one, for models that
            have none, such as subclassed ones without `get_config`.
        x: Inputs: an array or tensor of shape `(examples, ...)`, of numbers or strings, or a
            nested structure of such. Or a `tf.data.Dataset` of batches, as for `fit`: their
            examples are put together, as many as are needed, and cut into effective batches of
            `batch_size`, whatever the dataset's own batches are.
        y: Targets; the same. None (default) for a dataset, or a model that takes none.
        micro_batch_size: Integer >= 1, examples per micro-batch.
        accum_steps: Integer >= 1, micro-batches per update; must divide `batch_size`.
        sample_weight: Optional weights, as for `fit`.
        batch_size: Integer >= 1, examples of an effective batch. None (default) is all of `x`,
            which a dataset without an end does not have.
        updates: Integer >= 1, how many updates to make. They begin again with the first examples
            when all have been used.
        tolerance: Number > 0; see above.
        verbose: 1 (default) prints the report, 0 does not.

    Returns:
        An `EquivalenceReport`: `report.equivalent` for a test to assert on, `report.variables`,
        `report.causes`.

    Raises:
        TypeError: If `model` is not a Keras model, a count not an integer, or `x` neither arrays
            nor a dataset (a generator, a `keras.utils.PyDataset`).
        ValueError: If the model is not compiled, not built, or cannot be copied; if not exactly one
            way to accumulate is given; if nothing is accumulated, as an effective batch is one
            micro-batch; or if the sizes do not fit each other.
    """
    make = None
    if callable(model) and not isinstance(model, keras.Model):
        make = model
        model = make()
    check_model(model)
    updates = check_positive_int(
        "updates", updates, "updates to make", "Pass updates=1 for the first one alone."
    )
    tolerance = check_number("tolerance", tolerance)
    way = Way(model, make, micro_batch_size, accum_steps)
    data, order = effective_batches(x, y, sample_weight, batch_size, updates)
    size = order.shape[1]
    micro_batch = way.batch_size(size)
    one, weights = rows(data, slice(0, 1))[0], model.weights
    first = [v.numpy() for v in weights]

    def trained(copy, order, batch_size, tells_warnings=False, **fit):
        x, y, sample_weight = rows(data, order.ravel())
        fit = {"batch_size": batch_size, "shuffle": False, "verbose": 0, **fit}
        with _quietly(tells_warnings):
            copy.model.fit(x, y, sample_weight=sample_weight, **fit)
        return copy

    large = way.large(one)
    start, updates_before = large.state(), large.updates()
    trained(large, order, size)
    accumulated = trained(way.accumulated(one), order, micro_batch, tells_warnings=True)
    other = trained(way.large(one), np.random.default_rng(0).permuted(order, axis=1), size)
    end, reordered = large.values_of(weights), other.values_of(weights)
    random, by_order = random_layers(model, large.moved()), _depend_on_order(first, end, reordered)
    # What another order changes is more than rounding, or random layers draw for other examples.
    factor = 0 if random or by_order else REORDERED

    def differences(copy):
        paths, values = [v.path for v in weights], copy.values_of(weights)
        return tuple(
            _difference(*each, tolerance, factor)
            for each in zip(paths, first, end, values, reordered, strict=True)
        )

    def is_equivalent(copy):
        return all(v.within for v in differences(copy))

    variables, equivalent = differences(accumulated), is_equivalent(accumulated)
    causes = ()
    if not equivalent:
        evidence = Evidence(
            random=random,
            by_order=by_order,
            updates_per_batch=(large.updates() - updates_before) / updates,
            weighted=data[2] is not None,
            moved=[] if way.has_own_step else large.moved(),
        )
        with _quietly(tells_warnings=False):
            evidence = evidence._replace(
                whole_losses=reduced_by_themselves(large.model, rows(data, order[0]))
            )
        if way.calls_optimizer:
            reduction = "sum" if way.reduction == "mean" else "mean"
            with recorded_vectors() as vectors:
                copy = trained(way.accumulated(one, reduction), order, micro_batch)
            evidence = evidence._replace(
                better_reduction=reduction if is_equivalent(copy) else None,
                loss_vector=next(iter(vectors), None),
            )
        if way.has_own_step and evidence.updates_per_batch <= 1:
            copy, moved = way.accumulated(one), []
            # As the batch ends, since the end of `fit` makes an update of what there is.
            end_of_batch = keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: moved.extend(copy.moved())
            )
            trained(copy, order[0, :micro_batch], micro_batch, callbacks=[end_of_batch])
            evidence = evidence._replace(moved=moved)
        large.set_state(start)
        repeats = is_equivalent(trained(large, order, size))
        causes = tuple(causes_of(model, way, evidence._replace(repeats=repeats)))
    report = EquivalenceReport(equivalent, variables, causes, way.setting(size, updates))
    if verbose:
        print(report)
    return report


def _depend_on_order(first, end, reordered):
    """Whether the large batch ends elsewhere with its examples in another order, as a whole.

    Single variables may for rounding, such as a bias before a batch norm, which has no gradient.
    """

    def norm(starts, ends):
        return np.linalg.norm(
            [
                float(np.linalg.norm(np.asarray(b, "float64") - np.asarray(a, "float64")))
                for a, b in zip(starts, ends, strict=True)
            ]
        )

    return bool(norm(end, reordered) > BY_ORDER * norm(first, end))


def _difference(path, start, end, value, other, tolerance, factor):
    """A `VariableDifference` of arrays: where all began, the large batch's, ours, the control's."""
    start, end, value, other = (np.asarray(a, "float64") for a in (start, end, value, other))
    movement, difference, reordered = (
        float(np.linalg.norm(a)) for a in (end - start, value - end, other - end)
    )
    within = difference <= max(tolerance * movement, factor * reordered)  # not if it is nan
    return VariableDifference(path, movement, difference, reordered, within)


@contextlib.contextmanager
def _quietly(tells_warnings):
    """Without what TensorFlow says of many traces, which are ours: each copy has its own.

    Args:
        tells_warnings: Whether warnings of the training are shown, as they are of one copy.
    """

    def is_not_of_tracing(record):
        return "triggered tf.function retracing" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(is_not_of_tracing)
    try:
        with warnings.catch_warnings():
            if not tells_warnings:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(is_not_of_tracing)


def _quotient(difference, movement):
    if difference == 0:
        return 0.0
    return difference / movement if movement else float("inf")
