"""What `_keras` reads of functional graphs is still there, and still needed."""

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import _keras


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


def test_which_models_are_functional():
    inputs = keras.Input((2,))
    functional = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert _keras.is_functional(functional) and _keras.is_functional(keras.Sequential())
    assert not _keras.is_functional(keras.layers.Dense(1))


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


def test_a_sequential_model_may_have_no_graph():
    class NotSymbolic(keras.layers.Layer):
        def call(self, inputs):
            return keras.ops.convert_to_tensor(np.asarray(inputs))

    deferred = keras.Sequential([keras.layers.Dense(2)])
    assert not _keras.has_graph(deferred)
    deferred(np.ones((4, 3)))
    nested = keras.Sequential([keras.layers.Add()])
    nested([np.ones((4, 3)), np.ones((4, 3))])
    numbers = keras.Sequential([NotSymbolic(), keras.layers.Dense(2)])
    numbers(np.ones((4, 3)))
    built = [deferred, nested, numbers]
    assert [model.built for model in built] == [True, True, True]
    assert [_keras.has_graph(model) for model in built] == [True, False, False]
    assert [_keras.is_plain_functional(model) for model in built] == [True, False, False]


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
