"""GradientAccumulateModel: a Keras model whose `train_step` accumulates."""

from __future__ import annotations

import inspect
import numbers
from typing import Any, Literal, NoReturn

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import (
    FixedAttribute,
    check_choice,
    refuse_arguments,
    similar_name,
)
from gradient_accumulator_tf.cycle.batches import check_shared_inputs
from gradient_accumulator_tf.cycle.non_finite import NonFinite, policy_of
from gradient_accumulator_tf.cycle.schedules import (
    AccumSteps,
    deserialize_accum_steps,
    same_accum_steps,
    serialize_accum_steps,
)
from gradient_accumulator_tf.models.across_steps import AcrossSteps
from gradient_accumulator_tf.models.coupled_loss import check_coupled_loss
from gradient_accumulator_tf.models.further_optimizers import optimizers_of
from gradient_accumulator_tf.models.within_step import WithinStep
from gradient_accumulator_tf.models.wrapper import ModelWrapper
from gradient_accumulator_tf.optimizers.accumulate import (
    GradientAccumulateOptimizer,
    accumulating_optimizer,
    accumulating_optimizer_of,
)
from gradient_accumulator_tf.optimizers.cycle import cycle_of
from gradient_accumulator_tf.replicated.replicas import (
    check_made_under,
    check_strategy,
    prepare_fit,
)
from gradient_accumulator_tf.replicated.variables import outside_of_tracing


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
    similar = [similar for name in others if (similar := similar_name(name, known))]
    advice = f"Did you mean {' and '.join(similar)}? " if similar else ""
    refuse_arguments(owner, others, f"{advice}Its arguments are {', '.join(known)}.")


def _mode_of(accum_steps, micro_batch_size):
    """The mode that the user chose."""
    if (accum_steps is None) == (micro_batch_size is None):
        raise ValueError(
            "Exactly one of `accum_steps` (fit's batch is the micro-batch) and "
            "`micro_batch_size` (fit's batch is the effective batch) must be given. "
            f"Received: accum_steps={accum_steps!r}, micro_batch_size={micro_batch_size!r}. Pass "
            "micro_batch_size if the effective batch can be loaded at once, or else accum_steps."
        )
    return WithinStep(micro_batch_size) if accum_steps is None else AcrossSteps(accum_steps)


# What to do instead of setting an attribute that is fixed.
_ANOTHER = (
    "Make another model, around the same layers: "
    "GradientAccumulateModel(model.model, ..., {name}={value!r})."
)


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class GradientAccumulateModel(ModelWrapper):
    """A Keras model that trains on effective batches in micro-batches.

    It has two modes, and takes the argument of exactly one:

    - `micro_batch_size`: the batch given to `fit` is the effective batch. Each training step
      cuts it into micro-batches, runs them one after the other, and updates once. Steps per
      epoch, learning-rate schedules, callbacks and logs are those of the large batch. Peak memory
      is that of one micro-batch, and one copy of the gradients.
    - `accum_steps`: the batch given to `fit` is the micro-batch. Every `accum_steps`-th batch
      updates, with the mean over all of them. A partial cycle at the end of an epoch is an update
      too, made before the validation. This mode is for data that comes in micro-batches, and for
      an effective batch that does not fit even as input.

    The update equals that of the plain model on the effective batch, for any last batch. The loss
    of each micro-batch counts for what Keras divided it by: examples, unmasked tokens under a
    mask, or the sum of the weights for the reduction "mean_with_sample_weight". Regularisers count
    once. A tensor that `add_loss` gets unreduced is summed, as Keras does. A scalar given to
    `add_loss` counts as a mean over the examples, and so does what a `compute_loss` of your own
    returns. For a scalar that is a sum, call `self.add_loss(keras.ops.reshape(total, (1,)))`.

    The update differs where a layer looks across examples or draws random numbers.
    BatchNormalization normalises by the micro-batch, unless `batch_norm="exact"`. Dropout draws
    other numbers.

    With `micro_batch_size`, `evaluate`, `predict` and validation run in micro-batches as well, and
    return the numbers of the plain model. Metrics that add up over the examples are updated with
    each micro-batch. For others, such as a function that returns one number or a `Metric` class of
    your own, the outputs of the effective batch are kept, and they are updated once. An attribute
    `additive`, True or False, of the metric or the function says what cannot be known of it.

    ```python
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model = GradientAccumulateModel(model=model, micro_batch_size=16)
    model.compile("adam", loss="mse")
    model.fit(np.ones((256, 8)), np.ones((256, 1)), batch_size=128)
    ```

    It takes a model (`model=`), or the ends of a functional model (`inputs=`, `outputs=`). It is
    also a base class that takes the place of `keras.Model`:

    ```python
    class MyModel(GradientAccumulateModel):
        def __init__(self):
            super().__init__(accum_steps=8)
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)
    ```

    Around a model, layers and variables are that model's own, not copies. `weights`, `layers`,
    `summary()`, `save_weights()` and `export()` are those of the plain model, so weight files are
    interchangeable. An attribute that the wrapper does not have is read from the model, and set
    on it. The model's metrics are in the logs. A `fit`, a `compile` and the like of the model's
    own class run, and end in this class's. So KerasHub's tasks take strings and images as ever.

    Args:
        model_or_inputs: `model` or `inputs`, by position.
        outputs: Outputs of a functional model, as for `keras.Model`.
        inputs: Its inputs.
        model: A `keras.Model` to train instead: functional, Sequential or subclassed.
        accum_steps: Integer >= 1, batches per update; or a schedule of it, as for
            `GradientAccumulateOptimizer`.
        micro_batch_size: Integer >= 1, examples per micro-batch (per replica).
        batch_norm: With `micro_batch_size`, what trainable batch norms of Keras's
            `BatchNormalization` or `AccumBatchNorm` normalise by: "micro_batch" (default) or
            "exact". "exact" is the whole effective batch (of a replica, unless
            `synchronized=True`), forward and backward. The update, with the moving statistics, is
            then the large batch's. "exact" is for functional and Sequential models. It keeps what
            enters a batch norm, or passes it by, for all examples of the effective batch: 28 to
            74 % of what the large batch takes per example, measured on five nets.
        coupled_loss: With `micro_batch_size`, whether the loss compares examples (contrastive
            losses, Dice over the batch, a loss that divides by its own mask). False (default)
            computes it for each micro-batch. True computes it once, from the outputs of all
            examples of the effective batch (of a replica). "all_replicas" takes the outputs of
            all replicas together, as one device would. The update is then the large batch's for
            any loss. It costs one more forward pass, and keeps the outputs of all examples. Each
            output must have one row for each example.
        non_finite: "propagate" (default), "drop_micro_batch" or "drop_cycle"; as for
            `GradientAccumulateOptimizer`. The logs of an epoch count what was dropped. Their loss
            is then the mean over what was finite.
        shared_inputs: List of the inputs that belong to every example (a graph, a bank of
            negatives), by their positions or keys in `x`: `[1]`, `["bank"]`. A tuple reaches what
            is nested: `[("graph", 0)]`, while `["graph"]` is all that is in it. Each micro-batch
            gets them whole. Every other tensor of a batch must have one row for each example.
            Only scalars, and one row in a batch of several examples, belong to all as well.
        name: As for `keras.Model`, and so are the four below.
        trainable: Whether its variables are trained.
        dtype: Dtype or dtype policy.
        autocast: Whether the inputs are cast to its compute dtype.
        activity_regularizer: Regulariser of its outputs.
        **kwargs: Not accepted.

    Attributes:
        accum_steps: Batches per update; an integer can be set, and holds from the next cycle on.
        micro_batch_size: Examples per micro-batch; can be set, and holds from the next batch on.
        batch_norm: "micro_batch" or "exact".
        coupled_loss: False, True or "all_replicas".
        non_finite: "propagate", "drop_micro_batch" or "drop_cycle".

    Raises:
        TypeError: If `accum_steps` is neither an integer nor a schedule, `micro_batch_size` not
            an integer, `shared_inputs` not a list of positions, keys and tuples, or `model` not a
            Keras 3 model.
        ValueError: If not exactly one of the two is given, or an argument that is not known; if
            `batch_norm="exact"` or `coupled_loss` is given with `accum_steps`; if `model` is given
            together with `inputs`, `outputs` or a `call` of its own, accumulates by itself, or
            overrides a method of a training step; or under a ParameterServerStrategy or
            CentralStorageStrategy.
    """

    def __init__(
        self,
        model_or_inputs: Any = None,
        /,
        outputs: Any = None,
        *,
        inputs: Any = None,
        model: Any = None,
        accum_steps: AccumSteps | None = None,
        micro_batch_size: int | None = None,
        batch_norm: Literal["micro_batch", "exact"] = "micro_batch",
        coupled_loss: bool | Literal["all_replicas"] = False,
        non_finite: NonFinite = "propagate",
        shared_inputs: Any = None,
        name: str | None = None,
        trainable: bool | None = None,
        dtype: Any = None,
        autocast: bool | None = None,
        activity_regularizer: Any = None,
        **kwargs: NoReturn,
    ) -> None:
        _check_arguments(type(self).__name__, model_or_inputs, kwargs)
        mode = _mode_of(accum_steps, micro_batch_size)
        check_choice("batch_norm", batch_norm, ("micro_batch", "exact"))
        check_coupled_loss(coupled_loss)
        mode.check_arguments(batch_norm, coupled_loss, self._own_step)
        policy = policy_of(non_finite)
        if coupled_loss and policy.screens:
            raise ValueError(
                "With coupled_loss every example's gradient depends on all others, so no "
                f"micro-batch can be dropped alone. Received: non_finite={non_finite!r} and "
                f'coupled_loss={coupled_loss!r}. Pass non_finite="drop_cycle" instead.'
            )
        if batch_norm == "exact" and policy.screens:
            raise ValueError(
                'With batch_norm="exact" every example depends on all others, so no micro-batch '
                f"can be dropped alone. Received: non_finite={non_finite!r}. Pass "
                'non_finite="drop_cycle" instead.'
            )
        shared_inputs = check_shared_inputs(shared_inputs)
        check_strategy()
        prepare_fit()
        of_layer = {
            "name": name,
            "trainable": trainable,
            "dtype": dtype,
            "autocast": autocast,
            "activity_regularizer": activity_regularizer,
        }
        given = {argument: value for argument, value in of_layer.items() if value is not None}
        super().__init__(model_or_inputs, outputs, inputs=inputs, model=model, **given)
        self._mode = mode
        self._batch_norm = batch_norm
        self._coupled_loss = coupled_loss
        self._policy = policy
        self._shared_inputs = shared_inputs
        self._drops = mode.new_drops(policy)  # where checkpoints find what it counts
        mode.watch(self)

    @property
    def accum_steps(self) -> Any:
        """Batches per update: the optimizer's, once there is one; None with `micro_batch_size`.

        An integer can be set, between fits or within one; it holds from the next cycle on.
        """
        return self._mode.accum_steps(self)

    @accum_steps.setter
    def accum_steps(self, value: int) -> None:
        self._mode.set_accum_steps(self, value)

    @property
    def micro_batch_size(self) -> int | None:
        """Examples per micro-batch (per replica); None with `accum_steps`.

        An integer can be set, between fits or within one; the next batch is cut by it, with a new
        trace of the training step.
        """
        return self._mode.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, value: int) -> None:
        self._mode.set_micro_batch_size(value)
        # `fit`, `evaluate` and `predict` look these functions up in each step. Keras's own method
        # makes the first, since what is trainable is still to be as it was.
        if self.train_function is not None:
            super().make_train_function(force=True)
        if self.test_function is not None:
            self.make_test_function(force=True)
        if self.predict_function is not None:
            self.make_predict_function(force=True)

    batch_norm = FixedAttribute[str](
        "_batch_norm", "What trainable batch norms normalise by.", _ANOTHER
    )
    coupled_loss = FixedAttribute[Any](
        "_coupled_loss",
        'Whose outputs the loss is computed from at once, False, True or "all_replicas".',
        _ANOTHER,
    )
    non_finite = FixedAttribute[str](
        "_policy.name", "What becomes of gradients that are not finite.", _ANOTHER
    )
    shared_inputs = FixedAttribute[tuple[Any, ...]](
        "_shared_inputs",
        "The inputs that belong to every example, a tuple of positions, keys and tuples of both.",
        _ANOTHER,
    )

    @property
    def dropped_micro_steps(self) -> tf.Tensor:
        """int64 scalar tensor: micro-batches dropped so far (0 if none can be)."""
        return tf.convert_to_tensor(self._mode.counts(self).dropped_micro_steps)

    @property
    def dropped_cycles(self) -> tf.Tensor:
        """int64 scalar tensor: cycles dropped so far (0 if none can be)."""
        return tf.convert_to_tensor(self._mode.counts(self).dropped_cycles)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: str | bool = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
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
        self._mode.check_layers(self)
        self._check_no_open_cycle(optimizer)
        self._mode.plan_anew(self)
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
        own_weight = type(self).micro_batch_weight is not GradientAccumulateModel.micro_batch_weight
        self._mode.couplings.at_compile(
            loss, self.model or self, self._mode.setting(self), certain_only=own_weight
        )
        accumulating = accumulating_optimizer_of(self)
        if accumulating is not None and self.built:
            accumulating.rebuild(self.trainable_variables)

    def make_train_function(self, force: bool = False) -> None:
        """As for `keras.Model`, which calls it before each fit and `train_on_batch`.

        Raises:
            ValueError: If `trainable` of a variable was changed since the model was compiled and
                trained, or if the model was compiled without an optimizer.
        """
        if not self._own_step and self.optimizer is None:
            raise ValueError(
                "Training needs an optimizer. Received: compile(optimizer=None). Compile with "
                'one, such as compile("adam", loss).'
            )
        self._mode.note_training(self, self._own_step)
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

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model; Keras asks for it where `compile` is overridden."""
        # What was saved is what a wrapped model's own `compile` had handed on.
        type(self).compile(self, **keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> keras.callbacks.History:
        """Trains the model; arguments and result as for `keras.Model.fit`.

        With `accum_steps` a partial cycle at an epoch's end is applied before its validation and
        its `on_epoch_end` callbacks.
        """
        own = [*self._mode.callbacks(batch_size), *self._policy.callbacks()]
        if isinstance(callbacks, keras.callbacks.CallbackList):
            for callback in own:
                callback.set_model(self)
            callbacks.callbacks[:0] = own
        else:
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

    def flush(self) -> None:
        """Updates with the mean over a partial cycle, if there is one (mode `accum_steps`).

        To be called at the end of a loop of `train_on_batch`; `fit` does it by itself. Optimizers
        that a subclass keeps in further attributes are flushed as well.
        """
        for optimizer in optimizers_of(self).values():
            accumulating = accumulating_optimizer(optimizer)
            if accumulating is not None:
                accumulating.flush()

    @property
    def ended_in_update(self) -> bool:
        """Whether the last batch ended in an update: a bool, for callbacks.

        As for `GradientAccumulateOptimizer`; with `micro_batch_size` every batch does.
        """
        optimizer = accumulating_optimizer_of(self)
        return optimizer is None or optimizer.ended_in_update

    @property
    def just_updated(self) -> tf.Tensor:
        """Scalar bool tensor: whether the last batch ended in an update, for a `train_step`.

        As for `GradientAccumulateOptimizer`; with `micro_batch_size` every batch does.
        """
        optimizer = accumulating_optimizer_of(self)
        return tf.constant(True) if optimizer is None else optimizer.just_updated

    def train_step(self, data: Any) -> dict[str, Any]:
        """One batch: a micro-step, or all micro-steps of an update; see the class.

        Args:
            data: What the dataset yields: `x`, `(x, y)` or `(x, y, sample_weight)`, nested.

        Returns:
            Dict of the metrics' values.
        """
        return self._step("train_step", data, super().train_step)

    def test_step(self, data: Any) -> dict[str, Any]:
        """The loss and the metrics of one batch, in micro-batches with `micro_batch_size`.

        They equal those of the plain model on the whole batch where an update would equal its.

        Args:
            data: What the dataset yields: `x`, `(x, y)` or `(x, y, sample_weight)`, nested.

        Returns:
            Dict of the metrics' values.
        """
        return self._step("test_step", data, super().test_step, without=("optimizer",))

    def predict_step(self, data: Any) -> Any:
        """The outputs for one batch, in micro-batches with `micro_batch_size`.

        Args:
            data: What the dataset yields: `x`, or a tuple that begins with it, nested.

        Returns:
            What the model returns for the batch. Outputs that are not dense tensors with one row
            for each example are computed for the whole batch at once.
        """
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        without = ("optimizer", "_compile_loss", "_compile_metrics")
        return self._step("predict_step", (x,), super().predict_step, without)

    def _step(self, name, data, plain_step, without=()):
        """One step as the mode takes it.

        Args:
            name: The method of the mode.
            data: What the dataset yields.
            plain_step: Function of it that takes the step as Keras does.
            without: The parts of a compiled model that the step does not need.
        """

        def build(data):
            with outside_of_tracing(), _keras.compiled_without(self, *without):
                _keras.build_for_training(self, data)

        tensors = tf.nest.map_structure(_as_tensor, keras.utils.unpack_x_y_sample_weight(data))
        return getattr(self._mode, name)(self, tensors, build, lambda: plain_step(data))

    def micro_batch_weight(self, x: Any, y: Any, sample_weight: Any) -> Any:
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

    def _check_no_open_cycle(self, optimizer):
        """Refuses another optimizer in place of one that holds gradients."""
        current = accumulating_optimizer_of(self)
        if current is None or optimizer in (current, self.optimizer):
            return
        held = cycle_of(current).held
        if held:
            raise ValueError(
                "A new optimizer must not take the place of one in mid-cycle, whose gradients "
                f"would be lost. Received: an optimizer that holds {held}. Call "
                "model.flush() to update with them, or model.optimizer.reset() to drop them."
            )

    @property
    def _own_step(self):
        """Name of the subclass that overrides `train_step`; empty if none does."""
        cls = type(self)
        return "" if cls.train_step is GradientAccumulateModel.train_step else cls.__name__

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
        return self._mode.optimizer_for(self, optimizer)

    def get_config(self) -> dict[str, Any]:
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
            "coupled_loss": self.coupled_loss,
            "non_finite": self.non_finite,
            "shared_inputs": list(self._shared_inputs) or None,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> GradientAccumulateModel:
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
