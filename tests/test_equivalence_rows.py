"""check_equivalence and embeddings: Keras's treatment of repeated rows is named, and set apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import (
    AdaptiveGradientClipping,
    GradientAccumulateModel,
    GradientAccumulateOptimizer,
    check_equivalence,
)
from tests.oracle import difference

X = np.random.default_rng(0).integers(0, 6, size=(16, 3))
Y = np.random.default_rng(1).normal(size=(16, 1))


class OwnStep(keras.Sequential):
    """Has the usual `train_step` of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def net(*layers, cls=keras.Sequential):
    keras.utils.set_random_seed(1)
    embedding = keras.layers.Embedding(64, 4, name="embedding")
    layers = [embedding, *layers, keras.layers.Flatten(), keras.layers.Dense(1)]
    return cls([keras.Input((3,), dtype="int32"), *layers], name="net")


def compiled(model, optimizer, **arguments):
    model.compile(optimizer, "mse", **arguments)
    return model


def check(model, x=X, **arguments):
    return check_equivalence(model, x, Y, verbose=0, updates=2, **arguments)


def in_keras(optimizers):
    """The optimizers that the installed Keras has."""
    return {n: o for n, o in optimizers.items() if hasattr(keras.optimizers, n.split()[0])}


def of(name, rate=0.1, **arguments):
    return lambda: getattr(keras.optimizers, name)(rate, **arguments)


DIFFER = in_keras(
    {
        "Adam": of("Adam"),
        "AdamW": of("AdamW"),
        "RMSprop": of("RMSprop"),
        "Adadelta": of("Adadelta"),
        "Adagrad": of("Adagrad"),
        "Adamax": of("Adamax"),
        "Adafactor": of("Adafactor"),
        "Nadam": of("Nadam"),
        "Ftrl": of("Ftrl"),
        "Lamb": of("Lamb"),
        "Muon": of("Muon"),
        "ScheduleFreeAdamW": of("ScheduleFreeAdamW"),
        "SGD that clips by norm": of("SGD", clipnorm=0.1),
        "SGD that clips by global norm": of("SGD", global_clipnorm=0.1),
        "SGD that clips by value": of("SGD", clipvalue=0.02),
    }
)
SAME = {
    "SGD": of("SGD"),
    "SGD with momentum": of("SGD", momentum=0.9, nesterov=True),
    "SGD that need not clip": of("SGD", clipnorm=100.0),
    "Lion": of("Lion"),
    "AdaptiveGradientClipping": lambda: AdaptiveGradientClipping(keras.optimizers.Adam(0.1)),
}


@pytest.mark.parametrize("name", list(DIFFER))
def test_repeated_rows_are_named_and_set_apart(name):
    model = compiled(net(), DIFFER[name](), run_eagerly=True)
    report = check(model, micro_batch_size=4)
    assert report.equivalent, report
    (cause,) = report.causes
    assert cause.kind == "repeated_rows" and cause.where == ("net/embedding/embeddings",)
    assert "tf.IndexedSlices" in cause.advice and "Nothing has to be done" in cause.advice
    assert all(v.relative < 1e-3 for v in report.variables)
    assert "large batch of 16 with repeated rows added first, 2 updates" in report.setting
    assert "Equivalent, but for Keras's treatment of repeated rows:" in str(report)


@pytest.mark.parametrize("name", list(SAME))
def test_an_optimizer_that_adds_repeated_rows_right_is_equivalent(name):
    report = check(compiled(net(), SAME[name](), run_eagerly=True), micro_batch_size=4)
    assert report.equivalent and not report.causes
    assert report.setting.endswith("against the large batch of 16, 2 updates")


WAYS = {
    "micro_batch_size, XLA": lambda: (
        compiled(net(), "adam", jit_compile=True),
        {"micro_batch_size": 4},
    ),
    "accum_steps": lambda: (compiled(net(), "adam"), {"accum_steps": 4}),
    "GradientAccumulateModel": lambda: (
        compiled(GradientAccumulateModel(model=net(), accum_steps=4), "adam"),
        {},
    ),
    "GradientAccumulateOptimizer, own train_step": lambda: (
        compiled(net(cls=OwnStep), GradientAccumulateOptimizer("adam", 4)),
        {},
    ),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_repeated_rows_in_every_way_to_accumulate(way):
    model, arguments = WAYS[way]()
    report = check(model, **arguments)
    assert report.equivalent, report
    assert [(c.kind, c.where) for c in report.causes] == [
        ("repeated_rows", ("net/embedding/embeddings",))
    ]


@pytest.mark.fast
def test_rows_that_are_not_repeated_are_no_cause():
    report = check(compiled(net(), "adam"), x=np.arange(48).reshape(16, 3), micro_batch_size=4)
    assert report.equivalent and not report.causes


def test_what_else_differs_is_named_beside_repeated_rows():
    model = compiled(net(keras.layers.Dropout(0.5)), "adam", run_eagerly=True)
    report = check(model, micro_batch_size=4)
    assert not report.equivalent
    assert [cause.kind for cause in report.causes] == ["random", "repeated_rows"]
    assert "Not equivalent" in str(report)


def trained(way=None, value=None, dense=False):
    """The weights after two updates of Adam, in one of the ways to accumulate."""
    model, optimizer, size = net(), keras.optimizers.Adam(0.1), 16
    if dense:
        apply = optimizer.apply
        optimizer.apply = lambda grads, v: apply([tf.convert_to_tensor(g) for g in grads], v)
    if way == "optimizer":
        optimizer, size = GradientAccumulateOptimizer(optimizer, value), 16 // value
    elif way is not None:
        model = GradientAccumulateModel(model=model, **{way: value})
        size = 16 if way == "micro_batch_size" else 16 // value
    compiled(model, optimizer).fit(X, Y, batch_size=size, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.fast
def test_the_update_is_the_dense_gradients_but_for_one_micro_batch_per_update():
    dense, sparse = trained(dense=True), trained()
    assert difference(dense, sparse) > 1e-2
    for way, values in {
        "micro_batch_size": (4, 2**31 - 1),  # in several pieces, and in one
        "accum_steps": (4,),
        "optimizer": (4,),
    }.items():
        for value in values:
            assert difference(trained(way, value), dense) < 1e-5
    # accum_steps=1 is the inner optimizer, bit for bit.
    assert difference(trained("accum_steps", 1), sparse) == 0
    assert difference(trained("optimizer", 1), sparse) == 0
