"""check_equivalence: does a model that accumulates train as on the large batch, and if not, why?"""

from collections.abc import Callable
from typing import Any

import keras

from gradient_accumulator_tf._checks import check_number, check_positive_int
from gradient_accumulator_tf.equivalence.causes import causes_of
from gradient_accumulator_tf.equivalence.data import effective_batches
from gradient_accumulator_tf.equivalence.report import EquivalenceReport
from gradient_accumulator_tf.equivalence.trials import Trials
from gradient_accumulator_tf.equivalence.ways import Way, check_model


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
    tolerance = check_number("tolerance", tolerance, "Pass for example tolerance=1e-3.")
    way = Way(model, make, micro_batch_size, accum_steps)
    data, order = effective_batches(x, y, sample_weight, batch_size, updates)
    trials = Trials(model, way, data, order, tolerance)
    variables = trials.reference.differences(trials.accumulated())
    equivalent = all(v.within for v in variables)
    causes = () if equivalent else causes_of(trials.evidence())
    report = EquivalenceReport(equivalent, variables, causes, way.setting(order.shape[1], updates))
    if verbose:
        print(report)
    return report
