"""What was traced with an optimizer that kept no sums, and must not run once it keeps some."""

import weakref

import tensorflow as tf


class Traces:
    """The functions in which an optimizer hands each micro-batch straight to the inner one.

    With `accum_steps=1` there is nothing to add up, so no sums are made. When they are, a function
    that was traced before knows nothing of them. The training step of a Keras model can be made
    anew; of a function of the user's own we only know that there is one.
    """

    def __init__(self):
        self._models = weakref.WeakSet()
        self._running = 0
        self.of_users = False

    def __deepcopy__(self, memo):
        return Traces()  # nothing was traced with a copy

    def of_model(self, model, train_function):
        """`train_function` of a Keras model, in which what is traced counts as the model's."""
        self._models.add(model)

        def step(iterator):
            self._running += 1
            try:
                return train_function(iterator)
            finally:
                self._running -= 1

        return step

    def note(self):
        """Notes a function that is being traced, unless a model's."""
        if not tf.executing_eagerly() and not self._running:
            self.of_users = True

    def renew(self, cycle_of_model):
        """Lets each model that still trains with the optimizer make its training step anew.

        Args:
            cycle_of_model: Function that returns the `Cycle` of a model's optimizer, or None.
        """
        for model in list(self._models):
            cycle = cycle_of_model(model)
            if cycle is not None and cycle.traces is self:
                model.make_train_function(force=True)
