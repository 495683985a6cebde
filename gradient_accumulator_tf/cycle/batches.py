"""A batch: its number of examples, and the tensors that hold one row for each example.

Within a step such a tensor is cut into micro-batches. Some tensors belong to every example, and
each micro-batch gets them whole: scalars, targets and weights of one row, and the inputs that the
user names in `shared_inputs`. Any other tensor is refused, since nobody knows which of its rows
belong to which example.
"""

import json
import numbers

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import operation_name
from gradient_accumulator_tf.replicated.replicas import on_average_replica, sum_over_replicas

PARTS = ("x", "y", "sample_weight")


def check_shared_inputs(value):
    """The argument `shared_inputs` as a tuple of positions, keys and paths (tuples of both).

    Args:
        value: What the caller passed: None, one position or key, or a list or tuple of entries.

    Raises:
        TypeError: If an entry is neither of these.
        ValueError: If a position is negative, or a path empty.
    """
    if value is None:
        return ()
    if isinstance(value, (str, numbers.Integral)):
        value = [value]
    rule = (
        "`shared_inputs` must be positions or keys in `x`, such as [1] or ['bank'], with tuples "
        "for what is nested, such as [('graph', 0)]."
    )
    received = f"Received: shared_inputs={value!r}"
    if not isinstance(value, (list, tuple)):
        kind = type(value).__name__
        raise TypeError(f"{rule} {received} (of type {kind}). Pass a list of these.")
    entries = []
    for entry in value:
        path = tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
        for key in path:
            if isinstance(key, bool) or not isinstance(key, (str, numbers.Integral)):
                kind = type(key).__name__
                raise TypeError(
                    f"{rule} {received}, with {key!r} (of type {kind}). Pass an integer for a list "
                    "or tuple, and a string for a dict."
                )
        path = tuple(key if isinstance(key, str) else int(key) for key in path)
        if not path:
            raise ValueError(f"{rule} {received}, with {entry!r}. Leave the empty one out.")
        if any(isinstance(key, int) and key < 0 for key in path):
            raise ValueError(f"{rule} {received}, with {entry!r}. Count positions from 0.")
        entries.append(path if len(path) > 1 else path[0])
    return tuple(entries)


def batch_size(data, shared_inputs=()):
    """Number of examples in a batch: an int where it is static, else an int32 scalar.

    Args:
        data: Tuple `(x, y, sample_weight)`, nested, or the first of these.
        shared_inputs: Result of `check_shared_inputs`.

    Raises:
        ValueError: If there is no tensor with a row for each example, or if `shared_inputs`
            names an input that the batch does not have.
    """
    return _rows(_first_of_rows(data, _leaves(data, shared_inputs)).tensor)


class Batch:
    """An effective batch, which can be cut into micro-batches.

    Args:
        data: Nested structure of dense, ragged or sparse tensors and None.
        examples: int or int32 scalar, the rows of a tensor that is cut.
        whole: True, False or a bool scalar for each tensor, in the structure of `data`: whether
            the tensor belongs to every example.

    Attributes:
        data: The nested tensors.
        examples: Number of examples.
    """

    def __init__(self, data, examples, whole):
        self.data, self.examples, self._whole = data, examples, whole

    @classmethod
    def of(cls, data, shared_inputs=()):
        """The batch of the data that a dataset yields. The rows of its tensors are checked.

        If they are not static, an assertion checks them in each step.

        Args:
            data: Tuple `(x, y, sample_weight)`, nested, or the first of these.
            shared_inputs: Result of `check_shared_inputs`.

        Raises:
            ValueError: As for `batch_size`, or if a tensor has neither one row nor one for each
                example.
        """
        leaves = _leaves(data, shared_inputs)
        first = _first_of_rows(data, leaves)
        examples = _rows(first.tensor)
        tensors, whole = [], []
        for leaf in leaves:
            tensor, is_whole = leaf.tensor, not leaf.counts
            if leaf.counts and leaf is not first:
                tensor, is_whole = _checked(leaf, first, examples)
            tensors.append(tensor)
            whole.append(is_whole)
        pack = keras.tree.pack_sequence_as
        return cls(pack(data, tensors), examples, pack(data, whole))

    def inputs(self):
        """The batch of the inputs alone."""
        return Batch(self.data[:1], self.examples, self._whole[:1])

    def counter(self):
        """The batch of the examples' numbers."""
        return Batch((tf.range(self.examples),), self.examples, (False,))

    def slice(self, start, size):
        """The tensors of the examples `start` to `start + size`, nested.

        Args:
            start: int or int32 scalar.
            size: int or int32 scalar.
        """
        return tf.nest.map_structure(
            lambda leaf, whole: _slice(leaf, whole, start, size), self.data, self._whole
        )

    def times_weighed(self, micro_batch_size):
        """The number of micro-batches that get the weights of an example, on an average replica.

        Args:
            micro_batch_size: Examples in a micro-batch.

        Returns:
            Float64 scalars nested like `sample_weight`; None if one micro-batch gets each of them.
        """
        flags = self._whole[2]
        pairs = zip(tf.nest.flatten(self.data[2]), tf.nest.flatten(flags), strict=True)
        if all(weight is None or whole is False for weight, whole in pairs):
            return None
        times = tf.cast(-(-self.examples // micro_batch_size), tf.float64)
        times = on_average_replica(sum_over_replicas(times))
        return tf.nest.map_structure(lambda whole: tf.where(whole, times, 1.0), flags)


def by_identity(structure, values):
    """Dict of `values` by the `id` of the tensors in `structure`, which is nested alike."""
    return dict(zip(map(id, tf.nest.flatten(structure)), tf.nest.flatten(values), strict=True))


class _Leaf:
    """A tensor of a batch, its path, and whether its first dimension may count the examples."""

    def __init__(self, path, tensor, declared):
        self.path, self.tensor = path, tensor
        self.counts = tensor is not None and tensor.shape.rank != 0 and not declared

    @property
    def name(self):
        part, *keys = self.path
        return PARTS[part] + "".join(f"[{json.dumps(key)}]" for key in keys)


def _leaves(data, shared_inputs):
    """List of `_Leaf` in the order in which Keras flattens the batch."""
    paths = [(0, *(e if isinstance(e, tuple) else (e,))) for e in shared_inputs]
    found = set()
    leaves = []
    for path, tensor in keras.tree.flatten_with_path(data):
        above = {p for p in paths if path[: len(p)] == p}
        found |= above
        leaves.append(_Leaf(path, tensor, bool(above)))
    for entry, path in zip(shared_inputs, paths, strict=True):
        if path not in found:
            names = ", ".join(leaf.name for leaf in leaves if leaf.path[0] == 0)
            raise ValueError(
                "`shared_inputs` must name inputs that the batch has. Received: "
                f"shared_inputs={list(shared_inputs)!r} with {entry!r}, and a batch with {names}. "
                "Pass their positions or keys in `x`, and tuples for what is nested."
            )
    return leaves


def _first_of_rows(data, leaves):
    """The first leaf that has a row for each example."""
    for leaf in leaves:
        if leaf.counts:
            return leaf
    raise ValueError(
        "A batch must have at least one tensor whose first dimension counts the examples. "
        f"Received: {data}. Pass an input with a batch dimension, which `shared_inputs` does not "
        "name."
    )


def _static_rows(tensor):
    return None if tensor.shape.rank is None else tensor.shape[0]


def _rows(tensor):
    """The first dimension: an int where it is static, else an int32 scalar."""
    rows = _static_rows(tensor)
    return _shape(tensor)[0] if rows is None else int(rows)


def _shape(tensor):
    """The shape at run time, an int32 vector; for a ragged tensor only the rows."""
    if isinstance(tensor, tf.RaggedTensor):
        return tensor.nrows(tf.int32)[tf.newaxis]
    if isinstance(tensor, tf.SparseTensor):
        return tf.cast(tensor.dense_shape, tf.int32)
    return tf.shape(tensor)


def _checked(leaf, first, examples):
    """The tensor of a leaf, its rows checked, and whether it belongs to every example.

    Raises:
        ValueError: If it has neither one row nor one for each example.
    """
    rule = (
        "Within a step, each tensor of a batch must have one row for each example, or one row for "
        "all. Received:"
    )
    remedy = (
        "If it belongs to every example (a graph, a bank), name it in `shared_inputs`."
        if leaf.path[0] == 0
        else "Give it one row for each example. If it has several for each, reshape it to "
        "(examples, rows, ...)."
    )
    rows = _static_rows(leaf.tensor)
    if rows is not None and isinstance(examples, int):
        if rows in (1, examples):
            return leaf.tensor, rows != examples
        raise ValueError(
            f"{rule} {leaf.name} of shape {tuple(leaf.tensor.shape)} in a batch of {examples} "
            f"examples (the rows of {first.name}). {remedy}"
        )
    if rows == 1:
        return leaf.tensor, True
    is_whole = tf.equal(_rows(leaf.tensor), 1)
    received = [
        f"{rule} {leaf.name} of shape",
        _shape(leaf.tensor),
        f"in a batch of as many examples as {first.name} has rows:",
        examples,
        remedy,
    ]
    name = f"{leaf.name} must have one row or as many as {first.name}, or be in shared_inputs"
    wanted = tf.where(is_whole, 1, examples)
    return with_rows(leaf.tensor, wanted, received, name), is_whole


def checked_targets(y_true, y_pred, examples):
    """The targets, unless both the targets and a model's outputs are one row for several examples.

    Targets of one row belong to all examples, if the model has a row of outputs for each example. A
    model that has one row of outputs for all examples looks across them.

    Args:
        y_true: Targets of one output, of a micro-batch.
        y_pred: That output.
        examples: int or int32 scalar, examples in the micro-batch.

    Raises:
        ValueError: If both have one row.
    """
    is_plain = isinstance(y_true, tf.Tensor) and isinstance(y_pred, tf.Tensor)
    is_one = isinstance(examples, int) and examples == 1
    if not is_plain or is_one or 0 in (y_true.shape.rank, y_pred.shape.rank):
        return y_true
    if _static_rows(y_pred) != 1:
        return y_true
    rule = (
        "Within a step, a model must have one row of outputs for each example, as it sees one "
        f"micro-batch at a time. Received: outputs of shape {tuple(y_pred.shape)} with targets of "
        "shape"
    )
    remedy = (
        "If one row stands for all examples of a batch, pass accum_steps instead of "
        "micro_batch_size."
    )
    if _static_rows(y_true) is None:
        received = [rule, tf.shape(y_true), "for a micro-batch of", examples, remedy]
        name = "y must have one row for each example as the outputs have one"
        return with_rows(y_true, examples, received, name)
    if _static_rows(y_true) == 1:
        raise ValueError(f"{rule} {tuple(y_true.shape)}. {remedy}")
    return y_true


def with_rows(tensor, rows, received, name):
    """The tensor, after a check at run time that it has `rows` rows.

    Args:
        tensor: Dense, ragged or sparse tensor.
        rows: int32 scalar.
        received: List of strings and tensors, the error's message.
        name: The same in few words, for XLA.
    """
    if _keras.compiles_with_xla() and isinstance(tensor, tf.Tensor):
        # XLA leaves assertions out, but knows all sizes. It refuses to compile a reshape that
        # changes a size, and its error has the name of the reshape.
        shape = tf.concat([[rows], tf.shape(tensor)[1:]], 0)
        checked = tf.reshape(tensor, shape, name=operation_name(name))
        return tf.ensure_shape(checked, tensor.shape)
    assertion = tf.debugging.Assert(tf.equal(_rows(tensor), rows), received, summarize=-1)
    with tf.control_dependencies([] if assertion is None else [assertion]):
        return tf.identity(tensor)


def _slice(leaf, whole, start, size):
    if leaf is None or whole is True:
        return leaf
    if whole is not False:
        start, size = tf.where(whole, 0, start), tf.where(whole, 1, size)
    if isinstance(leaf, tf.RaggedTensor):
        return leaf[start : start + size]
    if isinstance(leaf, tf.SparseTensor):
        rest = leaf.dense_shape[1:]
        first, count = tf.cast([start], tf.int64), tf.cast([size], tf.int64)
        return tf.sparse.slice(leaf, tf.concat([first, 0 * rest], 0), tf.concat([count, rest], 0))
    shape = tf.shape(leaf)
    begin = tf.concat([[start], tf.zeros_like(shape[1:])], 0)
    sliced = tf.slice(leaf, begin, tf.concat([[size], shape[1:]], 0))
    if leaf.shape.rank is None:
        return sliced
    return tf.ensure_shape(sliced, [size if isinstance(size, int) else None, *leaf.shape[1:]])
