"""The mode `accum_steps`: a batch of `fit` is a micro-batch, and the optimizer accumulates."""

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.cycle_end import model_ends_cycle
from gradient_accumulator_tf.cycle.non_finite import NoDrops, policy_of
from gradient_accumulator_tf.cycle.schedules import check_accum_steps
from gradient_accumulator_tf.models.callbacks import FlushAtEpochEnd
from gradient_accumulator_tf.models.couplings import CouplingWarnings
from gradient_accumulator_tf.models.further_optimizers import warn_of_those_that_do_not_accumulate
from gradient_accumulator_tf.models.micro_step import (
    batch_norms_of,
    log_loss,
    run_micro_step,
    update_metrics,
)
from gradient_accumulator_tf.optimizers.accumulate import (
    GradientAccumulateOptimizer,
    accumulating_optimizer_of,
)
from gradient_accumulator_tf.optimizers.cycle import cycle_of_model
from gradient_accumulator_tf.replicated.replicas import undo_averaging


class AcrossSteps:
    """How a `GradientAccumulateModel` trains with `accum_steps`; has the methods of `WithinStep`.

    Args:
        accum_steps: As of the model.

    Attributes:
        micro_batch_size: None.
        couplings: What warns of losses that couple examples.
    """

    micro_batch_size = None

    def __init__(self, accum_steps):
        self._accum_steps = check_accum_steps(accum_steps, "batches per update")
        self.couplings = CouplingWarnings()
        self._has_looked_for_plain_optimizers = False

    def check_arguments(self, batch_norm, coupled_loss, has_own_step):
        """Raises ValueError if another argument of the model does not go with this mode."""
        if batch_norm == "exact":
            raise ValueError(
                'batch_norm="exact" needs the whole effective batch in each step. Received: '
                f"accum_steps={self._accum_steps}. Pass micro_batch_size instead."
            )

        if coupled_loss:
            raise ValueError(
                "`coupled_loss` needs the outputs of the whole effective batch in each step. "
                f"Received: coupled_loss={coupled_loss!r} with accum_steps={self._accum_steps}. "
                "Pass micro_batch_size instead."
            )

    def accum_steps(self, model):
        """Batches per update: the optimizer's, once there is one."""
        optimizer = accumulating_optimizer_of(model)
        return self._accum_steps if optimizer is None else optimizer.accum_steps

    def set_accum_steps(self, model, value):
        """Sets the batches per update, from the next cycle on."""
        optimizer = accumulating_optimizer_of(model)
        if optimizer is not None:
            optimizer.accum_steps = value
        self._accum_steps = check_accum_steps(value, "batches per update")

    def set_micro_batch_size(self, value):
        """Raises ValueError."""
        raise ValueError(
            "`micro_batch_size` has no meaning with `accum_steps`, where each batch of fit is "
            f"a micro-batch. Received: micro_batch_size={value!r}. Give fit another batch_size "
            "instead, or make a model with micro_batch_size."
        )

    def setting(self, model):
        """How the model accumulates, for messages; None if each batch is an update."""
        steps = self.accum_steps(model)
        return None if steps == 1 else f"accum_steps={steps}"

    def new_drops(self, policy):
        """The optimizer counts what is dropped, not the model."""
        return NoDrops()

    def watch(self, model):
        """Nothing is to be watched."""

    def counts(self, model):
        """What has the counts of dropped micro-batches and cycles."""
        return accumulating_optimizer_of(model) or NoDrops()

    def check_layers(self, model):
        """Any layer will do."""

    def plan_anew(self, model):
        """Nothing is to be planned before a training step."""

    def optimizer_for(self, model, optimizer):
        """The optimizer to compile with: one that accumulates, around the user's.

        Args:
            model: The model.
            optimizer: A Keras optimizer that does not accumulate.
        """
        inner = optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            inner = optimizer.inner_optimizer
        wrapped = GradientAccumulateOptimizer(
            inner, self.accum_steps(model), non_finite=model.non_finite
        )
        if inner is optimizer:
            return wrapped
        return keras.optimizers.LossScaleOptimizer(
            wrapped,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )

    def callbacks(self, batch_size):
        """List of the callbacks that `fit` needs."""
        return [FlushAtEpochEnd()]

    def note_training(self, model, has_own_step):
        """Warns once of optimizers that a `train_step` of the user's own may use plainly."""
        if not has_own_step or self._has_looked_for_plain_optimizers:
            return
        steps = self.accum_steps(model)
        if steps != 1:
            self._has_looked_for_plain_optimizers = True
            warn_of_those_that_do_not_accumulate(model, model.optimizer, steps)

    def test_step(self, model, data, build, plain_step):
        """As Keras takes it: a batch is a micro-batch."""
        return plain_step()

    def predict_step(self, model, data, build, plain_step):
        """As Keras takes it."""
        return plain_step()

    def train_step(self, model, data, build, plain_step):
        """One micro-batch.

        Args:
            model: The model.
            data: Tuple `(x, y, sample_weight)` of tensors, nested, and None.
            build: Function of such a tuple that builds the model for it.
            plain_step: Function that takes the step as Keras does.

        Returns:
            Dict of the metrics' values.
        """
        cycle = cycle_of_model(model)
        if not cycle.accumulates:
            with model_ends_cycle():
                logs = plain_step()
            for layer in batch_norms_of(model):
                layer.end_cycle()
            return logs
        build(data)
        with _keras.activity_regularizers_by_rank(model):
            step = run_micro_step(model, data)
        self.couplings.in_step(step.loss.whole, self.setting(model))
        if step.contributions:
            # Not through a loss scaler, whose `apply` takes no weights.
            cycle.lead(batch_norms_of(model))
            cycle.take(step.contributions, model.trainable_weights)
        loss, compiled = step.loss, step.loss.compiled
        # Keras divides losses by the number of replicas, and logs them undivided.
        values = [(undo_averaging(t.value), loss.weight_of(t)) for t in compiled]
        weight = loss.weight_of(compiled[0]) if len(compiled) == 1 else loss.weight
        logs = update_metrics(model, data, step.y_pred)
        policy = policy_of(model.non_finite)
        return log_loss(model, logs, (undo_averaging(loss.total), weight), values, policy)
