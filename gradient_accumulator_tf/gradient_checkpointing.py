"""GradientCheckpoint: a block of a model whose activations are computed twice and not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.replicated.side_effects import RecordingScope, held_back, perform

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradient_accumulator_tf._arguments import LayerArguments


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class GradientCheckpoint(keras.layers.Wrapper):
    """Computes a block's activations again for its gradient, so that none is kept until then.

    Only what enters the block is kept between its forward and its backward pass: a deep net cut
    into such blocks holds one tensor for each of them, and the inside of one at a time, for the
    price of one more forward pass. Where one example alone does not fit, this helps and
    accumulation does not; both add up, with either wrapper.

    Outputs, gradients and what the block changes are those of the block alone: random layers draw
    the same again, moving statistics move once, and metrics and losses inside count once. What
    would not be repeated is TensorFlow's own random operations (`tf.random`): use `keras.random`
    with a `keras.random.SeedGenerator`, as Keras's layers do. What would happen twice is what a
    block does to TensorFlow's own variables (`tf.Variable`): use `add_weight`.

    It is called with what the block is called with, by position or by keyword, such as
    `GradientCheckpoint(MultiHeadAttention(2, 8))(query, value, use_causal_mask=True)`. Gradients
    go to each tensor among these, and each keeps its mask.

    It takes the place of `keras.RematScope`, which raises in graphs on TensorFlow (as of Keras
    3.15).

    Args:
        layer: A `keras.Layer` or a model. Its call may take any arguments: tensors of any shape
            and dtype, nested structures of such, and Python values. Worth it where its inside is
            much larger than what enters it.
        **kwargs: Arguments of `keras.layers.Layer`. `dtype` has no effect: the layer's own counts.

    Raises:
        ValueError: If `layer` is not a Keras layer; and in training, if it assigns values to its
            trainable variables (as `keras.layers.SpectralNormalization` does).

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

    def __init__(self, layer: keras.Layer, **kwargs: Unpack[LayerArguments]) -> None:
        if not isinstance(layer, keras.Layer):
            raise ValueError(
                "`layer` must be a Keras layer or model. "
                f"Received: {layer!r} (of type {type(layer).__name__}). Make a function a layer "
                "with keras.layers.Lambda, or better one of your own."
            )
        super().__init__(layer, **kwargs)
        self.supports_masking = True
        # What it is given and what it holds are the layer's, which converts them itself.
        self.autocast, self.dtype_policy = False, "float32"
        _keras.adopt_call_arguments(self, layer)
        self._built_inside = False

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Builds the layer from the shapes that its own `build` takes.

        Keras calls it without any, and the layer is then built by its first call.
        """
        if (args or kwargs) and not self.layer.built:
            self.layer.build(*args, **kwargs)

    def call(self, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """The block's outputs; its activations are not kept.

        Args:
            *args: The layer's own positional arguments.
            training: Bool or None, as for any layer.
            **kwargs: The layer's own keyword arguments.
        """
        self._build_inside(args, kwargs)
        leaves = tf.nest.flatten((args, kwargs), expand_composites=True)
        masks = [_keras.keras_mask(leaf) for leaf in tf.nest.flatten((args, kwargs))]
        # What a gradient may be wanted of. Bools and strings cannot be computed with.
        places = [i for i, leaf in enumerate(leaves) if _is_numeric(leaf)]
        # What the block changes stays in the scope of each pass; that of the first one counts.
        states = [*self.layer.non_trainable_variables, *self.layer.metrics_variables]
        begins = [(v, tf.convert_to_tensor(v)) for v in states]
        first = []

        def compute(*tensors):
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            own = tf.nest.pack_sequence_as((args, kwargs), given, expand_composites=True)
            _set_masks(tf.nest.flatten(own), masks)
            with held_back() as actions, RecordingScope(begins, collect_losses=True) as scope:
                # Named, as the second pass is outside of the call that layers take it from.
                outputs = self.layer(*own[0], training=training, **own[1])
            masks_out = keras.tree.map_structure(_keras.keras_mask, outputs)
            first.append((scope.changes(), actions, masks_out))
            return outputs, list(scope.losses)

        outputs, losses = tf.recompute_grad(compute)(*(leaves[i] for i in places))
        changes, actions, masks_out = first[0]
        _set_masks(keras.tree.flatten(outputs), keras.tree.flatten(masks_out))
        # The second pass begins as the first one did, with what is not the layer's own as well.
        known = {id(v) for v in states}
        begins += [(v, tf.convert_to_tensor(v)) for v, _ in changes if id(v) not in known]
        for variable, value in changes:
            if variable.trainable:
                self._refuse_assigned(variable)
            variable.assign(value)
        for action in actions:
            perform(action)
        for loss in losses:
            self.add_loss(loss)
        return outputs

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's outputs for symbolic inputs."""
        args, kwargs = keras.tree.map_structure(_keras.outside_graph, (args, kwargs))
        return keras.tree.map_structure(_keras.outside_graph, self.layer(*args, **kwargs))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None, as outputs carry the block's own masks."""
        return None

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output shape, from the shapes that its own method takes."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def _build_inside(self, args, kwargs):
        """Creates the variables that are still to be created, by a call with symbols."""
        if not self._built_inside:
            self._built_inside = True
            if not all(layer.built for layer in _keras.all_layers(self.layer)):
                args, kwargs = tf.nest.map_structure(_symbol, (args, kwargs))
                self.layer(*args, **kwargs)

    def _refuse_assigned(self, variable):
        raise ValueError(
            "`layer` must not assign values to its trainable variables, as their gradients would "
            f"be computed through what is assigned. Received: {self.layer.name!r}, which assigns "
            f"to {variable.path!r}. Leave the layer that does so out of the GradientCheckpoint."
        )


def _is_numeric(leaf):
    """Whether a gradient can go through a leaf, and a number be added to it."""
    if not isinstance(leaf, tf.Tensor):
        return False
    return leaf.dtype.is_floating or leaf.dtype.is_complex or leaf.dtype.is_integer


def _symbol(leaf):
    """A symbolic tensor like a tensor; anything else as it is."""
    if not tf.is_tensor(leaf):
        return leaf
    sparse = isinstance(leaf, tf.SparseTensor)
    symbol = keras.KerasTensor(leaf.shape, leaf.dtype.name, sparse=sparse)
    mask = _keras.keras_mask(leaf)
    return _keras.set_keras_mask(symbol, None if mask is None else _symbol(mask))


# Tensors lose their masks on the way through a function with a gradient of its own.


def _set_masks(tensors, masks):
    for tensor, mask in zip(tensors, masks, strict=True):
        _keras.set_keras_mask(tensor, mask)
