"""Keyword arguments that the package hands on to Keras's layers, for type checkers and editors."""

from typing import Any, TypedDict


class LayerArguments(TypedDict, total=False):
    """Arguments of `keras.layers.Layer`."""

    activity_regularizer: Any
    trainable: bool
    dtype: Any
    autocast: bool
    name: str | None


class BatchNormArguments(LayerArguments, total=False):
    """Arguments of `keras.layers.BatchNormalization`, without those of renormalisation."""

    axis: int
    momentum: float
    epsilon: float
    center: bool
    scale: bool
    beta_initializer: Any
    gamma_initializer: Any
    moving_mean_initializer: Any
    moving_variance_initializer: Any
    beta_regularizer: Any
    gamma_regularizer: Any
    beta_constraint: Any
    gamma_constraint: Any
    synchronized: bool
