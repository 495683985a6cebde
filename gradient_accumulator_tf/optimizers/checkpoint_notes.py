"""What a `tf.train.Checkpoint` holds besides variables."""

import json

import tensorflow as tf


class CheckpointNotes(tf.train.experimental.PythonState):
    """A dict that a `tf.train.Checkpoint` saves with the object that has it as an attribute.

    A checkpoint restores into variables that are there. Whether they are to be there, it cannot
    tell before it is read; this is read by a function, at once.

    Args:
        write: Function that returns the dict, of what JSON can hold.
        read: Function that takes it.
    """

    def __init__(self, write, read):
        self._write, self._read = write, read

    def serialize(self):
        """The dict as a string."""
        return json.dumps(self._write())

    def deserialize(self, string_value):
        """Hands on what `serialize` returned."""
        self._read(json.loads(tf.compat.as_str(string_value)))
