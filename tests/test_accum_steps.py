"""`accum_steps` that changes: by a schedule, and by hand between fits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AccumBatchNorm,
    AccumStepsSchedule,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    PiecewiseConstantSteps,
)
from tests.oracle import (
    ACROSS_STEPS,
    EXECUTIONS,
    dense_model,
    difference,
    mirrored,
    regression_data,
    state_of,
    updates_of,
)

MICRO = 4
# Of {0: 2, 1: 1, 3: 3}: six updates on 14 micro-batches, the last one on a partial cycle.
STEPS = {0: 2, 1: 1, 3: 3}
CYCLES = [2, 1, 1, 3, 3, 2]
EXAMPLES = MICRO * sum(CYCLES[:-1]) + MICRO + 1


@keras.saving.register_keras_serializable(package="test")
class Growing(AccumStepsSchedule):
    """The same steps as `STEPS`, computed."""

    def __init__(self, later=3):
        self.later = later

    def __call__(self, update):
        first = keras.ops.where(keras.ops.equal(update, 0), 2, 1)
        return keras.ops.where(update >= 3, self.later, first)

    def get_config(self):
        return {"later": self.later}


@keras.saving.register_keras_serializable(package="test")
def growing(update):
    if update == 0:
        return 2
    return 1 if update < 3 else 3


SCHEDULES = {"mapping": STEPS, "class": Growing(), "function": growing}


def _sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def _accumulated(way, accum_steps, make_model=dense_model, **compile_with):
    if way == "accum_steps":
        model = GradientAccumulateModel(model=make_model(), accum_steps=accum_steps)
        model.compile(_sgd(), "mse", **compile_with)
    else:
        model = make_model()
        model.compile(GradientAccumulateOptimizer(_sgd(), accum_steps), "mse", **compile_with)
    return model


def _large(cycles, examples, micro=MICRO, make_model=dense_model):
    """The plain model after one update for each number of micro-batches in `cycles`."""
    x, y, _ = regression_data(examples)
    model, start = make_model(), 0
    model.compile(_sgd(), "mse")
    for steps in cycles:
        end = min(start + steps * micro, examples)
        model.train_on_batch(x[start:end], y[start:end])
        start = end
    assert start == examples
    return model


def _fit(model, examples, batch_size=MICRO, **kwargs):
    x, y, _ = regression_data(examples)
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, **kwargs)


def _traces(model):
    """How often the training step was traced; None in eager mode."""
    count = getattr(model.train_function, "experimental_get_tracing_count", None)
    return count and count()


def test_a_schedule_checked_by_hand():
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), {0: 1, 2: 3})
    seen = []
    for gradient in (1.0, 2.0, 3.0, 3.0, 6.0, 4.0):
        optimizer.apply([tf.constant(gradient)], [variable])
        numbers = optimizer.steps_in_cycle, optimizer.micro_step, optimizer.iterations, variable
        seen.append(tuple(float(v.numpy()) for v in numbers))
    assert seen == [
        (1, 0, 1, -1),
        (1, 0, 2, -3),
        (3, 1, 2, -3),
        (3, 2, 2, -3),
        (3, 0, 3, -7),  # the mean of 3, 3 and 6
        (3, 1, 3, -7),
    ]


@pytest.mark.parametrize(
    "kind, execution",
    [*(("mapping", e) for e in EXECUTIONS), ("class", "jit"), ("function", "graph")],
    indirect=["execution"],
)
def test_the_model_follows_a_schedule_as_large_batches_would(kind, execution):
    model = _accumulated("accum_steps", SCHEDULES[kind], **execution)
    _fit(model, EXAMPLES)
    assert updates_of(model.optimizer) == len(CYCLES)
    large = _large(CYCLES, EXAMPLES)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6
    constant = _accumulated("accum_steps", 2, **execution)
    _fit(constant, EXAMPLES)
    assert difference(constant.get_weights(), large.get_weights()) > 1e-3


@pytest.mark.parametrize(
    "kind, execution",
    [("function", "graph"), ("function", "jit"), ("class", "steps_per_execution")],
    indirect=["execution"],
)
def test_the_optimizer_follows_a_schedule_as_large_batches_would(kind, execution):
    examples = MICRO * sum(CYCLES)
    model = _accumulated("optimizer", SCHEDULES[kind], **execution)
    _fit(model, examples)
    assert updates_of(model.optimizer) == len(CYCLES)
    assert difference(model.get_weights(), _large(CYCLES, examples).get_weights()) < 1e-6


@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_a_schedule_on_replicas(way):
    examples = MICRO * sum(CYCLES)
    with mirrored().scope():
        model = _accumulated(way, STEPS)
    _fit(model, examples)
    assert difference(model.get_weights(), _large(CYCLES, examples).get_weights()) < 1e-6


def test_a_schedule_that_starts_with_one_is_exact_for_unequal_batches():
    # With the number 1 no sums are kept, and the step is the plain model's.
    model = _accumulated("accum_steps", {0: 1, 1: 2})
    _fit(model, 3 * MICRO - 1)
    large = _large([1, 2], 3 * MICRO - 1)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_changed_between_fits_without_a_new_trace(way, graph_or_jit):
    model = _accumulated(way, 3, **graph_or_jit)
    traces = []
    for accum_steps in (3, 2, 6, 1):
        model.optimizer.accum_steps = accum_steps
        assert model.optimizer.accum_steps == accum_steps
        _fit(model, 6 * MICRO)
        traces.append(_traces(model))
    assert len(set(traces)) == 1
    assert updates_of(model.optimizer) == 2 + 3 + 1 + 6
    large = dense_model()
    large.compile(_sgd(), "mse")
    for accum_steps in (3, 2, 6, 1):
        _fit(large, 6 * MICRO, batch_size=accum_steps * MICRO)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


def test_set_on_the_model_it_is_the_optimizers():
    model = _accumulated("accum_steps", 3)
    model.accum_steps = 2
    assert (model.accum_steps, model.optimizer.accum_steps) == (2, 2)
    model.optimizer.accum_steps = 6
    assert model.accum_steps == 6
    _fit(model, 6 * MICRO)
    assert updates_of(model.optimizer) == 1
    model.compile(_sgd(), "mse")  # a new optimizer takes it over
    assert model.optimizer.accum_steps == 6
    assert GradientAccumulateModel.from_config(model.get_config()).accum_steps == 6
    before = GradientAccumulateModel(model=dense_model(), accum_steps=3)
    before.accum_steps = {0: 1}
    before.compile("sgd", "mse")
    assert before.optimizer.accum_steps.steps == {0: 1}


def test_set_through_a_loss_scale():
    model = _accumulated("accum_steps", 3)
    model.compile(keras.optimizers.LossScaleOptimizer(_sgd()), "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.optimizer.accum_steps = 6
    assert model.accum_steps == model.optimizer.accum_steps == 6
    _fit(model, 6 * MICRO)
    assert updates_of(model.optimizer) == 1
    other = keras.optimizers.LossScaleOptimizer(_sgd())
    assert not hasattr(other, "accum_steps")
    with pytest.raises(AttributeError, match=r"accum_steps=2 .* around SGD\. Wrap SGD in a"):
        other.accum_steps = 2


def test_set_in_mid_cycle_it_holds_from_the_next_cycle_on():
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 3)
    step = tf.function(lambda g: optimizer.apply([g], [variable]))
    optimizer.build([variable])
    seen = []
    for i, gradient in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]):
        if i == 1:
            optimizer.accum_steps = 1
        if i == 4:
            optimizer.accum_steps = 2
        step(tf.constant(gradient))
        seen.append(float(variable.numpy()))
    assert seen == [0, 0, -2, -6, -6, -11.5]
    assert step.experimental_get_tracing_count() == 1


def test_set_by_a_callback_within_a_fit():
    class Set(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                self.model.optimizer.accum_steps = 3

    model = _accumulated("optimizer", 2)
    # Batches 0 and 1, then 2 and 3 (the cycle that had begun), then three at a time.
    _fit(model, 10 * MICRO, callbacks=[Set()])
    large = _large([2, 2, 3, 3], 10 * MICRO)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


def test_set_on_replicas():
    with mirrored().scope():
        model = _accumulated("accum_steps", 2)
    _fit(model, 4 * MICRO)
    model.accum_steps = 4
    _fit(model, 4 * MICRO)
    large = dense_model()
    large.compile(_sgd(), "mse")
    _fit(large, 4 * MICRO, batch_size=2 * MICRO)
    _fit(large, 4 * MICRO, batch_size=4 * MICRO)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


def test_batch_normalisation_follows_the_cycles():
    def make_model():
        keras.utils.set_random_seed(1)
        norm = AccumBatchNorm(accum_steps=1, momentum=0.5, center=False, scale=False)
        return keras.Sequential([keras.Input((5,)), norm, keras.layers.Dense(1)])

    model = _accumulated("accum_steps", STEPS, make_model)
    _fit(model, MICRO * sum(CYCLES))
    x, _, _ = regression_data(MICRO * sum(CYCLES))
    mean, variance, start = np.zeros(5), np.ones(5), 0
    for steps in CYCLES:
        batch = x[start : start + steps * MICRO]
        mean, variance = (mean + batch.mean(0)) / 2, (variance + batch.var(0)) / 2
        start += len(batch)
    statistics = state_of(model.layers[0].non_trainable_variables)
    assert difference(statistics, [mean, variance]) < 1e-6


def _keras_file(model, make, folder):
    del make
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def _weights_file(model, make, folder):
    model.save_weights(folder / "model.weights.h5")
    new = make()
    new.optimizer.build(new.trainable_variables)
    new.load_weights(folder / "model.weights.h5")
    return new


def _weights_file_before_build(model, make, folder):
    model.save_weights(folder / "model.weights.h5")
    new = make()
    new.load_weights(folder / "model.weights.h5")
    return new


def _checkpoint(model, make, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "ckpt")
    new = make()
    new.optimizer.build(new.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=new, optimizer=new.optimizer)
    checkpoint.restore(path).assert_consumed()
    return new


SAVINGS = [_keras_file, _weights_file, _weights_file_before_build, _checkpoint]


def _steps(model, first, last):
    x, y, _ = regression_data(10 * MICRO)
    for start in range(first * MICRO, last * MICRO, MICRO):
        model.train_on_batch(x[start : start + MICRO], y[start : start + MICRO])


@pytest.mark.parametrize(
    "save, way, stopped_after",
    [
        *((save, "optimizer", 6) for save in SAVINGS),
        (_keras_file, "accum_steps", 6),
        (_checkpoint, "accum_steps", 6),
        (_keras_file, "optimizer", 4),  # between two cycles
        (_weights_file, "accum_steps", 4),
    ],
)
def test_a_schedule_goes_on_after_saving(save, way, stopped_after, tmp_path):
    def make():
        return _accumulated(way, Growing())

    undisturbed = make()
    _steps(undisturbed, 0, 10)
    model = make()
    _steps(model, 0, stopped_after)
    resumed = save(model, make, tmp_path)
    _steps(resumed, stopped_after, 10)
    assert updates_of(resumed.optimizer) == 5
    assert difference(resumed.get_weights(), undisturbed.get_weights()) == 0.0
    assert resumed.optimizer.accum_steps.get_config() == {"later": 3}


@pytest.mark.parametrize("save", SAVINGS)
def test_what_was_set_is_saved(save, tmp_path):
    def make():
        return _accumulated("optimizer", 4)

    model = make()
    _steps(model, 0, 5)
    model.optimizer.accum_steps = 2  # in mid-cycle: this one keeps its 4
    resumed = save(model, make, tmp_path)
    _steps(model, 5, 10)
    _steps(resumed, 5, 10)
    assert resumed.optimizer.accum_steps == 2
    assert updates_of(resumed.optimizer) == updates_of(model.optimizer) == 3
    assert difference(resumed.get_weights(), model.get_weights()) == 0.0
    # Also between cycles, and when it is saved again.
    again = save(resumed, make, tmp_path)
    assert again.optimizer.accum_steps == 2


def test_a_schedule_in_a_dict_survives_json():
    schedule = PiecewiseConstantSteps({1000: 4, 0: 1})
    config = keras.saving.serialize_keras_object(schedule)
    assert keras.saving.deserialize_keras_object(config).steps == {0: 1, 1000: 4}
    model = GradientAccumulateModel(model=dense_model(), accum_steps=STEPS)
    model.compile("sgd", "mse")
    clone = keras.models.model_from_json(model.to_json())
    clone.compile_from_config(model.get_compile_config())
    assert clone.accum_steps.steps == clone.optimizer.accum_steps.steps == STEPS


@pytest.mark.parametrize(
    "steps, error, message",
    [
        ([1, 2], TypeError, r"Received: \[1, 2\]\. Pass for example \{0: 1"),
        ([(0, 1, 2)], TypeError, r"Received: \[\(0, 1, 2\)\]"),
        ("ab", TypeError, "Received: 'ab'"),
        ([[[0], 1]], TypeError, r"the update \(0,\) \(of type tuple\)"),
        ([[0, 1], [0, 2]], ValueError, r"each update once\. Received: \[\[0, 1\], \[0, 2\]\]"),
    ],
    ids=str,
)
def test_bad_phases(steps, error, message):
    with pytest.raises(error, match=message):
        PiecewiseConstantSteps(steps)
    assert PiecewiseConstantSteps([[0, 1], [5, 2]]).steps == {0: 1, 5: 2}


def test_an_optimizer_with_the_same_schedule_is_used_as_it_is():
    model = GradientAccumulateModel(model=dense_model(), accum_steps=STEPS)
    optimizer = GradientAccumulateOptimizer("sgd", dict(STEPS))
    model.compile(optimizer, "mse")
    assert model.optimizer is optimizer
    with pytest.raises(ValueError, match="must not do it as well"):
        model.compile(GradientAccumulateOptimizer("sgd", {0: 2}), "mse")


# On lines of their own, where AutoGraph finds their source.
no_conversion = lambda update: {}[int(update)]  # noqa: E731
turns_zero = lambda update: 4 - update // 10  # noqa: E731


@pytest.mark.parametrize(
    "value, error, message",
    [
        ({}, ValueError, r"begin with update 0. Received: accum_steps=\{\}"),
        ({1: 4}, ValueError, r"begin with update 0. Received: accum_steps=\{1: 4\}"),
        ({0: 2, -5: 4}, ValueError, "Received: accum_steps={0: 2, -5: 4}"),
        ({0: 0}, ValueError, r"update 0 on\). Received: accum_steps\[0\]=0. Pass \{0: 1\}"),
        ({0: 1, 10: 2.5}, TypeError, r"update 10 on\). Received: accum_steps\[10\]=2.5"),
        ({0: 1, "10": 2}, TypeError, "the update '10' .of type str"),
        (lambda update: 2.0, TypeError, "of dtype float32 and shape .*Cast it to an integer"),
        (lambda update: [1, 2], TypeError, r"of dtype int32 and shape \(2,\)"),
        (turns_zero, ValueError, "returned -6 for update 100"),
        (no_conversion, TypeError, "raised .* keras.ops"),
        (Growing, TypeError, "the class Growing. Pass an instance"),
        (AccumStepsSchedule(), TypeError, "must define `__call__"),
    ],
    ids=str,
)
def test_bad_schedules_are_refused_where_they_are_given(value, error, message):
    with pytest.raises(error, match=message):
        GradientAccumulateOptimizer("sgd", value)
    with pytest.raises(error, match=message):
        GradientAccumulateModel(model=dense_model(), accum_steps=value)


@pytest.mark.parametrize("value, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_values_are_refused_where_they_are_set(value, error):
    model = _accumulated("accum_steps", 2)
    for owner in (model, model.optimizer):
        with pytest.raises(error, match=rf"integer >= 1.*accum_steps={value!r}"):
            owner.accum_steps = value
    assert model.accum_steps == 2


def test_a_schedule_is_for_the_constructor():
    for before, after in ((2, {0: 1}), (2, growing), (STEPS, 4)):
        optimizer = GradientAccumulateOptimizer("sgd", before)
        with pytest.raises(TypeError, match=r"a schedule is for the constructor\. Received: accum"):
            optimizer.accum_steps = after


@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_one_can_be_raised_later(way, graph_or_jit):
    model = _accumulated(way, 1, **graph_or_jit)
    _fit(model, 2 * MICRO)
    assert model.optimizer.variables == model.optimizer.inner_optimizer.variables  # no sums
    model.optimizer.accum_steps = 2
    _fit(model, 4 * MICRO)
    model.optimizer.accum_steps = 1
    _fit(model, 2 * MICRO)
    large = dense_model()
    large.compile(_sgd(), "mse")
    _fit(large, 2 * MICRO)
    _fit(large, 4 * MICRO, batch_size=2 * MICRO)
    _fit(large, 2 * MICRO)
    assert updates_of(model.optimizer) == 2 + 2 + 2
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.parametrize("loss_scale", [False, True])
def test_one_can_be_raised_within_a_fit(loss_scale):
    class Raise(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.optimizer.accum_steps = 3
                assert self.model.optimizer.ended_in_update

    optimizer = GradientAccumulateOptimizer(_sgd(), 1)
    if loss_scale:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    model = dense_model()
    model.compile(optimizer, "mse")
    _fit(model, 9 * MICRO, callbacks=[Raise()])
    large = _large([1, 1, 3, 3, 1], 9 * MICRO)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


def test_one_can_be_raised_where_nothing_was_traced():
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 1)
    for gradient, steps in ((1.0, 2), (3.0, 2), (5.0, 2), (2.0, 3)):
        optimizer.apply([tf.constant(gradient)], [variable])
        optimizer.accum_steps = steps
    assert (float(variable), int(optimizer.micro_step)) == (-1 - 4, 1)


def test_one_cannot_be_raised_under_a_function_of_the_users_own():
    variable = keras.Variable(0.0)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), 1)
    optimizer.build([variable])
    tf.function(lambda g: optimizer.apply([g], [variable]))(tf.constant(1.0))
    with pytest.raises(ValueError, match=r"of your own calls.*accum_steps={0: 1, ...}"):
        optimizer.accum_steps = 2
    assert optimizer.accum_steps == 1
    # What the message says to do keeps the momentum.
    new = GradientAccumulateOptimizer(optimizer.inner_optimizer, 2)
    step = tf.function(lambda g: new.apply([g], [variable]))
    new.build([variable])
    for gradient in (1.0, 3.0):
        step(tf.constant(gradient))
    assert float(variable) == -1 - (0.5 + 2)


def test_set_with_a_micro_batch_size_it_has_no_meaning():
    model = GradientAccumulateModel(model=dense_model(), micro_batch_size=2)
    with pytest.raises(ValueError, match=r"Received: accum_steps=4\. Give fit another"):
        model.accum_steps = 4
    assert model.accum_steps is None
