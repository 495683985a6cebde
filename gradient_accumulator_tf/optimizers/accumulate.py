"""GradientAccumulateOptimizer: what a user and Keras call. Its work is done in `cycle.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import FixedAttribute, check_choice
from gradient_accumulator_tf._keras.patches import hook_into_models
from gradient_accumulator_tf.cycle.gradients import Contribution
from gradient_accumulator_tf.cycle.non_finite import PROPAGATE, NonFinite, policy_of
from gradient_accumulator_tf.cycle.schedules import (
    AccumSteps,
    check_accum_steps,
    deserialize_accum_steps,
    serialize_accum_steps,
)
from gradient_accumulator_tf.cycle.weights import checked_weight
from gradient_accumulator_tf.optimizers.cycle import Cycle, cycle_of, cycle_of_model
from gradient_accumulator_tf.optimizers.cycle_length import CycleLength
from gradient_accumulator_tf.optimizers.saved_cycle import SavedCycle
from gradient_accumulator_tf.optimizers.wrapper import OptimizerWrapper, as_it_is
from gradient_accumulator_tf.replicated.replicas import check_strategy, prepare_fit

if TYPE_CHECKING:
    from typing_extensions import Self


# What to do instead of setting an attribute that is fixed.
_ANOTHER = (
    "Make another optimizer: "
    "GradientAccumulateOptimizer(optimizer.inner_optimizer, ..., {name}={value!r})."
)


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class GradientAccumulateOptimizer(OptimizerWrapper):
    """A Keras optimizer that updates once every `accum_steps` calls, with the mean gradient.

    A cycle is `accum_steps` calls. Its last call updates the inner optimizer once, with the mean

        sum_k w_k g_k / sum_k w_k

    where `g_k` is the gradient that call k was given, and `w_k` its `weight` (1 by default).
    Between updates nothing moves: no weight, no slot, not `iterations`, no weight decay, no moving
    average. Clipping, weight decay and averaging act once, on the mean.

    The result equals that of the inner optimizer on the effective batch under two conditions:

    - `g_k` is the gradient of a mean over micro-batch k, and `w_k` is what that mean was divided by
      (examples, or tokens). The default weight is right if all micro-batches have the same size
      and there are no masks.
    - No layer looks across examples (BatchNormalization) or draws random numbers (Dropout).

    Embedding gradients (`tf.IndexedSlices`) are scattered into the sum. So the update is that of
    the dense gradient. Adam on the sparse gradient of a large batch differs from it: it squares
    repeated rows before it adds them up.

    ```python
    x, y = np.ones((256, 8)), np.ones((256, 1))
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    optimizer = GradientAccumulateOptimizer("adam", accum_steps=8)
    model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=4)  # an update every 8 batches, so for every 32 examples
    ```

    `fit` leaves a partial cycle open at the end of an epoch. The cycle goes on in the next epoch.
    At the end of the training `fit` flushes it: it updates with the mean over what is there.

    A loop of your own passes each micro-batch's gradients to `apply`, and flushes at the end:

    ```python
    loss_fn = keras.losses.MeanSquaredError()
    for x_batch, y_batch in tf.data.Dataset.from_tensor_slices((x, y)).batch(4):
        with tf.GradientTape() as tape:
            loss = loss_fn(y_batch, model(x_batch, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables, weight=len(x_batch))
    optimizer.flush()
    ```

    A variable that gets no gradient (None) in a whole cycle is not updated, as in Keras. There is
    one exception, in a `tf.function`, which knows only the call that is traced: if some variables
    without a gradient in the call that ends the cycle got one earlier in the cycle, all of them
    are updated with their mean. The mean is zero for a variable that got none.

    Args:
        optimizer: The inner optimizer: a `keras.optimizers.Optimizer`, its name, or its config.
        accum_steps: The micro-batches per update: an integer >= 1, or a schedule. With 1 the
            optimizer is the inner optimizer, until another number is set. A schedule is a dict
            `{first_update: steps}`, or a callable of the number of updates, such as an
            `AccumStepsSchedule`. A cycle keeps the length that it began with.
        reduction: "mean" (default) updates with `sum_k w_k g_k / sum_k w_k`. "sum" updates with
            `sum_k w_k g_k`, which is the effective batch's gradient if the loss is a sum over
            examples.
        non_finite: What happens to gradients that contain an inf or a nan. "propagate" (default)
            updates with them, as the large batch would. "drop_micro_batch" leaves the micro-batch
            out of the mean: its weight is 0. "drop_cycle" makes no update with a mean that is
            not finite. "drop_micro_batch" makes none if no micro-batch of the cycle is finite.
        name: Optional name.
        **kwargs: Not accepted. Set clipping, weight decay, moving averages and the loss scale on
            the inner optimizer.

    Attributes:
        inner_optimizer: The wrapped optimizer.
        accum_steps: Micro-batches per update. An integer can be set, between fits or within one.
        steps_in_cycle: int64 scalar tensor, the micro-batches that the current cycle takes.
        reduction: "mean" or "sum".
        non_finite: "propagate", "drop_micro_batch" or "drop_cycle".
        dropped_micro_steps: int64 scalar tensor, the micro-batches that were dropped, over all
            replicas. They are counted when their cycle ends.
        dropped_cycles: int64 scalar tensor, the cycles that ended without an update.
        iterations: int64 scalar variable, the number of updates.
        micro_step: int64 scalar tensor, the micro-batches in the current cycle.
        just_updated: Scalar bool tensor, whether the last `apply` ended in an update.
        ended_in_update: The same as a bool, for callbacks.
        learning_rate: The inner optimizer's. It can be set.

    Raises:
        TypeError: If `accum_steps` is neither an integer nor a schedule that can be traced, or
            if `optimizer` is not a Keras 3 optimizer.
        ValueError: If `accum_steps` < 1, if the inner optimizer accumulates or scales losses, or
            if the strategy in force is a ParameterServerStrategy or CentralStorageStrategy.

    Reference:
        Design of accumulation as an optimizer: [optax.MultiSteps](
        https://optax.readthedocs.io/en/latest/api/optimizer_wrappers.html).
    """

    def __init__(
        self,
        optimizer: Any,
        accum_steps: AccumSteps,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        non_finite: NonFinite = "propagate",
        name: str | None = None,
        **kwargs: NoReturn,
    ) -> None:
        accum_steps = check_accum_steps(accum_steps, "micro-batches per update")
        check_choice("reduction", reduction, ("mean", "sum"))
        policy = policy_of(non_finite)
        check_strategy()
        super().__init__(optimizer, name, kwargs)
        prepare_fit()
        self._reduction = reduction
        self._cycle = Cycle(self, CycleLength(accum_steps), policy, self._track)
        self._saved = SavedCycle(self, self._cycle)
        self._notes = self._saved.notes
        self._track()

    def _track(self):
        """Keeps what has variables in attributes, whose names are the ones in checkpoints."""
        self._accumulator, self._drops = self._cycle.accumulator, self._cycle.drops

    @property
    def accum_steps(self) -> Any:
        """Micro-batches per update: an integer, which can be set, or a schedule.

        A number that is set holds from the next cycle on, without a new trace. An optimizer that
        was built with `accum_steps=1` keeps no sums until another number is set. Then it makes
        them, and the models that it trains make their training step anew.

        Raises:
            TypeError: On setting it to anything but an integer, or in place of a schedule.
            ValueError: On setting it to less than 1; or to more than 1, if there are no sums and
                a `tf.function` of your own was traced without them.
        """
        return self._cycle.length.accum_steps

    @accum_steps.setter
    def accum_steps(self, value: int) -> None:
        self._cycle.set_steps(self._cycle.length.checked(value, type(self).__name__))

    @property
    def steps_in_cycle(self) -> tf.Tensor:
        """int64 scalar tensor: micro-batches in the current cycle once it is complete.

        Between cycles it is the last cycle's. It is 0 before the first cycle and after `reset`. It
        is always 1 if the optimizer keeps no sums (`accum_steps=1`).
        """
        return self._accumulator.in_cycle()[1]

    reduction = FixedAttribute[str](
        "_reduction",
        'What an update takes of the gradients of a cycle, "mean" or "sum".',
        _ANOTHER,
    )
    non_finite = FixedAttribute[str](
        "_cycle.policy.name", "What becomes of gradients that are not finite.", _ANOTHER
    )

    @property
    def dropped_micro_steps(self) -> tf.Tensor:
        """int64 scalar tensor: micro-batches dropped so far (0 before `build`)."""
        return tf.convert_to_tensor(self._drops.dropped_micro_steps)

    @property
    def dropped_cycles(self) -> tf.Tensor:
        """int64 scalar tensor: cycles dropped so far (0 before `build`)."""
        return tf.convert_to_tensor(self._drops.dropped_cycles)

    @property
    def micro_step(self) -> tf.Tensor:
        """int64 scalar tensor: micro-batches in the current cycle (0 before `build`)."""
        return self._accumulator.in_cycle()[0]

    @property
    def just_updated(self) -> tf.Tensor:
        """Scalar bool tensor: whether the last `apply` (or `flush`) ended a cycle in an update.

        A `train_step` of your own needs it for what it does after each update. It is right in
        eager code, in a `tf.function` after `apply`, under XLA and on every replica. It is False
        before the first `apply` and after `reset`. It is True also if the update was dropped, by a
        loss scale or by `non_finite`: a large batch's `train_step` would go on as well.

        ```python
        variable, average = tf.Variable(1.0), tf.Variable(1.0)
        optimizer = GradientAccumulateOptimizer("sgd", accum_steps=2)
        for _ in range(4):
            optimizer.apply([tf.constant(1.0)], [variable])
            moved = 0.99 * average + 0.01 * variable
            average.assign(tf.where(optimizer.just_updated, moved, average))
        ```
        """
        return self._accumulator.just_ended()

    @property
    def ended_in_update(self) -> bool:
        """Whether the last micro-batch ended its cycle in an update: a bool, for callbacks.

        With `steps_per_execution` callbacks see only the last of several batches. `iterations`
        counts the updates of the others. It is True also if a loss scale dropped the update.

        Raises:
            RuntimeError: Within a `tf.function`. Read `just_updated` there.
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`ended_in_update` is a bool, which must be read outside of a tf.function. "
                "Received: a call while a function is traced. Read `just_updated`, the same as a "
                "tensor: tf.cond(optimizer.just_updated, ...)."
            )
        return bool(self.just_updated.numpy())

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables, then those of the cycle.

        The list is complete after `build`, with two exceptions. An optimizer that kept no sums may
        begin to. Sums for further denominators come with the losses that need them. A
        `LossScaleOptimizer` does not see the latter, because it saves variables by number.
        """
        further = self._accumulator.variables_of_further_groups
        further = further if self._cycle.loss_scaler is None else []
        return [*self._variables_from_build, *further]

    @property
    def _variables_from_build(self):
        cycle = self._accumulator.variables_from_build
        return [*self.inner_optimizer.variables, *self._drops.variables, *cycle]

    def build(self, variables: Iterable[Any]) -> None:
        """Creates the inner optimizer's variables and one accumulator per trainable variable.

        Args:
            variables: List of the trainable variables, Keras's or TensorFlow's.

        Raises:
            ValueError: If the inner optimizer accumulates, or was made under another strategy.
        """
        super().build(variables)
        if self.built:
            self._saved.load_kept()

    def _make_variables(self, variables):
        self._cycle.build(variables)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets `variables` from a list of arrays in the same order.

        Before `build` the list is kept, and set by `build`. It may hold the sums of an open cycle
        for more denominators than there are yet.
        """
        if not self.built:
            self._saved.keep_weights(weights)
            return
        if len(weights) > len(self.variables):
            self._cycle.begin_to_accumulate()
            self._accumulator.make_groups_for(len(weights) - len(self._variables_from_build))
        super().set_weights(weights)

    def rebuild(self, variables: Iterable[Any]) -> None:
        """Takes variables that it was not built with, and keeps the state of the others.

        Call it if some variables of a model were made trainable, before the model is compiled
        again with this optimizer. `GradientAccumulateModel.compile` does so by itself. The
        optimizer keeps the number of updates, the learning rate, and the slots and sums of the
        variables that it has already. It forgets those that are not among `variables`. A copy
        takes the place of the inner optimizer. Functions that were traced before must not be
        called again.

        Args:
            variables: List of all trainable variables. Nothing happens if none is new.

        Raises:
            ValueError: If the inner optimizer cannot be copied by its config.
        """
        variables = list(variables)
        indices = self._cycle.indices_of(variables)
        if not self.built or None not in indices:
            return
        with self._cycle.in_strategy():
            try:
                copy = _keras.rebuilt_optimizer(self.inner_optimizer, variables)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    "The inner optimizer must be serialisable to take other variables. Received: "
                    f"{type(self.inner_optimizer).__name__}, which failed with: {error} Compile "
                    "with a new optimizer."
                ) from error
            accumulator = self._cycle.build_anew()
            self.inner_optimizer, self.built = copy, False
            self.build(variables)
            if accumulator.keeps_sums:
                self._accumulator.take_over(accumulator, indices)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], weight: Any = None) -> Any:
        """Adds one micro-batch's gradients; every `accum_steps`-th call updates the variables.

        Args:
            grads_and_vars: Iterable of (gradient, variable); see `apply`.
            weight: As in `apply`.

        Returns:
            `iterations`, the number of updates.
        """
        return self._apply_pairs(grads_and_vars, weight=weight)

    @as_it_is
    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[Any] | None = None,
        weight: Any = None,
    ) -> None:
        """Adds one micro-batch's gradients; every `accum_steps`-th call updates the variables.

        Args:
            grads: List of gradients: tensors in the variables' shapes, `tf.IndexedSlices`, or
                None for a variable that this micro-batch does not reach.
            trainable_variables: List of the variables in the same order. Needed in the first
                call unless `build` was called.
            weight: Scalar, a number or a tensor of any real dtype: what this micro-batch counts
                for in the cycle's mean, such as its examples or tokens. It is 0, or from 1e-20 to
                1e20. None counts as 1. A micro-batch that counts 0 adds nothing, whatever its
                gradients are. A cycle of such micro-batches alone is an update with gradients of
                zero, as with the large batch.

        Raises:
            TypeError: If `weight` is not a real number.
            ValueError: If a variable is not among those that the optimizer was built with, if a
                gradient does not have the shape of its variable, if all gradients are None, or if
                `weight` is not a scalar or out of range.
            tf.errors.InvalidArgumentError: If `weight` is a tensor whose value is out of range.
                It is raised when the value is known. XLA cannot raise, and updates with nan.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._given_or_known(trainable_variables)
        weight = checked_weight(weight, finite=not self._cycle.policy.finite_only)
        contribution = Contribution(grads, weight, averaged=self._reduction == "mean")
        self._cycle.take([contribution], variables)

    @as_it_is
    def flush(self) -> None:
        """Updates with the mean over a partial cycle, if there is one. A new cycle begins."""
        self._cycle.flush()

    @as_it_is
    def reset(self) -> None:
        """Drops what a partial cycle holds, without an update."""
        self._cycle.drop()

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Flushes a partial cycle, then finalizes the inner optimizer. `fit` calls it last."""
        self.flush()
        self.inner_optimizer.finalize_variable_values(var_list)

    def save_own_variables(self, store: Any) -> None:
        """Writes the inner optimizer's state as it would itself and, in mid-cycle, the cycle's.

        So a file that is written between cycles is the inner optimizer's, and loads into it. It
        has more only if `accum_steps` was set, or if something was dropped.
        """
        super().save_own_variables(store)
        self._saved.write(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what this optimizer or its inner optimizer wrote. Before `build`, `build` does."""
        self._saved.read(store)

    def get_config(self) -> dict[str, Any]:
        """Config with the serialised inner optimizer."""
        return {
            **super().get_config(),
            "accum_steps": serialize_accum_steps(self.accum_steps),
            "reduction": self._reduction,
            "non_finite": self.non_finite,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        """The reverse of `get_config`."""
        steps = deserialize_accum_steps(config["accum_steps"], custom_objects)
        return super().from_config({**config, "accum_steps": steps}, custom_objects)

    def _shown_arguments(self):
        shown = {"accum_steps": self.accum_steps}
        if self._reduction != "mean":
            shown["reduction"] = self._reduction
        if self.non_finite != PROPAGATE.name:
            shown["non_finite"] = self.non_finite
        return shown


def accumulating_optimizer(optimizer):
    """The GradientAccumulateOptimizer that `optimizer` is, or that its loss scaler is around."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, GradientAccumulateOptimizer) else None


def accumulating_optimizer_of(model):
    """The GradientAccumulateOptimizer that a model was compiled with, or None."""
    # Not `getattr`: a model wrapper looks up what it lacks on the model in it.
    return accumulating_optimizer(vars(model).get("optimizer"))


_keras.route_loss_scaling(GradientAccumulateOptimizer, cycle_of)
hook_into_models(keras.Model, cycle_of_model)
