"""Layers, variables and slots of a copy are known by path and identity, not by position."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._keras.layer_pairs import paired_layers, paired_variables
from gradient_accumulator_tf._keras.model_copies import carry_state, copy_model
from tests.oracle import KERAS

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


class Task(keras.Model):
    """Holds its layers before its graph does, in another order."""

    def __init__(self):
        self.head = keras.layers.Dense(3, name="head")
        self.preprocessor = keras.layers.Rescaling(2.0, name="preprocessor")
        inputs = keras.Input((3,))
        body = keras.layers.Dense(3, "tanh", name="body")
        super().__init__(inputs, self.head(body(self.preprocessor(inputs))))


class Blocks(keras.Model):
    """Layers in attributes, lists and dicts, whose names are new in every copy."""

    def __init__(self, share=True):
        super().__init__()
        self.blocks = [keras.layers.Dense(3), keras.layers.Dense(3)]
        self.named = {"out": keras.layers.Dense(3)}
        self.again = self.blocks[1] if share else keras.layers.Dense(3)

    def call(self, x):
        return self.again(self.named["out"](self.blocks[1](self.blocks[0](x))))

    def get_config(self):
        return {}


def graph():
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(3)(inputs)))


def with_head():
    model = graph()
    model.beside = {"head": keras.layers.Dense(3, name="beside")}
    model.beside["head"].build((None, 3))
    model.beside["head"].trainable = False
    return model


def blocks(**arguments):
    model = Blocks(**arguments)
    model(X)
    return model


# Keras 3.8 refuses to copy such a class, and takes no layers beside a graph for the model's.
newer = pytest.mark.skipif(KERAS < (3, 10), reason="Keras 3.8 knows of no such layers")


@pytest.mark.parametrize("make", [pytest.param(Task, marks=newer), with_head, blocks])
def test_a_copy_has_each_layers_own_state(make):
    model = make()
    layers = [v for v in _keras.all_layers(model) if isinstance(v, keras.layers.Dense)]
    for i, layer in enumerate(layers):
        layer.set_weights([w + i + 1.0 for w in layer.get_weights()])
    layers[0].trainable = False
    copy, pairs = copy_model(model, X[:1])
    assert {id(a) for a, _ in pairs} == {id(v) for v in model.variables}
    assert {id(b) for _, b in pairs} == {id(v) for v in copy.variables}
    for a, b in pairs:
        assert a is not b and a.trainable == b.trainable
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        if make is not blocks:
            assert a.path.split("/")[-2:] == b.path.split("/")[-2:]
    np.testing.assert_array_equal(model(X), copy(X))
    for a, b in paired_layers(model, copy):
        assert a is not b and a.trainable == b.trainable


@pytest.mark.parametrize("own", [True, False])
def test_layers_named_anew_are_known_by_their_place_or_attribute(own):
    old, new = (blocks(), blocks()) if own else (with_head(), with_head())
    assert [v.path for v in old.variables] != [v.path for v in new.variables]
    pairs = carry_state(old, new, X[:1])
    assert len(pairs) == len(old.variables)
    np.testing.assert_array_equal(old(X), new(X))


def test_a_random_state_is_paired():
    old, new = (keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.5)]) for _ in "ab")
    old(X, training=True)
    pairs = paired_variables(paired_layers(old, new))
    assert [a.path for a, _ in pairs] == [v.path for v in old.variables] and len(pairs) == 1


def dense(units, name="layer", kind=keras.layers.Dense):
    return keras.Sequential([keras.Input((3,)), kind(units, name=name)], name="net")


@pytest.mark.parametrize(
    "old, new, message",
    [
        (blocks, lambda: blocks(share=False), "is shared in one and not in the other.*'dense"),
        (lambda: blocks(share=False), blocks, "is shared in one and not in the other.*'dense"),
        pytest.param(
            with_head, graph, "holds Dense 'beside' in one, and nothing in its place", marks=newer
        ),
        pytest.param(
            graph, with_head, "holds Dense 'beside' in the other, and nothing", marks=newer
        ),
        (lambda: dense(3), lambda: dense(4), r"layer/kernel \(3, 3\).*layer/kernel \(3, 4\)"),
        (
            lambda: dense(3),
            lambda: dense(3, kind=keras.layers.RepeatVector),
            "net/layer is Dense 'layer' in one, RepeatVector 'layer' in the other",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused_by_name(old, new, message):
    with pytest.raises(ValueError, match=message):
        carry_state(old(), new(), X[:1])


def test_a_copied_optimizer_has_the_slots_of_the_same_variables():
    old, new = blocks(), blocks()
    pairs = carry_state(old, new, X[:1])
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    excluded = old.blocks[1].kernel
    optimizer.exclude_from_weight_decay(var_list=[excluded])
    backwards = old.trainable_variables[::-1]
    unbuilt = _keras.copied_optimizer(optimizer, pairs)
    assert not unbuilt._use_weight_decay(new.blocks[1].kernel)
    optimizer.build(backwards)
    optimizer.apply([i + np.ones(v.shape) for i, v in enumerate(backwards)], backwards)
    for a, b in pairs:
        b.assign(a)
    copy = _keras.copied_optimizer(optimizer, pairs)
    twins = {id(a): b for a, b in pairs}
    for o, variables in ((optimizer, backwards), (copy, [twins[id(v)] for v in backwards])):
        o.apply([np.ones(v.shape) for v in variables], variables)
    for a, b in pairs:
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        assert copy._use_weight_decay(b) == (a is not excluded)
    with pytest.raises(ValueError, match=r"the optimizer trains .*kernel.*model does not have"):
        _keras.copied_optimizer(optimizer, pairs[:1])


@pytest.mark.parametrize("kind", ["Adafactor", "Adam"])
def test_a_rebuilt_optimizer_knows_variables_of_one_path_apart(kind):
    first, second, third = (
        keras.Variable(np.ones((2, 2), "float32"), name="kernel") for _ in range(3)
    )
    optimizer = getattr(keras.optimizers, kind)(0.1)
    optimizer.build([first, second])
    optimizer.apply([np.full((2, 2), 3.0), np.full((2, 2), 5.0)], [first, second])
    copy = _keras.rebuilt_optimizer(optimizer, [third, second, first])
    names = ("_r", "_c", "_v") if kind == "Adafactor" else ("_momentums", "_velocities")
    for name in names:
        old, new = getattr(optimizer, name), getattr(copy, name)
        np.testing.assert_array_equal(new[1].numpy(), old[1].numpy())
        np.testing.assert_array_equal(new[2].numpy(), old[0].numpy())
        assert not np.any(new[0].numpy()) and np.any(old[0].numpy() != old[1].numpy())
    assert int(copy.iterations.numpy()) == 1
