"""Variables of a strategy's replicas, created outside of the trace in progress."""

import contextlib

import tensorflow as tf


@contextlib.contextmanager
def outside_of_tracing():
    """Within this context variables are created at once, and the trace in progress has no part.

    Otherwise a `tf.function` traces everything a second time, because its first trace created
    variables, even if that was in `tf.init_scope`. It also adds a conditional to the graph that
    initialises each variable.
    """

    def create(next_creator, **kwargs):
        return next_creator(**{**kwargs, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(create):
        yield


# Keras builds optimizers and layers while it traces the first training step.
@outside_of_tracing()
def sum_variable(shape, dtype, name, aggregation=tf.VariableAggregation.SUM):
    """A variable of zeros on each replica. Outside of replicas, and in files, it is their sum."""
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
    """An int64 scalar variable, the same on all replicas. Outside of them it is the first's."""
    variable = tf.Variable(
        tf.constant(value, tf.int64),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        name=name,
    )
    return _with_path(variable, name)


def _with_path(variable, name):
    """Gives a TensorFlow variable the `path` by which Keras's legacy HDF5 files name variables."""
    variable.path = f"gradient_accumulator/{name}"
    return variable
