"""Float8 layers, whose scales and histories are overwritten with their "gradients"."""

import keras
import numpy as np
import pytest

from tests.oracle import EFFECTIVE, KERAS, MICRO, difference, in_way, mirrored, regression_data

STEPS = EFFECTIVE // MICRO


def float8_model():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)]
    )
    for layer in model.layers:
        layer.quantize("float8")
    return model


def trained(way, **compile_with):
    """Dict of lists: the trained weights, and by a part of its name each overwritten variable."""
    model, optimizer = float8_model(), keras.optimizers.Adam(0.01)
    if way == "keras":
        optimizer.gradient_accumulation_steps, batch_size = STEPS, MICRO
    else:
        model, optimizer, batch_size = in_way(way, model, optimizer)
    model.compile(optimizer, "mse", **compile_with)
    x, y, _ = regression_data(4 * EFFECTIVE, features=16)
    model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    result = {"weights": []}
    for v in model.trainable_variables:
        overwritten = v.overwrite_with_gradient
        result.setdefault(v.name if overwritten else "weights", []).append(v.numpy())
    return result


# Eagerly, Keras's float8 layers fail by themselves.
graph_and_jit = pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])

OVERWRITTEN = [
    f"{what}_{value}"
    for what in ("inputs", "kernel", "outputs_grad")
    for value in ("scale", "amax_history")
]


@graph_and_jit
def test_within_a_step_all_is_as_with_the_large_batch(jit):
    if jit and KERAS < (3, 10):
        pytest.skip("XLA of TensorFlow 2.16 rounds float8 otherwise: the large batch is 12 % off")
    large = trained("plain")
    result = trained("micro_batch_size", jit_compile=jit)
    assert set(result) == {"weights", *OVERWRITTEN}
    for name in OVERWRITTEN:
        # A float8 has three bits of mantissa, so what another rounding moves, it moves far.
        for value, expected in zip(result[name], large[name], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-6, err_msg=name)
    assert difference(result["weights"], large["weights"]) < 1e-3
    # All that one micro-batch's values, or their mean, would not be.
    assert np.count_nonzero(large["inputs_amax_history"][0]) == 8


@graph_and_jit
def test_across_steps_all_is_as_with_keras_own_accumulation(jit):
    expected = trained("keras", jit_compile=jit)
    result = trained("optimizer", jit_compile=jit)
    for name in OVERWRITTEN:
        for value, other in zip(result[name], expected[name], strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-2, atol=1e-6, err_msg=name)
    assert difference(result["weights"], expected["weights"]) < 1e-3

    # The model's gradients are those of sums, so it keeps their largest in another unit.
    of_sums = trained("accum_steps", jit_compile=jit)
    assert difference(of_sums["weights"], expected["weights"]) < 1e-3
    for name in OVERWRITTEN[:4]:
        assert difference(of_sums[name], expected[name]) < 1e-3
    ratio = of_sums["outputs_grad_amax_history"][1][0] / expected["outputs_grad_amax_history"][1][0]
    np.testing.assert_allclose(ratio, MICRO, rtol=1e-2)


def test_across_steps_the_largest_inputs_are_the_large_batchs():
    # Keras's accumulation and ours quantise gradients of micro-batches, which are larger.
    large, result = trained("plain"), trained("optimizer")
    for name in OVERWRITTEN[:4]:
        for value, expected in zip(result[name], large[name], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-6, err_msg=name)
    assert difference(result["outputs_grad_scale"], large["outputs_grad_scale"]) > 1e-6


@pytest.mark.parametrize("way", ["optimizer", "micro_batch_size"])
def test_replicas_agree_on_the_largest(way):
    if way == "micro_batch_size" and KERAS < (3, 10):
        pytest.skip("Keras before 3.10 has metrics of each replica's own")
    with mirrored().scope():
        result = trained(way)
    alone = trained(way)
    for name in OVERWRITTEN[:4]:
        for value, expected in zip(result[name], alone[name], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-6, err_msg=name)
