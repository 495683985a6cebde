"""What `_keras` reads of a layer is still there, and still needed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradient_accumulator_tf import _keras


def test_call_has_training_argument():
    assert _keras.call_has_training_argument(keras.layers.Dropout(0.5))
    assert not _keras.call_has_training_argument(keras.layers.Flatten())


def test_a_mask_travels_from_the_embedding_to_the_loss():
    model = keras.Sequential([keras.layers.Embedding(5, 2, mask_zero=True), keras.layers.Dense(1)])
    mask = _keras.keras_mask(model(np.array([[1, 0, 2]])))
    assert np.asarray(mask).tolist() == [[True, False, True]]
    assert _keras.keras_mask(_keras.set_keras_mask(tf.zeros(3), None)) is None


def test_all_layers_are_found_however_deep():
    inner = keras.layers.Dense(1)
    model = keras.Sequential([keras.Sequential([inner])])
    assert inner in _keras.all_layers(model) and inner not in model.layers
    assert _keras.sublayers(model) == model.layers


class HandsOn(keras.layers.Wrapper):
    def call(self, *args, training=None, **kwargs):
        return self.layer(*args, **kwargs)


def test_arguments_of_a_call_are_read_as_those_of_another_layer():
    x = tf.ones((2, 3, 4))
    wrapper = HandsOn(keras.layers.MultiHeadAttention(1, 2))
    wrapper.layer.build(x.shape, x.shape)
    mixed = {"attention_mask": tf.ones((2, 3, 3)), "use_causal_mask": True}
    with pytest.raises(ValueError, match="cannot mix tensors and non-tensors"):
        wrapper(x, x, **mixed)  # when this does not fail, the signature may stay as it is
    _keras.adopt_call_arguments(wrapper, wrapper.layer)
    assert wrapper(x, x, **mixed).shape == x.shape
    assert _keras.call_has_training_argument(wrapper)
    # For a layer that takes no `training`, and for one that takes what is no tensor.
    wrapper = HandsOn(keras.layers.Flatten())
    _keras.adopt_call_arguments(wrapper, wrapper.layer)
    assert wrapper(x, training=True).shape == (2, 12)


def test_a_symbolic_tensor_outside_of_its_graph():
    x = keras.Input((3,))
    layer = keras.layers.Dense(2)
    y = layer(_keras.outside_graph(x))
    assert y.shape == (None, 2)
    with pytest.raises(ValueError, match=r"(?i)connected"):
        keras.Model(x, y)
    assert not hasattr(_keras.outside_graph(keras.layers.Masking()(x)), "_keras_mask")
    assert _keras.outside_graph(3) == 3
