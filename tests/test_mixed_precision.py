"""Sixteen bits: sums in float32, a thousand of them, and one cast at the update."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import WAYS, difference, in_way, mirrored

STEPS = 1024
SIXTEEN_BITS = ["float16", "bfloat16"]
POLICIES = ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"]
# The error of adding n numbers of one sign one after the other is at most n u of their sum
# (Higham, Accuracy and Stability of Numerical Algorithms, 4.2); u is half the last place's weight.
ROUNDING = STEPS * 2.0**-24


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


class Record(keras.optimizers.SGD):
    """Keeps the gradients that an update is given, as they are."""

    def build(self, variables):
        super().build(variables)
        self.seen = [tf.Variable(tf.zeros(v.shape, "float64")) for v in variables]
        self.given = None

    def apply(self, grads, trainable_variables=None):
        self.given = [g.dtype.name for g in grads]
        for seen, gradient in zip(self.seen, grads, strict=True):
            seen.assign(tf.cast(gradient, "float64"))
        super().apply(grads, trainable_variables)


def _tiny(dtype, largest=2e-3):
    """Numbers, as a dtype holds them, that their sum swallows in sixteen bits."""
    values = np.random.default_rng(0).uniform(0.05, 1.0, size=STEPS) * largest
    return tf.cast(tf.constant(values), dtype)


@pytest.mark.parametrize(
    "execution, dtype",
    [
        ("eager", "bfloat16"),
        *(("graph", dtype) for dtype in (*SIXTEEN_BITS, "float32")),
        ("jit", "float16"),
    ],
)
def test_a_thousand_tiny_gradients(execution, dtype):
    gradients = _tiny(dtype)
    variable, inner = keras.Variable(1.0, dtype=dtype), Record(1.0)
    optimizer = GradientAccumulateOptimizer(inner, STEPS, reduction="sum")
    optimizer.build([variable])
    step = lambda g: optimizer.apply([g], [variable])  # noqa: E731
    if execution != "eager":
        step = tf.function(step, jit_compile=execution == "jit")
    for gradient in gradients:
        step(gradient)
    exact = np.sum(tf.cast(gradients, "float64").numpy())
    assert int(optimizer.iterations) == 1
    assert inner.given == ["float32"]
    assert abs(inner.seen[0].numpy() - exact) <= ROUNDING * exact
    if dtype != "float32":
        # In the gradients' own dtype the sum loses much of them.
        total = gradients[0]
        for gradient in gradients[1:]:
            total += gradient
        assert abs(float(total) - exact) > 10 * ROUNDING * exact


@pytest.mark.parametrize(
    "policy, way, replicas",
    [
        *((policy, way, 1) for policy in POLICIES for way in WAYS),
        ("mixed_float16", "accum_steps", 2),
        ("bfloat16", "micro_batch_size", 2),
    ],
    indirect=["policy"],
)
def test_a_thousand_micro_batches_of_a_model(way, policy, replicas):
    # Each gradient is one input, exactly, and so is its share in the mean, a power of two. They
    # are tiny beside their sum.
    x = _tiny("bfloat16" if "bfloat16" in policy else "float16", largest=2.0)
    x = tf.cast(x, "float32").numpy()[:, np.newaxis]
    strategy = mirrored() if replicas == 2 else tf.distribute.get_strategy()
    with strategy.scope():
        inputs = keras.Input((1,))
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model, optimizer = keras.Model(inputs, layer(inputs)), Record(1.0)
        sizes = {"steps": STEPS // replicas, "micro": replicas, "replicas": replicas}
        model, compiled, batch_size = in_way(way, model, optimizer, **sizes)
        # A scale would be a power of two, which changes no digit.
        model.compile(compiled, loss=lambda y, y_pred: y_pred, auto_scale_loss=False)
    model.fit(x, np.zeros((STEPS, 1)), batch_size=batch_size, shuffle=False, verbose=0)
    exact = np.mean(x.astype("float64"))
    assert optimizer.given == ["float32"]
    mean = float(tf.convert_to_tensor(optimizer.seen[0])[0, 0])
    assert abs(mean - exact) <= ROUNDING * exact
    # One rounding to the variable's dtype, of the gradient and then of the step.
    kernel = model.trainable_variables[0]
    expected = "float32" if policy.startswith("mixed") else policy
    assert keras.backend.standardize_dtype(kernel.dtype) == expected
    step = tf.cast(tf.constant(mean), expected)
    once = tf.ones((), expected) - step
    assert float(tf.convert_to_tensor(kernel)[0, 0]) == float(once)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("way", ["optimizer", "micro_batch_size"])
def test_the_mean_is_cast_once_and_not_on_its_way(way, dtype):
    last = 2.0 ** (-10 if dtype == "float16" else -7)  # weight of the last place of 1
    parts = [1.0 + last * (i % 8 > 2) for i in range(16)]
    # Their mean is 1 + 10 / 16 last, and not even half of them is there before the last.
    variable = keras.Variable([[2.0]], dtype=dtype)
    if way == "optimizer":
        optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 16)
        for part in parts:
            optimizer.apply([tf.constant([[part]], dtype)], [variable])
        value = variable.numpy()
    else:
        inputs = keras.Input((1,), dtype=dtype)
        layer = keras.layers.Dense(1, use_bias=False, dtype=dtype)
        model = keras.Model(inputs, layer(inputs))
        layer.kernel.assign(variable)
        model = GradientAccumulateModel(model=model, micro_batch_size=1)
        model.compile(keras.optimizers.SGD(1.0), lambda y, y_pred: y_pred)
        model.fit(np.array(parts)[:, None], np.zeros((16, 1)), batch_size=16, verbose=0)
        value = layer.kernel.numpy()
    assert float(value[0, 0]) == 2.0 - (1.0 + last)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_accumulators_are_float32_whatever_the_gradients_are(dtype):
    variables = [keras.Variable(tf.zeros(3), dtype=dtype), keras.Variable(tf.zeros(3))]
    optimizer = GradientAccumulateOptimizer("adam", 4)
    optimizer.build(variables)
    sums = [v for n, v in optimizer._accumulator.state.items() if "gradient_sum" in n]
    assert [v.dtype for v in sums] == [tf.float32, tf.float32]
    slices = tf.IndexedSlices(tf.ones((2, 4), dtype), tf.constant([0, 2]), tf.constant([3, 4]))
    table = keras.Variable(tf.zeros((3, 4)), dtype=dtype)
    optimizer = GradientAccumulateOptimizer(keras.optimizers.SGD(1.0), 300)
    for _ in range(300):
        optimizer.apply([slices], [table])
    assert difference([table.numpy()[:, 0]], [[-1, 0, -1]]) == 0.0
