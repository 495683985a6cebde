"""The loop over micro-batches, and what is left after it."""

import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import GradientAccumulateModel
from gradient_accumulator_tf.cycle.batches import Batch
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from tests.oracle import dense_model

MICRO = 3


def _looped(execution, examples=None):
    """Function of x and y that sums x, keeps 2 x, reads it again, and returns the last maximum.

    If `examples` is given, it is traced for this number.
    """

    def both(x, y):
        batch = Batch.of((x, y, None))

        def zeros(like):
            return tf.zeros(like.shape, like.dtype)

        def add(total, new):
            return total + new

        def keep(micro_batch):
            x, *_ = micro_batch
            return tf.reduce_sum(x, 0), [2 * x], {"largest": tf.reduce_max(x), "nothing": None}

        def read(micro_batch, doubled):
            _, y, _ = micro_batch
            return tf.reduce_sum(doubled * y, 0), [], ()

        total, kept, result = sum_over_micro_batches(keep, batch, MICRO, zeros, add)
        product, _, _ = sum_over_micro_batches(read, batch, MICRO, zeros, add, kept)
        return total, product, result["largest"]

    if execution == "eager":
        return both
    spec = tf.TensorSpec((examples, 2))
    return tf.function(both, (spec, spec), jit_compile=execution == "xla", autograph=False)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("execution", ["eager", "graph", "xla"])
def test_sums_what_is_kept_and_the_last_result_for_any_batch(execution, known):
    looped = _looped(execution)
    rng = np.random.default_rng(0)
    for examples in (1, MICRO - 1, MICRO, MICRO + 1, 2 * MICRO, 3 * MICRO - 1):
        if known:
            looped = _looped(execution, examples)
        x, y = rng.normal(size=(2, examples, 2)).astype("float32")
        last = x[(examples - 1) // MICRO * MICRO :]
        total, product, largest = looped(tf.constant(x), tf.constant(y))
        np.testing.assert_allclose(total, x.sum(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(product, (2 * x * y).sum(0), rtol=1e-5, atol=1e-5)
        assert float(largest) == last.max()


def test_a_batch_without_examples_sums_to_zero():
    # As of a replica that the last batch leaves nothing for.
    total, product, _ = _looped("graph")(tf.zeros((0, 2)), tf.zeros((0, 2)))
    assert total.numpy().tolist() == product.numpy().tolist() == [0, 0]


def test_xla_compiles_a_micro_batch_once_unless_the_last_is_smaller():
    model = GradientAccumulateModel(model=dense_model(), micro_batch_size=4)
    model.compile("sgd", loss="mse")
    step = tf.function(model.train_step, jit_compile=True, autograph=False)

    def products(examples):
        batch = (tf.ones((examples, 5)), tf.ones((examples, 1)))
        return step.experimental_get_compiler_ir(batch)(stage="hlo").count(" dot(")

    spec = (tf.TensorSpec((None, 5)), tf.TensorSpec((None, 1)))
    step.get_concrete_function(spec)
    assert products(16) == products(8)
    assert products(10) == 2 * products(8)
