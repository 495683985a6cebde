"""Create variables while a function is being traced, as if before."""

import contextlib

import tensorflow as tf


@contextlib.contextmanager
def outside_of_tracing():
    """Within this context variables are created at once, unnoticed by what is being traced.

    A `tf.function` traces everything again if its first trace created variables, also if it did so
    in `tf.init_scope`; and each variable comes with a conditional that initialises it.
    """

    def create(next_creator, **kwargs):
        return next_creator(**{**kwargs, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(create):
        yield
