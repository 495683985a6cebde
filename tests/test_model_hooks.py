"""What a plain model tells its optimizer: nothing that is held is lost or mixed up in silence."""

import inspect
import warnings

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import ACROSS_STEPS, MICRO, dense_model, difference, regression_data, updates_of


def _sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def _compiled(way, accum_steps=4, scaled=False):
    if way == "accum_steps":
        model = GradientAccumulateModel(model=dense_model(), accum_steps=accum_steps)
        model.compile(_sgd(), "mse")
    else:
        model, optimizer = dense_model(), GradientAccumulateOptimizer(_sgd(), accum_steps)
        model.compile(
            keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse"
        )
    return model


def _fit(model, micro_batches, **kwargs):
    x, y, _ = regression_data(micro_batches * MICRO)
    model.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0, **kwargs)


class Break(keras.callbacks.Callback):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def on_train_batch_end(self, batch, logs=None):
        if batch == 5:
            raise self.error


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


@pytest.mark.fast
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_a_fit_that_breaks_off_tells_what_is_held(way, error):
    model = _compiled(way)
    with (
        pytest.warns(UserWarning, match=r"`fit` broke off .* of 2 of 4 micro-batches are kept"),
        pytest.raises(type(error)),
    ):
        _fit(model, 8, callbacks=[Break(error)])
    model.optimizer.reset()  # as the warning says
    _fit(model, 4)
    expected = dense_model()
    expected.compile(_sgd(), "mse")
    for micro_batches in (8, 4):
        x, y, _ = regression_data(micro_batches * MICRO)
        expected.train_on_batch(x[: 4 * MICRO], y[: 4 * MICRO])
    assert updates_of(model.optimizer) == 2
    assert difference(model.get_weights(), expected.get_weights()) < 1e-6


def test_an_error_of_a_generator_tells_it_too():
    def batches():
        x, y, _ = regression_data(3 * MICRO)
        for start in range(0, 3 * MICRO, MICRO):
            yield x[start : start + MICRO], y[start : start + MICRO]
        raise RuntimeError("no more")

    model = _compiled("optimizer", scaled=True)
    with (
        pytest.warns(UserWarning, match="of 3 of 4 micro-batches"),
        pytest.raises(tf.errors.UnknownError, match="no more"),
    ):
        model.fit(batches(), steps_per_epoch=8, verbose=0, shuffle=False)


@pytest.mark.fast
def test_between_cycles_there_is_nothing_to_tell(no_warning):
    model = _compiled("optimizer", accum_steps=3)
    with pytest.raises(KeyboardInterrupt):
        _fit(model, 8, callbacks=[Break(KeyboardInterrupt())])
    model.set_weights(model.get_weights())
    model.compile("sgd", "mse")
    with pytest.raises(KeyboardInterrupt):
        _fit(model, 8, callbacks=[Break(KeyboardInterrupt())])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("again", ["same inner", "another", "plain"])
def test_a_plain_models_compile_tells_what_is_lost(again, scaled):
    model = _compiled("optimizer", scaled=scaled)
    x, y, _ = regression_data(MICRO)
    model.train_on_batch(x, y)
    before = model.optimizer
    new = {
        "same inner": lambda: GradientAccumulateOptimizer(_inner(before), 2),
        "another": lambda: GradientAccumulateOptimizer(_sgd(), 4),
        "plain": _sgd,
    }[again]()
    with pytest.warns(UserWarning, match="gradients of 1 of 4 micro-batches are lost"):
        model.compile(new, "mse")


def _inner(optimizer):
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def test_compiled_with_the_same_optimizer_nothing_is_lost(no_warning):
    model = _compiled("optimizer")
    x, y, _ = regression_data(MICRO)
    model.train_on_batch(x, y)
    model.compile(model.optimizer, "mse")
    assert int(model.optimizer.micro_step) == 1
    model.optimizer.flush()
    model.compile(_sgd(), "mse")


@pytest.mark.fast
@pytest.mark.parametrize("way", ACROSS_STEPS)
def test_weights_that_are_set_in_mid_cycle(way):
    model = _compiled(way)
    x, y, _ = regression_data(MICRO)
    model.train_on_batch(x, y)
    with pytest.warns(UserWarning, match=r"`set_weights` in mid-cycle .* 1 of 4 micro-batches"):
        model.set_weights(model.get_weights())
    model.optimizer.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.set_weights(model.get_weights())


def test_best_weights_are_restored_after_the_last_update(no_warning):
    model = _compiled("optimizer")
    early = keras.callbacks.EarlyStopping("loss", patience=0, restore_best_weights=True)
    _fit(model, 6, epochs=2, callbacks=[early])


def test_other_models_are_left_alone(no_warning):
    model = dense_model()
    model.compile(_sgd(), "mse")
    with pytest.raises(KeyboardInterrupt):
        _fit(model, 8, callbacks=[Break(KeyboardInterrupt())])
    model.set_weights(model.get_weights())
    model.compile("adam", "mse")
    assert "optimizer" in inspect.signature(keras.Model.compile).parameters
    assert "validation_data" in inspect.signature(keras.Model.fit).parameters
    assert keras.Sequential.fit is keras.Model.fit
