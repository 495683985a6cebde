"""Argument checks with one form of message: the rule, what was received, what to do instead."""

import difflib
import math
import numbers
import operator
from typing import Any, Generic, NoReturn, TypeVar

import keras

T = TypeVar("T")

# What an int64 variable counts to.
LARGEST_INT = 2**63 - 1


def check_positive_int(name, value, meaning, instead=None, largest=LARGEST_INT):
    """Returns `value` as a Python int, or raises if it is not a whole number of at least 1.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        meaning: What one unit of it is, for the message ("micro-batches per update").
        instead: A sentence, what to pass in place of a number below 1, for the message.
            None: that 1 or more will do.
        largest: What `value` may be at most.

    Raises:
        TypeError: If `value` is not an integer (a bool is not).
        ValueError: If it is smaller than 1, or larger than `largest`.
    """
    rule = f"`{name}` must be an integer >= 1 ({meaning})."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{rule} Received: {name}={value!r} (of type {type(value).__name__}). "
            f"Pass a whole number such as {name}=8."
        )
    if value < 1:
        instead = instead or f"Pass {name}=1 or more."
        raise ValueError(f"{rule} Received: {name}={value!r}. {instead}")
    if value > largest:
        raise ValueError(f"{rule} Received: {name}={value!r}. Pass at most {largest}.")
    return int(value)


def check_steps(value, meaning):
    """`check_positive_int` for `accum_steps` of an optimizer or a model."""
    instead = "Pass accum_steps=1 to train without accumulation."
    return check_positive_int("accum_steps", value, meaning, instead)


def check_number(name, value, instead):
    """Returns `value` as a float, or raises if it is not a finite number above 0.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        instead: A sentence for the message: what to pass.

    Raises:
        TypeError: If `value` is not a real number (a bool is not).
        ValueError: If it is not finite, or not positive.
    """
    rule = f"`{name}` must be a finite number > 0."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise TypeError(f"{rule} Received: {name}={value!r} (of type {kind}). {instead}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{rule} Received: {name}={value!r}. {instead}")
    return float(value)


def check_choice(name, value, choices):
    """Raises ValueError if `value` is not one of the strings `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be {quoted(choices)}. Received: {name}={value!r}. "
            f'Pass one of these, such as {name}="{closest(value, choices)}".'
        )


def quoted(choices):
    """The strings `choices` as an error lists them."""
    return " or ".join(f'"{choice}"' for choice in choices)


def closest(value, choices):
    """The one of `choices` that `value` may be a slip of, or the first."""
    similar = similar_name(value, choices) if isinstance(value, str) else None
    return similar or choices[0]


def check_keras_model(value, instead, kind="a Keras 3 model"):
    """Raises TypeError if `value` is not a `keras.Model`.

    Args:
        value: What the caller passed as `model`.
        instead: A sentence, what to pass in its place, for the message.
        kind: What `model` must be, for the message.
    """
    if not isinstance(value, keras.Model):
        name = qualified_name(value)
        if is_of_older_keras(name):
            instead = f"{instead} A model of tf_keras (Keras 2) must be built again with `keras`."
        raise TypeError(f"`model` must be {kind}. Received: {value!r} (of type {name}). {instead}")


def qualified_name(value):
    """Name of the class of `value`, with its module."""
    return f"{type(value).__module__}.{type(value).__name__}"


def is_of_older_keras(name):
    """Whether a class of that qualified name is one of Keras 2 or of TensorFlow itself."""
    return "tf_keras" in name or "legacy" in name or name.startswith("tensorflow.python")


def operation_name(text):
    """A name for a TensorFlow operation, which errors show, made from words."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text)


def similar_name(name, names):
    """The one of `names` that `name` may be a slip of, or None."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def refuse_arguments(owner, arguments, instead):
    """Raises if any of `arguments` (a dict of keyword arguments) was passed to `owner`."""
    if arguments:
        received = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{owner} does not take these arguments. Received: {received}. {instead}")


class FixedAttribute(Generic[T]):
    """An attribute that can be read, and whose setting is refused with what to do instead.

    Args:
        kept_in: The attribute that keeps the value; may have dots.
        doc: The docstring.
        instead: A sentence for the message; `{name}` and `{value!r}` in it are filled in.
    """

    def __init__(self, kept_in: str, doc: str, instead: str) -> None:
        self._get = operator.attrgetter(kept_in)
        self._instead = instead
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        of_class: Any = self
        return of_class if instance is None else self._get(instance)

    def __set__(self, instance: Any, value: NoReturn) -> NoReturn:
        name = self._name
        raise AttributeError(
            f"`{name}` is given to the constructor, and cannot be set. Received: {name}={value!r}, "
            f"in place of {self._get(instance)!r}. {self._instead.format(name=name, value=value)}"
        )
