"""The warning of losses that couple examples, in a model that computes them per micro-batch."""

from gradient_accumulator_tf.cycle.coupling import couplings_of, warn_of, whole_loss


class CouplingWarnings:
    """Warns once of each loss of a model that couples examples, or may do so.

    `compile` knows Keras's losses, and the outputs of a functional model, by which it traces the
    user's losses. Of other models the first training step tells.
    """

    def __init__(self):
        self._known = set()

    def at_compile(self, losses, model, setting, certain_only):
        """Warns of what `compile` can find.

        Args:
            losses: The argument `loss` of `compile`.
            model: The model that has the outputs.
            setting: As for `warn_of`; None if each loss sees all examples of an update.
            certain_only: Whether to leave out what only may couple examples, since the model has a
                `micro_batch_weight` of its own, which tells what such a loss counts for.
        """
        self._known = set()
        if setting is None:
            return
        outputs = list(model.outputs) if getattr(model, "outputs", None) else None
        if outputs is not None and isinstance(losses, dict):
            outputs = dict(zip(model.output_names, outputs, strict=True))
        found = couplings_of(losses, outputs)
        self._warn([c for c in found if c.certain or not certain_only], setting)

    def in_step(self, names, setting):
        """Warns of what a training step has found.

        Args:
            names: List of the names of losses that returned one number for a micro-batch.
            setting: As for `at_compile`.
        """
        if setting is not None:
            self._warn([whole_loss(name) for name in names], setting)

    def _warn(self, couplings, setting):
        new = [coupling for coupling in couplings if coupling.name not in self._known]
        self._known.update(coupling.name for coupling in new)
        warn_of(new, setting)
