"""check_equivalence: does a model that accumulates train as on the large batch, and if not, why?"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import _compat
from gradient_accumulator_tf._checks import check_number, check_positive_int
from gradient_accumulator_tf.equivalence_causes import (
    causes_of,
    random_layers,
    repeats_itself,
)
from gradient_accumulator_tf.model import GradientAccumulateModel
from gradient_accumulator_tf.model_copy import carry_state, copy_model, copy_optimizer
from gradient_accumulator_tf.model_wrapper import overridden_methods
from gradient_accumulator_tf.optimizer import (
    GradientAccumulateOptimizer,
    accumulating_optimizer,
)

SHOWN = 12  # rows of the table
REORDERED = 3  # how much further than the reordered batch a variable may be


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
    def relative(self):
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
    variables: tuple
    causes: tuple
    setting: str

    def __str__(self):
        worst = sorted(self.variables, key=lambda v: v.relative, reverse=True)
        rows = [("variable", "movement", "difference", "relative", "reordered", "")]
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
    model,
    x,
    y,
    *,
    micro_batch_size=None,
    accum_steps=None,
    sample_weight=None,
    batch_size=None,
    updates=3,
    tolerance=1e-3,
    verbose=1,
):
    """Trains copies of a compiled model on large batches and accumulated, and compares them.

    Three copies start from the model's weights, optimizer state and random states: one makes
    `updates` updates on large batches of `batch_size` examples, one accumulates over the same
    examples, and one takes the large batches with their examples in another order, which shows
    what rounding alone does. The model itself is not touched.

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
        x: Inputs: an array or tensor of shape `(examples, ...)`, or a nested structure of such.
        y: Targets; the same.
        micro_batch_size: Integer >= 1, examples per micro-batch.
        accum_steps: Integer >= 1, micro-batches per update; must divide `batch_size`.
        sample_weight: Optional weights, as for `fit`.
        batch_size: Integer >= 1, examples of an effective batch. None (default) is all of `x`.
        updates: Integer >= 1, how many updates to make. They begin again with the first examples
            when all have been used.
        tolerance: Number > 0; see above.
        verbose: 1 (default) prints the report, 0 does not.

    Returns:
        An `EquivalenceReport`: `report.equivalent` for a test to assert on, `report.variables`,
        `report.causes`.

    Raises:
        TypeError: If `model` is not a Keras model, or a count not an integer.
        ValueError: If the model is not compiled, not built, or cannot be copied; if not exactly one
            way to accumulate is given; or if the sizes do not fit each other.
    """
    make = None
    if callable(model) and not isinstance(model, keras.Model):
        make = model
        model = make()
    _check_model(model)
    data = tf.nest.map_structure(
        lambda a: None if a is None else np.asarray(a), (x, y, sample_weight)
    )
    way = _Way(model, make, micro_batch_size, accum_steps)
    order = _order(data, batch_size, check_positive_int("updates", updates, "updates to make"))
    size, tolerance = order.shape[1], check_number("tolerance", tolerance)
    first, one = [v.numpy() for v in model.weights], _rows(data, slice(0, 1))[0]

    def trained(make_copy, order, batch_size):
        copy = make_copy(one)
        x, y, sample_weight = _rows(data, order.ravel())
        fit = {"batch_size": batch_size, "shuffle": False, "verbose": 0}
        copy.fit(x, y, sample_weight=sample_weight, **fit)
        return copy

    large = trained(way.large, order, size)
    accumulated = trained(way.accumulated, order, way.batch_size(size))
    other = trained(way.large, np.random.default_rng(0).permuted(order, axis=1), size)
    # Random layers draw alike, but for other examples.
    random = random_layers(model, large)
    ends = ([v.numpy() for v in m.weights] for m in (large, accumulated, other))
    paths = [v.path for v in model.weights]
    factor = 0 if random else REORDERED
    variables = [
        _difference(*values, tolerance, factor) for values in zip(paths, first, *ends, strict=True)
    ]
    equivalent = all(v.within for v in variables)
    causes = ()
    if not equivalent:
        repeats = repeats_itself(way.large(one), _rows(data, slice(0, size))[0])
        causes = tuple(causes_of(model, way, large, first, data, random, repeats))
    report = EquivalenceReport(equivalent, tuple(variables), causes, way.setting(size, updates))
    if verbose:
        print(report)
    return report


def _difference(path, start, end, value, other, tolerance, factor):
    """A `VariableDifference` of arrays: where all began, the large batch's, ours, the control's."""
    start, end, value, other = (np.asarray(a, "float64") for a in (start, end, value, other))
    movement, difference, reordered = (
        float(np.linalg.norm(a)) for a in (end - start, value - end, other - end)
    )
    within = difference <= max(tolerance * movement, factor * reordered)  # not if it is nan
    return VariableDifference(path, movement, difference, reordered, within)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a compiled Keras 3 model, or a function that returns one. "
            f"Received: {model!r} (of type {type(model).__name__})."
        )
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled, so that its copies can be trained. Received: "
            f"{type(model).__name__} {model.name!r}, which is not. Call "
            "model.compile(optimizer, loss) first."
        )
    if not model.built:
        raise ValueError(
            "`model` must be built, so that its copies start with its weights. Received: "
            f"{type(model).__name__} {model.name!r}, which is not. Give it a keras.Input, or call "
            "it on some inputs first."
        )
    if model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "`model` must be made outside of a strategy, as `check_equivalence` trains on one "
            f"device. Received: a model on {model.distribute_strategy.num_replicas_in_sync} "
            "replicas. Check one that is made in the same way outside of the scope."
        )


class _Way:
    """How a model accumulates: makes the copy that does, and the one for the large batch.

    Attributes:
        wrapper: "model" or "optimizer".
    """

    def __init__(self, model, make, micro_batch_size, accum_steps):
        self._model, self._make = model, make
        self._compiled = _compat.compile_arguments(model)
        self._arguments = {"micro_batch_size": micro_batch_size, "accum_steps": accum_steps}
        given = [name for name, value in self._arguments.items() if value is not None]
        received = f"micro_batch_size={micro_batch_size!r}, accum_steps={accum_steps!r}"
        self._own = accumulating_optimizer(model.optimizer)
        self._is_wrapped = isinstance(model, GradientAccumulateModel)
        if self._is_wrapped or self._own is not None:
            if given:
                raise ValueError(
                    "A model that accumulates by itself is checked as it is. Received: "
                    f"{received}. Leave them out, or pass the model without its wrapper."
                )
            owner = model if self._is_wrapped else self._own
            self._arguments = {
                "micro_batch_size": getattr(owner, "micro_batch_size", None),
                "accum_steps": owner.accum_steps,
            }
            if not isinstance(self._arguments["accum_steps"], int | None):
                raise ValueError(
                    "A schedule of accum_steps cannot be checked as a whole. Received: "
                    f"accum_steps={owner.accum_steps!r}. Pass a copy with an integer."
                )
        elif len(given) != 1:
            raise ValueError(
                "Exactly one of `micro_batch_size` and `accum_steps` must be given. Received: "
                f"{received}."
            )
        else:
            check_positive_int(given[0], self._arguments[given[0]], "how to accumulate")
        overridden = overridden_methods(model)
        by_optimizer = self._own is not None or overridden
        self.wrapper = "model" if self._is_wrapped or not by_optimizer else "optimizer"
        if self.wrapper == "optimizer" and micro_batch_size is not None:
            raise ValueError(
                "A model that overrides a training method accumulates with the optimizer, across "
                f"calls. Received: micro_batch_size={micro_batch_size} for "
                f"{type(model).__name__} with its own {', '.join(overridden)}. Pass accum_steps."
            )

    def setting(self, size, updates):
        arguments = ", ".join(f"{k}={v}" for k, v in self._arguments.items() if v is not None)
        wrappers = {"model": "GradientAccumulateModel", "optimizer": "GradientAccumulateOptimizer"}
        return (
            f"{wrappers[self.wrapper]}({arguments}) against the large batch of {size}, "
            f"{updates} update{'s' if updates > 1 else ''}"
        )

    def batch_size(self, size):
        """What `fit` takes at a time of an effective batch."""
        if self._arguments["micro_batch_size"] is not None:
            return size
        steps = self._arguments["accum_steps"]
        if size % steps:
            raise ValueError(
                "`batch_size` must be a multiple of `accum_steps`. Received: "
                f"batch_size={size}, accum_steps={steps}. Pass a batch_size such as "
                f"{max(size // steps, 1) * steps}."
            )
        return size // steps

    def large(self, x):
        """The copy for large batches."""
        copy = self._copy(x)
        if isinstance(copy, GradientAccumulateModel):
            # A subclass with methods of its own: in one piece.
            if copy.micro_batch_size is None:
                copy.accum_steps = 1
            else:
                copy.micro_batch_size = np.iinfo("int32").max
        return self._compile(copy, self._optimizer(copy))

    def accumulated(self, x):
        """The copy that accumulates."""
        copy = self._copy(x)
        optimizer = self._optimizer(copy)
        if self.wrapper == "optimizer":
            config = {"accum_steps": self._arguments["accum_steps"]}
            if self._own is not None:
                config = {k: v for k, v in self._own.get_config().items() if k != "optimizer"}
            optimizer = GradientAccumulateOptimizer(optimizer, **config)
        elif not self._is_wrapped:
            copy = GradientAccumulateModel(model=copy, **self._arguments)
        elif self._model.model is not None:
            config = {**self._model.get_config(), **self._arguments, "model": copy}
            copy = type(self._model)(**config)
        return self._compile(copy, optimizer)

    def _copy(self, x):
        """A copy of the model, without a GradientAccumulateModel around it."""

        def inner(model):
            wrapped = isinstance(model, GradientAccumulateModel) and model.model is not None
            return model.model if wrapped else model

        if self._make is None:
            return copy_model(inner(self._model), x)
        copy = inner(self._make())
        carry_state(inner(self._model), copy, x)
        return copy

    def _optimizer(self, copy):
        """A copy of the innermost optimizer, which no wrapper is around."""
        optimizer = self._model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        if isinstance(optimizer, GradientAccumulateOptimizer):
            optimizer = optimizer.inner_optimizer
        return copy_optimizer(optimizer, copy.trainable_variables)

    def _compile(self, copy, optimizer):
        scaler = self._model.optimizer
        if isinstance(scaler, keras.optimizers.LossScaleOptimizer):
            # It starts with the scale that the model's has come to.
            scale = scaler.dynamic_scale if scaler.built else scaler.initial_scale
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer,
                initial_scale=float(tf.convert_to_tensor(scale)),
                dynamic_growth_steps=scaler.dynamic_growth_steps,
            )
        compiled = {**self._compiled, "optimizer": optimizer, "steps_per_execution": 1}
        copy.compile(**compiled)
        return copy


# The data.


def _rows(data, rows):
    return tf.nest.map_structure(lambda a: None if a is None else a[rows], data)


def _examples(data):
    sizes = {len(a) for a in tf.nest.flatten(data) if a is not None}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have the same number of examples, at least 1. "
            f"Received: {sorted(sizes)}."
        )
    return sizes.pop()


def _order(data, batch_size, updates):
    """The examples of each effective batch, by index: an array of `(updates, batch_size)`."""
    examples = _examples(data)
    size = examples
    if batch_size is not None:
        size = check_positive_int("batch_size", batch_size, "examples of an effective batch", "")
    if size > examples:
        raise ValueError(
            "`x` must have at least one effective batch. Received: "
            f"{examples} examples with batch_size={size}. Pass more data or a smaller batch_size."
        )
    batches = np.arange(examples // size * size).reshape(-1, size)
    return batches[np.arange(updates) % len(batches)]


def _quotient(difference, movement):
    if difference == 0:
        return 0.0
    return difference / movement if movement else float("inf")
