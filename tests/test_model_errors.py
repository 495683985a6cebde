"""Wrong uses of GradientAccumulateModel are refused, with the value that was received."""

import re

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from tests.oracle import dense_model, in_way, regression_data


def raises(error, *texts):
    """`pytest.raises` for a message that holds each of `texts`, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(text) for text in texts))


@pytest.mark.fast
def test_exactly_one_mode_is_needed():
    remedy = "Pass micro_batch_size if the effective batch can be loaded at once, or else"
    with raises(ValueError, "Exactly one", "accum_steps=None, micro_batch_size=None", remedy):
        GradientAccumulateModel(model=dense_model())
    with raises(ValueError, "Exactly one", "accum_steps=2, micro_batch_size=4", remedy):
        GradientAccumulateModel(model=dense_model(), accum_steps=2, micro_batch_size=4)


@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_at_least_one(mode, value):
    with raises(ValueError, f"`{mode}` must be an integer >= 1", f"Received: {mode}={value}"):
        GradientAccumulateModel(model=dense_model(), **{mode: value})


@pytest.mark.parametrize("value", [2.5, 4.0, "4", True, [4], np.float32(4)], ids=repr)
def test_sizes_are_integers(mode, value):
    received = f"Received: {mode}={value!r} (of type {type(value).__name__})"
    with raises(TypeError, f"`{mode}` must be an integer", received):
        GradientAccumulateModel(model=dense_model(), **{mode: value})


def test_integers_of_numpy_are_integers(mode):
    model = GradientAccumulateModel(model=dense_model(), **{mode: np.int64(4)})
    assert type(getattr(model, mode)) is int


@pytest.mark.fast
def test_a_model_comes_alone():
    model = dense_model()
    with raises(ValueError, "not both", "model=<Sequential", "`inputs` and `outputs` alone"):
        GradientAccumulateModel(
            inputs=model.inputs, outputs=model.outputs, model=model, accum_steps=2
        )
    with raises(ValueError, "not both", "outputs=None"):
        GradientAccumulateModel(inputs=model.inputs, model=model, accum_steps=2)


def test_inputs_and_outputs_come_together():
    model = dense_model()
    with raises(ValueError, "given together", "outputs=None"):
        GradientAccumulateModel(inputs=model.inputs, accum_steps=2)
    with raises(ValueError, "given together", "inputs=None"):
        GradientAccumulateModel(outputs=model.outputs, accum_steps=2)


@pytest.mark.parametrize("value", [keras.layers.Dense, "resnet", 3, lambda x: x])
def test_only_keras_models_are_wrapped(value):
    with raises(TypeError, "`model` must be a Keras 3 model", repr(value), type(value).__name__):
        GradientAccumulateModel(model=value, accum_steps=2)


def test_a_layer_is_no_model():
    with raises(TypeError, "`model` must be a Keras 3 model", "<Dense", "Dense)"):
        GradientAccumulateModel(model=keras.layers.Dense(1), accum_steps=2)


@pytest.mark.parametrize(
    "method", ["train_step", "test_step", "predict_step", "compute_loss", "compute_metrics"]
)
def test_a_model_with_a_training_method_of_its_own_is_not_wrapped(method):
    own = type("Trainer", (keras.Model,), {method: lambda self, *args, **kwargs: None})
    with raises(ValueError, "cannot be wrapped", f"Trainer with its own {method}", "Derive"):
        GradientAccumulateModel(model=own(), accum_steps=2)


@pytest.mark.fast
def test_a_model_is_not_wrapped_twice():
    model = GradientAccumulateModel(model=dense_model(), accum_steps=2)
    with raises(ValueError, "not wrapped twice", "accumulates by itself", "model.model"):
        GradientAccumulateModel(model=model, micro_batch_size=2)
    GradientAccumulateModel(model=model.model, micro_batch_size=2)


def test_the_first_argument_is_no_number():
    inputs = keras.Input((5,))
    outputs = keras.layers.Dense(1)(inputs)
    with raises(TypeError, "first argument", "Received: 4", "accum_steps=4", "micro_batch_size=4"):
        GradientAccumulateModel(4, inputs=inputs, outputs=outputs)
    with raises(TypeError, "`model` must be a Keras 3 model", "<Dense"):
        GradientAccumulateModel(keras.layers.Dense(1), accum_steps=4)


def test_a_model_or_inputs_are_given_once():
    model, inputs = dense_model(), keras.Input((5,))
    with raises(ValueError, "`model` must be given once", "<Sequential"):
        GradientAccumulateModel(model, model=model, accum_steps=4)
    with raises(ValueError, "`inputs` must be given once", "<KerasTensor"):
        GradientAccumulateModel(inputs, inputs=inputs, outputs=inputs, accum_steps=4)
    with raises(ValueError, "not both"):
        GradientAccumulateModel(model, inputs=inputs, outputs=inputs, accum_steps=4)


@pytest.mark.fast
def test_an_unknown_argument_is_named():
    with raises(ValueError, "Received: acum_steps=4", "Did you mean accum_steps?", "outputs"):
        GradientAccumulateModel(dense_model(), acum_steps=4)
    with raises(ValueError, "Received: steps=4, micro_batchsize=2", "accum_steps and micro"):
        GradientAccumulateModel(dense_model(), steps=4, micro_batchsize=2, accum_steps=2)
    model = GradientAccumulateModel(dense_model(), accum_steps=2, name="ours", trainable=False)
    assert model.name == "ours" and not model.trainable


def test_sizes_are_what_tensorflow_can_count():
    with raises(ValueError, f"micro_batch_size={2**31}. Pass at most {2**31 - 1}"):
        GradientAccumulateModel(dense_model(), micro_batch_size=2**31)
    with raises(ValueError, f"accum_steps={2**70}. Pass at most {2**63 - 1}"):
        GradientAccumulateModel(dense_model(), accum_steps=2**70)
    GradientAccumulateModel(dense_model(), accum_steps=2**63 - 1)


def test_what_is_set_later_is_checked_or_refused():
    model = GradientAccumulateModel(dense_model(), micro_batch_size=2)
    with raises(ValueError, "`micro_batch_size` must be an integer >= 1", "micro_batch_size=0"):
        model.micro_batch_size = 0
    with raises(TypeError, "`micro_batch_size` must be an integer", "micro_batch_size=None"):
        model.micro_batch_size = None
    for name, value in (("batch_norm", "exact"), ("non_finite", "drop_cycle")):
        with raises(AttributeError, f"{name}={value!r}, in place of", "model.model", repr(value)):
            setattr(model, name, value)
    assert (model.micro_batch_size, model.batch_norm) == (2, "micro_batch")
    model = GradientAccumulateModel(model.model, accum_steps=2)
    with raises(ValueError, "no meaning with `accum_steps`", "micro_batch_size=4"):
        model.micro_batch_size = 4
    assert model.micro_batch_size is None


@pytest.mark.fast
def test_training_needs_an_optimizer(mode):
    model, *_ = in_way(mode, dense_model())
    model.compile(optimizer=None, loss="mse")
    x, y, _ = regression_data(12)
    assert model.evaluate(x, y, verbose=0) > 0
    for train in (model.fit, model.train_on_batch):
        with raises(ValueError, "needs an optimizer", "compile(optimizer=None)", '"adam"'):
            train(x, y)


WRONG = {
    "a vector": (lambda y: y[:, 0], ValueError, "shape (4,)"),
    "a string": (lambda y: "none", TypeError, "'none' (of type str)"),
    "a bool": (lambda y: y[0, 0] > 0, TypeError, "bool"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_what_is_no_scalar_is_no_loss_and_no_weight(wrong, mode):
    make, error, received = WRONG[wrong]

    class OwnLoss(GradientAccumulateModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return make(y_pred)

    class OwnWeight(GradientAccumulateModel):
        def micro_batch_weight(self, x, y, sample_weight):
            return make(y)

    x, y, _ = regression_data(12)
    for cls, name in ((OwnLoss, "compute_loss"), (OwnWeight, "micro_batch_weight")):
        model, _, batch_size = in_way(mode, dense_model(), cls=cls)
        model.compile("sgd", "mse")
        with raises(error, f"`{name}` must return a", received):
            model.fit(x, y, batch_size=batch_size, verbose=0)


def test_an_integer_is_a_weight_but_no_loss():
    class Own(GradientAccumulateModel):
        def micro_batch_weight(self, x, y, sample_weight):
            return 3

    x, y, _ = regression_data(12)
    model = Own(dense_model(), micro_batch_size=4)
    model.compile("sgd", "mse")
    model.fit(x, y, batch_size=12, verbose=0)
    assert int(model.optimizer.iterations) == 1
    model.compute_loss = lambda *args, **kwargs: 3
    model.compile("sgd", "mse")
    with raises(TypeError, "`compute_loss` must return a scalar", "3 (of type int)"):
        model.fit(x, y, batch_size=12, verbose=0)


def test_a_train_step_of_ones_own_excludes_splitting_it():
    class OwnStep(GradientAccumulateModel):
        def train_step(self, data):
            return super().train_step(data)

    with raises(ValueError, "micro_batch_size", "OwnStep with a `train_step`", "accum_steps"):
        OwnStep(model=dense_model(), micro_batch_size=4)
    model = OwnStep(model=dense_model(), accum_steps=2)
    model.compile("sgd", loss="mse")
    x, y, _ = regression_data(4)
    model.train_on_batch(x, y)
    assert int(model.optimizer.micro_step) == 1


def test_a_subclass_with_a_call_takes_no_model():
    class OwnCall(GradientAccumulateModel):
        def call(self, inputs):
            return inputs

    with raises(ValueError, "defines `call`", "OwnCall with model=<Sequential"):
        OwnCall(model=dense_model(), accum_steps=2)
    with raises(NotImplementedError, "GradientAccumulateModel must wrap a model or define `call`"):
        GradientAccumulateModel(accum_steps=2)(np.ones((1, 5)))


def test_an_optimizer_that_accumulates_too_is_refused(mode):
    model, *_ = in_way(mode, dense_model())
    received = f"accum_steps={model.accum_steps}, micro_batch_size={model.micro_batch_size}"
    for wrap in (lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = wrap(GradientAccumulateOptimizer("sgd", accum_steps=7))
        with raises(ValueError, "must not do it as well", "accum_steps=7", received):
            model.compile(optimizer, loss="mse")


def test_keras_own_accumulation_is_refused(mode):
    model, *_ = in_way(mode, dense_model())
    with raises(ValueError, "gradient_accumulation_steps=7"):
        model.compile(keras.optimizers.SGD(gradient_accumulation_steps=7), loss="mse")


@pytest.mark.parametrize("by", ["OptimizerMap", "function"])
def test_an_optimizer_that_accumulates_within_another_is_refused(by):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip(f"Keras {keras.__version__} has no MultiOptimizer")
    x, y, _ = regression_data(12)
    for part, received in (
        (keras.optimizers.Adam(gradient_accumulation_steps=7), "gradient_accumulation_steps=7"),
        (GradientAccumulateOptimizer("adam", 7), "accum_steps=7"),
        (keras.optimizers.Adam(), None),
    ):
        # A function is asked for its optimizers only when they are built.
        parts = keras.optimizers.OptimizerMap(part) if by == "OptimizerMap" else lambda v, p=part: p
        model = GradientAccumulateModel(dense_model(), micro_batch_size=4)
        if received is None:
            model.compile(keras.optimizers.MultiOptimizer(parts), loss="mse")
            model.fit(x, y, batch_size=12, verbose=0)
            assert int(part.iterations) == 1
            continue
        with raises(ValueError, "must not do it as well", received, "micro_batch_size=4"):
            model.compile(keras.optimizers.MultiOptimizer(parts), loss="mse")
            model.fit(x, y, batch_size=12, verbose=0)
        assert int(part.iterations) == 0


def test_an_optimizer_of_the_same_accum_steps_is_used_as_it_is():
    model, *_ = in_way("accum_steps", dense_model())
    optimizer = GradientAccumulateOptimizer("sgd", accum_steps=3)
    model.compile(optimizer, loss="mse")
    assert model.optimizer is optimizer


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "unfrozen"])
def test_a_change_of_what_is_trainable_needs_a_new_compile(mode, trainable):
    model, _, batch_size = in_way(mode, dense_model())
    x, y, _ = regression_data(12)
    model.layers[0].trainable = not trainable
    model.compile("sgd", loss="mse")
    model.fit(x, y, batch_size, verbose=0)
    model.layers[0].trainable = trainable
    before = model.get_weights()
    with raises(ValueError, "without a new `compile`", "kernel", f"trainable={trainable}"):
        model.train_on_batch(x, y)
    model.compile("sgd", loss="mse")
    model.fit(x, y, batch_size, verbose=0)
    moved = [
        float(np.abs(w - b).max()) > 0 for w, b in zip(model.get_weights(), before, strict=True)
    ]
    assert moved == [trainable, trainable, True, True]


def test_training_needs_compile(mode):
    model, _, batch_size = in_way(mode, dense_model())
    x, y, _ = regression_data(12)
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y, batch_size, verbose=0)
    assert model.predict(x, verbose=0).shape == (12, 1)


@pytest.mark.fast
def test_a_model_with_nothing_to_train_says_so(mode):
    model, _, batch_size = in_way(mode, dense_model())
    model.trainable = False
    model.compile("sgd", loss="mse")
    x, y, _ = regression_data(12)
    before = model.get_weights()
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        history = model.fit(x, y, batch_size, verbose=0).history
    assert history["loss"][0] > 0
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
