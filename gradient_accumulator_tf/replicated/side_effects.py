"""Side effects of a layer, which may have to wait until after its outputs are computed.

A `GradientCheckpoint` computes a block twice, and so calls the layers in it twice. A
`keras.StatelessScope` holds back what they assign to Keras's variables. It does not hold back what
they assign to TensorFlow's variables, so layers of this package make such changes in `perform`.
"""

import contextlib

from gradient_accumulator_tf.replicated.scoped import ScopedValue

# The list that collects actions, or None where actions run at once.
_held_back = ScopedValue(None)


def perform(action):
    """Calls `action()`, or appends it to the list of the `held_back` around the call."""
    if _held_back.value is None:
        action()
    else:
        _held_back.value.append(action)


@contextlib.contextmanager
def held_back():
    """Within this context `perform` calls no actions. Yields the list that collects them."""
    with _held_back.set_to([]) as actions:
        yield actions
