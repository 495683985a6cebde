"""Keras's callbacks do what they do with the large batch, and `ThroughputLogger` counts right."""

import csv
import math
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    ThroughputLogger,
)
from tests.oracle import (
    ACROSS_STEPS,
    EFFECTIVE,
    KERAS,
    MICRO,
    WAYS,
    dense_model,
    difference,
    in_way,
    mirrored,
    regression_data,
    updates_of,
)

STEPS = EFFECTIVE // MICRO
EPOCHS = 6


def make(way, optimizer, model=None, **compile_with):
    """A compiled model of a way, or of the plain large batch, and its batch size for `fit`."""
    model, optimizer, batch_size = in_way(way, model or dense_model(), optimizer)
    model.compile(optimizer, "mse", **compile_with)
    return model, batch_size


def sgd(**kwargs):
    return keras.optimizers.SGD(0.05, momentum=0.9, **kwargs)


class Run:
    """A training with callbacks: its model and its history."""

    def __init__(self, way, *callbacks, optimizer=sgd, data=None, epochs=EPOCHS, **fit):
        self.model, batch_size = make(way, optimizer())
        x, y = data or regression_data(48)[:2]
        x_val, y_val, _ = regression_data(16, seed=5)
        fit = {"validation_data": (x_val, y_val), "shuffle": False, "verbose": 0, **fit}
        self.history = self.model.fit(
            x, y, batch_size=batch_size, epochs=epochs, callbacks=list(callbacks), **fit
        ).history


def assert_all_same(make_callback, **kwargs):
    """Trains the large batch and all ways with the callback; returns the large batch's run."""
    plain = Run("plain", make_callback(), **kwargs)
    for way in WAYS:
        run = Run(way, make_callback(), **kwargs)
        assert difference(run.model.get_weights(), plain.model.get_weights()) <= 2e-6, way
        assert list(run.history) == list(plain.history)
        for name, values in plain.history.items():
            np.testing.assert_allclose(run.history[name], values, 2e-6, 2e-6, err_msg=way + name)
    return plain


def test_learning_rate_scheduler():
    def halved(epoch, rate):
        return rate / 2 if epoch else rate

    run = assert_all_same(lambda: keras.callbacks.LearningRateScheduler(halved))
    np.testing.assert_allclose(run.history["learning_rate"], 0.05 / 2.0 ** np.arange(EPOCHS))
    assert difference(run.model.get_weights(), Run("plain").model.get_weights()) > 1e-3


def test_reduce_lr_on_plateau():
    run = assert_all_same(
        lambda: keras.callbacks.ReduceLROnPlateau(
            "val_loss", patience=1, min_delta=0.05, factor=0.1
        )
    )
    rates = run.history["learning_rate"]
    assert rates[0] > rates[-1] > 0


@pytest.mark.fast
def test_early_stopping_restores_the_best_weights():
    def diverging():
        return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.02, 4, 3.0))

    run = assert_all_same(
        lambda: keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        optimizer=diverging,
        epochs=12,
    )
    losses = run.history["val_loss"]
    assert 2 < len(losses) < 12
    assert losses[-1] > losses[-3]
    x, y, _ = regression_data(16, seed=5)
    np.testing.assert_allclose(run.model.evaluate(x, y, verbose=0), min(losses), rtol=1e-5)


def test_model_checkpoint_keeps_the_best_model_to_train_on(tmp_path):
    x, y, _ = regression_data(48)
    trained = {}
    for way in ("plain", *WAYS):
        path = tmp_path / f"{way}.keras"
        best = keras.callbacks.ModelCheckpoint(path, "val_loss", save_best_only=True)
        run = Run(way, best, epochs=2)
        loaded = keras.models.load_model(path)
        assert type(loaded) is type(run.model)
        assert type(loaded.optimizer) is type(run.model.optimizer)
        batch_size = MICRO if way in ACROSS_STEPS else EFFECTIVE
        loaded.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
        trained[way] = loaded.get_weights()
        assert difference(trained[way], trained["plain"]) < 2e-6, way
    assert difference(trained["plain"], run.model.get_weights()) > 1e-2


def test_model_checkpoint_every_few_batches(tmp_path):
    expected = None
    for way in ("plain", *WAYS):
        # In batches of fit, as Keras counts: here a saving for each update.
        every = STEPS if way in ACROSS_STEPS else 1
        folder = tmp_path / way
        path = str(folder / "{batch:02d}.weights.h5")
        save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True, save_freq=every)
        Run(way, save, epochs=1)
        saved = []
        for path in sorted(folder.iterdir()):
            model = dense_model(seed=3)
            model.compile(sgd(), "mse")
            model.optimizer.build(model.trainable_variables)
            model.load_weights(path)
            saved += model.get_weights()
        expected = expected or saved
        assert len(saved) == 4 * len(model.get_weights())
        assert difference(saved, expected) < 2e-6, way
    assert difference(saved[:4], saved[-4:]) > 1e-2


class Killed(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise KeyboardInterrupt


def test_backup_and_restore(tmp_path):
    # tests/test_resume.py has it in mid-cycle, and killed in earnest.
    expected = Run("plain").model.get_weights()
    for way in WAYS:
        with pytest.raises(KeyboardInterrupt):
            Run(way, keras.callbacks.BackupAndRestore(str(tmp_path)), Killed())
        run = Run(way, keras.callbacks.BackupAndRestore(str(tmp_path)))
        assert len(run.history["loss"]) == EPOCHS - 3
        assert updates_of(run.model.optimizer) == EPOCHS * 4
        assert difference(run.model.get_weights(), expected) < 2e-6, way


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swap_ema_weights(swap_on_epoch):
    def with_ema():
        return sgd(use_ema=True, ema_momentum=0.8)

    run = assert_all_same(
        lambda: keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch), optimizer=with_ema
    )
    without = Run("plain", optimizer=with_ema)
    assert np.max(np.abs(np.subtract(run.history["val_loss"], without.history["val_loss"]))) > 1e-3


def test_swap_ema_weights_under_a_loss_scale():
    swap, (x, y, _) = keras.callbacks.SwapEMAWeights(), regression_data(24)
    fit = {"validation_data": (x, y), "shuffle": False, "verbose": 0, "callbacks": [swap]}

    def losses(way, **ema):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model, batch_size = make(way, sgd(**ema))
        finally:
            keras.config.set_dtype_policy("float32")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.optimizer.initial_scale = 256.0
        return model.fit(x, y, batch_size=batch_size, **fit).history["val_loss"]

    plain = losses("plain", use_ema=True, ema_momentum=0.8)
    for way in WAYS:
        np.testing.assert_allclose(losses(way, use_ema=True, ema_momentum=0.8), plain, rtol=2e-3)
        with pytest.raises(ValueError, match="use_ema=True"):
            losses(way)


def scalars_of(folder):
    """Dict of (tag, step) to value of all event files in a folder."""
    found = {}
    for path in sorted(folder.rglob("events*")):
        for record in tf.compat.v1.train.summary_iterator(str(path)):
            for value in record.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found[path.parent.name, value.tag, record.step] = float(
                        tf.make_ndarray(value.tensor)
                    )
    return found


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_and_csv_logger(tmp_path):
    for way in ("plain", *WAYS):
        board = keras.callbacks.TensorBoard(
            tmp_path / way, histogram_freq=1, write_steps_per_second=True, update_freq=1
        )
        Run(way, board, keras.callbacks.CSVLogger(tmp_path / f"{way}.csv"), epochs=2)
    plain, plain_rows = scalars_of(tmp_path / "plain"), rows_of(tmp_path / "plain.csv")
    assert ("validation", "evaluation_loss_vs_iterations", 8) in plain
    for way in WAYS:
        scalars = scalars_of(tmp_path / way)
        # Steps too are those of the large batch: epochs, and updates in "vs_iterations".
        by_batch = [name for name in scalars if name[1] == "batch_loss"]
        assert len(by_batch) == (8 if way == "micro_batch_size" else 8 * STEPS)
        for name, value in plain.items():
            assert name in scalars, f"{way}: {name}"
            if "per_second" not in name[1] and "batch_" not in name[1]:
                np.testing.assert_allclose(scalars[name], value, rtol=1e-5, err_msg=str(name))
        rows = rows_of(tmp_path / f"{way}.csv")
        assert len(rows) == 2
        for row, expected in zip(rows, plain_rows, strict=True):
            assert list(row) == list(expected) == ["epoch", "loss", "val_loss"]
            for name, value in expected.items():
                np.testing.assert_allclose(float(row[name]), float(value), 2e-6, err_msg=way)


@pytest.mark.fast
def test_terminate_on_nan():
    x, y, _ = regression_data(48)
    y[2 * EFFECTIVE + MICRO] = np.nan  # in the third effective batch
    nan = keras.callbacks.TerminateOnNaN()
    for way in ("plain", *WAYS):
        run = Run(way, nan, data=(x, y), validation_data=None)
        assert len(run.history["loss"]) == 1, way
        assert math.isnan(run.history["loss"][0])
        assert updates_of(run.model.optimizer) == 3
        assert np.isnan(run.model.get_weights()[0]).all()


class Asks(keras.callbacks.Callback):
    """Notes what the wrapper answers after each batch, and the updates so far."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def on_train_batch_end(self, batch, logs=None):
        wrapper = self.model
        if not isinstance(wrapper, GradientAccumulateModel):
            wrapper = self.model.optimizer
        self.answers.append((wrapper.ended_in_update, updates_of(self.model.optimizer)))


def test_callbacks_can_ask_whether_a_batch_ended_in_an_update(way, execution):
    asks = Asks()
    model, batch_size = make(way, sgd(), **execution)
    x, y, _ = regression_data(5 * MICRO)
    fit = {"batch_size": batch_size, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=[asks], **fit)
    after_batches = {
        # Across epochs; within them, where the last two batches are a cycle of their own; always.
        "optimizer": [0, 0, 1, 1, 1, 2, 2, 2, 3, 3],
        "accum_steps": [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
        "micro_batch_size": [1, 2, 3, 4],
    }[way]
    ends = {
        "optimizer": [2, 5, 8],
        "accum_steps": [2, 7],
        "micro_batch_size": [0, 1, 2, 3],
    }[way]
    answers = [(i in ends, updates) for i, updates in enumerate(after_batches)]
    seen = execution.get("steps_per_execution", 1)
    if seen > 1:
        # Of several batches callbacks see the last, and an epoch's rest.
        half = len(answers) // 2
        places = [min(i + seen, half) - 1 for i in range(0, half, seen)]
        answers = [answers[i] for i in [*places, *(p + half for p in places)]]
    assert asks.answers == answers


def test_no_update_has_ended_before_the_first():
    model, _ = make("accum_steps", sgd())
    assert not model.ended_in_update
    assert not make("optimizer", sgd())[0].optimizer.ended_in_update


def throughput(model, batch_size, data, *callbacks, epochs=2, **fit):
    log = ThroughputLogger(batch_size)
    fit = {"shuffle": False, "verbose": 0, **fit}
    if isinstance(data, tuple):
        fit["batch_size"] = batch_size
        return model.fit(*data, epochs=epochs, callbacks=[log, *callbacks], **fit).history
    return model.fit(data, epochs=epochs, callbacks=[log, *callbacks], **fit).history


@pytest.mark.parametrize("way", ["plain", *WAYS])
@pytest.mark.parametrize("executed", [1, 3])
def test_throughput_counts(way, executed):
    model, batch_size = make(way, sgd(), steps_per_execution=executed)
    begin = time.perf_counter()
    logs = throughput(model, batch_size, regression_data(5 * EFFECTIVE)[:2], epochs=3)
    longest = time.perf_counter() - begin
    assert logs["effective_batch"] == [EFFECTIVE] * 3
    assert logs["dropped_micro_steps"] == [0] * 3
    ratio = np.divide(logs["examples_per_second"], logs["updates_per_second"])
    np.testing.assert_allclose(ratio, EFFECTIVE)
    # No epoch took longer than the fit, and together they took no longer.
    seconds = 5 / np.array(logs["updates_per_second"])
    assert 0 < sum(seconds) < longest


@pytest.mark.parametrize(
    ("way", "effective"),
    [
        # 5 batches, cycles of 3: in the optimizer a cycle goes on into the next epoch.
        ("optimizer", [EFFECTIVE, EFFECTIVE]),
        ("accum_steps", [5 * MICRO / 2] * 2),
    ],
)
@pytest.mark.parametrize("executed", [1, 3])
def test_throughput_of_partial_cycles_and_data_of_unknown_length(way, effective, executed):
    model, batch_size = make(way, sgd(), steps_per_execution=executed)
    data = tf.data.Dataset.from_tensor_slices(regression_data(5 * MICRO)[:2]).batch(batch_size)
    logs = throughput(model, batch_size, data)
    assert logs["effective_batch"] == effective
    per_update = np.divide(logs["examples_per_second"], logs["updates_per_second"])
    updates = [1, 2] if way == "optimizer" else [2, 2]
    np.testing.assert_allclose(per_update, 5 * MICRO / np.array(updates))


@pytest.mark.fast
def test_throughput_of_an_epoch_without_an_update():
    model, batch_size = make("optimizer", sgd())
    logs = throughput(model, batch_size, regression_data(2 * MICRO)[:2], epochs=2)
    assert logs["updates_per_second"][0] == 0.0
    assert math.isnan(logs["effective_batch"][0]) and logs["effective_batch"][1] == EFFECTIVE


def test_throughput_leaves_out_validation():
    class Slow(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            time.sleep(1.0)

    model, batch_size = make("accum_steps", sgd())
    data = regression_data(2 * EFFECTIVE)[:2]
    throughput(model, batch_size, data, epochs=1)  # traces
    logs = throughput(model, batch_size, data, Slow(), epochs=1, validation_data=data)
    assert 2 / logs["updates_per_second"][0] < 1.0


def test_throughput_counts_what_is_dropped():
    x, y = regression_data(2 * EFFECTIVE)[:2]
    # One micro-batch of each effective batch.
    x[[MICRO, EFFECTIVE]] = np.nan
    model = dense_model()
    optimizer = GradientAccumulateOptimizer(
        "sgd", EFFECTIVE // MICRO, non_finite="drop_micro_batch"
    )
    model.compile(optimizer, "mse")
    logs = throughput(model, MICRO, (x, y), epochs=2)
    assert logs["dropped_micro_steps"] == [2, 4]
    assert logs["effective_batch"] == [EFFECTIVE - MICRO] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_throughput_reaches_the_files_and_the_progress_bar(tmp_path, capsys):
    model, batch_size = make("micro_batch_size", sgd())
    throughput(
        model,
        batch_size,
        regression_data(2 * EFFECTIVE)[:2],
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path / "board"),
        verbose=2,
    )
    rows = rows_of(tmp_path / "log.csv")
    assert [row["effective_batch"] for row in rows] == ["12.0"] * 2
    scalars = scalars_of(tmp_path / "board")
    assert scalars["train", "epoch_effective_batch", 1] == EFFECTIVE
    assert scalars["train", "epoch_examples_per_second", 1] > 0
    assert "effective_batch: 12.0" in capsys.readouterr().out


@pytest.mark.parametrize("way", ACROSS_STEPS if KERAS < (3, 10) else WAYS)
def test_throughput_on_replicas_and_under_a_loss_scale(way):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with mirrored().scope():
            model, batch_size = make(way, sgd())
    finally:
        keras.config.set_dtype_policy("float32")
    logs = throughput(model, batch_size, regression_data(2 * EFFECTIVE)[:2], Asks())
    assert logs["effective_batch"] == [EFFECTIVE] * 2


@pytest.mark.fast
def test_throughput_refuses_what_is_no_batch_size():
    with pytest.raises(
        ValueError, match=r"batch_size.*>= 1.*Received: batch_size=0.*that fit is given"
    ):
        ThroughputLogger(0)
    with pytest.raises(TypeError, match=r"batch_size.*Received: batch_size=2.5"):
        ThroughputLogger(2.5)
