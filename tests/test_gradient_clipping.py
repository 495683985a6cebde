"""Adaptive gradient clipping: the paper's arithmetic, and the large batch as the oracle."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AdaptiveGradientClipping,
    GradientAccumulateOptimizer,
)
from gradient_accumulator_tf.optimizers.gradient_clipping import clip_units, unit_norms
from tests.oracle import (
    EFFECTIVE,
    MICRO,
    MODES,
    WAYS,
    difference,
    in_way,
    mirrored,
    regression_data,
    state_of,
    updates_of,
)
from tests.test_optimizer_contract import OPTIMIZERS, VARIANTS

# All units of the models here are clipped with it, and not to nothing.
FACTOR = 0.02


def _agc(inner=None, **kwargs):
    kwargs = {"clip_factor": FACTOR, "exclude": ["output"], **kwargs}
    return AdaptiveGradientClipping(inner or keras.optimizers.SGD(0.5, momentum=0.9), **kwargs)


def _named_model(seed=1):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, "tanh", name="hidden"), keras.layers.Dense(1, name="output")]
    return keras.Sequential([keras.Input((5,)), *layers])


@pytest.mark.fast
def test_units_are_clipped_to_a_fraction_of_their_weights():
    weights = np.array([[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]])  # norms 5, 0 and 10
    gradient = np.array([[0.6, 0.06, 0.6], [0.8, 0.08, 0.8]])  # norms 1, 0.1 and 1
    clipped = clip_units(tf.constant(gradient), tf.constant(weights), 0.1, 0.01)
    # Allowed are 0.5, 0.1 x 0.01 and 1: a half, a hundredth, and all of it.
    np.testing.assert_allclose(clipped, gradient * [0.5, 0.01, 1.0], rtol=1e-12)


@pytest.mark.parametrize(
    "shape, axes, units",
    [
        ((), (-1,), ()),
        ((7,), (-1,), (1,)),
        ((1, 7, 1), (-1,), (1, 1, 1)),
        ((2, 1), (-1,), (1, 1)),
        ((4, 3), (-1,), (1, 3)),
        ((5, 4, 3), (-1,), (1, 1, 3)),
        ((3, 3, 4, 2), (-2, -1), (1, 1, 4, 2)),
        ((3, 3, 4, 2), (-2,), (1, 1, 4, 1)),
        ((4, 3), (-2, -1), (1, 3)),  # a dense layer that is called like a depthwise one
        ((4, 3), (-3,), (1, 3)),
    ],
)
def test_norms_have_one_entry_for_each_unit(shape, axes, units):
    values = np.random.default_rng(0).normal(size=shape)
    norms = unit_norms(tf.constant(values), axes)
    assert norms.shape == units
    reduced = tuple(i for i, size in enumerate(units) if size < shape[i])
    expected = np.sqrt((values**2).sum(reduced, keepdims=True))
    np.testing.assert_allclose(norms, expected, rtol=1e-12)


LAYERS = {
    "dense": (keras.layers.Dense, (5,), {"units": 3}, [3, 0]),
    "conv1d": (keras.layers.Conv1D, (8, 2), {"filters": 3, "kernel_size": 3}, [3, 0]),
    "conv2d": (keras.layers.Conv2D, (8, 8, 4), {"filters": 3, "kernel_size": 3}, [3, 0]),
    "grouped": (
        keras.layers.Conv2D,
        (8, 8, 4),
        {"filters": 6, "kernel_size": 3, "groups": 2},
        [6, 0],
    ),
    "depthwise": (
        keras.layers.DepthwiseConv2D,
        (8, 8, 4),
        {"kernel_size": 3, "depth_multiplier": 2},
        [8, 0],
    ),
    "depthwise1d": (keras.layers.DepthwiseConv1D, (8, 4), {"kernel_size": 3}, [4, 0]),
    "separable": (
        keras.layers.SeparableConv2D,
        (8, 8, 4),
        {"filters": 3, "kernel_size": 3},
        [4, 3, 0],
    ),
    "transposed": (
        keras.layers.Conv2DTranspose,
        (8, 8, 4),
        {"filters": 3, "kernel_size": 3},
        [3, 0],
    ),
    "norm": (keras.layers.LayerNormalization, (6,), {}, [0, 0]),
}


def _unit_by_unit(kernel, gradient, axis_of_units):
    """The paper's rule in loops, for units along `axis_of_units` (a tuple; none for a bias)."""
    kernel, gradient = np.asarray(kernel, "float64"), np.asarray(gradient, "float64")
    clipped = gradient.copy()
    for unit in np.ndindex(*[kernel.shape[a] for a in axis_of_units]):
        index = [slice(None)] * kernel.ndim
        for axis, i in zip(axis_of_units, unit, strict=True):
            index[axis] = i
        index = tuple(index)
        largest = 0.01 * max(np.sqrt((kernel[index] ** 2).sum()), 1e-3)
        norm = np.sqrt((gradient[index] ** 2).sum())
        if norm > largest:
            clipped[index] = gradient[index] * largest / norm
    return clipped


@pytest.mark.parametrize("kind", LAYERS)
def test_the_units_of_keras_layers(kind):
    cls, shape, arguments, units = LAYERS[kind]
    layer = cls(**arguments)
    layer.build((None, *shape))
    optimizer = AdaptiveGradientClipping(keras.optimizers.SGD(1.0))
    optimizer.build(layer.trainable_variables)
    rng = np.random.default_rng(0)
    for variable, count in zip(layer.trainable_variables, units, strict=True):
        variable.assign(rng.normal(size=variable.shape))
        gradient = rng.normal(size=variable.shape).astype("float32")
        gradient *= rng.choice([1e-3, 1.0], size=variable.shape[-1])
        rank = len(variable.shape)
        axes = (rank - 1,) if count else ()
        if count and ("depthwise" in kind or (kind == "separable" and count == 4)):
            axes = (rank - 2, rank - 1)
        if count and kind == "transposed":
            axes = (rank - 2,)
        if count:
            assert np.prod([variable.shape[a] for a in axes]) == count
        expected = variable.numpy() - _unit_by_unit(variable.numpy(), gradient, axes)
        optimizer.apply([tf.constant(gradient)], [variable])
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_units_of_attention_are_heads_and_features():
    layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=3)
    layer.build((None, 5, 4), (None, 5, 4))
    optimizer = AdaptiveGradientClipping("sgd")
    axes = {v.path.split("/", 1)[1]: optimizer._axes_of_units(v.path) for v in layer.variables}
    for name in ("query", "key", "value"):
        assert axes[f"{name}/kernel"] == (-2, -1)
    assert axes["attention_output/kernel"] == (-1,)
    assert unit_norms(layer.query_dense.kernel, (-2, -1)).shape == (1, 2, 3)


def _train(model, optimizer, batch_size, epochs=2, **compile_with):
    x, y, _ = regression_data(2 * EFFECTIVE + 5, dtype=keras.config.floatx())
    model.compile(optimizer, "mse", **compile_with)
    model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model


@functools.cache
def _large_clipped_or_not():
    optimizers = _agc(), _agc().inner_optimizer
    return [_train(_named_model(), o, EFFECTIVE).get_weights() for o in optimizers]


@pytest.mark.usefixtures("float64")
def test_in_the_model_it_is_that_of_the_large_batch(mode, graph_or_jit):
    large, unclipped = _large_clipped_or_not()
    model, _, batch_size = in_way(mode, _named_model())
    _train(model, _agc(), batch_size, **graph_or_jit)
    assert difference(model.get_weights(), large) < 1e-12
    assert difference(unclipped, large) > 1e-2


def _contract(name):
    return (OPTIMIZERS | VARIANTS)[name]()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [
        *("adam", "muon", "multi_optimizer", "clipnorm", "ema", "loss_scale_factor"),
    ],
)
def test_around_any_optimizer_it_is_that_of_the_large_batch(name):
    # An epoch is not whole cycles, so the optimizer wrapper is given fewer examples.
    x, y, _ = regression_data(2 * EFFECTIVE, dtype="float64")
    models = []
    for make, batch_size in (
        (lambda: _agc(_contract(name)), EFFECTIVE),
        (lambda: GradientAccumulateOptimizer(_agc(_contract(name)), 3), MICRO),
        (lambda: _contract(name), EFFECTIVE),
    ):
        model = _named_model()
        model.compile(make(), "mse")
        model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    large, accumulated, unclipped = models
    assert difference(accumulated.get_weights(), large.get_weights()) < 1e-12
    inner = accumulated.optimizer.inner_optimizer
    assert difference(state_of(inner.variables), state_of(large.optimizer.variables)) < 1e-12
    assert updates_of(large.optimizer) == updates_of(unclipped.optimizer) == 4
    assert difference(unclipped.get_weights(), large.get_weights()) > 1e-9


def test_clipping_each_micro_batch_is_something_else():
    rng = np.random.default_rng(0)
    kernel, gradients = rng.normal(size=(4, 2)), rng.normal(size=(3, 4, 2))
    variable = keras.Variable(kernel, dtype="float64")
    optimizer = GradientAccumulateOptimizer(
        AdaptiveGradientClipping(keras.optimizers.SGD(1.0)), accum_steps=3
    )
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    step = kernel - variable.numpy()
    np.testing.assert_allclose(step, _unit_by_unit(kernel, gradients.mean(0), (1,)), rtol=1e-6)
    each = np.mean([_unit_by_unit(kernel, g, (1,)) for g in gradients], axis=0)
    assert np.abs(step - each).max() > 1e-3


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_on_replicas_the_sum_is_clipped(way):
    x, y, _ = regression_data(2 * EFFECTIVE)
    large = _named_model()
    large.compile(_agc(), "mse")
    large.fit(x, y, batch_size=EFFECTIVE, shuffle=False, verbose=0)
    with mirrored().scope():
        model, optimizer, batch_size = in_way(way, _named_model(), _agc(), replicas=2)
        model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    assert difference(model.get_weights(), large.get_weights()) < 1e-6


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_under_a_loss_scale_the_gradients_themselves_are_clipped(mode):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, _, batch_size = in_way(mode, _named_model())
        optimizer = keras.optimizers.LossScaleOptimizer(_agc(), initial_scale=1024.0)
        _train(model, optimizer, batch_size, epochs=1)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    large = _train(_named_model(), _agc(), EFFECTIVE, epochs=1)
    assert difference(model.get_weights(), large.get_weights()) < 2e-3
    assert difference(large.get_weights(), _named_model().get_weights()) > 1e-2


@pytest.mark.usefixtures("float64")
def test_a_loss_scale_factor_changes_nothing():
    make = keras.optimizers.SGD
    plain = _train(_named_model(), _agc(make(0.5)), EFFECTIVE)
    scaled = _train(_named_model(), _agc(make(0.5, loss_scale_factor=1024.0)), EFFECTIVE)
    assert difference(scaled.get_weights(), plain.get_weights()) < 1e-12


def test_sixteen_bit_variables_are_clipped_in_float32():
    # The squares of 1e-4 are 0 in float16.
    variable = keras.Variable(np.full((4, 2), 1e-4), dtype="float16")
    optimizer = AdaptiveGradientClipping(keras.optimizers.SGD(1.0), clip_factor=0.5, epsilon=1e-6)
    optimizer.apply([tf.fill((4, 2), tf.constant(1e-4, tf.float16))], [variable])
    np.testing.assert_allclose(variable.numpy(), 5e-5, rtol=2e-3)


@pytest.mark.fast
def test_slices_are_clipped_as_the_dense_gradient():
    start, dense = np.random.default_rng(0).normal(size=(6, 2)), np.zeros((6, 2))
    rows, values = [1, 4, 1], np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.add.at(dense, rows, values)
    results = []
    for gradient in (tf.constant(dense), tf.IndexedSlices(values, rows, (6, 2))):
        variable = keras.Variable(start, dtype="float64")
        AdaptiveGradientClipping(keras.optimizers.SGD(1.0)).apply([gradient], [variable])
        results.append(variable.numpy())
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    "exclude, clipped",
    [
        ([], {"hidden/kernel", "hidden/bias", "output/kernel", "output/bias"}),
        (["bias"], {"hidden/kernel", "output/kernel"}),
        (["bias", "output"], {"hidden/kernel"}),
        (["/hidden/kernel$"], {"hidden/bias", "output/kernel", "output/bias"}),
        ("layer", {"hidden/kernel", "hidden/bias"}),
    ],
    ids=str,
)
def test_excluded_variables_are_not_clipped(exclude, clipped):
    model = _named_model()
    exclude = [model.layers[-1]] if exclude == "layer" else exclude
    optimizer = AdaptiveGradientClipping(keras.optimizers.SGD(1.0), exclude=exclude)
    before = [v.numpy() for v in model.trainable_variables]
    gradients = [tf.ones(v.shape) for v in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    moved = {
        v.path.split("/", 1)[1]: np.abs(v.numpy() - old).max()
        for v, old in zip(model.trainable_variables, before, strict=True)
    }
    assert {path for path, by in moved.items() if by < 0.5} == clipped
    assert all(by > 0 for by in moved.values())


def test_units_of_a_layer_of_ones_own():
    variable = keras.Variable(np.ones((2, 3)), name="odd")
    optimizer = AdaptiveGradientClipping(
        keras.optimizers.SGD(1.0), clip_factor=1.0, unit_axes={"odd": -2}
    )
    optimizer.apply([tf.constant([[9.0, 0.0, 0.0], [0.0, 0.1, 0.0]])], [variable])
    expected = [[1 - 3**0.5, 1, 1], [1, 0.9, 1]]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


@pytest.mark.fast
def test_it_is_saved_and_goes_on_in_mid_cycle(tmp_path):
    def steps(model, first, last):
        x, y, _ = regression_data(40)
        for start in range(first * MICRO, last * MICRO, MICRO):
            model.train_on_batch(x[start : start + MICRO], y[start : start + MICRO])

    model, undisturbed = _named_model(), _named_model()
    axes = {"hidden/kernel": (-2,)}
    for m in (model, undisturbed):
        clipping = _agc(exclude=["bias", m.layers[-1]], unit_axes=axes, epsilon=0.01)
        m.compile(GradientAccumulateOptimizer(clipping, 3), "mse")
    steps(undisturbed, 0, 9)
    steps(model, 0, 4)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    steps(resumed, 4, 9)
    assert difference(resumed.get_weights(), undisturbed.get_weights()) == 0.0
    clipping = resumed.optimizer.inner_optimizer
    assert clipping.get_config() == model.optimizer.inner_optimizer.get_config()
    config = clipping.get_config()
    assert (config["clip_factor"], config["epsilon"]) == (FACTOR, 0.01)
    assert config["exclude"] == ["bias", "(^|/)output/"]
    assert config["unit_axes"] == {"hidden/kernel": [-2]}

    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    again = _named_model(seed=2)
    clipping = _agc(exclude=["bias", again.layers[-1]], unit_axes=axes, epsilon=0.01)
    again.compile(GradientAccumulateOptimizer(clipping, 3), "mse")
    again.optimizer.build(again.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=again, optimizer=again.optimizer)
    checkpoint.restore(path).assert_consumed()
    steps(again, 4, 9)
    assert difference(again.get_weights(), undisturbed.get_weights()) == 0.0


def test_weight_files_are_the_inner_optimizers_own(tmp_path):
    clipped, plain = _named_model(), _named_model()
    _train(clipped, _agc(), EFFECTIVE)
    clipped.save_weights(tmp_path / "model.weights.h5")
    plain.compile(_agc().inner_optimizer, "mse")
    plain.optimizer.build(plain.trainable_variables)
    plain.load_weights(tmp_path / "model.weights.h5")
    states = [state_of(model.optimizer.variables) for model in (plain, clipped)]
    assert difference(*states) == 0


def test_callbacks_see_the_inner_optimizers_learning_rate():
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.125)
    optimizer = _agc()
    model = _named_model()
    model.compile(GradientAccumulateOptimizer(optimizer, 2), "mse")
    x, y, _ = regression_data(8)
    model.fit(x, y, batch_size=4, callbacks=[schedule], verbose=0)
    assert float(optimizer.inner_optimizer.learning_rate) == 0.125


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"clip_factor": 0}, ValueError, r"`clip_factor` must be .* > 0. Received: clip_factor=0"),
        ({"clip_factor": None}, TypeError, r"None .*NoneType\). Pass for example clip_factor=0.01"),
        ({"clip_factor": "0.1"}, TypeError, r"clip_factor='0.1' \(of type str\)"),
        ({"epsilon": -1.0}, ValueError, "epsilon=-1.0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon=nan. Pass for example epsilon=1e-3"),
        ({"exclude": "bias"}, TypeError, r'exclude=.bias.\. Pass for example \["bias"\]'),
        ({"exclude": [3]}, TypeError, r"Received: 3 \(of type int\)"),
        ({"exclude": ["("]}, ValueError, "Received: '[(]', where .*re.escape"),
        ({"unit_axes": ["kernel"]}, TypeError, r"unit_axes=\['kernel'\]"),
        ({"unit_axes": {"kernel": 1}}, ValueError, "Received: 1 for 'kernel'"),
        ({"unit_axes": {"kernel": []}}, ValueError, r"Received: \[\] for 'kernel'"),
        ({"unit_axes": {"kernel": None}}, TypeError, "Received: None for 'kernel'"),
        ({"unit_axes": {"kernel": "-1"}}, TypeError, "Received: '-1' for 'kernel'"),
        ({"unit_axes": {"kernel": [-1, -1.0]}}, TypeError, r"Received: \[-1, -1.0\] for"),
        ({"unit_axes": {3: -1}}, TypeError, "Received: 3 as an expression"),
        ({"clipnorm": 1.0}, ValueError, r"clipnorm=1.0\. Pass them to the inner optimizer"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveGradientClipping("sgd", **arguments)


@pytest.mark.fast
def test_what_cannot_be_wrapped():
    with pytest.raises(ValueError, match=r"inside of the accumulation.*Optimizer\(AdaptiveGrad"):
        AdaptiveGradientClipping(GradientAccumulateOptimizer("sgd", 2))
    with pytest.raises(ValueError, match=r"around SGD.*LossScaleOptimizer\(AdaptiveGradient"):
        AdaptiveGradientClipping(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with pytest.raises(TypeError, match="must be a Keras 3 optimizer"):
        AdaptiveGradientClipping(None)
    inner = keras.optimizers.SGD(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        GradientAccumulateOptimizer(AdaptiveGradientClipping(inner), 2)


@pytest.mark.parametrize("argument", [{"exclude": ["biass"]}, {"unit_axes": {"biass": -1}}])
def test_a_pattern_that_matches_nothing_is_told_at_build(argument):
    optimizer = AdaptiveGradientClipping("sgd", **argument)
    with pytest.raises(ValueError, match=r"'biass', for the paths .*/hidden/kernel, "):
        optimizer.build(_named_model().trainable_variables)


def test_axes_that_a_kernel_has_not_are_told_at_build():
    variables = _named_model().trainable_variables
    rank = next(len(v.shape) for v in variables if "hidden/kernel" in v.path)
    # The bias that the expression finds as well is one unit anyway.
    AdaptiveGradientClipping("sgd", unit_axes={"hidden": -rank}).build(variables)
    optimizer = AdaptiveGradientClipping("sgd", unit_axes={"hidden": [-1, -9]})
    message = (
        rf"Received: \(-1, -9\) for 'hidden', .*hidden/kernel' of rank {rank}. Pass .* -{rank}"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.build(variables)


def test_gradients_alone_before_build():
    with pytest.raises(ValueError, match=r"call `optimizer.build\(model.trainable_variables\)`"):
        AdaptiveGradientClipping("sgd").apply([tf.constant(1.0)])
