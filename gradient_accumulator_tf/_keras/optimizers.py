"""What Keras keeps private of an optimizer: its variables, and its sums over replicas."""

import tensorflow as tf


def innermost(optimizer):
    """The optimizer inside of all wrappers."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def variable_key(optimizer, variable):
    """Hashable identity of a variable, the same for Keras's and the `tf.Variable` in it.

    `Optimizer._var_key`. No public function knows that a Keras variable, its `tf.Variable` and a
    replica's copy of it are the same.
    """
    return optimizer._var_key(variable)


def moving_averages(optimizer):
    """List of the variables' moving averages. AttributeError if the optimizer keeps none.

    `Optimizer._model_variables_moving_average`. `SwapEMAWeights` reads them, one `inner_optimizer`
    deep.
    """
    return optimizer._model_variables_moving_average


def strategy_of(optimizer):
    """The strategy that was in force when a Keras optimizer was made.

    `Optimizer._distribution_strategy`. The optimizer makes its variables there, also if another
    strategy is in force by then.
    """
    return optimizer._distribution_strategy


def gradients_over_replicas(optimizer, gradients, variables):
    """Gradients summed over replicas, unless they are summed already.

    `Optimizer._all_reduce_sum_gradients` of the innermost optimizer. Within `replicas_agree` it
    returns gradients as they are, because they are summed there. A wrapper around the optimizer has
    no other way to know.
    """
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return gradients
    optimizer = innermost(optimizer)
    pairs = zip(gradients, variables, strict=True)
    summed = iter(optimizer._all_reduce_sum_gradients([p for p in pairs if p[0] is not None]))
    return [None if gradient is None else next(summed)[0] for gradient in gradients]
