"""GradientCheckpoint: a block of a model whose activations are computed twice and not kept."""

import keras
import tensorflow as tf

from gradient_accumulator_tf import _compat


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class GradientCheckpoint(keras.layers.Wrapper):
    """Computes a block's activations again for its gradient, so that none is kept until then.

    Only what enters the block is kept between its forward and its backward pass: a deep net cut
    into such blocks holds one tensor for each of them, and the inside of one at a time, for the
    price of one more forward pass. Where one example alone does not fit, this helps and
    accumulation does not; both add up, with either wrapper.

    Outputs, gradients and what the block changes are those of the block alone: random layers draw
    the same again, moving statistics move once, and losses added inside count once. What would not
    be repeated is TensorFlow's own random operations (`tf.random`): use `keras.random` with a
    `keras.random.SeedGenerator`, as Keras's layers do.

    It takes the place of `keras.RematScope`, which raises in graphs on TensorFlow (as of Keras
    3.15).

    Args:
        layer: A `keras.Layer` or a model with one call argument besides `training` and `mask`: a
            tensor of any shape and dtype, or a nested structure of such. Worth it where its
            inside is much larger than what enters it.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `layer` is not a Keras layer.

    Reference:
        Chen et al., 2016, Training deep nets with sublinear memory cost.

    Example:
    ```python
    import keras
    import numpy as np
    from gradient_accumulator_tf import GradientAccumulateModel, GradientCheckpoint

    def block():
        inputs = keras.Input((32, 32, 8))
        x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
        x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(x)
        return keras.Model(inputs, keras.layers.Add()([inputs, x]))

    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, padding="same")(inputs)
    for _ in range(4):
        x = GradientCheckpoint(block())(x)
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling2D()(x))
    model = GradientAccumulateModel(inputs=inputs, outputs=outputs, micro_batch_size=2)
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 32, 32, 3)), np.ones((8, 1)), batch_size=8)
    ```
    """

    def __init__(self, layer, **kwargs):
        if not isinstance(layer, keras.Layer):
            raise ValueError(
                "`layer` must be a Keras layer or model. "
                f"Received: {layer!r} (of type {type(layer).__name__}). Make a function a layer "
                "with keras.layers.Lambda, or better one of your own."
            )
        super().__init__(layer, **kwargs)
        self.supports_masking = True

    def call(self, inputs, training=None, mask=None):
        """The block's outputs for `inputs`; its activations are not kept."""
        # What the block changes stays in the scope of each pass; that of the first one counts.
        states = self.layer.non_trainable_variables
        values = [tf.convert_to_tensor(v) for v in states]
        first = []

        def compute(inputs):
            _set_masks(inputs, mask)
            mapping = zip(states, values, strict=True)
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
                # Named, as the second pass is outside of the call that layers take it from.
                outputs = self.layer(inputs, training=training)
            ends = [scope.get_current_value(v) for v in states]
            first.append((ends, keras.tree.map_structure(_compat.keras_mask, outputs)))
            return outputs, list(scope.losses)

        outputs, losses = tf.recompute_grad(compute)(inputs)
        ends, masks = first[0]
        _set_masks(outputs, masks)
        for variable, value, end in zip(states, values, ends, strict=True):
            if end is not value:
                variable.assign(end)
        for loss in losses:
            self.add_loss(loss)
        return outputs

    def compute_mask(self, inputs, previous_mask):
        """None, as outputs carry the block's own masks."""
        return None

    def compute_output_shape(self, input_shape):
        """The block's output shape."""
        return self.layer.compute_output_shape(input_shape)


# Tensors lose their masks on the way through a function with a gradient of its own.


def _set_masks(tensors, masks):
    if masks is not None:
        pairs = zip(keras.tree.flatten(tensors), keras.tree.flatten(masks), strict=True)
        for tensor, mask in pairs:
            _compat.set_keras_mask(tensor, mask)
