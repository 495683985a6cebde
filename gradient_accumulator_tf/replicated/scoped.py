"""Values that hold within a `with` block, on the thread of one replica.

Why: a training step has to tell inner layers something, such as that the model ends their cycle.
Between the two are Keras's `Layer.__call__` and the user's `call` methods, which pass on no
arguments that they do not know. TensorFlow traces each replica on a thread of its own, and the
threads take turns, so a value of one replica must not be seen by another.

Where it takes effect: only in the function that reads the value, which each module with a
`ScopedValue` keeps beside the value. Nothing of Keras or TensorFlow changes.

When it can go: Keras 3.15 can pass arguments through all layers
(`Layer._register_call_context_args`). Keras 3.8 cannot, and the method is private. Once every
supported version has a public one, arguments can take the place of this module.
"""

import contextlib
import threading


class ScopedValue:
    """A value that is replaced within a `with` block, on this thread only.

    ```python
    depth = ScopedValue(0)
    with depth.set_to(depth.value + 1):
        depth.value  # 1 here, and 0 on any other thread
    depth.value  # 0
    ```

    Args:
        default: The value outside of all blocks, on every thread.
    """

    def __init__(self, default):
        self._default = default
        self._on_this_thread = threading.local()

    @property
    def value(self):
        """The value of the innermost block around the call on this thread, or the default."""
        return getattr(self._on_this_thread, "value", self._default)

    @contextlib.contextmanager
    def set_to(self, value):
        """Replaces the value within this context, which yields it."""
        previous = self.value
        self._on_this_thread.value = value
        try:
            yield value
        finally:
            self._on_this_thread.value = previous
