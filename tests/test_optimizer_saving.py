"""State is saved whole: in mid-cycle, between cycles, and from and to the plain optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer
from tests.oracle import dense_model, difference, regression_data, state_of


def _compiled(accum_steps=4, seed=1):
    model = dense_model(seed=seed)
    model.compile(GradientAccumulateOptimizer(keras.optimizers.Adam(0.02), accum_steps), "mse")
    return model


def _micro_steps(model, start, stop, size=4):
    x, y, _ = regression_data(64)
    for k in range(start, stop):
        model.train_on_batch(x[k * size : (k + 1) * size], y[k * size : (k + 1) * size])


@pytest.fixture
def undisturbed():
    model = _compiled()
    _micro_steps(model, 0, 12)
    return model.get_weights()


def _keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def _weights_file(model, folder):
    model.save_weights(folder / "model.weights.h5")
    new = _compiled(seed=2)
    new.optimizer.build(new.trainable_variables)
    new.load_weights(folder / "model.weights.h5")
    return new


def _weights_file_into_unbuilt_optimizer(model, folder):
    model.save_weights(folder / "model.weights.h5")
    new = _compiled(seed=2)
    new.load_weights(folder / "model.weights.h5")
    return new


def _checkpoint(model, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "ckpt")
    new = _compiled(seed=2)
    new.optimizer.build(new.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=new, optimizer=new.optimizer)
    checkpoint.restore(path).assert_consumed()
    return new


def _checkpoint_into_unbuilt_optimizer(model, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "ckpt")
    new = _compiled(seed=2)
    tf.train.Checkpoint(model=new, optimizer=new.optimizer).restore(path)
    return new


def _arrays(model, folder):
    del folder
    new = _compiled(seed=2)
    new.set_weights(model.get_weights())
    new.optimizer.build(new.trainable_variables)
    new.optimizer.set_weights(state_of(model.optimizer.variables))
    return new


@pytest.mark.parametrize("stopped_after", [4, 6], ids=["between_cycles", "mid_cycle"])
@pytest.mark.parametrize(
    "copy",
    [
        _keras_file,
        _weights_file,
        _weights_file_into_unbuilt_optimizer,
        _checkpoint,
        _checkpoint_into_unbuilt_optimizer,
        _arrays,
    ],
)
def test_resumes_as_if_it_had_not_stopped(copy, stopped_after, undisturbed, tmp_path):
    model = _compiled()
    _micro_steps(model, 0, stopped_after)
    resumed = copy(model, tmp_path)
    assert isinstance(resumed.optimizer, GradientAccumulateOptimizer)
    _micro_steps(resumed, stopped_after, 12)
    assert difference(resumed.get_weights(), undisturbed) == 0.0
    assert int(resumed.optimizer.iterations.numpy()) == 3


def test_what_a_resumed_cycle_would_lose_without_its_state(undisturbed):
    model = _compiled()
    _micro_steps(model, 0, 6)
    model.optimizer.reset()
    _micro_steps(model, 6, 12)
    assert difference(model.get_weights(), undisturbed) > 1e-4


@pytest.mark.fast
def test_two_optimizers_share_files_between_cycles(tmp_path):
    plain = dense_model()
    plain.compile(keras.optimizers.Adam(0.02), "mse")
    _micro_steps(plain, 0, 2, size=16)
    plain.save_weights(tmp_path / "plain.weights.h5")
    accumulated = _compiled(seed=2)
    accumulated.load_weights(tmp_path / "plain.weights.h5")
    accumulated.optimizer.build(accumulated.trainable_variables)
    expected = state_of(plain.optimizer.variables)
    assert difference(state_of(accumulated.optimizer.inner_optimizer.variables), expected) == 0.0

    _micro_steps(accumulated, 8, 12)
    accumulated.save_weights(tmp_path / "accumulated.weights.h5")
    plain.load_weights(tmp_path / "accumulated.weights.h5")
    expected = state_of(accumulated.optimizer.inner_optimizer.variables)
    assert difference(state_of(plain.optimizer.variables), expected) == 0.0
    assert int(plain.optimizer.iterations.numpy()) == 3


@pytest.mark.fast
def test_loading_a_file_of_complete_cycles_empties_the_accumulators(tmp_path):
    model = _compiled()
    _micro_steps(model, 0, 4)
    model.save_weights(tmp_path / "complete.weights.h5")
    _micro_steps(model, 4, 6)
    model.load_weights(tmp_path / "complete.weights.h5")
    assert int(model.optimizer.micro_step.numpy()) == 0
    state = model.optimizer._accumulator.state.values()
    assert all(np.all(v.numpy() == 0) for v in state)


def test_the_file_holds_the_inner_state_once(tmp_path):
    import h5py

    model = _compiled()
    _micro_steps(model, 0, 4)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        names = []
        file["optimizer"].visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    assert len(names) == len(model.optimizer.inner_optimizer.variables)


@pytest.mark.fast
def test_mid_cycle_under_a_loss_scale(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        trained, resumed = _compiled(), _compiled()
        _micro_steps(trained, 0, 12)
        _micro_steps(resumed, 0, 6)
        resumed = _keras_file(resumed, tmp_path)
        _micro_steps(resumed, 6, 12)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(resumed.optimizer, keras.optimizers.LossScaleOptimizer)
    assert difference(resumed.get_weights(), trained.get_weights()) == 0.0


def test_summary_counts_the_optimizer(capsys):
    model = _compiled()
    _micro_steps(model, 0, 1)
    model.summary()
    assert "Optimizer params" in capsys.readouterr().out
