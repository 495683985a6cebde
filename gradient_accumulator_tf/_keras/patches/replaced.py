"""Functions in place of functions of Keras, once each."""

import functools

_OURS = "_replaced_by_gradient_accumulator_tf"


def replace_function(owner, name, function):
    """Puts `function` in place of `owner`'s function `name`.

    A second call for the same function takes the place of the first, so that the original is never
    wrapped twice. The replacement has the original's signature, which Keras and others read, and
    the original as `__wrapped__`.

    Args:
        owner: A class or module of Keras.
        name: The name of a method or function in it.
        function: Function that takes the original, then the arguments of a call.
    """
    current = getattr(owner, name)
    # Another package may have wrapped ours, and copied its attributes: the `id` tells them apart.
    is_ours = vars(current).get(_OURS) == id(current)
    original = current.__wrapped__ if is_ours else current

    @functools.wraps(original)
    def call(*args, **kwargs):
        return function(original, *args, **kwargs)

    setattr(call, _OURS, id(call))
    setattr(owner, name, call)
