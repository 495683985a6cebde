"""check_equivalence: does a model that accumulates train as on the large batch, and if not, why?"""

from collections.abc import Callable
from typing import Any

import keras

from gradient_accumulator_tf._checks import check_number, check_positive_int
from gradient_accumulator_tf.equivalence.causes import causes_of, repeated_rows
from gradient_accumulator_tf.equivalence.copies import check_model
from gradient_accumulator_tf.equivalence.data import effective_batches
from gradient_accumulator_tf.equivalence.report import EquivalenceReport
from gradient_accumulator_tf.equivalence.trials import Trials
from gradient_accumulator_tf.equivalence.ways import Way


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
    """Compares training with accumulation to training on large batches, for a model of yours.

    Copies of the model are trained; the model itself is not touched. All copies start from its
    weights, optimizer state and random states, and see the same examples:

    1. One copy makes `updates` updates on large batches of `batch_size` examples.
    2. One copy makes the same updates on the same large batches, with the examples of each in
       another order. It shows what rounding alone does.
    3. One copy accumulates. If it ends elsewhere than the first, further copies are trained to find
       out why.

    The copy that accumulates depends on the model:

    - A `GradientAccumulateModel`, or a model that was compiled with a
      `GradientAccumulateOptimizer`, is checked as it is. Leave `micro_batch_size` and
      `accum_steps` out.
    - Any other model is put into a `GradientAccumulateModel` with the one of the two that you pass.
    - A model that overrides a training method, such as `train_step`, gets a
      `GradientAccumulateOptimizer` instead. Pass `accum_steps`.

    A variable is equivalent if its distance from the large batch's value is at most `tolerance`
    times the distance that the large batch moved it, or at most three times the distance that the
    other order makes. Distances are L2 norms. In float32, after a few updates, equal variables
    differ by about 1e-6 of their movement, and others by 1e-2 to 1.

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
        model: A compiled and built Keras model that was made outside of any strategy. It is copied
            through its config. Or a function of no arguments that returns such a model, for models
            without a config, such as a subclassed one without `get_config`.
        x: Inputs: an array or tensor of shape `(examples, ...)`, of numbers or strings, or a
            nested structure of such. Or a `tf.data.Dataset` of batches, as for `fit`. Its examples
            are put together, as many as are needed, and cut into effective batches of
            `batch_size`, whatever the size of its own batches.
        y: Targets, in the same form. None (default) for a dataset, or a model that takes none.
        micro_batch_size: Integer >= 1, examples per micro-batch.
        accum_steps: Integer >= 1, micro-batches per update; must divide `batch_size`.
        sample_weight: Optional weights, as for `fit`.
        batch_size: Integer >= 1, examples of an effective batch. None (default) takes all of `x`,
            and must not be combined with a dataset that has no end.
        updates: Integer >= 1, the number of updates. If they need more examples than there are,
            they begin again with the first.
        tolerance: Number > 0, the largest distance, relative to the movement.
        verbose: 1 (default) prints the report, 0 does not.

    Returns:
        An `EquivalenceReport`: `report.equivalent` for a test to assert on, `report.variables`
        with the distances, and `report.causes`.

    Raises:
        TypeError: If `model` is not a Keras model, if a count is not an integer, or if `x` is
            neither arrays nor a dataset (a generator, a `keras.utils.PyDataset`).
        ValueError: If the model is not compiled, not built, or cannot be copied; if not exactly one
            way to accumulate is given; if an effective batch is a single micro-batch, so that
            nothing is accumulated; or if the sizes do not fit each other.
    """
    make = None
    if callable(model) and not isinstance(model, keras.Model):
        make = model
        model = make()
    check_model(model)
    updates = check_positive_int(
        "updates", updates, "updates to make", "Pass updates=1 for the first one alone."
    )
    tolerance = check_number("tolerance", tolerance, "Pass for example tolerance=1e-3.")
    way = Way(model, make, micro_batch_size, accum_steps)
    data, order = effective_batches(x, y, sample_weight, batch_size, updates)
    trials = Trials(model, way, data, order, tolerance)
    accumulated = trials.accumulated()
    if not trials.reference.is_met_by(accumulated):
        trials.add_repeated_rows()
    variables = trials.reference.differences(accumulated)
    equivalent = all(v.within for v in variables)
    if not equivalent:
        causes = causes_of(trials.evidence(), trials.is_equal_if_coupled)
    else:
        causes = (repeated_rows(trials.repeated_rows),) if trials.repeated_rows else ()
    setting = way.setting(order.shape[1], updates, bool(trials.repeated_rows))
    report = EquivalenceReport(equivalent, variables, causes, setting)
    if verbose:
        print(report)
    return report
