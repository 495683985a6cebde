"""Lasting changes to Keras's classes: made twice they are made once."""

import functools
import importlib
import types

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from gradient_accumulator_tf._keras import patches
from gradient_accumulator_tf._keras.patches.replaced import replace_function
from gradient_accumulator_tf.optimizers.cycle import cycle_of, cycle_of_model
from gradient_accumulator_tf.replicated.replicas import check_strategy, prepare_fit
from tests.oracle import dense_model, mirrored, regression_data


def _owner():
    def double(value, plus=0):
        """Doubles."""
        return 2 * value + plus

    return types.SimpleNamespace(double=double)


def _one_more(original, value, **kwargs):
    return original(value, **kwargs) + 1


@pytest.mark.fast
def test_a_function_is_replaced_once():
    owner = _owner()
    original = owner.double
    for _ in range(3):
        replace_function(owner, "double", _one_more)
        assert owner.double(3, plus=10) == 17
        assert owner.double.__wrapped__ is original
        assert owner.double.__doc__ == "Doubles."


def test_the_last_replacement_counts():
    owner = _owner()
    replace_function(owner, "double", _one_more)
    replace_function(owner, "double", lambda original, value: original(value) + 100)
    assert owner.double(1) == 102


@pytest.mark.fast
def test_what_others_put_around_a_replacement_stays():
    owner = _owner()
    replace_function(owner, "double", _one_more)
    ours = owner.double

    @functools.wraps(ours)
    def theirs(value):
        return -ours(value)

    owner.double = theirs
    replace_function(owner, "double", lambda original, value: original(value))
    assert owner.double(3) == -7


def _functions():
    """The functions of Keras that are replaced, with a way to name them."""
    from keras.src.backend.tensorflow import trainer

    scaler = keras.optimizers.LossScaleOptimizer
    names = ["build", "apply", "save_own_variables", "load_own_variables"]
    found = {f"scaler.{name}": vars(scaler)[name] for name in names}
    for name in ("compile", "fit", "set_weights", "make_train_function"):
        found[f"model.{name}"] = getattr(keras.Model, name)
    found["build"] = trainer.TensorFlowTrainer._maybe_symbolic_build
    found["reduce"] = trainer.reduce_per_replica
    return found


def _patch():
    patches.mend_fit_on_several_workers()
    patches.route_loss_scaling(GradientAccumulateOptimizer, cycle_of)
    patches.hook_into_models(keras.Model, cycle_of_model)


@pytest.fixture
def keras_trainer(monkeypatch):
    """Keras's trainer, which is as before when the test ends."""
    from keras.src.backend.tensorflow import trainer

    reduce, build = trainer.reduce_per_replica, trainer.TensorFlowTrainer._maybe_symbolic_build
    monkeypatch.setattr(trainer, "reduce_per_replica", reduce)
    monkeypatch.setattr(trainer.TensorFlowTrainer, "_maybe_symbolic_build", build)
    return trainer


@pytest.mark.parametrize("again", ["call", "reload"])
def test_every_change_made_twice_is_made_once(keras_trainer, again):
    _patch()
    originals = {name: function.__wrapped__ for name, function in _functions().items()}
    (_patch if again == "call" else _reload_and_patch)()
    for name, function in _functions().items():
        assert function.__wrapped__ is originals[name]


def _reload_and_patch():
    from gradient_accumulator_tf._keras.patches import (
        loss_scaling,
        model_hooks,
        replaced,
        several_workers,
    )

    for module in (replaced, loss_scaling, model_hooks, several_workers):
        importlib.reload(module)
    several_workers.mend_fit_on_several_workers()
    loss_scaling.route_loss_scaling(GradientAccumulateOptimizer, cycle_of)
    model_hooks.hook_into_models(keras.Model, cycle_of_model)


def test_a_model_that_is_hooked_into_twice_warns_once():
    _patch()
    model = dense_model()
    model.compile(GradientAccumulateOptimizer("sgd", 2), "mse")
    x, y, _ = regression_data(4)
    model.train_on_batch(x, y)
    with pytest.warns(UserWarning, match="`set_weights` in mid-cycle") as warned:
        model.set_weights(model.get_weights())
    assert len(warned) == 1


@pytest.mark.fast
def test_a_loss_scale_that_is_routed_twice_acts_once_per_update():
    _patch()
    variable = keras.Variable(1.0)
    inner = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 2)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    for _ in range(2):
        scaler.apply([tf.constant(4.0)], [variable])
    assert (float(variable), int(inner.iterations), scaler.accum_steps) == (0.0, 1, 2)


def test_a_check_of_the_strategy_changes_nothing(keras_trainer):
    before = keras_trainer.reduce_per_replica
    for strategy in (tf.distribute.get_strategy(), mirrored()):
        with strategy.scope():
            check_strategy()
            prepare_fit()
    assert keras_trainer.reduce_per_replica is before
