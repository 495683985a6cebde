"""Tensors of the effective batch in place of a micro-batch's, once all micro-batches have run."""

import dataclasses

import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.batches import batch_size, by_identity, with_rows
from gradient_accumulator_tf.cycle.micro_batches import is_one_micro_batch
from gradient_accumulator_tf.cycle.outputs import parts_of, put_together
from gradient_accumulator_tf.cycle.rows import gathered


class NotRowsError(ValueError):
    """A tensor does not have one row for each example."""


class Gathering:
    """What a loop over micro-batches keeps so that something can see the effective batch.

    In the loop's step: `begin`, then `want` for what is wanted of the effective batch, and `kept`
    is what the step has to keep. After the loop `whole` returns it. A step may be traced more than
    once, each time with other tensors.

    ```python
    def step(micro_batch):
        gathering.begin(micro_batch)
        nonlocal wanted
        wanted = gathering.want(model(micro_batch[0]), "outputs", "Give each example a row.")
        return (), gathering.kept, None

    _, kept, _ = sum_over_micro_batches(step, batch, size, ...)
    outputs = gathering.whole(wanted, kept)
    ```

    Args:
        batch: The effective `Batch`.
        micro_batch_size: Examples in a micro-batch.
        shared_inputs: As for `batch_size`.
        attached: Whether the masks and logits are wanted too that Keras attaches to outputs.

    Attributes:
        kept: List of tensors of the micro-batch, each with a row for each example.
    """

    def __init__(self, batch, micro_batch_size, shared_inputs=(), attached=True):
        self._batch, self._micro_batch_size = batch, micro_batch_size
        self._shared_inputs, self._attached = shared_inputs, attached
        self._is_one = is_one_micro_batch(batch, micro_batch_size)
        self.kept, self._names = [], []

    def begin(self, micro_batch):
        """Forgets what was wanted of another micro-batch, or of an earlier trace of this one.

        Args:
            micro_batch: The slice of the batch.
        """
        self.kept, self._names, self._wanted = [], [], {}
        self._examples = batch_size(micro_batch, self._shared_inputs)
        self._micro_batch = micro_batch  # as long as it is there, no other tensor has its `id`
        self._of_batch = by_identity(micro_batch, self._batch.data)

    def want(self, structure, name, remedy):
        """Notes what is wanted of the effective batch.

        Args:
            structure: Nested tensors of this micro-batch, and anything else. Those that are slices
                of the batch are not kept.
            name: What an error calls it.
            remedy: Sentence with what to do where it has no rows for the examples.

        Returns:
            The argument of `whole`.

        Raises:
            NotRowsError: If a tensor is known not to have a row for each example.
        """
        return tf.nest.map_structure(lambda leaf: self._want(leaf, name, remedy), structure)

    def whole(self, wanted, kept):
        """What was wanted, of the effective batch.

        Args:
            wanted: What `want` returned.
            kept: List of the `Kept` that became of `self.kept`.
        """
        found = [self._gathered(*pair) for pair in zip(kept, self._names, strict=True)]

        def value(leaf):
            if not isinstance(leaf, _Wanted):
                return leaf
            return put_together({kind: found[place] for kind, place in leaf.places.items()})

        return tf.nest.map_structure(value, wanted)

    def _gathered(self, kept, name):
        if self._is_one:
            return kept.rest
        return gathered(kept, self._batch, self._micro_batch_size, name)

    def _want(self, leaf, name, remedy):
        if not _is_tensor(leaf):
            return leaf
        if id(leaf) in self._of_batch:
            return self._of_batch[id(leaf)]
        if id(leaf) not in self._wanted:
            parts = parts_of(leaf) if self._attached else {"output": leaf}
            places = {}
            for kind, part in parts.items():
                places[kind] = len(self.kept)
                self.kept.append(part if self._is_one else self._checked(part, name, remedy))
                self._names.append(name)
            self._wanted[id(leaf)] = leaf, _Wanted(places)
        return self._wanted[id(leaf)][1]

    def _checked(self, tensor, name, remedy):
        rule = (
            f"With `micro_batch_size`, {name} must be dense with one row for each example, since "
            "what sees the effective batch has to gather them. Received:"
        )
        if not isinstance(tensor, tf.Tensor) or not tensor.shape.rank:
            raise NotRowsError(f"{rule} {tensor}. {remedy}")
        if _keras.compiles_with_xla() and not tensor.shape[1:].is_fully_defined():
            raise NotRowsError(
                f"{rule} shape {tuple(tensor.shape)}. With XLA all dimensions but the first must "
                "be static. Give the model's inputs a static shape, or compile with "
                f"jit_compile=False. {remedy}"
            )
        rows, examples = tensor.shape[0], self._examples
        fitting = [n for n in (examples, self._micro_batch_size) if isinstance(n, int)]
        if rows is None:
            received = [rule, tf.shape(tensor), "for examples:", examples, remedy]
            short = f"{name} must have one row for each example"
            return with_rows(tensor, examples, received, short)
        if rows not in fitting:
            raise NotRowsError(f"{rule} shape {tuple(tensor.shape)}. {remedy}")
        return tensor


@dataclasses.dataclass(frozen=True)  # no tuple, so that it is a leaf
class _Wanted:
    """An output, by the places of its parts in what is kept.

    Attributes:
        places: Dict of int by kind, as of `parts_of`.
    """

    places: dict


def _is_tensor(leaf):
    return isinstance(leaf, tf.Tensor | tf.RaggedTensor | tf.SparseTensor)
