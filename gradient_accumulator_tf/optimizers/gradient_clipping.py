"""Adaptive gradient clipping: each unit's gradient is bounded by the norm of its weights."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_number
from gradient_accumulator_tf.cycle.gradients import accumulation_dtype
from gradient_accumulator_tf.optimizers.wrapper import OptimizerWrapper, as_it_is

# The axes that count a kernel's units. For all other kernels it is the last axis.
UNIT_AXES = {
    r"depthwise|dwconv|conv_dw": (-2, -1),
    r"transpose": (-2,),
    r"(query|key|value)/kernel$": (-2, -1),
}


def unit_norms(tensor, unit_axes=(-1,)):
    """Euclidean norm of the weights of each unit, in a shape that broadcasts to `tensor`'s.

    A tensor with fewer than two axes longer than 1 (a bias, a gain) is one unit.

    Args:
        tensor: Tensor of static shape.
        unit_axes: Axes that count the units. The norm is taken over all others.
    """
    rank = tensor.shape.rank
    units = {axis % rank for axis in unit_axes} if rank else set()
    if sum(size != 1 for size in tensor.shape) <= 1:
        units = set()
    elif len(units) == rank or any(axis < -rank for axis in unit_axes):
        units = {rank - 1}
    axes = [axis for axis in range(rank) if axis not in units]
    return tf.sqrt(tf.reduce_sum(tf.square(tensor), axis=axes, keepdims=True))


def clip_units(gradient, weights, clip_factor, epsilon, unit_axes=(-1,)):
    """Scales down each unit's gradient to at most `clip_factor` times the norm of its weights.

        g_i  ->  g_i min(1, clip_factor max(||w_i||, epsilon) / ||g_i||)

    Args:
        gradient: Tensor of the weights' shape.
        weights: Tensor.
        clip_factor: The largest ratio of the two norms.
        epsilon: The least norm of weights. With it a unit of zeros can learn.
        unit_axes: See `unit_norms`.
    """
    largest = clip_factor * tf.maximum(unit_norms(weights, unit_axes), epsilon)
    norm = unit_norms(gradient, unit_axes)
    clipped = gradient * tf.math.divide_no_nan(largest, norm)
    return tf.where(norm > largest, clipped, gradient)


@keras.saving.register_keras_serializable(package="gradient_accumulator_tf")
class AdaptiveGradientClipping(OptimizerWrapper):
    """An optimizer that clips each unit's gradient to a fraction of the norm of its weights.

    A unit is one output of a dense layer, or one filter of a convolution. The gradient `g_i` of a
    unit with weights `w_i` becomes

        g_i  ->  g_i min(1, clip_factor max(||w_i||, epsilon) / ||g_i||)

    Then it goes to the inner optimizer. If that clips as well, it clips after this optimizer.

    Put it inside of the accumulation. There it clips the mean over the cycle and all replicas, and
    the result equals that of this optimizer on the effective batch. Clipping each micro-batch
    gives another result. Without accumulation it clips what Keras would clip: under a strategy,
    the sum over replicas.

    ```python
    clipped = AdaptiveGradientClipping(
        keras.optimizers.SGD(0.1, momentum=0.9), clip_factor=0.01, exclude=["bias", "predictions"]
    )
    optimizer = GradientAccumulateOptimizer(clipped, accum_steps=8)
    ```

    The units of a kernel are counted by its last axis: `(inputs, units)` of a dense layer,
    `(height, width, inputs, filters)` of a convolution. There are three exceptions, which are
    told by the names of the variable and its layer:

    - a depthwise kernel: its last two axes;
    - a transposed convolution: its last axis but one;
    - query, key and value kernels of attention: the heads and their features.

    A bias or a gain is one unit.

    Args:
        optimizer: The inner optimizer: a `keras.optimizers.Optimizer`, its name, or its config.
        clip_factor: Number > 0 (default 0.01), the largest norm of a unit's gradient, divided by
            the norm of its weights. The paper uses the default for batches of 4096. A larger
            number suits smaller batches.
        epsilon: Number > 0 (default 1e-3), the least norm of weights.
        exclude: List of what is not clipped. An entry is a layer, or a regular expression that is
            searched in the paths of variables, such as `"bias"`, or `"predictions"` for the layer
            of that name. The paper excludes the last layer.
        unit_axes: Dict of a regular expression to the axes that count units: a negative integer,
            or a list of them. The expression is searched in the names of a variable's layer and
            of the variable ("my_layer/kernel"). It takes precedence over the rules above.
        name: Optional name.
        **kwargs: Not accepted. Set clipping, weight decay and moving averages on the inner
            optimizer.

    Attributes:
        inner_optimizer: The wrapped optimizer.

    Raises:
        TypeError: If `optimizer` is not a Keras 3 optimizer, or an argument has another type.
        ValueError: If a number is not positive, or if the inner optimizer accumulates or scales
            losses. From `build`: if an entry of `exclude` or `unit_axes` matches no variable, or
            if `unit_axes` names an axis that the kernel does not have.

    Reference:
        [Brock et al., 2021](https://arxiv.org/abs/2102.06171), High-performance large-scale image
        recognition without normalization.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        clip_factor: float = 0.01,
        epsilon: float = 1e-3,
        exclude: Iterable[str | keras.Layer] = (),
        unit_axes: Mapping[str, int | Sequence[int]] | None = None,
        name: str | None = None,
        **kwargs: NoReturn,
    ) -> None:
        if isinstance(optimizer, OptimizerWrapper) and hasattr(optimizer, "accum_steps"):
            raise ValueError(
                "Adaptive gradient clipping acts on the mean over a cycle. Its place is inside of "
                f"the accumulation. Received: {type(optimizer).__name__}. Pass "
                f"{type(optimizer).__name__}(AdaptiveGradientClipping(...), accum_steps=...)."
            )
        clip_factor = check_number(
            "clip_factor", clip_factor, "Pass for example clip_factor=0.01, as in the paper."
        )
        epsilon = check_number(
            "epsilon", epsilon, "Pass for example epsilon=1e-3, as in the paper."
        )
        exclude = _checked_patterns(exclude)
        axes_of_units = _checked_unit_axes({} if unit_axes is None else unit_axes)
        super().__init__(optimizer, name, kwargs)
        self._clip_factor = clip_factor
        self._epsilon = epsilon
        self._exclude = exclude
        self._unit_axes = axes_of_units

    @as_it_is
    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Clips the gradients and hands them to the inner optimizer.

        Args:
            grads: List of gradients: tensors, `tf.IndexedSlices`, or None.
            trainable_variables: List of the variables in the same order. Needed in the first call
                unless `build` was called.

        Raises:
            ValueError: If there are no variables, or as from `build`.
        """
        grads = list(grads)
        if not grads:
            return
        variables = self._given_or_known(trainable_variables)
        self.build(variables)
        grads = _keras.gradients_over_replicas(self.inner_optimizer, grads, variables)
        clipped = [self._clip(g, v) for g, v in zip(grads, variables, strict=True)]
        with _keras.replicas_agree(self.inner_optimizer):
            self.inner_optimizer.apply(clipped, variables)

    def _check_variables(self, variables):
        """Raises ValueError if a pattern matches no variable, or if a variable lacks its axes."""
        paths = [_path(v) for v in variables]
        for argument in ("exclude", "unit_axes"):
            for pattern in getattr(self, f"_{argument}"):
                if not any(re.search(pattern, path) for path in paths):
                    raise ValueError(
                        f"Each entry of `{argument}` must match the path of a trainable variable. "
                        f"Received: {pattern!r}, for the paths {', '.join(paths)}."
                    )
        for variable, path in zip(variables, paths, strict=True):
            self._check_unit_axes(len(variable.shape), path)

    def _clip(self, gradient, variable):
        path = _path(variable)
        excluded = any(re.search(pattern, path) for pattern in self._exclude)
        # The "gradient" of such a variable is its new value.
        if gradient is None or excluded or getattr(variable, "overwrite_with_gradient", False):
            return gradient
        gradient = tf.convert_to_tensor(gradient)
        dtype = accumulation_dtype(gradient.dtype)
        # The gradient is multiplied by the loss scale, the weights are not.
        factor = self._clip_factor * (self.loss_scale_factor or 1.0)
        clipped = clip_units(
            tf.cast(gradient, dtype),
            tf.cast(tf.convert_to_tensor(variable), dtype),
            factor,
            self._epsilon,
            self._axes_of_units(path),
        )
        return tf.cast(clipped, gradient.dtype)

    def _axes_of_units(self, path):
        rules = {**UNIT_AXES, **self._unit_axes}
        return rules.get(_matching([*self._unit_axes, *UNIT_AXES], path), (-1,))

    def _check_unit_axes(self, rank, path):
        """Raises ValueError if a kernel lacks an axis that the user names for it."""
        pattern = _matching(self._unit_axes, path)
        axes = self._unit_axes.get(pattern, ())
        # A bias is one unit, also if it matches the pattern for a kernel.
        if rank > 1 and any(axis < -rank for axis in axes):
            raise ValueError(
                "`unit_axes` must name axes that the variable has. Received: "
                f"{axes!r} for {pattern!r}, which matches {path!r} of rank {rank}. Pass axes from "
                f"{-rank} to -1, or an expression that does not match it."
            )

    def get_config(self) -> dict[str, Any]:
        """Config with the serialised inner optimizer."""
        return {
            **super().get_config(),
            "clip_factor": self._clip_factor,
            "epsilon": self._epsilon,
            "exclude": list(self._exclude),
            "unit_axes": {pattern: list(axes) for pattern, axes in self._unit_axes.items()},
        }


def _matching(patterns, path):
    """The first pattern that is found in "layer/variable", the end of a path; or None."""
    own = "/".join(path.split("/")[-2:])
    return next((pattern for pattern in patterns if re.search(pattern, own)), None)


def _path(variable):
    return getattr(variable, "path", None) or variable.name


def _checked_patterns(exclude):
    """A tuple of regular expressions, from a list of these and of layers."""
    rule = "`exclude` must be a list of regular expressions for paths of variables, and of layers."
    if isinstance(exclude, str) or not hasattr(exclude, "__iter__"):
        raise TypeError(f'{rule} Received: exclude={exclude!r}. Pass for example ["bias"].')
    patterns = []
    for entry in exclude:
        if isinstance(entry, keras.Layer):
            entry = f"(^|/){re.escape(entry.name)}/"
        if not isinstance(entry, str):
            raise TypeError(
                f"{rule} Received: {entry!r} (of type {type(entry).__name__}) in it. Pass for "
                'example ["bias", model.layers[-1]].'
            )
        patterns.append(_checked_pattern("exclude", entry))
    return tuple(patterns)


def _checked_pattern(argument, pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{argument}` must hold regular expressions. Received: {pattern!r}, where {error}. "
            "Use re.escape for a name."
        ) from error
    return pattern


def _checked_unit_axes(unit_axes):
    rule = "`unit_axes` must map regular expressions to axes, which are negative integers."
    example = 'Pass for example {"my_layer/kernel": (-2, -1)}.'
    if not isinstance(unit_axes, dict):
        raise TypeError(f"{rule} Received: unit_axes={unit_axes!r}. {example}")
    checked = {}
    for pattern, axes in unit_axes.items():
        if not isinstance(pattern, str):
            raise TypeError(f"{rule} Received: {pattern!r} as an expression. {example}")
        given = list(axes) if isinstance(axes, Iterable) and not isinstance(axes, str) else [axes]
        whole = [isinstance(axis, numbers.Integral) and type(axis) is not bool for axis in given]
        if not all(whole):
            raise TypeError(f"{rule} Received: {axes!r} for {pattern!r}. {example}")
        if not whole or any(axis >= 0 for axis in given):
            raise ValueError(f"{rule} Received: {axes!r} for {pattern!r}. {example}")
        checked[_checked_pattern("unit_axes", pattern)] = tuple(map(int, given))
    return checked
