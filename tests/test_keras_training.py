"""What `_keras` reads of a model's training is still there, and still needed."""

import os

import keras
import pytest
import tensorflow as tf

from gradient_accumulator_tf import _keras
from tests.oracle import dense_model, regression_data


@pytest.mark.fast
def test_what_a_model_keeps_for_training_is_known():
    class Model(keras.Model):
        def call(self, x):
            return x * self.scale

        def build(self, shape):
            self.scale = self.add_weight(shape=())

    model, layer = Model(), keras.layers.Activation("relu")
    x, y, _ = regression_data(4)
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(x, y, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    model.train_on_batch(x, y)
    kept = {n for n in set(vars(model)) - set(vars(layer)) if not n.startswith("_self_")}
    assert kept - {"scale"} <= set(_keras.TRAINER_ATTRIBUTES)
    # Most are there in every version; one that is gone for good can go.
    assert {"optimizer", "_compile_loss", "_loss_tracker", "stop_training", "history"} <= kept


@pytest.mark.fast
def test_methods_of_training_are_those_that_a_layer_lacks():
    methods = _keras.trainer_methods()
    public = {"compile", "fit", "evaluate", "predict", "train_on_batch", "get_metrics_result"}
    assert public | {"train_step", "make_train_function", "_symbolic_build"} <= set(methods)
    assert not [name for name in methods if hasattr(keras.Layer, name)]


@pytest.mark.fast
def test_compute_loss_with_and_without_a_training_argument():
    class Old(keras.Model):
        def call(self, x):
            return x

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return tf.constant(3.0)

    model = Old()
    model.compile()
    assert float(_keras.compute_loss(model, None, None, None, None)) == 3.0


@pytest.mark.fast
def test_track_loss_is_what_train_step_does():
    x, y, _ = regression_data(12)
    model = dense_model()
    model.compile("sgd", "mse")
    logs = model.evaluate(x, y, batch_size=12, verbose=0)
    model.reset_metrics()
    _keras.track_loss(model, tf.constant(logs), 12)
    assert model.get_metrics_result()["loss"] == logs


@pytest.mark.fast
def test_build_for_training_builds_model_losses_and_metrics():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y, _ = regression_data(4)
    _keras.build_for_training(model, (tf.constant(x), tf.constant(y), None))
    assert model.built and len(model.trainable_variables) == 2
    assert "mae" in str(model.get_metrics_result()) or model._compile_metrics.built


def test_backups_in_another_folder(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "a", double_checkpoint=True)
    keys = set(vars(backup))
    _keras.use_backup_folder(backup, tmp_path)
    _keras.set_backup_epoch(backup, 3)
    assert set(vars(backup)) == keys  # no new names
    model = dense_model()
    model.compile("sgd", "mse")
    backup.set_model(model)
    backup._save_model()
    backup._save_model()
    files = ("latest.weights.h5", "training_metadata.json")
    assert {f"{name}{end}" for name in files for end in ("", ".bkp")} < set(os.listdir(tmp_path))
    assert '"epoch": 3' in (tmp_path / files[1]).read_text()


@pytest.mark.fast
def test_compiled_metrics_are_those_given_to_compile():
    model = dense_model()
    model.own = keras.metrics.Mean(name="own")
    model.compile("sgd", "mse", metrics=["mae"], weighted_metrics=["mse"])
    assert _keras.compiled_metrics(model) == []  # not built yet
    x, y, weights = regression_data(4)
    expected = model.evaluate(x, y, verbose=0, sample_weight=weights, return_dict=True)
    metrics = _keras.compiled_metrics(model)
    assert [m.name for m in metrics] == ["mae", "mse"]
    model.reset_metrics()
    _keras.update_compiled_metrics(model, y, model(x), weights)
    assert [float(m.result()) for m in metrics] == pytest.approx(
        [expected["mae"], expected["mse"]], rel=1e-5
    )
    plain = dense_model()
    plain.compile("sgd", "mse")
    assert _keras.compiled_metrics(plain) == []
    _keras.update_compiled_metrics(plain, y, plain(x), weights)


@pytest.mark.fast
def test_metric_function_has_the_metrics_arguments():
    function = _keras.metric_function(keras.metrics.BinaryAccuracy(threshold=0.9))
    assert float(tf.reduce_sum(function(tf.ones((1, 1)), tf.fill((1, 1), 0.8)))) == 0.0
    assert _keras.metric_function(keras.metrics.AUC()) is None


@pytest.mark.fast
def test_added_losses_are_without_regularisers():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(2.0 * tf.reduce_sum(x))
            return x

    model = keras.Sequential([Adds(), keras.layers.Dense(1, kernel_regularizer="l2")])
    model(tf.ones((1, 1)))
    assert len(model.losses) == 2
    assert [float(loss) for loss in _keras.added_losses(model)] == [2.0]
