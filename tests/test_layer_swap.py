import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, _keras
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm
from gradient_accumulator_tf.batch_norm.swap import swap_batch_norm
from tests.oracle import regression_data

layers = keras.layers
BATCH_NORMS = {layers.BatchNormalization}
NAMES = ("accum", "frozen", "group", "layer", "instance")


def images(size=8, examples=2, channels=3):
    return np.random.default_rng(0).normal(size=(examples, size, size, channels)).astype("float32")


def randomise(model):
    """Random weights, so that one that is lost or in another's place changes the result."""
    random = np.random.default_rng(1)
    for layer in _keras.all_layers(model):
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.weights:
                variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return model


def norms(model):
    """The normalisations in a model, by name."""
    kinds = (layers.BatchNormalization, layers.GroupNormalization)
    return {x.name: x for x in _keras.all_layers(model) if isinstance(x, kinds)}


def kinds(model):
    return {type(layer) for layer in norms(model).values()}


def names(model):
    return [layer.name for layer in model.layers]


def same_weights(first, second):
    pairs = zip(first.weights, second.weights, strict=True)
    return all(a.name == b.name and np.array_equal(a, b) for a, b in pairs)


def predictions(model, x):
    return [np.asarray(y) for y in keras.tree.flatten(model.predict(x, verbose=0))]


def assert_same_predictions(first, second, x):
    for a, b in zip(predictions(first, x), predictions(second, x), strict=True):
        np.testing.assert_array_equal(a, b)


def functional():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn", epsilon=0.01, momentum=0.9)(x)
    x = layers.GlobalAveragePooling2D()(keras.ops.relu(x) + 1.0)
    return randomise(keras.Model(inputs, layers.Dense(2)(x), name="functional"))


def sequential():
    parts = [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(name="bn")]
    return randomise(keras.Sequential([*parts, layers.Flatten(), layers.Dense(2)]))


def several_ends():
    a, b = keras.Input((8, 8, 3), name="first"), keras.Input((8, 8, 3), name="second")
    shared = layers.BatchNormalization(name="shared")
    x, y = shared(a), shared(b)
    own = layers.BatchNormalization(name="own", axis=1)(x)
    outputs = {"sum": x + y, "parts": [own, y]}
    return randomise(keras.Model({"first": a, "second": b}, outputs))


def nested(shared=True):
    def block(name, inside=None):
        inputs = keras.Input((8, 8, 3))
        x = layers.BatchNormalization(name=f"{name}_bn")(inputs)
        return keras.Model(inputs, x if inside is None else inside(x), name=name)

    # Three levels deep, and the innermost twice.
    innermost = block("innermost")
    middle = keras.Sequential([block("inner", innermost)], name="middle")
    inputs = keras.Input((8, 8, 3))
    last = innermost if shared else layers.Conv2D(2, 1)
    return randomise(keras.Model(inputs, last(middle(inputs)), name="outer"))


def nested_without_sharing():
    return nested(shared=False)


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A layer with layers in it, some of them made in `build`."""

    def __init__(self, filters=4, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.bn = layers.BatchNormalization(name="block_bn")

    def build(self, shape):
        self.conv = layers.Conv2D(self.filters, 1)
        self.conv.build(shape)
        self.bn.build((*shape[:-1], self.filters))

    def call(self, x, training=None):
        return self.bn(self.conv(x), training=training)


def with_custom_layer():
    inputs = keras.Input((8, 8, 3))
    x = layers.TimeDistributed(layers.BatchNormalization(name="bn"))(Block()(inputs))
    return randomise(keras.Model(inputs, x))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.BatchNormalization(name="first")
        self.stack = [layers.Conv2D(4, 1), layers.BatchNormalization(name="in_list")]
        self.pair = (layers.Conv2D(4, 1), layers.BatchNormalization(name="in_tuple"))
        self.by_name = {"a": [layers.BatchNormalization(name="in_dict")]}
        self.alias = self.by_name["a"][0]
        self.block = Block(name="block")
        self.graph = keras.Sequential(
            [keras.Input((8, 8, 4)), layers.BatchNormalization(name="in_graph")], name="graph"
        )
        self.graph_again = self.graph
        self.last_of_graph = self.graph.layers[-1]
        self.head = keras.Sequential([layers.Flatten(), layers.Dense(2)])

    def call(self, x, training=None):
        x = self.first(x, training=training)
        for layer in (*self.stack, *self.pair, *self.by_name["a"], self.alias):
            x = layer(x)
        return self.head(self.last_of_graph(self.graph(self.block(x))))


def subclassed():
    model = Subclassed()
    model(images())
    return randomise(model)


REBUILT = [functional, sequential, nested, with_custom_layer]


def as_dtype(build, policy):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return build()
    finally:
        keras.config.set_dtype_policy(previous)


# The applications


APPLICATIONS = {
    "ResNet50": (32, {}),
    "ResNet50V2": (32, {}),
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {"alpha": 0.75}),
    "EfficientNetV2B0": (32, {}),
    "DenseNet121": (32, {}),
    "InceptionV3": (75, {}),
    "Xception": (71, {}),
    "NASNetMobile": (32, {}),
}


def application(name):
    size, kwargs = APPLICATIONS.get(name, (32, {}))
    build = getattr(keras.applications, name)
    return randomise(build(weights=None, input_shape=(size, size, 3), classes=3, **kwargs)), size


@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications_predict_the_same_there_and_back(name):
    model, size = application(name)
    accum = swap_batch_norm(model, accum_steps=8)
    assert {layer.accum_steps for layer in norms(accum).values()} == {8}
    assert names(accum) == names(model)
    assert same_weights(accum, model)
    # Tracing would take most of the time.
    model.run_eagerly = accum.run_eagerly = True
    assert_same_predictions(accum, model, images(size))
    back = swap_batch_norm(accum, to="batch")
    assert kinds(back) == {layers.BatchNormalization}
    assert same_weights(back, model)
    back.run_eagerly = True
    assert_same_predictions(back, model, images(size))


def test_an_application_without_batch_norm_is_returned_and_said_so():
    model = keras.applications.ConvNeXtTiny(weights=None, input_shape=(32, 32, 3), classes=3)
    with pytest.warns(UserWarning, match=r"'convnext_tiny' has no BatchNormalization"):
        assert swap_batch_norm(model) is model


# Kinds of models


@pytest.mark.parametrize("build", REBUILT)
def test_a_rebuilt_model_is_of_the_same_kind(build):
    model = build()
    expected = predictions(model, images())
    accum = swap_batch_norm(model, accum_steps=4)
    assert type(accum) is type(model)
    assert accum.name == model.name
    assert names(accum) == names(model)
    assert same_weights(accum, model)
    assert kinds(accum) == {AccumBatchNorm}
    assert norms(accum).keys() == norms(model).keys()
    assert_same_predictions(accum, model, images())
    back = swap_batch_norm(accum, to="batch")
    assert kinds(back) == {layers.BatchNormalization}
    assert same_weights(back, model)
    assert_same_predictions(back, model, images())
    # The one given is left alone, and shares nothing.
    assert kinds(model) == {layers.BatchNormalization}
    for weight in [*accum.weights, *back.weights]:
        weight.assign(weight + 1.0)
    np.testing.assert_array_equal(predictions(model, images()), expected)


@pytest.mark.fast
def test_several_inputs_and_outputs_and_a_shared_layer():
    model = several_ends()
    accum = swap_batch_norm(model)
    x = {"first": images(), "second": 1.0 + images()}
    assert model.predict(x, verbose=0).keys() == accum.predict(x, verbose=0).keys()
    assert_same_predictions(accum, model, x)
    assert [v.name for v in accum.inputs] == ["first", "second"]
    assert len(norms(accum)) == 2
    assert len(accum.weights) == 8


def test_a_nested_model_that_is_shared_stays_shared():
    accum = swap_batch_norm(nested())
    inner = accum.get_layer("middle").get_layer("inner").get_layer("innermost")
    assert accum.get_layer("innermost") is inner


@pytest.mark.fast
def test_a_subclassed_model_is_changed_in_place():
    model = subclassed()
    expected = predictions(model, images())
    order = names(model)
    weights = [np.array(w) for w in model.weights]
    assert swap_batch_norm(model, accum_steps=4) is model
    assert kinds(model) == {AccumBatchNorm}
    assert len(norms(model)) == 6
    assert names(model) == order
    for old, new in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(predictions(model, images()), expected)
    # What was one layer still is.
    assert model.alias is model.by_name["a"][0]
    assert model.graph_again is model.graph
    assert model.last_of_graph is model.graph.layers[-1]
    assert isinstance(model.pair, tuple)
    swap_batch_norm(model, to="batch")
    assert kinds(model) == {layers.BatchNormalization}
    np.testing.assert_array_equal(predictions(model, images()), expected)


def test_a_subclassed_model_that_is_not_built():
    model = swap_batch_norm(Subclassed())
    model(images())
    assert kinds(model) == {AccumBatchNorm}


def test_a_subclassed_model_in_a_functional_one_is_copied():
    inputs = keras.Input((8, 8, 3))
    model = randomise(keras.Model(inputs, Subclassed(name="net")(inputs)))
    accum = swap_batch_norm(model)
    assert kinds(model) == {layers.BatchNormalization}
    assert kinds(accum) == {AccumBatchNorm}
    assert type(accum.get_layer("net")) is Subclassed
    assert_same_predictions(accum, model, images())


@pytest.mark.parametrize("build", [functional, sequential, subclassed])
def test_a_model_in_an_accumulating_one(build):
    model = GradientAccumulateModel(model=build(), accum_steps=2)
    expected = predictions(model, images())
    assert swap_batch_norm(model) is model
    assert kinds(model) == {AccumBatchNorm}
    np.testing.assert_array_equal(predictions(model, images()), expected)
    model.compile("sgd", loss="mse")
    before = norms(model).popitem()[1].moving_mean.numpy()
    model.fit(images(examples=4), np.ones((4, 2)), batch_size=1, verbose=0)
    assert not np.array_equal(norms(model).popitem()[1].moving_mean, before)


def test_lambda_layers_keep_their_function():
    scale = np.float32(3.0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Lambda(lambda x: x * scale, output_shape=(8, 8, 3))(inputs)
    model = randomise(keras.Model(inputs, layers.BatchNormalization()(x)))
    assert_same_predictions(swap_batch_norm(model), model, images())


def test_state_that_is_not_only_weights():
    normalization = layers.Normalization()
    normalization.adapt(5.0 + images())
    model = keras.Sequential([keras.Input((8, 8, 3)), normalization, layers.BatchNormalization()])
    assert_same_predictions(swap_batch_norm(model), model, images())


# What is kept


@pytest.mark.parametrize(
    "build, to",
    [
        *((functional, to) for to in NAMES),
        *((build, "accum") for build in (nested_without_sharing, with_custom_layer, subclassed)),
        (subclassed, "group"),
    ],
)
def test_training_runs_after_each_swap_and_saves(build, to, tmp_path):
    model = swap_batch_norm(build(), to=to)
    model.compile("sgd", loss="mse")
    x = images()
    y = np.ones_like(model.predict(x, verbose=0))
    before = [w.numpy() for w in model.trainable_weights]
    model.fit(x, y, epochs=2, verbose=0)
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, model.trainable_weights, strict=True)
    ]
    assert any(changed)
    model.save_weights(tmp_path / "model.weights.h5")
    other = swap_batch_norm(build(), to=to)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_predictions(other, model, x)


# Keras saves no sharing between levels, and a class constructs its own layers.
@pytest.mark.parametrize(
    "build, to",
    [*((functional, to) for to in NAMES), (sequential, "accum"), (nested_without_sharing, "group")],
)
def test_a_rebuilt_model_saves_whole(build, to, tmp_path):
    model = swap_batch_norm(build(), to=to)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert kinds(loaded) == kinds(model)
    assert_same_predictions(loaded, model, images())


def test_checkpoints_hold_a_changed_model_s_new_layers(tmp_path):
    model = swap_batch_norm(subclassed(), to="group")
    before = [np.array(weight) for weight in model.weights]
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    for weight in model.weights:
        weight.assign(weight + 1.0)
    tf.train.Checkpoint(model=model).read(path)
    # With Keras, TensorFlow's checkpoints do not see layers in a list.
    in_list = [id(weight) for layer in model.stack for weight in layer.weights]
    for old, new in zip(before, model.weights, strict=True):
        assert np.array_equal(old, new) == (id(new) not in in_list)
    # Not the old layers, which have moving statistics.
    assert not [name for name, _ in tf.train.list_variables(path) if "moving" in name]


def test_a_changed_model_exports(tmp_path):
    model = swap_batch_norm(subclassed(), to="group")
    x = images()
    model.export(tmp_path / "exported", verbose=False)
    served = keras.layers.TFSMLayer(tmp_path / "exported", call_endpoint="serve")
    np.testing.assert_allclose(served(x), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_arguments_are_carried_over():
    arguments = {
        "axis": 1,
        "momentum": 0.7,
        "epsilon": 0.02,
        "beta_initializer": "ones",
        "gamma_regularizer": keras.regularizers.L2(0.5),
        "beta_constraint": keras.constraints.NonNeg(),
        "dtype": "mixed_float16",
        "trainable": False,
        "name": "bn",
    }
    inputs = keras.Input((4, 8, 8))
    model = keras.Model(inputs, layers.BatchNormalization(**arguments)(inputs))
    old = model.get_layer("bn").get_config()
    new = swap_batch_norm(model, accum_steps=3).get_layer("bn").get_config()
    assert new == {**old, "accum_steps": 3}
    for to in ("group", "layer", "instance"):
        new = swap_batch_norm(model, to=to).get_layer("bn").get_config()
        assert {key: old[key] for key in new if key != "groups"} == {
            key: value for key, value in new.items() if key != "groups"
        }


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_without_gamma_or_beta(center, scale):
    inputs = keras.Input((8, 8, 3))
    bn = layers.BatchNormalization(center=center, scale=scale, name="bn")
    model = randomise(keras.Model(inputs, bn(inputs)))
    assert_same_predictions(swap_batch_norm(model), model, images())
    group = swap_batch_norm(model, to="group").get_layer("bn")
    assert len(group.weights) == center + scale
    if center:
        np.testing.assert_array_equal(group.beta, bn.beta)
    if scale:
        np.testing.assert_array_equal(group.gamma, bn.gamma)


@pytest.mark.parametrize("build", [functional, with_custom_layer, nested, subclassed])
def test_trainable_flags_are_kept(build):
    def flags(model):
        all_layers = _keras.all_layers(model)
        return [x.trainable for x in all_layers if not isinstance(x, layers.InputLayer)]

    model = build()
    for i, layer in enumerate(_keras.all_layers(model)[1:]):
        layer.trainable = i % 3 != 2
    next(iter(norms(model).values())).trainable = False
    before = flags(model)
    count = len(model.trainable_weights)
    swapped = swap_batch_norm(model)
    assert flags(swapped) == before
    assert len(swapped.trainable_weights) == count
    model.trainable = False
    assert not swap_batch_norm(model, to="layer").trainable_weights


@pytest.mark.fast
def test_frozen_trains_with_its_moving_statistics():
    model = functional()
    frozen = swap_batch_norm(model, to="frozen")
    assert_same_predictions(frozen, model, images())
    bn = frozen.get_layer("bn")
    assert not bn.trainable
    before = [w.numpy() for w in bn.weights]
    np.testing.assert_array_equal(frozen(images(), training=True), frozen(images()))
    frozen.compile("sgd", loss="mse")
    frozen.fit(images(), np.ones((2, 2)), verbose=0)
    for old, new in zip(before, bn.weights, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 4), (32, 32), (48, 24), (64, 32), (37, 1), (100, 25)]
)
def test_groups_are_the_largest_divisor_up_to_32(channels, groups):
    model = keras.Sequential([keras.Input((2, 2, channels)), layers.BatchNormalization(name="bn")])
    assert swap_batch_norm(model, to="group").get_layer("bn").groups == groups


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(("to", "groups"), [("layer", 1), ("group", 4), ("instance", 4)])
def test_examples_are_normalised_one_by_one(to, groups, axis):
    inputs = keras.Input((4, 5, 4))
    model = randomise(
        keras.Model(inputs, layers.BatchNormalization(axis=axis, name="bn", epsilon=0.1)(inputs))
    )
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 4, 5, 4)).astype("float32")
    z = np.moveaxis(x, axis, -1)
    z = z.reshape(2, -1, groups, 4 // groups)
    z = (z - z.mean((1, 3), keepdims=True)) / np.sqrt(z.var((1, 3), keepdims=True) + 0.1)
    z = z.reshape(np.moveaxis(x, axis, -1).shape)
    bn = model.get_layer("bn")
    z = np.moveaxis(z * np.asarray(bn.gamma) + np.asarray(bn.beta), -1, axis)
    swapped = swap_batch_norm(model, to=to)
    np.testing.assert_allclose(swapped(x), z, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(swapped(x, training=True), swapped(x))


def test_mixed_precision():
    model = as_dtype(functional, "mixed_float16")
    assert_same_predictions(swap_batch_norm(model), model, images())
    group = swap_batch_norm(model, to="group").get_layer("bn")
    assert group.compute_dtype == "float16"
    assert group.gamma.dtype == "float32"


def test_arguments_of_calls_are_kept():
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="bn")(inputs, training=False)
    x = layers.Reshape((64, 3))(x)
    x = layers.MultiHeadAttention(1, 2)(x, x, use_causal_mask=True)
    model = keras.Model(inputs, layers.BatchNormalization(name="other")(x, mask=None))
    accum = swap_batch_norm(model)
    np.testing.assert_array_equal(accum(images()), model(images()))
    np.testing.assert_array_equal(accum(images(), training=True), model(images(), training=True))
    swap_batch_norm(model, to="group")(images(), training=True)


@pytest.mark.parametrize("build", [functional, sequential, subclassed])
def test_a_compiled_model_comes_back_uncompiled(build):
    model = build()
    model.compile("adam", loss="mse")
    model.fit(images(), np.ones((2, 2)), verbose=0)
    model.predict(images(), verbose=0)
    swapped = swap_batch_norm(model, to="layer")
    with pytest.raises(ValueError, match="compile"):
        swapped.fit(images(), np.ones((2, 2)), verbose=0)
    # Nothing that was traced with the old layers is left.
    np.testing.assert_array_equal(swapped.predict(images(), verbose=0), swapped(images()))
    assert model.compiled == (swapped is not model)


def test_accum_steps_can_be_changed():
    model = swap_batch_norm(swap_batch_norm(functional(), accum_steps=2), accum_steps=5)
    assert model.get_layer("bn").accum_steps == 5


# A function


def test_a_function_chooses_for_each_layer():
    asked = []

    def choose(layer):
        asked.append(layer.name)
        own = layers.UnitNormalization(name="in_tuple")
        return {"first": "group", "in_list": "layer", "in_dict": layer, "in_tuple": own}.get(
            layer.name
        )

    model = swap_batch_norm(subclassed(), to=choose)
    assert sorted(asked) == sorted(
        ["first", "in_list", "in_tuple", "in_dict", "block_bn", "in_graph"]
    )
    assert norms(model)["first"].groups == 3
    assert norms(model)["in_list"].groups == 1
    assert type(model.pair[1]) is layers.UnitNormalization
    for name in ("in_dict", "block_bn", "in_graph"):
        assert type(norms(model)[name]) is layers.BatchNormalization
    model(images())


def test_a_function_s_layer_gets_gamma_and_beta_unless_it_is_built():
    model = functional()
    new = swap_batch_norm(model, to=lambda x: layers.LayerNormalization(name=x.name))
    np.testing.assert_array_equal(new.get_layer("bn").gamma, model.get_layer("bn").gamma)
    own = layers.LayerNormalization(name="own")
    own.build((None, 6, 6, 4))
    assert swap_batch_norm(model, to=lambda _: own).get_layer("own") is own
    np.testing.assert_array_equal(own.gamma, np.ones(4))


# Errors and warnings


@keras.saving.register_keras_serializable(package="tests")
class OtherBatchNorm(layers.BatchNormalization):
    pass


@keras.saving.register_keras_serializable(package="tests")
class Whitening(layers.Layer):
    def build(self, shape):
        self.moving_mean = self.add_weight(shape=shape[-1:], trainable=False)
        self.moving_variance = self.add_weight(shape=shape[-1:], trainable=False)

    def call(self, x):
        return x


@keras.saving.register_keras_serializable(package="tests")
class InPlaceBatchNorm(layers.Layer):
    def call(self, x):
        return x


@pytest.mark.fast
def test_unknown_batch_norms_are_listed():
    inner = keras.Sequential([keras.Input((8, 8, 3)), OtherBatchNorm(name="a")], name="inner")
    parts = [inner, Whitening(name="b"), InPlaceBatchNorm(name="c"), layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((8, 8, 3)), *parts], name="net")
    with pytest.warns(UserWarning) as caught:
        swapped = swap_batch_norm(model)
    (message,) = [str(w.message) for w in caught]
    listed = "net/inner/a (OtherBatchNorm), net/b (Whitening), net/c (InPlaceBatchNorm)."
    assert listed.rstrip(".") in message
    assert len(norms(swapped)) == 2
    assert type(norms(swapped)["a"]) is OtherBatchNorm


def test_renormalisation_is_listed():
    try:
        layer = layers.BatchNormalization(renorm=True, name="bn")
    except (TypeError, ValueError):
        pytest.skip("this Keras has no renorm")
    model = keras.Sequential([keras.Input((3,)), layer], name="net")
    with pytest.warns(UserWarning, match=r"net/bn \(BatchNormalization\)"):
        assert swap_batch_norm(model) is model


@pytest.mark.fast
def test_nothing_to_swap_back_is_said():
    model = functional()
    with pytest.warns(UserWarning, match="'functional' has no AccumBatchNorm"):
        assert swap_batch_norm(model, to="batch") is model


class Unreachable(keras.Model):
    def __init__(self):
        super().__init__(name="net")
        self.first = layers.BatchNormalization(name="first")
        self.hidden = {layers.BatchNormalization(name="hidden")}

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return self.first(x)


def test_a_layer_that_cannot_be_reached_is_named_and_nothing_changed():
    model = Unreachable()
    with pytest.raises(ValueError, match=r"held elsewhere: net/hidden\."):
        swap_batch_norm(model)
    assert kinds(model) == {layers.BatchNormalization}
    swap_batch_norm(model, to=lambda x: "accum" if x.name == "first" else None)


@pytest.mark.parametrize("to", ["group", "instance"])
def test_vectors_have_no_positions(to):
    parts = [layers.Dense(64), layers.BatchNormalization(name="bn")]
    model = keras.Sequential([keras.Input((3,)), *parts], name="net")
    with pytest.raises(ValueError, match=f'to="{to}" .* Received: net/bn, on vectors of 64'):
        swap_batch_norm(model, to=to)
    layer = swap_batch_norm(model, to="layer").get_layer("bn")
    assert layer.groups == 1


def test_groups_need_a_built_layer():
    model = keras.Sequential([layers.BatchNormalization(name="bn")], name="net")
    with pytest.raises(ValueError, match="Received: net/bn, not built"):
        swap_batch_norm(model, to="group")


@keras.saving.register_keras_serializable(package="tests")
class Backbone(keras.Model):
    """A functional model with a constructor of its own, which keeps layers and tensors."""

    def __init__(self, units, **kwargs):
        inputs = keras.Input((8,))
        self.norm = layers.BatchNormalization(name="norm")
        x = self.norm(layers.Dense(units, name="hidden")(inputs))
        outputs = layers.BatchNormalization(name="last")(layers.Dense(4, "tanh", name="top")(x))
        super().__init__(inputs, outputs, **kwargs)
        self.units, self.levels = units, {"P1": [x]}

    def get_config(self):
        return {"units": self.units, "name": self.name}


class Task(keras.Model):
    """One around it, with a preprocessor that is in no graph, and a step of its own."""

    def __init__(self, backbone, preprocessor=None, **kwargs):
        self.backbone, self.preprocessor = backbone, preprocessor
        self.head = layers.Dense(1, name="head")
        super().__init__(backbone.input, self.head(backbone(backbone.input)), **kwargs)
        self.compile("sgd", "mse")

    def build(self, input_shape=None):
        self.built = True

    def get_config(self):
        return {"backbone": self.backbone, "preprocessor": self.preprocessor}

    def predict_step(self, data):
        return super().predict_step(self.preprocessor(data))


def test_functional_classes_with_constructors_of_their_own():
    keras.utils.set_random_seed(1)
    model = Task(Backbone(6, name="backbone"), layers.Rescaling(0.1), name="task")
    x, y, _ = regression_data(12, 8)
    model.fit(x, y, verbose=0)
    before = model.predict(x, verbose=0)
    new = swap_batch_norm(model, accum_steps=3)
    assert type(new) is Task and not new.compiled and new.name == "task"
    assert isinstance(model.backbone.norm, keras.layers.BatchNormalization)
    # Attributes are the new graph's, and what is in no graph is at hand.
    backbone = new.backbone
    assert type(backbone) is Backbone and backbone in new.layers and backbone.units == 6
    assert new.head in new.layers and new.preprocessor is model.preprocessor
    assert backbone.norm is backbone.get_layer("norm") and type(backbone.norm) is AccumBatchNorm
    features = keras.Model(backbone.inputs, backbone.levels["P1"][0])
    assert features.layers[-1] is backbone.norm
    assert [v.path for v in new.weights] == [v.path for v in model.weights]
    np.testing.assert_array_equal(new.predict(x, verbose=0), before)
    # It trains, and the old one does not with it.
    new.compile("sgd", "mse")
    new.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert np.abs(new.predict(x, verbose=0) - before).max() > 1e-3
    again = swap_batch_norm(new, to="batch")
    np.testing.assert_array_equal(again.predict(x, verbose=0), new.predict(x, verbose=0))


def test_the_weights_of_such_a_model_are_saved(tmp_path):
    x, _, _ = regression_data(12, 8)
    made = [swap_batch_norm(Task(Backbone(6), layers.Rescaling(0.1))) for _ in range(2)]
    assert np.abs(made[0].predict(x, verbose=0) - made[1].predict(x, verbose=0)).max() > 1e-3
    made[0].save_weights(tmp_path / "model.weights.h5")
    made[1].load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(*(m.predict(x, verbose=0) for m in made))


class HoldsVariable(keras.Model):
    def __init__(self, units):
        inputs = keras.Input((units,))
        super().__init__(inputs, layers.BatchNormalization()(inputs), name="net")
        self.scales = [keras.Variable(1.0)]


def test_such_a_model_with_variables_outside_of_layers_is_refused():
    model = HoldsVariable(8)
    with pytest.raises(ValueError, match=r"HoldsVariable \(the model 'net'\).* attribute 'scales'"):
        swap_batch_norm(model)
    # The advice works.
    swapped = swap_batch_norm(keras.Model(model.inputs, model.outputs))
    assert isinstance(swapped.layers[-1], AccumBatchNorm)


def test_a_layer_whose_copy_differs_is_refused():
    inputs = keras.Input((8, 8, 3))
    block = Block(name="block")
    block.extra = layers.BatchNormalization()
    block.extra.build((None, 8, 8, 3))
    model = keras.Model(inputs, block(inputs))
    with pytest.raises(
        ValueError, match=r"'block' \(Block\).* holds BatchNormalization 'batch_norm"
    ):
        swap_batch_norm(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "groups"}, ValueError, "Received: to='groups'. Pass .* such as to=\"group\""),
        ({"to": None}, ValueError, 'Received: to=None. Pass one of these, such as to="accum"'),
        ({"accum_steps": 0}, ValueError, "Received: accum_steps=0"),
        ({"accum_steps": 2.0}, TypeError, r"Received: accum_steps=2\.0"),
        ({"to": "group", "accum_steps": 2}, ValueError, "Received: to='group', accum_steps=2"),
        (
            {"to": lambda _: 3},
            TypeError,
            r"`to` must return .* Received: 3 \(of type int\) for functional/bn.* Return one",
        ),
        (
            {"to": lambda _: "groups"},
            ValueError,
            "`to` must return .* Received: 'groups' .* for functional/bn.* such as \"group\" or",
        ),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        swap_batch_norm(functional(), **arguments)


def test_a_layer_is_not_a_model():
    with pytest.raises(TypeError, match=r"Received: .*BatchNormalization\). Pass the keras.Model"):
        swap_batch_norm(layers.BatchNormalization())
