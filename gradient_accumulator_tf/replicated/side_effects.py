"""What a layer does besides its outputs, and may have to leave until later.

A block that is computed twice calls its layers twice. What they change in Keras's variables can be
held back by a `keras.StatelessScope`; what they do to TensorFlow's variables cannot.
"""

import contextlib
import threading


class _Waiting(threading.local):
    """What this thread, which may be a replica's, holds back; None where nothing is."""

    actions = None


_waiting = _Waiting()


def perform(action):
    """Calls `action()`: now, or later if the caller holds side effects back."""
    if _waiting.actions is None:
        action()
    else:
        _waiting.actions.append(action)


@contextlib.contextmanager
def held_back():
    """Within this context `perform` calls nothing; yields the list of what it was given."""
    previous = _waiting.actions
    _waiting.actions = []
    try:
        yield _waiting.actions
    finally:
        _waiting.actions = previous
