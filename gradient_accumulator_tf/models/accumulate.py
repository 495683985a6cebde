"""GradientAccumulateModel: a Keras model whose `train_step` accumulates."""

import functools
import inspect
import numbers
import operator
import warnings
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import (
    check_choice,
    check_positive_int,
    refuse_arguments,
    similar_name,
)
from gradient_accumulator_tf._keras.patches import held_by
from gradient_accumulator_tf.batch_norm.cycle_end import model_ends_cycle
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm
from gradient_accumulator_tf.cycle.batches import (
    Batch,
    batch_size,
    by_identity,
    check_shared_inputs,
)
from gradient_accumulator_tf.cycle.gradients import (
    add_to_sums,
    largest,
    overwritten_of,
    sum_of_means,
    zero_sums,
)
from gradient_accumulator_tf.cycle.losses import (
    LossRecorder,
    check_micro_batch_weight,
    check_total_loss,
    contributions,
    denominators,
    loss_from_sums,
    loss_sums,
    targets_and_seeds,
    with_coefficients,
)
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from gradient_accumulator_tf.cycle.non_finite import NoDrops, policy_of
from gradient_accumulator_tf.cycle.schedules import (
    check_accum_steps,
    deserialize_accum_steps,
    same_accum_steps,
    serialize_accum_steps,
)
from gradient_accumulator_tf.models.callbacks import FlushAtEpochEnd
from gradient_accumulator_tf.models.further_optimizers import (
    optimizers_of,
    warn_of_those_that_do_not_accumulate,
)
from gradient_accumulator_tf.models.one_piece import LargestBatch, WarnOfOnePiece
from gradient_accumulator_tf.models.wrapper import ModelWrapper
from gradient_accumulator_tf.optimizers.accumulate import (
    GradientAccumulateOptimizer,
    accumulating_optimizer,
)
from gradient_accumulator_tf.optimizers.update_order import one_by_one
from gradient_accumulator_tf.optimizers.wrapper import parts_of
from gradient_accumulator_tf.replicated.replicas import (
    check_made_under,
    check_strategy,
    number_of_replicas,
    prepare_fit,
    sum_over_replicas,
)
from gradient_accumulator_tf.replicated.variables import outside_of_tracing
from gradient_accumulator_tf.stages.batch_norm import BATCH_NORM
from gradient_accumulator_tf.stages.engine import StagedGradients


class _MicroStep(NamedTuple):
    """What one micro-batch's forward and backward pass found."""

    groups: list  # of Contribution; empty if there is nothing to train
    loss: Any
    terms: list  # of Term
    weight: Any  # of what no compiled loss measures
    share: Any  # that weight by the effective batch's, if known
    logs: dict


class _Effective(NamedTuple):
    """What is known of the effective batch that a micro-batch is a slice of."""

    total: Any  # float64 scalar, examples on an average replica; None if some may be dropped
    weighed: Any  # see `Batch.times_weighed`


class _Loss(NamedTuple):
    """What one micro-batch's forward pass found; see `_MicroStep`."""

    tape: Any
    y_pred: Any
    loss: Any
    terms: list
    weight: Any
    share: Any


_LAYER_ARGUMENTS = ("name", "trainable", "dtype", "autocast", "activity_regularizer")


def _check_arguments(owner, first, others):
    """Raises if the first argument is a number, or one of the others not known.

    Keras refuses the latter as well, but after a mode was found to be missing, by a slip in it.
    """
    if isinstance(first, numbers.Number):
        raise TypeError(
            "The first argument must be a Keras model, or the inputs of one. Received: "
            f"{first!r}. Pass it by its name: accum_steps={first!r} (batches per update) or "
            f"micro_batch_size={first!r} (examples per micro-batch)."
        )
    own = inspect.signature(GradientAccumulateModel.__init__).parameters.values()
    known = [p.name for p in own if p.kind not in (p.POSITIONAL_ONLY, p.VAR_KEYWORD)]
    known += _LAYER_ARGUMENTS
    unknown = {name: value for name, value in others.items() if name not in known}
    similar = [similar for name in unknown if (similar := similar_name(name, known))]
    advice = f"Did you mean {' and '.join(similar)}? " if similar else ""
    refuse_arguments(owner, unknown, f"{advice}Its arguments are {', '.join(known)}.")


def _checked_micro_batch_size(value):
    instead = "Pass as many examples as fit into memory at once, such as micro_batch_size=8."
    return check_positive_int(
        "micro_batch_size", value, "examples per micro-batch", instead, largest=2**31 - 1
    )


def _fixed(name, attribute, doc):
    """A property that can be read, and whose setting is refused with what to do instead."""
    get = operator.attrgetter(attribute)

    def refuse(self, value):
        raise AttributeError(
            f"`{name}` is given when the model is made, and cannot be set. Received: "
            f"{name}={value!r}, in place of {get(self)!r}. Make another model, around the same "
            f"layers: GradientAccumulateModel(model.model, ..., {name}={value!r})."
        )

    return property(get, refuse, doc=doc)


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class GradientAccumulateModel(ModelWrapper):
    """A Keras model that trains on effective batches in micro-batches.

    Exactly one of two modes:

    - `micro_batch_size`: the batch given to `fit` is the effective batch. Each training step
      cuts it into micro-batches, runs them one after the other, and updates once. Steps per
      epoch, learning-rate schedules, callbacks and logs are those of the large batch. Peak memory
      is that of one micro-batch, and one copy of the gradients.
    - `accum_steps`: the batch given to `fit` is the micro-batch, and every `accum_steps`-th batch
      updates, with the mean over all of them. What is left at the end of an epoch, before its
      validation, is an update too. For data that comes in micro-batches, or whose effective
      batch does not fit even as input.

    The update equals that of the plain model on the effective batch, for any last batch: the loss
    of each micro-batch counts for what Keras divided it by (examples; unmasked tokens under a
    mask; the weights' sum for the reduction "mean_with_sample_weight"), and regularisers count
    once. A tensor that `add_loss` was given unreduced is summed, as Keras does. A scalar given to
    `add_loss` counts as a mean over the examples, and so does what a `compute_loss` of your own
    returns. (A scalar that is a sum: `self.add_loss(keras.ops.reshape(total, (1,)))`.) The update
    does not equal it where a layer looks across examples (BatchNormalization normalises by the
    micro-batch, unless `batch_norm="exact"`) or draws random numbers (Dropout draws others).

    ```python
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model = GradientAccumulateModel(model=model, micro_batch_size=16)
    model.compile("adam", loss="mse")
    model.fit(np.ones((256, 8)), np.ones((256, 1)), batch_size=128)
    ```

    It is built around a model (`model=`), from a functional model's ends (`inputs=`,
    `outputs=`), or as a base class in place of `keras.Model`:

    ```python
    class MyModel(GradientAccumulateModel):
        def __init__(self):
            super().__init__(accum_steps=8)
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)
    ```

    Around a model, layers and variables are that model's own, not copies: `weights`, `layers`,
    `summary()`, `save_weights()` and `export()` are those of the plain model, whose weight files
    are interchangeable, and what is not found on the wrapper is looked up on it, and set on it.
    Its metrics are in the logs. A `fit`, a `compile` and the like of the model's own class run, and
    end in this class's, so that KerasHub's tasks take strings and images as they do by themselves.

    Args:
        model_or_inputs: The model to train, as `model`; or `inputs`. By position.
        outputs: Outputs of a functional model, as for `keras.Model`.
        inputs: Its inputs.
        model: A `keras.Model` to train instead: functional, Sequential or subclassed.
        accum_steps: Integer >= 1, batches per update; or a schedule of it, as for
            `GradientAccumulateOptimizer`.
        micro_batch_size: Integer >= 1, examples per micro-batch (per replica).
        batch_norm: With `micro_batch_size`, what trainable batch norms of Keras's
            `BatchNormalization` or `AccumBatchNorm` normalise by: "micro_batch" (default), or
            "exact", which is by the whole effective batch (of a replica, unless
            `synchronized=True`), forward and backward. With it the update is the large batch's,
            moving statistics included. It is for functional and Sequential models, and keeps what
            batch norms wait with for all examples of the effective batch: 28 to 74 % of what the
            large batch takes per example, measured on five nets.
        non_finite: "propagate" (default), "drop_micro_batch" or "drop_cycle"; as for
            `GradientAccumulateOptimizer`. What was dropped is in the logs of an epoch, whose loss
            is then the mean over what was finite.
        shared_inputs: List of the inputs that belong to every example (a graph, a bank of
            negatives), by their positions or keys in `x`: `[1]`, `["bank"]`; `[("graph", 0)]`
            for what is nested, where `["graph"]` is all that is in it. Each micro-batch gets them
            whole. Every other tensor of a batch must have one row for each example; only
            scalars, and tensors of one row in a batch of several examples, are for all as well.
        **kwargs: `name`, `trainable`, `dtype` as for `keras.Model`.

    Attributes:
        accum_steps: Batches per update; an integer can be set, and holds from the next cycle on.
        micro_batch_size: Examples per micro-batch; can be set, and holds from the next batch on.
        batch_norm: "micro_batch" or "exact".
        non_finite: "propagate", "drop_micro_batch" or "drop_cycle".

    Raises:
        TypeError: If `accum_steps` is neither an integer nor a schedule, `micro_batch_size` not
            an integer, `shared_inputs` not a list of positions, keys and tuples, or `model` not a
            Keras 3 model.
        ValueError: If not exactly one of the two is given, or an argument that is not known; if
            `batch_norm="exact"` is given with `accum_steps`; if `model` is given together with
            `inputs`, `outputs` or a `call` of its own, accumulates by itself, or overrides a
            method of a training step; or under a ParameterServerStrategy or CentralStorageStrategy.
    """

    def __init__(
        self,
        model_or_inputs=None,
        /,
        outputs=None,
        *,
        inputs=None,
        model=None,
        accum_steps=None,
        micro_batch_size=None,
        batch_norm="micro_batch",
        non_finite="propagate",
        shared_inputs=None,
        **kwargs,
    ):
        _check_arguments(type(self).__name__, model_or_inputs, kwargs)
        if (accum_steps is None) == (micro_batch_size is None):
            raise ValueError(
                "Exactly one of `accum_steps` (fit's batch is the micro-batch) and "
                "`micro_batch_size` (fit's batch is the effective batch) must be given. "
                f"Received: accum_steps={accum_steps!r}, micro_batch_size={micro_batch_size!r}. "
                "If the effective batch can be loaded at once, pass micro_batch_size."
            )
        if accum_steps is not None:
            accum_steps = check_accum_steps(accum_steps, "batches per update")
        else:
            micro_batch_size = _checked_micro_batch_size(micro_batch_size)
            if type(self).train_step is not GradientAccumulateModel.train_step:
                raise ValueError(
                    "`micro_batch_size` splits the batch inside `train_step`, which must not be "
                    f"overridden. Received: {type(self).__name__} with a `train_step` of its own. "
                    "Pass accum_steps (each call is then a micro-step), or override "
                    "`compute_loss` instead."
                )
        check_choice("batch_norm", batch_norm, ("micro_batch", "exact"))
        if batch_norm == "exact" and micro_batch_size is None:
            raise ValueError(
                'batch_norm="exact" needs the whole effective batch in each step. Received: '
                f"accum_steps={accum_steps}. Pass micro_batch_size instead."
            )
        policy = policy_of(non_finite)
        if batch_norm == "exact" and policy.screens:
            raise ValueError(
                'With batch_norm="exact" every example depends on all others, so no micro-batch '
                f"can be dropped alone. Received: non_finite={non_finite!r}. Pass "
                'non_finite="drop_cycle" instead.'
            )
        shared_inputs = check_shared_inputs(shared_inputs)
        check_strategy()
        prepare_fit()
        super().__init__(model_or_inputs, outputs, inputs=inputs, model=model, **kwargs)
        self._accum_steps = accum_steps
        self._micro_batch_size = micro_batch_size
        self._batch_norm = batch_norm
        self._exact_batch_norm = None
        self._policy = policy
        self._shared_inputs = shared_inputs
        self._plain_optimizers = None
        self._drops = NoDrops() if micro_batch_size is None else policy.new_counts()
        self._largest_batch = None if micro_batch_size is None else LargestBatch()
        if micro_batch_size is not None and "fit" in vars(self):
            vars(self)["fit"] = self._watched(self.fit)

    @property
    def accum_steps(self):
        """Batches per update: the optimizer's, once there is one; None with `micro_batch_size`.

        An integer can be set, between fits or within one; it holds from the next cycle on.
        """
        optimizer = self._accumulating_optimizer
        return self._accum_steps if optimizer is None else optimizer.accum_steps

    @accum_steps.setter
    def accum_steps(self, value):
        if self.micro_batch_size is not None:
            raise ValueError(
                "`accum_steps` has no meaning with `micro_batch_size`, where each batch of fit is "
                f"an update. Received: accum_steps={value!r}. Give fit another batch_size instead."
            )
        if self._accumulating_optimizer is not None:
            self._accumulating_optimizer.accum_steps = value
        self._accum_steps = check_accum_steps(value, "batches per update")

    @property
    def shared_inputs(self):
        """Tuple of the inputs that belong to every example: positions, keys and tuples of both."""
        return self._shared_inputs

    @property
    def micro_batch_size(self):
        """Examples per micro-batch (per replica); None with `accum_steps`.

        An integer can be set, between fits or within one; the next batch is cut by it, with a new
        trace of the training step.
        """
        return self._micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, value):
        if self._micro_batch_size is None:
            raise ValueError(
                "`micro_batch_size` has no meaning with `accum_steps`, where each batch of fit is "
                f"a micro-batch. Received: micro_batch_size={value!r}. Give fit another batch_size "
                "instead, or make a model with micro_batch_size."
            )
        self._micro_batch_size = _checked_micro_batch_size(value)
        if self.train_function is not None:
            # Keras's own, since what is trainable is still to be as it was; `fit` looks it up in
            # each step.
            super().make_train_function(force=True)

    batch_norm = _fixed("batch_norm", "_batch_norm", "What trainable batch norms normalise by.")
    non_finite = _fixed(
        "non_finite", "_policy.name", "What becomes of gradients that are not finite."
    )

    @property
    def dropped_micro_steps(self):
        """int64 scalar tensor: micro-batches dropped so far (0 if none can be)."""
        return tf.convert_to_tensor(self._counts.dropped_micro_steps)

    @property
    def dropped_cycles(self):
        """int64 scalar tensor: cycles dropped so far (0 if none can be)."""
        return tf.convert_to_tensor(self._counts.dropped_cycles)

    @property
    def _counts(self):
        """What counts the drops: this model, or the optimizer that it accumulates in."""
        return self._accumulating_optimizer or self._drops

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        run_eagerly=False,
        steps_per_execution=1,
        jit_compile="auto",
        auto_scale_loss=True,
    ):
        """Configures the model for training; arguments as for `keras.Model.compile`.

        With `accum_steps` the optimizer is wrapped in a `GradientAccumulateOptimizer`, under
        mixed_float16 inside the `LossScaleOptimizer`. Compiled again with the same one after
        `trainable` was changed, it keeps the state of the variables that it has trained before.

        Raises:
            ValueError: If the optimizer accumulates by itself, unless by the same
                `accum_steps`, or was made under another strategy; or if, with
                `micro_batch_size` on several replicas, a layer synchronises them
                (`BatchNormalization(synchronized=True)`); or if, with `batch_norm="exact"`, the
                model is not a graph of layers that can be cut at each trainable batch norm (a
                subclassed model, batch norm within another layer, masks, activity
                regularisers, renormalisation); or if another optimizer was in mid-cycle.
        """
        self._check_layers()
        self._check_no_open_cycle(optimizer)
        self._exact_batch_norm = None
        if self.built:
            self._plan_exact_batch_norm()
        super().compile(
            optimizer=self._accumulating(optimizer),
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        if self._accumulating_optimizer is not None and self.built:
            self._accumulating_optimizer.rebuild(self.trainable_variables)

    def make_train_function(self, force=False):
        """As for `keras.Model`, which calls it before each fit and `train_on_batch`.

        Raises:
            ValueError: If `trainable` of a variable was changed since the model was compiled and
                trained, or if the model was compiled without an optimizer.
        """
        self._splits = True
        if type(self).train_step is GradientAccumulateModel.train_step:
            if self.optimizer is None:
                raise ValueError(
                    "Training needs an optimizer. Received: compile(optimizer=None). Compile with "
                    'one, such as compile("adam", loss).'
                )
        elif self._plain_optimizers is None and self.accum_steps != 1:
            self._plain_optimizers = warn_of_those_that_do_not_accumulate(
                self, self.optimizer, self.accum_steps
            )
        if self.train_function is None or force:
            self._trainable_at_compile = {id(v): v.trainable for v in self.variables}
        for variable in self.variables:
            was = self._trainable_at_compile.get(id(variable), variable.trainable)
            if was != variable.trainable:
                raise ValueError(
                    "What is trainable must not change without a new `compile`: the training step "
                    f"is made for it. Received: {variable.path} with trainable="
                    f"{variable.trainable}, which was {was}. Call model.compile(model.optimizer, "
                    "...) to keep the optimizer's state, or compile with a new optimizer."
                )
        super().make_train_function(force)

    def compile_from_config(self, config):
        """Compiles a loaded model; Keras asks for it where `compile` is overridden."""
        # What was saved is what a wrapped model's own `compile` had handed on.
        type(self).compile(self, **keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
    ):
        """Trains the model; arguments and result as for `keras.Model.fit`.

        With `accum_steps` a partial cycle at an epoch's end is applied before its validation and
        its `on_epoch_end` callbacks.
        """
        own = [FlushAtEpochEnd()] if self.micro_batch_size is None else []
        own += self._policy.callbacks()
        own += [WarnOfOnePiece(batch_size, self._largest_batch)] if self._largest_batch else []
        if isinstance(callbacks, keras.callbacks.CallbackList):
            for callback in own:
                callback.set_model(self)
            callbacks.callbacks[:0] = own
        elif own:
            callbacks = [*own, *tf.nest.flatten(callbacks or [])]
        # By keyword, where tools that patch `keras.Model.fit` look for them.
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )

    def flush(self):
        """Updates with the mean over a partial cycle, if there is one (mode `accum_steps`).

        To be called at the end of a loop of `train_on_batch`; `fit` does it by itself. Optimizers
        that a subclass keeps in further attributes are flushed as well.
        """
        for optimizer in optimizers_of(self).values():
            accumulating = accumulating_optimizer(optimizer)
            if accumulating is not None:
                accumulating.flush()

    @property
    def ended_in_update(self):
        """Whether the last batch ended in an update: a bool, for callbacks.

        As for `GradientAccumulateOptimizer`; with `micro_batch_size` every batch does.
        """
        optimizer = self._accumulating_optimizer
        return optimizer is None or optimizer.ended_in_update

    @property
    def just_updated(self):
        """Scalar bool tensor: whether the last batch ended in an update, for a `train_step`.

        As for `GradientAccumulateOptimizer`; with `micro_batch_size` every batch does.
        """
        optimizer = self._accumulating_optimizer
        return tf.constant(True) if optimizer is None else optimizer.just_updated

    def train_step(self, data):
        """One batch: a micro-step, or all micro-steps of an update; see the class.

        Args:
            data: What the dataset yields: `x`, `(x, y)` or `(x, y, sample_weight)`, nested.

        Returns:
            Dict of the metrics' values.
        """
        self._splits = True
        optimizer = self._accumulating_optimizer
        if optimizer is not None and not optimizer.accumulates:
            with model_ends_cycle():
                logs = super().train_step(data)
            self._end_cycle_of_batch_norms()
            return logs
        data = tf.nest.map_structure(_as_tensor, keras.utils.unpack_x_y_sample_weight(data))
        batch = None if self.micro_batch_size is None else Batch.of(data, self._shared_inputs)
        with outside_of_tracing():
            _keras.build_for_training(self, data)
        self._check_layers()
        self._plan_exact_batch_norm()
        with _keras.activity_regularizers_by_rank(self):
            if batch is None:
                return self._train_across_steps(data)
            self._check_optimizer_does_not_accumulate(self.optimizer)
            return self._train_within_step(batch)

    def micro_batch_weight(self, x, y, sample_weight):
        """What a micro-batch counts for where no compiled loss tells; to be overridden.

        It is the weight of regularisers and of scalars given to `add_loss`, and of all that a
        `compute_loss` of your own returns, if that calls none of the losses given to `compile`.
        So it is of a loss function given to `compile` that returns one number for the whole
        micro-batch, such as one that divides by its own mask. (One that returns a value for each
        element has its weight by itself: with the reduction "mean_with_sample_weight", the sum of
        the sample weights.) Return what the loss was divided by, for example the number of valid
        tokens:

        ```python
        def micro_batch_weight(self, x, y, sample_weight):
            return keras.ops.sum(keras.ops.cast(y != 0, "float32"))
        ```

        A loss that is a sum was divided by nothing. Give it to `add_loss` with a dimension
        (`self.add_loss(loss_per_example)`): it counts as a sum, whatever this returns.

        Args:
            x: The micro-batch's inputs.
            y: Its targets.
            sample_weight: Its weights or None.

        Returns:
            Scalar >= 0, a number or a tensor of any real dtype, or None (the default) for the
            number of examples.
        """
        return None

    def _train_across_steps(self, data):
        step = self._micro_step(data)
        if step.groups:
            # Not through a loss scaler, whose `apply` takes no weights.
            optimizer = self._accumulating_optimizer
            optimizer.lead(self._batch_norms)
            optimizer.apply_contributions(step.groups, self.trainable_weights)
        weight, compiled = step.weight, [t for t in step.terms if t.compiled]
        if len(compiled) == 1 and compiled[0].denominator is not None:
            weight = compiled[0].denominator
        # Keras divides losses by the number of replicas, and logs them undivided.
        replicas = number_of_replicas()
        values = [
            (replicas * t.value, step.weight if t.denominator is None else t.denominator)
            for t in compiled
        ]
        return self._with_loss(step.logs, (replicas * step.loss, weight), values)

    def _train_within_step(self, batch):
        variables = self.trainable_weights
        examples = batch.examples
        self._largest_batch.see(examples)
        total = None  # what will be left of the effective batch, if some of it may be dropped
        if not self._policy.screens:
            total = sum_over_replicas(tf.cast(examples, tf.float64)) / number_of_replicas()

        effective = _Effective(total, batch.times_weighed(self.micro_batch_size))
        if self._exact_batch_norm is not None:
            sums, logs = self._sum_of_exact(batch, effective, variables)
        else:
            sums, logs = self._sum_of_micro_steps(batch, effective, variables)
        newest = {i: largest([g[i] for g, _ in sums[0]]) for i in overwritten_of(variables)}
        groups, (losses, counts) = sum_over_replicas(sums)
        if groups:
            # Under a strategy, what averages was divided by the number of replicas.
            means = sum_of_means(
                [(g, None if w is None else w / number_of_replicas()) for g, w in groups]
            )
            self._update(
                [newest.get(i, mean) for i, mean in enumerate(means)],
                counts or (tf.zeros((), tf.float64), tf.ones((), tf.float64)),
            )
        loss, values = loss_from_sums(losses)
        if self._policy.screens:
            left = losses[-1][-1] / number_of_replicas()
            return self._with_loss(logs, (loss, left), [(value, left) for value in values])
        # Keras weights these by the batch size where it is static, so as the large batch does.
        weight = examples if isinstance(examples, int) else None
        return self._with_loss(logs, (loss, examples), [(value, weight) for value in values])

    def _sum_of_micro_steps(self, batch, effective, variables):
        """Sums of what all micro-steps found, and the logs of the last."""

        def step(micro_batch):
            step = self._micro_step(micro_batch, effective)
            losses = loss_sums(step.loss, step.terms, step.weight, step.share)
            losses = self._policy.screen_losses(step.loss, losses)
            groups, dropped = self._policy.screen(step.groups)
            counts = None if dropped is None else (dropped, tf.ones_like(dropped))
            groups = [(g.gradients, g.weight) for g in groups]
            return (groups, (losses, counts)), [], step.logs

        sums, _, logs = sum_over_micro_batches(
            step,
            batch,
            self.micro_batch_size,
            zeros=lambda summands: zero_sums(summands, variables),
            add=functools.partial(add_to_sums, overwritten=overwritten_of(variables)),
        )
        self._end_cycle_of_batch_norms()
        return sums, logs

    def _sum_of_exact(self, batch, effective, variables):
        """As `_sum_of_micro_steps`, with the effective batch's batch norm."""

        def totals_of(predict, micro_batch):
            found = self._loss(micro_batch, predict, effective)
            return denominators(found.terms, found.weight, found.share)

        def differentiate(predict, micro_batch, totals):
            found = self._loss(micro_batch, predict, effective)
            summed = (found.loss, found.terms, found.weight, found.share)
            scale = self._gradient_scale(found.loss.dtype)
            targets, seeds = targets_and_seeds(
                found.loss, found.terms, scale, found.weight, found.share, totals
            )
            x, y, sample_weight = micro_batch
            logs = self.compute_metrics(x, y, found.y_pred, sample_weight=sample_weight)
            return found.tape, targets, seeds, loss_sums(*summed), logs

        gradients, losses, logs = self._exact_batch_norm.gradients(
            batch,
            self.micro_batch_size,
            variables,
            totals_of,
            differentiate,
            finite_only=self._policy.finite_only,
        )
        return ([(gradients, None)] if variables else [], (losses, None)), logs

    def _update(self, gradients, counts):
        """Updates with the effective batch's gradients, or drops them; on a replica.

        Args:
            gradients: List with a tensor or None for each trainable variable, the same on all
                replicas.
            counts: Tuple of float64 scalars, the micro-batches that were dropped and all.
        """

        def apply(gradients):
            # The graph of a step also runs in the call that finds the data at its end: without
            # its gradients, the update must not count.
            with (
                tf.control_dependencies([g for g in gradients if g is not None]),
                _keras.replicas_agree(self.optimizer),
                one_by_one(self.optimizer),
            ):
                self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))

        scaled = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        self._drops.update(gradients, *counts, apply, self.optimizer if scaled else None)

    def _loss(self, data, predict, effective=None):
        """Forward pass of one micro-batch, and what its loss is made of.

        Args:
            data: `(x, y, sample_weight)`.
            predict: Function of the tape that returns the predictions.
            effective: `_Effective` of the batch that `data` is a slice of; None across steps.
        """
        x, y, sample_weight = data
        examples = batch_size(data, self._shared_inputs)
        known = {"same_shapes": False}
        if effective is not None:
            weighed = effective.weighed
            times = None if weighed is None else by_identity(sample_weight, weighed)
            known = {"same_shapes": True, "times_weighed": times}
        finite_only = self._policy.finite_only
        with tf.GradientTape(persistent=True) as tape, model_ends_cycle(finite_only):
            _keras.clear_added_losses(self)
            y_pred = predict(tape)
            recorder = LossRecorder(tape, examples=examples, **known)
            with recorder.recording(self):
                loss = _keras.compute_loss(self, x, y, y_pred, sample_weight)
            loss = check_total_loss(loss)
        terms = with_coefficients(recorder.terms, tape, loss)
        weight = check_micro_batch_weight(self.micro_batch_weight(x, y, sample_weight))
        share = None
        if weight is None:
            weight, total = examples, None if effective is None else effective.total
            if total is not None:
                # A batch without examples is one micro-batch, whose regularisers count.
                part = tf.math.divide_no_nan(tf.cast(weight, total.dtype), total)
                share = tf.where(tf.equal(total, 0), tf.ones_like(total), part)
        return _Loss(tape, y_pred, loss, terms, weight, share)

    def _gradient_scale(self, dtype):
        return self.optimizer.scale_loss(tf.ones((), dtype))

    def _micro_step(self, data, effective=None):
        """Forward and backward pass of one micro-batch; arguments as for `_loss`."""
        x, y, sample_weight = data

        def predict(tape):
            del tape  # which records it anyway
            training = {"training": True} if _keras.call_has_training_argument(self) else {}
            return self(x, **training)

        tape, y_pred, loss, terms, weight, share = self._loss(data, predict, effective)
        groups = []
        if self.trainable_weights:
            in_half = self.compute_dtype == "float16" or isinstance(
                self.optimizer, keras.optimizers.LossScaleOptimizer
            )
            groups = contributions(
                tape,
                loss,
                terms,
                self.trainable_weights,
                self._gradient_scale(loss.dtype),
                weight,
                share,
                multiply=effective is None and not in_half,
            )
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        logs = self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return _MicroStep(groups, loss, terms, weight, share, logs)

    def _plan_exact_batch_norm(self):
        """Cuts the model for `batch_norm="exact"`, unless no batch norm needs it."""
        if self.batch_norm != "exact" or self._exact_batch_norm is not None:
            return
        model = self if self.model is None else self.model
        if BATCH_NORM.is_in(model):
            self._exact_batch_norm = StagedGradients(model, BATCH_NORM)

    def _with_loss(self, logs, loss, values):
        """The logs after the metrics of the loss, and of each output's, have seen a step's.

        Args:
            logs: Dict of the metrics' values before that.
            loss: Tuple of the total loss and its weight in the mean over the epoch.
            values: List of the same for each compiled loss.
        """
        loss, *values = [self._policy.logged(*pair) for pair in (loss, *values)]
        _keras.track_loss(self, *loss)
        metrics = _keras.per_output_loss_metrics(self)
        for metric, (value, weight) in zip(metrics, values, strict=False):
            metric.update_state(value, sample_weight=weight)
        results = self.get_metrics_result()
        return {name: results.get(name, value) for name, value in logs.items()}

    @property
    def _batch_norms(self):
        """The AccumBatchNorm layers, whose cycle is the model's."""
        return [v for v in _keras.all_layers(self) if isinstance(v, AccumBatchNorm) and v.built]

    def _end_cycle_of_batch_norms(self):
        for layer in self._batch_norms:
            layer.end_cycle()

    def _watched(self, fit):
        """A wrapped model's own `fit`, which warns once where it trains past this model."""

        @functools.wraps(fit)
        def watched(*args, **kwargs):
            self._splits = False
            result = fit(*args, **kwargs)
            if not self._splits:
                vars(self)["fit"] = fit
                name = type(self.model).__name__
                warnings.warn(
                    "With `micro_batch_size` it is `keras.Model.fit`, `train_on_batch` and "
                    f"`train_step` that split batches. Received: {name}.fit, which called none of "
                    f"them, with micro_batch_size={self.micro_batch_size}: it saw whole batches. "
                    "Let it end in super().fit(...), or train it without a wrapper, compiled with "
                    "a GradientAccumulateOptimizer.",
                    stacklevel=2,
                )
            return result

        return watched

    def _check_layers(self):
        """Refuses layers that synchronise replicas in the loop over micro-batches."""
        replicas = self.distribute_strategy.num_replicas_in_sync
        if self.micro_batch_size is None or self.batch_norm == "exact" or replicas == 1:
            return
        for layer in _keras.all_layers(self):
            if getattr(layer, "synchronized", False):
                raise ValueError(
                    "With `micro_batch_size` on several replicas no layer may synchronise them, "
                    "which TensorFlow cannot do in the loop over micro-batches. Received: "
                    f"{type(layer).__name__}(synchronized=True) {layer.name!r} on "
                    f"{replicas} replicas. Pass accum_steps instead (fit's batch is then a "
                    'micro-batch), or batch_norm="exact", or make it synchronized=False.'
                )

    def _check_no_open_cycle(self, optimizer):
        """Refuses another optimizer in place of one that holds gradients."""
        current = self._accumulating_optimizer
        if current is None or optimizer in (current, self.optimizer):
            return
        held = held_by(current)
        if held:
            raise ValueError(
                "A new optimizer must not take the place of one in mid-cycle, whose gradients "
                f"would be lost. Received: an optimizer that holds {held}. Call "
                "model.flush() to update with them, or model.optimizer.reset() to drop them."
            )

    def _check_optimizer_does_not_accumulate(self, optimizer):
        """For `micro_batch_size`. A `MultiOptimizer` may know its parts only once it is built."""
        for part in parts_of(optimizer):
            for name in ("gradient_accumulation_steps", "accum_steps"):
                steps = getattr(part, name, None)
                if steps:
                    raise ValueError(
                        "The model accumulates, so its optimizer must not do it as well. Received: "
                        f"{type(part).__name__}({name}={steps}) for a model with micro_batch_size="
                        f"{self.micro_batch_size}. Leave that out."
                    )

    @property
    def _accumulating_optimizer(self):
        """The GradientAccumulateOptimizer in use, or None."""
        return accumulating_optimizer(getattr(self, "optimizer", None))

    def _accumulating(self, optimizer):
        """`optimizer` as this model's mode needs it."""
        if optimizer is None:
            return None
        if isinstance(optimizer, str | dict):
            optimizer = keras.optimizers.get(optimizer)
        inner = optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            inner = optimizer.inner_optimizer
        check_made_under(self.distribute_strategy, inner)
        if isinstance(inner, GradientAccumulateOptimizer):
            same_steps = same_accum_steps(inner.accum_steps, self.accum_steps)
            if same_steps and inner.non_finite == self.non_finite:
                return optimizer
            raise ValueError(
                "The model accumulates, so its optimizer must not do it as well. Received: "
                f"GradientAccumulateOptimizer(accum_steps={inner.accum_steps}, "
                f"non_finite={inner.non_finite!r}) for a model with accum_steps="
                f"{self.accum_steps}, micro_batch_size={self.micro_batch_size}, "
                f"non_finite={self.non_finite!r}. Pass "
                "the inner optimizer to `compile`, or the wrapped one to a plain keras.Model."
            )
        if self.micro_batch_size is not None:
            self._check_optimizer_does_not_accumulate(inner)
            return optimizer
        wrapped = GradientAccumulateOptimizer(inner, self.accum_steps, non_finite=self.non_finite)
        if inner is optimizer:
            return wrapped
        return keras.optimizers.LossScaleOptimizer(
            wrapped,
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )

    def get_config(self):
        """Config of the wrapped model and the mode; a subclass's own, as by Keras, without one."""
        if self.model is None:
            return super().get_config()
        return {
            "name": self.name,
            "trainable": self.trainable,
            "model": keras.saving.serialize_keras_object(self.model),
            "accum_steps": serialize_accum_steps(self.accum_steps),
            "micro_batch_size": self.micro_batch_size,
            "batch_norm": self.batch_norm,
            "non_finite": self.non_finite,
            "shared_inputs": list(self._shared_inputs) or None,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The reverse of `get_config`."""
        if not isinstance(config.get("model"), dict):
            return super().from_config(config, custom_objects=custom_objects)
        model = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects
        )
        steps = deserialize_accum_steps(config["accum_steps"], custom_objects)
        return cls(**{**config, "model": model, "accum_steps": steps})


# Legacy HDF5 files name a model's class without the package that it is registered under.
keras.saving.get_custom_objects()["GradientAccumulateModel"] = GradientAccumulateModel


def _as_tensor(leaf):
    if leaf is None or isinstance(leaf, tf.Tensor | tf.RaggedTensor | tf.SparseTensor):
        return leaf
    return tf.convert_to_tensor(leaf)
