"""Bad input: each message tells the rule, what was received, and what to do instead."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import AdaptiveGradientClipping, GradientAccumulateOptimizer
from tests.oracle import dense_model, regression_data


@pytest.mark.fast
@pytest.mark.parametrize(
    "value, error", [(0, ValueError), (-1, ValueError)] + [(v, TypeError) for v in (2.5, "4", True)]
)
def test_accum_steps_must_be_a_positive_integer(value, error):
    with pytest.raises(error, match=rf"must be an integer >= 1.*accum_steps={value!r}"):
        GradientAccumulateOptimizer("adam", accum_steps=value)


def test_accum_steps_none_is_told_like_any_other_value():
    with pytest.raises(TypeError, match=r"accum_steps=None \(of type NoneType\).*accum_steps=8"):
        GradientAccumulateOptimizer("adam", accum_steps=None)


@pytest.mark.fast
@pytest.mark.parametrize(
    "inner, message",
    [
        (lambda: keras.optimizers.Adam(gradient_accumulation_steps=4), "_accumulation_steps=4"),
        (lambda: GradientAccumulateOptimizer("sgd", 3), "accum_steps=3.*[Ww]rap once"),
        (
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
            r"around Adam.*LossScaleOptimizer\(GradientAccumulateOptimizer",
        ),
    ],
)
def test_inner_optimizers_that_cannot_be_wrapped(inner, message):
    with pytest.raises(ValueError, match=message):
        GradientAccumulateOptimizer(inner(), 2)


@pytest.mark.parametrize(
    "part, message",
    [
        (lambda: keras.optimizers.Adam(gradient_accumulation_steps=2), "_accumulation_steps=2"),
        (lambda: GradientAccumulateOptimizer("sgd", 3), "accum_steps=3.*[Ww]rap once"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "around the whole"),
    ],
)
@pytest.mark.parametrize(
    "wrap", [lambda o: GradientAccumulateOptimizer(o, 2), AdaptiveGradientClipping]
)
def test_multi_optimizer_with_an_accumulating_part(part, message, wrap):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip(f"Keras {keras.__version__} has no MultiOptimizer")
    parts = keras.optimizers.OptimizerMap(part())
    with pytest.raises(ValueError, match=message):
        wrap(keras.optimizers.MultiOptimizer(parts))


def test_wrapped_twice_with_another_wrapper_between():
    clipped = AdaptiveGradientClipping("sgd")
    clipped.inner_optimizer = GradientAccumulateOptimizer("sgd", 3)
    with pytest.raises(ValueError, match=r"accum_steps=3.*[Ww]rap once"):
        GradientAccumulateOptimizer(clipped, 2)


@pytest.mark.parametrize("wrap", [lambda o: GradientAccumulateOptimizer(o, 2), lambda o: o])
def test_keras_own_accumulation_set_later(wrap):
    optimizer = wrap(AdaptiveGradientClipping("sgd"))
    optimizer.gradient_accumulation_steps = None
    with pytest.raises(ValueError, match=r"Received: gradient_accumulation_steps=2\. Set accum_st"):
        optimizer.gradient_accumulation_steps = 2
    assert optimizer.gradient_accumulation_steps is None


def test_keras_own_accumulation_set_later_on_the_inner_optimizer():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    optimizer.inner_optimizer.gradient_accumulation_steps = 3
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3"):
        optimizer.build([keras.Variable(0.0)])


def test_more_micro_batches_than_can_be_counted():
    largest = 2**63 - 1
    assert GradientAccumulateOptimizer("sgd", largest).accum_steps == largest
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    for refused in (
        lambda: GradientAccumulateOptimizer("sgd", 2**70),
        lambda: GradientAccumulateOptimizer("sgd", {0: 2**63}),
        lambda: setattr(optimizer, "accum_steps", 2**70),
    ):
        with pytest.raises(ValueError, match=rf"accum_steps(\[0\])?=\d+\. Pass at most {largest}"):
            refused()


@pytest.mark.fast
def test_what_it_shows_of_itself():
    assert repr(GradientAccumulateOptimizer("adam", 8)) == (
        "GradientAccumulateOptimizer(Adam, accum_steps=8)"
    )
    optimizer = GradientAccumulateOptimizer(
        AdaptiveGradientClipping("sgd"), {0: 1}, reduction="sum", non_finite="drop_cycle"
    )
    assert repr(optimizer) == (
        "GradientAccumulateOptimizer(AdaptiveGradientClipping(SGD), "
        "accum_steps=PiecewiseConstantSteps({0: 1}), reduction='sum', non_finite='drop_cycle')"
    )
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    optimizer.build([keras.Variable(0.0)])
    optimizer.accum_steps = 4
    assert repr(optimizer) == "GradientAccumulateOptimizer(SGD, accum_steps=4)"


@pytest.mark.parametrize("module", ["tf_keras.src.optimizers.adam", "keras.optimizers.legacy"])
def test_legacy_optimizers_are_told_apart(module):
    legacy = type("Adam", (), {"__module__": module})()
    with pytest.raises(TypeError, match=rf"{module}.Adam.*pass the one of the same name"):
        GradientAccumulateOptimizer(legacy, 2)


@pytest.mark.parametrize("value", [None, 3, keras.layers.Dense(1), keras.optimizers.Adam])
def test_what_is_no_optimizer(value):
    with pytest.raises(TypeError, match=r'Pass for example keras.optimizers.Adam.*"adam"'):
        GradientAccumulateOptimizer(value, 2)


def test_an_unknown_name_is_keras_own_error():
    with pytest.raises(Exception, match="nonsense"):
        GradientAccumulateOptimizer("nonsense", 2)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["clipnorm", "weight_decay", "use_ema", "learning_rate"])
def test_arguments_of_the_inner_optimizer_are_refused(name):
    with pytest.raises(ValueError, match=rf"Received: {name}=0.5\. Pass them to the inner"):
        GradientAccumulateOptimizer("adam", 2, **{name: 0.5})


def test_negative_weight():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises(ValueError, match=r"must not be negative. Received: weight=-1.0"):
        optimizer.apply([tf.constant(1.0)], [keras.Variable(0.0)], weight=-1.0)


def test_unknown_variable_after_trainable_was_changed():
    x, y, _ = regression_data(8)
    model = dense_model()
    model.layers[0].trainable = False
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=4, verbose=0)
    model.layers[0].trainable = True
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match=r"(?s)unknown variable, .*kernel.*new optimizer"):
        model.fit(x, y, batch_size=4, verbose=0)


def test_fewer_gradients_than_variables():
    variables = [keras.Variable(0.0), keras.Variable(0.0)]
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises(ValueError, match="Received: 1 gradients for 2 variables"):
        optimizer.apply([tf.constant(1.0)], variables)


def test_gradients_alone_before_build():
    with pytest.raises(ValueError, match=r"call `optimizer.build\(model.trainable_variables\)`"):
        GradientAccumulateOptimizer("sgd", 2).apply([tf.constant(1.0)])


def test_no_gradient_at_all():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    with pytest.raises(ValueError, match="None for every one of 1 variables"):
        optimizer.apply([None], [keras.Variable(0.0)])


def test_set_weights_of_another_length():
    optimizer = GradientAccumulateOptimizer("sgd", 2)
    optimizer.build([keras.Variable(0.0)])
    with pytest.raises(ValueError, match="Received: 1 arrays"):
        optimizer.set_weights([0.0])


@pytest.mark.fast
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_gradient_has_the_shape_of_its_variable(accum_steps):
    variable = keras.Variable(np.ones((2, 3), "float32"), name="table")
    optimizer = GradientAccumulateOptimizer("sgd", accum_steps)
    optimizer.build([variable])
    received = r"shape \(1, 3\) for table of shape \(2, 3\)"
    with pytest.raises(ValueError, match=received):
        optimizer.apply([tf.ones((1, 3))], [variable])
    with pytest.raises(ValueError, match=r"shape \(1, 4\) for table"):
        optimizer.apply([tf.IndexedSlices(tf.ones((1, 4)), [0])], [variable])
    apply = tf.function(
        lambda gradient: optimizer.apply([gradient], [variable]),
        input_signature=[tf.TensorSpec(None)],
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="gradient_of_table"):
        apply(tf.ones((1, 3)))
    np.testing.assert_array_equal(variable, np.ones((2, 3)))
    for _ in range(accum_steps):
        apply(tf.ones((2, 3)))
    np.testing.assert_allclose(variable, np.full((2, 3), 0.99), rtol=1e-6)
