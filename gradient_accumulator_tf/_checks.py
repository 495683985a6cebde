"""Argument checks with one form of message: the rule, what was received, what to do instead."""

import math
import numbers

# What an int64 variable counts to.
LARGEST_INT = 2**63 - 1


def check_positive_int(
    name, value, meaning, instead="to train without accumulation", largest=LARGEST_INT
):
    """Returns `value` as a Python int, or raises if it is not a whole number of at least 1.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        meaning: What one unit of it is, for the message ("micro-batches per update").
        instead: What the value 1 is for, for the message.
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
        raise ValueError(f"{rule} Received: {name}={value!r}. Pass {name}=1 {instead}.")
    if value > largest:
        raise ValueError(f"{rule} Received: {name}={value!r}. Pass at most {largest}.")
    return int(value)


def check_number(name, value):
    """Returns `value` as a float, or raises if it is not a finite number above 0.

    Raises:
        TypeError: If `value` is not a real number (a bool is not).
        ValueError: If it is not finite, or not positive.
    """
    rule = f"`{name}` must be a finite number > 0."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{rule} Received: {name}={value!r} (of type {type(value).__name__}).")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{rule} Received: {name}={value!r}.")
    return float(value)


def check_choice(name, value, choices):
    """Raises ValueError if `value` is not one of the strings `choices`."""
    if not isinstance(value, str) or value not in choices:
        known = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be {known}. Received: {name}={value!r}.")


def refuse_arguments(owner, arguments, instead):
    """Raises if any of `arguments` (a dict of keyword arguments) was passed to `owner`."""
    if arguments:
        received = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{owner} does not take these arguments. Received: {received}. {instead}")
