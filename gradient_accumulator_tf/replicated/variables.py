"""Variables of a strategy's replicas, made outside of what is being traced."""

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


# Keras builds optimizers and layers while it traces the first training step.
@outside_of_tracing()
def sum_variable(shape, dtype, name, aggregation=tf.VariableAggregation.SUM):
    """A zero variable of each replica's own; read outside a replica, and saved, is their sum."""
    variable = tf.Variable(
        tf.zeros(shape, dtype),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=aggregation,
        name=name,
    )
    return _with_path(variable, name)


@outside_of_tracing()
def counter(name, value=0):
    """An int64 scalar variable that all replicas keep alike; read outside, and saved, as one."""
    variable = tf.Variable(
        tf.constant(value, tf.int64),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        name=name,
    )
    return _with_path(variable, name)


def _with_path(variable, name):
    """A TensorFlow variable with a `path`, by which Keras's legacy HDF5 files know variables."""
    variable.path = f"gradient_accumulator/{name}"
    return variable
