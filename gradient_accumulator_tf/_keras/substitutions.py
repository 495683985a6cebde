"""Another value or function in place of an attribute, for as long as any block needs it."""

import contextlib
import threading

_MISSING = object()


class _Entry:
    """An attribute that is replaced: its object, what the object had, and the blocks inside."""

    def __init__(self, owner):
        # Holding the object keeps its `id` from being given to another one.
        self.owner, self.blocks, self.original = owner, 0, _MISSING


class _OnThisThread(threading.local):
    """The functions of the blocks that this thread is in, by object and attribute."""

    def __init__(self):
        self.functions = {}


class Substitutions:
    """Counts the blocks that replace an attribute, for each object and attribute.

    Each replica's thread enters the same block, and the first to leave must not undo it for the
    others. So the first block to enter replaces the attribute, and the last to leave restores it.
    All blocks around one attribute must want the same value, since only the first one's counts.

    Values are set in the object's `__dict__`: Keras's `__setattr__` would track them as state.
    """

    def __init__(self):
        self._entries, self._lock = {}, threading.Lock()
        self._here = _OnThisThread()

    @contextlib.contextmanager
    def replaced(self, owner, name, make):
        """Within this context an object has another value as an attribute of its own.

        Args:
            owner: The object.
            name: The attribute. It may be one of its class, or one that it is yet to have.
            make: Function that takes the current value, or None, and returns the one to replace it.
        """
        key = id(owner), name
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(owner)
                value = make(getattr(owner, name, None))
                entry.original = vars(owner).get(name, _MISSING)
                vars(owner)[name] = value
                self._entries[key] = entry
            entry.blocks += 1
        try:
            yield
        finally:
            with self._lock:
                entry.blocks -= 1
                if not entry.blocks:
                    del self._entries[key]
                    if entry.original is _MISSING:
                        del vars(owner)[name]
                    else:
                        vars(owner)[name] = entry.original

    @contextlib.contextmanager
    def routed(self, owner, name, function):
        """Within this context a method of an object calls a function, on this thread.

        Blocks on other threads have functions of their own, and a thread in no block calls the
        method. So a replica that waits within its block for another one keeps its own function.

        Args:
            owner: The object.
            name: The method.
            function: Function that takes the method, then the arguments of a call.
        """
        key, here = (id(owner), name), self._here

        def make(method):
            def route(*args, **kwargs):
                function = here.functions.get(key)
                if function is None:
                    return method(*args, **kwargs)
                return function(method, *args, **kwargs)

            return route

        with self.replaced(owner, name, make):
            outer = here.functions.get(key)
            here.functions[key] = function
            try:
                yield
            finally:
                del here.functions[key]
                if outer is not None:
                    here.functions[key] = outer


# One table for all: blocks around the same attribute must meet.
SUBSTITUTIONS = Substitutions()
