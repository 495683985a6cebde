"""Each private name that `_keras` uses is still there, and still needed."""

import inspect
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateOptimizer, _installation, _keras
from tests.oracle import KERAS, dense_model, mirrored, regression_data


def _public(names):
    return [name for name in names if not name.startswith("_")]


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


def test_methods_of_training_are_those_that_a_layer_lacks():
    methods = _keras.trainer_methods()
    public = {"compile", "fit", "evaluate", "predict", "train_on_batch", "get_metrics_result"}
    assert public | {"train_step", "make_train_function", "_symbolic_build"} <= set(methods)
    assert not [name for name in methods if hasattr(keras.Layer, name)]


def test_variable_key_knows_a_keras_variable_by_its_tensorflow_variable():
    optimizer, variable = keras.optimizers.SGD(), keras.Variable(0.0)
    assert _keras.variable_key(optimizer, variable) == _keras.variable_key(
        optimizer, variable.value
    )


def test_call_has_training_argument():
    assert _keras.call_has_training_argument(keras.layers.Dropout(0.5))
    assert not _keras.call_has_training_argument(keras.layers.Flatten())


def test_compute_loss_with_and_without_a_training_argument():
    class Old(keras.Model):
        def call(self, x):
            return x

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return tf.constant(3.0)

    model = Old()
    model.compile()
    assert float(_keras.compute_loss(model, None, None, None, None)) == 3.0


def test_track_loss_is_what_train_step_does():
    x, y, _ = regression_data(12)
    model = dense_model()
    model.compile("sgd", "mse")
    logs = model.evaluate(x, y, batch_size=12, verbose=0)
    model.reset_metrics()
    _keras.track_loss(model, tf.constant(logs), 12)
    assert model.get_metrics_result()["loss"] == logs
    assert "_loss_tracker.update_state" in inspect.getsource(keras.Model.train_step)


def test_build_for_training_builds_model_losses_and_metrics():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y, _ = regression_data(4)
    _keras.build_for_training(model, (tf.constant(x), tf.constant(y), None))
    assert model.built and len(model.trainable_variables) == 2
    assert "mae" in str(model.get_metrics_result()) or model._compile_metrics.built
    assert not hasattr(keras.Model, "symbolic_build")  # public one day?


def test_replaced_losses_are_called_and_put_back():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    model.compile("sgd", ["mse", "mae"])
    x, y, _ = regression_data(4)
    data = tf.constant(x), (tf.constant(y), tf.constant(y)), None
    _keras.build_for_training(model, data)
    before = model._compile_loss._flat_losses
    metrics = _keras.per_output_loss_metrics(model)
    assert len(metrics) == 2

    values = iter([1.0, 2.0])

    def replace(loss):
        value = next(values)
        return lambda y_true, y_pred, sample_weight=None: tf.constant(value)

    with _keras.replaced_losses(model, replace) as number:
        total = _keras.compute_loss(model, data[0], data[1], model(data[0]), None)
    assert (number, float(total)) == (2, 3.0)
    assert model._compile_loss._flat_losses is before
    assert _keras.per_output_loss_metrics(model) == metrics
    assert all(float(m.total) == 0.0 for m in metrics)


def test_replaced_added_losses_are_those_of_add_loss_that_have_a_rank():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss([tf.reduce_mean(x), tf.reduce_sum(x, 1)])
            return x

    class Absolute(keras.regularizers.Regularizer):
        def __call__(self, weights):
            return tf.abs(weights)

    layers = [Adds(), keras.layers.Dense(1, kernel_regularizer=Absolute())]
    model = keras.Sequential([keras.Input((5,)), *layers])
    model.compile("sgd")
    y_pred = model(tf.ones((4, 5)))
    seen = []

    def replace(loss, value):
        seen.append((loss.shape, float(value)))
        return 0.0 * value

    everything = float(model.compute_loss(y_pred=y_pred))
    with _keras.replaced_added_losses(model, replace):
        rest = float(model.compute_loss(y_pred=y_pred))
    assert seen == [((4,), 20.0)]
    assert everything == pytest.approx(rest + 20.0)
    assert float(model.compute_loss(y_pred=y_pred)) == everything
    _keras.clear_added_losses(model)
    assert len(model.losses) == 1  # the regulariser
    assert not hasattr(keras.Model, "aggregate_additional_loss")  # public one day?


def test_activity_regularizers_by_rank():
    """Where no supported Keras adds them up, what is before 3.14 can go."""
    layer = keras.layers.Dense(1, activity_regularizer=lambda v: 2.0 * v, kernel_initializer="ones")
    layer(tf.ones((4, 3)))
    assert float(tf.reduce_sum(layer.losses[0])) == (6.0 if KERAS >= (3, 14) else 24.0)
    with _keras.activity_regularizers_by_rank(layer):
        with _keras.activity_regularizers_by_rank(layer):  # by another replica
            layer(tf.ones((4, 3)))
        layer(tf.ones((4, 3)))
    assert layer.losses[0].shape == (() if KERAS >= (3, 14) else (1,))
    assert float(tf.reduce_sum(layer.losses[0])) == (6.0 if KERAS >= (3, 14) else 24.0)
    assert type(layer.activity_regularizer).__name__ == "function"
    assert _installation.OLDEST_KERAS < (3, 14)


def test_a_mask_travels_from_the_embedding_to_the_loss():
    model = keras.Sequential([keras.layers.Embedding(5, 2, mask_zero=True), keras.layers.Dense(1)])
    mask = _keras.keras_mask(model(np.array([[1, 0, 2]])))
    assert np.asarray(mask).tolist() == [[True, False, True]]
    assert _keras.keras_mask(_keras.set_keras_mask(tf.zeros(3), None)) is None
    assert not hasattr(keras.ops, "get_keras_mask")  # public one day?


def test_a_loss_scale_optimizer_left_alone_looks_at_each_micro_batch():
    # When it asks its inner optimizer first, `route_loss_scaling` can go.
    variable = keras.Variable(1.0)
    inner = GradientAccumulateOptimizer("sgd", 2)
    scaler = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    scaler.build([variable])
    left_alone = keras.optimizers.LossScaleOptimizer.apply.__wrapped__
    for gradient in (np.inf, np.inf):
        left_alone(scaler, [tf.constant(gradient)], [variable])
    assert (float(scaler.dynamic_scale), int(inner.micro_step)) == (1.0, 0)
    for gradient in (np.inf, 1.0):
        scaler.apply([tf.constant(gradient)], [variable])
    assert (float(scaler.dynamic_scale), int(inner.micro_step)) == (0.5, 0)
    assert float(variable) == 1.0


def test_a_loss_scale_optimizer_left_alone_loads_nothing_of_another_number():
    # When it loads its own variables by name, `route_loss_scaling` need not see to it.
    scalers = []
    for accum_steps in (1, 2):
        inner = GradientAccumulateOptimizer("sgd", accum_steps)
        scalers.append(keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0))
        scalers[-1].build([keras.Variable(1.0)])
    one, two = scalers
    two.dynamic_scale.assign(8.0)
    store = {str(i): v.numpy() for i, v in enumerate(two.variables)}
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        keras.optimizers.LossScaleOptimizer.load_own_variables.__wrapped__(one, store)
    assert float(one.dynamic_scale) == 2.0
    one.load_own_variables(store)
    assert float(one.dynamic_scale) == 8.0


def test_other_loss_scale_optimizers_are_left_alone():
    variable = keras.Variable(1.0)
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=4.0)
    scaler.apply([tf.constant(4.0)], [variable])
    assert float(variable) == 0.5


def test_a_built_layer_takes_no_other_layer_by_assignment():
    # When it does, and forgets the old one, `replace_layers` can be an assignment.
    class Holder(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(2)

        def build(self, shape):
            self.inner.build(shape)

    layer, new = Holder(), keras.layers.Dense(2)
    layer.build((None, 3))
    old = layer.inner
    with pytest.raises(ValueError):
        layer.inner = new
    _keras.replace_layers(layer, {old: new})
    assert layer.inner is new
    assert _keras.sublayers(layer) == _keras.held_layers(layer) == [new]


def test_functional_models_have_no_public_name():
    inputs = keras.Input((2,))
    functional = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert _keras.is_functional(functional) and _keras.is_functional(keras.Sequential())
    assert not _keras.is_functional(keras.layers.Dense(1))
    assert not hasattr(keras, "Functional")  # public one day?


def test_the_strategy_of_an_optimizer_has_no_public_name():
    assert _keras.strategy_of(keras.optimizers.SGD()) is tf.distribute.get_strategy()
    assert not hasattr(keras.optimizers.SGD(), "distribute_strategy")  # public one day?


def test_all_layers_are_found_however_deep():
    inner = keras.layers.Dense(1)
    model = keras.Sequential([keras.Sequential([inner])])
    assert inner in _keras.all_layers(model) and inner not in model.layers
    assert "flatten_layers" not in _public(dir(keras.Model))  # public one day?


def test_a_graph_runs_as_keras_runs_it():
    images, numbers = keras.Input((2, 2), name="images"), keras.Input((3,), name="numbers")
    dense = keras.layers.Dense(3)
    joined = keras.layers.Add()([dense(keras.layers.Flatten()(images)), keras.ops.tanh(numbers)])
    model = keras.Model({"images": images, "numbers": numbers}, {"sum": [joined]})
    x = {"numbers": np.ones((5, 3)), "images": np.ones((5, 2, 2))}  # neither order nor dtype
    graph = _keras.graph_of(model)
    tensors = dict(zip(graph.inputs, _keras.standardized_inputs(model, x), strict=True))
    for node in graph.nodes:
        args, kwargs = node.fill_in({key: tensors[key] for key in node.inputs})
        assert not node.has_mask
        tensors.update(zip(node.outputs, [node.operation(*args, **kwargs)], strict=True))
    outputs = _keras.packed_outputs(model, [tensors[key] for key in graph.outputs])
    np.testing.assert_array_equal(outputs["sum"][0], model(x)["sum"][0])
    # Public API tells none of it: neither the calls nor their order.
    assert not any(hasattr(keras.Model, name) for name in ("nodes", "graph", "nodes_by_depth"))


def test_a_sequential_model_has_a_graph_and_a_subclass_does_as_it_likes():
    class Own(keras.Sequential):
        def call(self, inputs, training=None, mask=None):
            return inputs

    layers = [keras.Input((3,)), keras.layers.Masking(), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    assert [node.has_mask for node in _keras.graph_of(model).nodes] == [True, True]
    assert _keras.packed_outputs(model, [1]) == 1
    assert _keras.is_plain_functional(model)
    assert not _keras.is_plain_functional(Own(layers))
    assert not _keras.is_plain_functional(keras.layers.Dense(2))


def test_gradients_over_replicas_are_summed_once():
    # Whoever comes first sums; then they are the same on all replicas, and stay as they are.
    strategy = mirrored()
    with strategy.scope():
        optimizer, variable = keras.optimizers.SGD(), keras.Variable(0.0)

    def on_replica():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradient = tf.cast(replica, tf.float32) + 1.0
        summed = _keras.gradients_over_replicas(optimizer, [gradient, None], [variable, variable])
        with _keras.replicas_agree(optimizer):
            again = _keras.gradients_over_replicas(optimizer, summed, [variable, variable])
        assert again[1] is None
        return summed[0], again[0]

    for value in strategy.run(on_replica):
        assert [float(v) for v in strategy.experimental_local_results(value)] == [3.0, 3.0]
    source = inspect.getsource(keras.optimizers.Optimizer._backend_update_step)
    assert "self._all_reduce_sum_gradients(grads_and_vars)" in source


def test_an_optimizer_rebuilt_for_other_variables():
    a, b, c = (keras.Variable(float(i), name=name) for i, name in enumerate("abc"))
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5, use_ema=True, ema_momentum=0.5)
    optimizer.exclude_from_weight_decay(var_list=[b], var_names=["c"])
    optimizer.build([a, b])
    optimizer.apply([tf.constant(1.0), tf.constant(2.0)], [a, b])
    with pytest.raises(ValueError, match="recreate a new optimizer"):  # else this can go
        optimizer.apply([tf.constant(1.0)], [c])
    copy = _keras.rebuilt_optimizer(optimizer, [c, b])
    state = {v.path.split("/")[-1]: float(v) for v in copy.variables}
    slots = {name: value for name, value in state.items() if "momentum" in name}
    assert sorted(slots.values()) == [-2.0, 0.0]
    averages = {name: value for name, value in state.items() if "average" in name}
    assert sorted(averages.values()) == [-1.0, 2.0]  # of b so far, and of c as it is
    assert (state["iteration"], state["learning_rate"]) == (1.0, 1.0)
    assert [copy._use_weight_decay(v.value) for v in (b, c)] == [False, False]
    assert copy._use_weight_decay(a.value)
    copy.apply([tf.constant(1.0), tf.constant(0.0)], [c, b])
    assert (float(c), float(b)) == (1.0, -2.0)


class HandsOn(keras.layers.Wrapper):
    def call(self, *args, training=None, **kwargs):
        return self.layer(*args, **kwargs)


def test_arguments_of_a_call_are_read_as_those_of_another_layer():
    x = tf.ones((2, 3, 4))
    wrapper = HandsOn(keras.layers.MultiHeadAttention(1, 2))
    wrapper.layer.build(x.shape, x.shape)
    mixed = {"attention_mask": tf.ones((2, 3, 3)), "use_causal_mask": True}
    with pytest.raises(ValueError, match="cannot mix tensors and non-tensors"):
        wrapper(x, x, **mixed)  # when this does not fail, the signature may stay as it is
    _keras.adopt_call_arguments(wrapper, wrapper.layer)
    assert wrapper(x, x, **mixed).shape == x.shape
    assert _keras.call_has_training_argument(wrapper)
    # For a layer that takes no `training`, and for one that takes what is no tensor.
    wrapper = HandsOn(keras.layers.Flatten())
    _keras.adopt_call_arguments(wrapper, wrapper.layer)
    assert wrapper(x, training=True).shape == (2, 12)


def test_a_symbolic_tensor_outside_of_its_graph():
    x = keras.Input((3,))
    layer = keras.layers.Dense(2)
    y = layer(_keras.outside_graph(x))
    assert y.shape == (None, 2)
    with pytest.raises(ValueError, match=r"(?i)connected"):
        keras.Model(x, y)
    assert not hasattr(_keras.outside_graph(keras.layers.Masking()(x)), "_keras_mask")
    assert _keras.outside_graph(3) == 3


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


def test_a_functional_model_becomes_one_of_a_subclass():
    class Own(keras.Model):
        def __init__(self, units):
            inputs = keras.Input((3,))
            self.dense, self.units = keras.layers.Dense(units, use_bias=False, name="first"), units
            super().__init__(inputs, self.dense(keras.layers.Dense(4, name="hidden")(inputs)))

    old = Own(2)
    old.compile("sgd", "mse")
    old.fit(np.ones((2, 3)), np.ones((2, 2)), verbose=0)
    plain = keras.Model(old.inputs, old.outputs)
    attributes = _keras.own_attributes(old, plain)
    assert attributes == {"dense": old.dense, "units": 2}
    assert plain.layers == old.layers
    assert [v.path for v in plain.weights] == ["hidden/kernel", "hidden/bias", "first/kernel"]
    _keras.become(plain, Own, attributes, _keras.sublayers(old))
    assert [v.path for v in plain.weights] == [v.path for v in old.weights]
    assert type(plain) is Own and plain.units == 2 and plain.layers[-1] is plain.dense
    # When Keras makes a clone of the class, this can go.
    assert type(keras.models.clone_model(plain)) is not Own
