"""The mode `micro_batch_size`: a batch of `fit` is the effective batch, and each step cuts it."""

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_positive_int
from gradient_accumulator_tf.cycle.batches import Batch
from gradient_accumulator_tf.cycle.gathering import NotRowsError
from gradient_accumulator_tf.cycle.micro_batches import is_one_micro_batch, sum_over_micro_batches
from gradient_accumulator_tf.cycle.non_finite import policy_of
from gradient_accumulator_tf.cycle.rules import Summation, Sums, over_replicas, rules_of
from gradient_accumulator_tf.models.coupled_loss import run_coupled_step, staged_whole
from gradient_accumulator_tf.models.couplings import CouplingWarnings
from gradient_accumulator_tf.models.evaluation import evaluated, outputs_of
from gradient_accumulator_tf.models.micro_step import (
    Effective,
    batch_norms_of,
    find_loss,
    gradient_scale,
    log_loss,
    log_losses_of_batch,
    run_micro_step,
)
from gradient_accumulator_tf.models.one_piece import LargestBatch, OwnFit, WarnOfOnePiece
from gradient_accumulator_tf.models.step_metrics import StepMetrics
from gradient_accumulator_tf.optimizers.inner import parts_of
from gradient_accumulator_tf.optimizers.update_order import update_of
from gradient_accumulator_tf.replicated.replicas import (
    number_of_replicas,
    on_average_replica,
    sum_over_replicas,
    undo_averaging,
)
from gradient_accumulator_tf.stages.batch_norm import BATCH_NORM
from gradient_accumulator_tf.stages.run import staged_at_barriers


class WithinStep:
    """How a `GradientAccumulateModel` trains with `micro_batch_size`.

    Args:
        micro_batch_size: As of the model.

    Attributes:
        micro_batch_size: Examples per micro-batch on a replica.
        couplings: What warns of losses that couple examples.
    """

    def __init__(self, micro_batch_size):
        self.set_micro_batch_size(micro_batch_size)
        self.couplings = CouplingWarnings()
        self._largest_batch = LargestBatch()
        self._own_fit = None
        self._staged = None
        self._drops = None

    def check_arguments(self, batch_norm, coupled_loss, has_own_step):
        """Raises ValueError if another argument of the model does not go with this mode."""
        if has_own_step:
            raise ValueError(
                "`micro_batch_size` splits the batch inside `train_step`, which must not be "
                f"overridden. Received: {has_own_step} with a `train_step` of its own. "
                "Pass accum_steps (each call is then a micro-step), or override "
                "`compute_loss` instead."
            )

    def accum_steps(self, model):
        """None: each batch is an update."""
        return None

    def set_accum_steps(self, model, value):
        """Raises ValueError."""
        raise ValueError(
            "`accum_steps` has no meaning with `micro_batch_size`, where each batch of fit is "
            f"an update. Received: accum_steps={value!r}. Give fit another batch_size instead."
        )

    def set_micro_batch_size(self, value):
        """Sets the examples per micro-batch, for training steps that are traced from now on."""
        instead = "Pass as many examples as fit into memory at once, such as micro_batch_size=8."
        self.micro_batch_size = check_positive_int(
            "micro_batch_size", value, "examples per micro-batch", instead, largest=2**31 - 1
        )

    def setting(self, model):
        """How the model accumulates, for messages; None if its losses see all examples."""
        return None if model.coupled_loss else f"micro_batch_size={self.micro_batch_size}"

    def new_drops(self, policy):
        """What counts the dropped micro-batches and cycles; an attribute of the model as well."""
        self._drops = policy.new_counts()
        return self._drops

    def watch(self, model):
        """Warns later if a wrapped model's own `fit` trains past the model."""
        if "fit" in vars(model):
            self._own_fit = OwnFit(model, self.micro_batch_size)
            vars(model)["fit"] = self._own_fit.watched()

    def counts(self, model):
        """What has the counts of dropped micro-batches and cycles."""
        return self._drops

    def check_layers(self, model):
        """Refuses layers that synchronise replicas in the loop over micro-batches."""
        replicas = model.distribute_strategy.num_replicas_in_sync
        if model.batch_norm == "exact" or replicas == 1:
            return
        for layer in _keras.all_layers(model):
            if getattr(layer, "synchronized", False):
                raise ValueError(
                    "With `micro_batch_size` on several replicas no layer may synchronise them, "
                    "which TensorFlow cannot do in the loop over micro-batches. Received: "
                    f"{type(layer).__name__}(synchronized=True) {layer.name!r} on "
                    f"{replicas} replicas. Pass accum_steps instead (fit's batch is then a "
                    'micro-batch), or batch_norm="exact", or make it synchronized=False.'
                )

    def plan_anew(self, model):
        """Forgets how the model was cut, since what is trainable may have changed."""
        self._staged = None
        if model.built:
            self._plan(model)

    def _plan(self, model):
        """Prepares a model whose examples meet: in a batch norm, or in the loss."""
        if self._staged is not None:
            return
        inner = model if model.model is None else model.model
        if model.batch_norm == "exact" and BATCH_NORM.is_in(inner):
            self._staged = staged_at_barriers(inner, BATCH_NORM)
        elif model.coupled_loss:
            self._staged = staged_whole(model)

    def optimizer_for(self, model, optimizer):
        """The optimizer to compile with: the user's, which must not accumulate."""
        inner = optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            inner = optimizer.inner_optimizer
        self._check_does_not_accumulate(inner)
        return optimizer

    def callbacks(self, batch_size):
        """List of the callbacks that `fit` needs."""
        return [WarnOfOnePiece(batch_size, self._largest_batch)]

    def note_training(self, model, has_own_step):
        """Notes that a training goes through the model; a wrapped model's own `fit` may not."""
        if self._own_fit is not None:
            self._own_fit.note_training()

    def train_step(self, model, data, build, plain_step):
        """All micro-batches of an effective batch, and an update; as `AcrossSteps.train_step`."""
        self.note_training(model, has_own_step="")
        batch = Batch.of(data, model.shared_inputs)
        build(data)
        self.check_layers(model)
        self._plan(model)
        self._check_does_not_accumulate(model.optimizer)
        self._largest_batch.see(batch.examples)
        with _keras.activity_regularizers_by_rank(model):
            return self._train(model, batch)

    def test_step(self, model, data, build, plain_step):
        """The loss and the metrics of an effective batch, in micro-batches."""
        batch = Batch.of(data, model.shared_inputs)
        build(data)
        if is_one_micro_batch(batch, self.micro_batch_size) and number_of_replicas() == 1:
            return plain_step()
        with _keras.activity_regularizers_by_rank(model):
            return evaluated(model, batch, self.micro_batch_size)

    def predict_step(self, model, data, build, plain_step):
        """The outputs for an effective batch, in micro-batches."""
        batch = Batch.of(data, model.shared_inputs)
        build(data)
        if is_one_micro_batch(batch, self.micro_batch_size):
            return plain_step()
        try:
            return outputs_of(model, batch, self.micro_batch_size)
        except NotRowsError:
            return plain_step()

    def _train(self, model, batch):
        if model.coupled_loss:
            return self._train_coupled(model, batch)
        policy, variables = policy_of(model.non_finite), model.trainable_weights
        total = None  # unknown yet, if micro-batches may be dropped
        if not policy.screens:
            total = on_average_replica(sum_over_replicas(tf.cast(batch.examples, tf.float64)))
        effective = Effective(total, batch.times_weighed(self.micro_batch_size))
        metrics = StepMetrics(model, batch, self.micro_batch_size)
        run = self._run_micro_steps if self._staged is None else self._run_stages
        (sums, others), kept, logs = run(model, batch, effective, policy, metrics)
        gradients, (losses, counts) = over_replicas(rules_of(variables), sums, others)
        if sums:
            self._update(model, gradients, counts)
        logs = metrics.finish(kept, logs)
        if policy.screens:
            left = on_average_replica(losses.weight)
            values = [(value, left) for value in losses.values]
            return log_loss(model, logs, (losses.total, left), values, policy)
        return log_losses_of_batch(model, logs, losses, batch, policy)

    def _run_micro_steps(self, model, batch, effective, policy, metrics):
        """The sums over all micro-batches on this replica, and what `metrics` keeps and returns."""

        def step(micro_batch):
            step = run_micro_step(model, micro_batch, effective)
            self.couplings.in_step(step.loss.whole, self.setting(model))
            losses = policy.screen_losses(step.loss.total, step.loss.sums())
            contributions, dropped = policy.screen(step.contributions)
            counts = None if dropped is None else (dropped, tf.ones_like(dropped))
            summands = [c.as_summand() for c in contributions]
            return (summands, (losses, counts)), *metrics.update(micro_batch, step.y_pred)

        summation = Summation(model.trainable_weights)
        found = sum_over_micro_batches(
            step, batch, self.micro_batch_size, summation.zeros, summation.add
        )
        for layer in batch_norms_of(model):
            layer.end_cycle()
        return found

    def _run_stages(self, model, batch, effective, policy, metrics):
        """As `_run_micro_steps`, with the effective batch's batch norm."""

        def totals_of(predict, micro_batch):
            return find_loss(model, micro_batch, predict, effective)[0].denominators()

        def differentiate(predict, micro_batch, totals):
            loss, y_pred = find_loss(model, micro_batch, predict, effective)
            self.couplings.in_step(loss.whole, self.setting(model))
            targets, seeds = loss.targets_and_seeds(gradient_scale(model, loss), totals)
            keep, logs = metrics.update(micro_batch, y_pred)
            return loss.tape, targets, seeds, loss.sums(), keep, logs

        variables = model.trainable_weights
        gradients, losses, kept, logs = self._staged.gradients(
            batch,
            self.micro_batch_size,
            variables,
            totals_of,
            differentiate,
            finite_only=policy.finite_only,
        )
        sums = [Sums(gradients, None)] if variables else []
        return (sums, (losses, None)), kept, logs

    def _train_coupled(self, model, batch):
        """As `_train`, with a loss over all examples."""
        step = run_coupled_step(model, batch, self._staged, self.micro_batch_size)
        variables = model.trainable_weights
        if variables:
            sums = [Sums(step.gradients, None)]
            gradients, _ = over_replicas(rules_of(variables), sums)
            self._update(model, gradients, counts=None)
        # Keras divides losses by the number of replicas, and logs them undivided.
        loss = undo_averaging(step.total), batch.examples
        return log_loss(model, step.logs, loss, [], policy_of(model.non_finite))

    def _update(self, model, gradients, counts):
        """Updates with the effective batch's gradients, or drops them.

        Args:
            model: The model.
            gradients: List with a tensor or None for each variable, the same on all replicas.
            counts: Tuple of float64 scalars, the micro-batches that were dropped and all. None if
                none can be.
        """
        optimizer = model.optimizer
        apply = update_of(optimizer, model.trainable_weights)
        dropped, micro_batches = counts or (tf.zeros((), tf.float64), tf.ones((), tf.float64))
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._drops.update(gradients, dropped, micro_batches, apply, optimizer if scaled else None)

    def _check_does_not_accumulate(self, optimizer):
        """A `MultiOptimizer` may know its parts only once it is built."""
        for part in parts_of(optimizer):
            for name in ("gradient_accumulation_steps", "accum_steps"):
                steps = getattr(part, name, None)
                if steps:
                    raise ValueError(
                        "The model accumulates, so its optimizer must not do it as well. Received: "
                        f"{type(part).__name__}({name}={steps}) for a model with micro_batch_size="
                        f"{self.micro_batch_size}. Leave that out."
                    )
