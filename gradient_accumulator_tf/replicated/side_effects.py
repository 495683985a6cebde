"""Side effects of a layer, which may have to wait until after its outputs are computed.

What is computed twice calls the layers in it twice: a block in a `GradientCheckpoint`, a stage. A
`keras.StatelessScope` holds back what they assign to Keras's variables. It does not hold back what
they assign to TensorFlow's variables, so layers of this package make such changes in `perform`.
"""

import contextlib

import keras

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


class RecordingScope(keras.StatelessScope):
    """A scope that knows which variables have changed in it, whoever's they are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._changed = {}

    def add_update(self, update):
        """Keeps the new value; Keras calls it in place of an assignment."""
        self._changed[id(update[0])] = update[0]
        super().add_update(update)

    def changes(self):
        """Pairs of a variable and its value at the end."""
        return [(v, self.get_current_value(v)) for v in self._changed.values()]
