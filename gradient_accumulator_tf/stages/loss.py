"""The loss over the outputs of all examples, as a node behind a model's outputs.

The loss reads tensors with one row for each example: the model's outputs, the logits and masks that
Keras attaches to them, and what layers gave to `add_loss`.
"""

import keras
import tensorflow as tf

from gradient_accumulator_tf.cycle import outputs
from gradient_accumulator_tf.cycle.losses import counts_as_sum


class LossNode:
    """The last node of a model with a loss over all examples.

    What it reads is known once the model's outputs are: `take` is called with these each time that
    the model is computed for a micro-batch.

    Attributes:
        barrier: The `Barrier` that computes the loss; set once it is made.
        inputs: Tuple of the keys of what the loss reads; empty before `take`.
    """

    barrier = None

    def __init__(self):
        self.inputs = ()
        self._structure = None

    def take(self, y_pred, losses=(), weight=None):
        """Takes a micro-batch's outputs apart.

        Args:
            y_pred: The model's outputs, nested.
            losses: List of what layers gave to `add_loss`.
            weight: Scalar that scalars in `losses` count for; None is the number of examples.

        Returns:
            Dict of tensors of one row for each example, by key.

        Raises:
            ValueError: If an output has no such rows.
        """
        leaves = keras.tree.flatten(y_pred)
        self._structure = keras.tree.pack_sequence_as(y_pred, list(range(len(leaves))))
        taken = {}
        for i, leaf in enumerate(leaves):
            if leaf is None:
                continue
            _check_output(i, leaf)
            taken.update(((kind, i), part) for kind, part in outputs.parts_of(leaf).items())
        first = next(iter(taken.values()))
        rows = tf.shape(first)[0]
        for i, loss in enumerate(losses):
            if counts_as_sum(loss, first.shape[0]):
                total = tf.reduce_sum(loss)
                taken["sum", i] = tf.fill([rows], total / tf.cast(rows, total.dtype))
            else:
                taken["mean", i] = tf.fill([rows], loss)
        if weight is not None and losses:
            taken["weight", 0] = tf.fill(
                [rows], tf.cast(weight, tf.float64) / tf.cast(rows, tf.float64)
            )
        self.inputs = tuple(taken)
        return taken

    def name_of(self, key):
        """What one of the inputs is called in errors."""
        kind, i = key
        return f"the {kind} of output {i}" if kind in ("logits", "mask") else f"output {i}"

    def put_together(self, tensors):
        """The reverse of `take`, for all examples.

        Args:
            tensors: List of tensors with the rows of all examples, in the order of `inputs`.

        Returns:
            The outputs, nested, with their masks and logits; and a list of scalars: what the large
            batch would have given to `add_loss`, where a sum is added up already.
        """
        taken = dict(zip(self.inputs, tensors, strict=True))

        def output(i):
            parts = {kind: taken[kind, i] for kind in outputs.KINDS if (kind, i) in taken}
            return outputs.put_together(parts) if parts else None

        y_pred = keras.tree.map_structure(output, self._structure)
        losses, weights = [], taken.get(("weight", 0))
        for (kind, _), rows in taken.items():
            if kind == "sum":
                losses.append(tf.reduce_sum(rows))
            elif kind == "mean" and weights is None:
                losses.append(_mean(rows, tf.ones_like(rows)))
            elif kind == "mean":
                losses.append(_mean(rows, tf.cast(weights, rows.dtype)))
        return y_pred, losses


def _mean(rows, weights):
    return tf.math.divide_no_nan(tf.reduce_sum(rows * weights), tf.reduce_sum(weights))


def _check_output(i, leaf):
    rule = (
        "With coupled_loss each output of the model must be a dense tensor with one row for each "
        "example, as the loss reads those of all micro-batches together."
    )
    if not isinstance(leaf, tf.Tensor):
        raise ValueError(
            f"{rule} Received: output {i}, a {type(leaf).__name__}. Make it dense in the model, "
            "such as with to_tensor()."
        )
    if leaf.shape.rank == 0:
        raise ValueError(
            f"{rule} Received: output {i}, a scalar. If it is a variable, let the loss read that; "
            "or repeat it, such as with keras.ops.broadcast_to(scalar, (examples, 1))."
        )
