"""The examples that check_equivalence trains on: arrays, strings, datasets."""

import inspect

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf._checks import check_positive_int


def effective_batches(x, y, sample_weight, batch_size, updates):
    """The data of the effective batches to train on.

    Args:
        x: Inputs as for `fit`: an array or tensor, a nested structure of such, or a
            `tf.data.Dataset`.
        y: Targets, or None.
        sample_weight: Weights, or None.
        batch_size: Integer >= 1, or None for all examples.
        updates: Integer >= 1, the number of effective batches.

    Returns:
        `(x, y, sample_weight)` of arrays and ragged tensors, and the examples of each effective
        batch by their index: an integer array of shape `(updates, batch_size)`.

    Raises:
        TypeError: If `x` is neither, such as a generator.
        ValueError: If there is less than an effective batch, or the sizes do not fit each other.
    """
    if batch_size is not None:
        batch_size = check_positive_int(
            "batch_size",
            batch_size,
            "examples of an effective batch",
            "Leave it out for one batch of all examples.",
        )
    if isinstance(x, tf.data.Dataset):
        if y is not None or sample_weight is not None:
            raise ValueError(
                "`y` and `sample_weight` must not be given with a tf.data.Dataset, which yields "
                f"them. Received: y of type {type(y).__name__}, sample_weight of type "
                f"{type(sample_weight).__name__}. Leave them out, and "
                "let the dataset yield (x, y) or (x, y, sample_weight)."
            )
        data = _from_dataset(x, None if batch_size is None else updates * batch_size)
    else:
        data = tuple(
            _as_arrays(value, name)
            for name, value in (("x", x), ("y", y), ("sample_weight", sample_weight))
        )
    examples = _number_of_examples(data)
    size = examples if batch_size is None else batch_size
    if size > examples:
        raise ValueError(
            "`x` must have at least one effective batch. Received: "
            f"{examples} examples with batch_size={size}. Pass more data or a smaller batch_size."
        )
    batches = np.arange(examples // size * size).reshape(-1, size)
    return data, batches[np.arange(updates) % len(batches)]


def rows(data, index):
    """The examples of an index, as `fit` takes them: strings as tensors."""

    def take(array):
        if array is None:
            return None
        if isinstance(array, tf.RaggedTensor):
            return tf.gather(array, index)
        array = array[index]
        return tf.constant(array) if array.dtype == object else array

    return tf.nest.map_structure(take, data)


def _as_arrays(value, name):
    """A nested structure with an array in place of each leaf."""
    if isinstance(value, dict):
        return {key: _as_arrays(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        if not (value and all(isinstance(item, str | bytes) for item in value)):
            items = [_as_arrays(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if value is None or isinstance(value, tf.RaggedTensor):
        return value
    if inspect.isgenerator(value) or isinstance(value, keras.utils.PyDataset):
        array = None
    else:
        array = np.asarray(value)
        if array.dtype.kind in "US":
            array = array.astype(object)
    if array is None or not array.ndim or (array.dtype == object and not _are_strings(array)):
        raise TypeError(
            "`x`, `y` and `sample_weight` must be arrays or tensors with one row for each example, "
            "strings too, or nested structures of such, or `x` a tf.data.Dataset. Received: "
            f"{name} of type {type(value).__name__}. Of a generator or a keras.utils.PyDataset "
            "take one batch or several: x, y = next(generator), or x, y = dataset[0]; of a sparse "
            "tensor its dense form: tf.sparse.to_dense(x)."
        )
    return array


def _are_strings(array):
    return all(isinstance(item, str | bytes) for item in array.flat)


def _number_of_examples(data):
    """The examples that all arrays of `(x, y, sample_weight)` have.

    Raises:
        ValueError: If they have not the same number, or none.
    """
    names = ("x", "y", "sample_weight")
    sizes = {
        name: sorted({_length(a) for a in tf.nest.flatten(part) if a is not None})
        for name, part in zip(names, data, strict=True)
    }
    known = {size for found in sizes.values() for size in found}
    if len(known) == 1 and 0 not in known:
        return known.pop()
    received = ", ".join(
        f"{name} of {' and '.join(map(str, found))}" for name, found in sizes.items() if found
    )
    raise ValueError(
        "`x`, `y` and `sample_weight` must have the same number of examples, at least 1. Received: "
        f"{received or 'no array'} examples. Pass arrays with one row for each example; repeat "
        "what belongs to all examples, as np.repeat(a, len(y), axis=0) does for one row."
    )


def _length(array):
    return int(array.nrows()) if isinstance(array, tf.RaggedTensor) else len(array)


def _from_dataset(dataset, needed):
    """`(x, y, sample_weight)` of a dataset's first `needed` examples, or of all (None)."""
    if needed is None and dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`batch_size` must be given with a dataset without an end, of which not all examples "
            "can be one effective batch. Received: batch_size=None, and a dataset of infinite "
            "cardinality. Pass batch_size, or dataset.take(n)."
        )
    parts, examples = [], 0
    for element in dataset:
        part = _as_arrays(keras.utils.unpack_x_y_sample_weight(element), "the dataset's element")
        parts.append(part)
        examples += _length(next(a for a in tf.nest.flatten(part) if a is not None))
        if needed is not None and examples >= needed:
            break
    if not parts:
        raise ValueError(
            "`x` must have at least one effective batch. Received: an empty dataset. Pass one that "
            "yields batches: a generator that was read to its end yields nothing, and a `filter` "
            "or `skip` may leave nothing."
        )
    try:
        return tf.nest.map_structure(_joined, *parts)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            "The batches of a dataset must have the same shape but for the number of examples, as "
            f"their examples are put together. Received: batches that do not fit: {error} Pad them "
            "alike (dataset.padded_batch with padded_shapes), or pass one batch as arrays."
        ) from error


def _joined(*arrays):
    if arrays[0] is None:
        return None
    ragged = isinstance(arrays[0], tf.RaggedTensor)
    return tf.concat(arrays, 0) if ragged else np.concatenate(arrays)
