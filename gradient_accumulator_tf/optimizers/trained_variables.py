"""The variables of an optimizer in their order, and which of them may move."""

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.cycle.gradients import in_shape_of


class TrainedVariables:
    """The variables that an optimizer was built with.

    Args:
        optimizer: The optimizer.
        variables: List of variables, Keras's or TensorFlow's.

    Attributes:
        variables: As given.
    """

    def __init__(self, optimizer, variables=()):
        self._optimizer, self.variables = optimizer, variables
        self._indices = {_keras.variable_key(optimizer, v): i for i, v in enumerate(variables)}
        self._trained_anyway = set()

    def indices_of(self, variables):
        """List of the indices of variables; None for each that the optimizer does not know."""
        return [self._indices.get(_keras.variable_key(self._optimizer, v)) for v in variables]

    @property
    def movable(self):
        """Set of the indices of the variables that may move.

        A variable that was frozen after the optimizer was built must not move, unless it was given
        a gradient all the same: so it is with Keras's optimizers.
        """
        return {
            i
            for i, variable in enumerate(self.variables)
            if variable.trainable or i in self._trained_anyway
        }

    def aligned(self, gradients, variables):
        """The gradients in the order of the optimizer's variables, in their shapes.

        Args:
            gradients: List of gradients.
            variables: List of the variable of each.

        Raises:
            ValueError: If a variable is unknown or comes twice, or a gradient has another shape.
        """
        if len(gradients) != len(variables):
            raise ValueError(
                "`grads` must have one entry for each variable (None where there is no "
                f"gradient). Received: {len(gradients)} gradients for {len(variables)} variables."
            )
        aligned, seen = [None] * len(self.variables), set()
        indices = self.indices_of(variables)
        for gradient, variable, index in zip(gradients, variables, indices, strict=True):
            path = getattr(variable, "path", variable.name)
            if index is None:
                raise ValueError(
                    "The optimizer accumulates for the variables it was built with. Received: "
                    f"an unknown variable, {path}. If "
                    "`trainable` was changed after the optimizer was built, compile the model "
                    "again with a new optimizer, or call optimizer.rebuild(model."
                    "trainable_variables) first, which keeps the state of the others."
                )
            if index in seen:
                raise ValueError(
                    "Each variable must have one gradient. Received: several for "
                    f"{path}. Add them up before."
                )
            seen.add(index)
            if gradient is None:
                continue
            aligned[index] = in_shape_of(gradient, variable.shape, path)
            if not variable.trainable:
                self._trained_anyway.add(index)
        return aligned
