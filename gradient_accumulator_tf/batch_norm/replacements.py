"""The layer that takes the place of one batch norm."""

from typing import Literal, get_args

import keras

from gradient_accumulator_tf._checks import closest, quoted
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm

Target = Literal["accum", "group", "layer", "instance", "frozen", "batch"]
_TARGETS = get_args(Target)
_STATE = ("gamma", "beta", "moving_mean", "moving_variance")


def check_target(to):
    """Raises ValueError unless `to` is a name of a normalisation, or a function."""
    if not callable(to) and to not in _TARGETS:
        raise ValueError(
            f"`to` must be {quoted(_TARGETS)}, or a function of a BatchNormalization. Received: "
            f'to={to!r}. Pass one of these, such as to="{closest(to, _TARGETS)}".'
        )


def replacement(layer, path, to, accum_steps):
    """The layer to put in place of a batch norm, with its state; or the same layer.

    Args:
        layer: A `BatchNormalization` or `AccumBatchNorm`.
        path: The names of the layers around it, for errors.
        to: As for `swap_batch_norm`.
        accum_steps: As for `swap_batch_norm`.

    Raises:
        TypeError: If a function `to` returns neither a layer, nor a string, nor None.
        ValueError: If it returns another string, or if the normalisation does not fit the layer.
    """
    new = _returned(to, layer, path) if callable(to) else to
    if new is None:
        return layer
    if isinstance(new, str):
        new = _named(new, layer, path, accum_steps)
    if new is not layer and layer.built and not new.built:
        new.build_from_config(layer.get_build_config())
        for name in _STATE:
            value, variable = getattr(layer, name, None), getattr(new, name, None)
            if value is not None and variable is not None and variable.shape == value.shape:
                variable.assign(value)
    return new


def _returned(to, layer, path):
    """What a function `to` returns for a layer, checked."""
    new = to(layer)
    is_string = isinstance(new, str)
    if new is None or isinstance(new, keras.Layer) or (is_string and new in _TARGETS):
        return new
    raise (ValueError if is_string else TypeError)(
        f"`to` must return a Keras layer, None to leave the layer, or {quoted(_TARGETS)}. "
        f"Received: {new!r} (of type {type(new).__name__}) for {path}. Return one of these, such "
        f'as "{closest(new, _TARGETS)}" or keras.layers.LayerNormalization(name=layer.name).'
    )


def _named(to, layer, path, accum_steps):
    """A new layer of the normalisation `to` with the config of a batch norm."""
    config = layer.get_config()
    config.pop("accum_steps", None)
    if to == "accum":
        return AccumBatchNorm.from_config({**config, "accum_steps": accum_steps})
    if to == "frozen":
        return keras.layers.BatchNormalization.from_config({**config, "trainable": False})
    if to == "batch":
        if type(layer) is keras.layers.BatchNormalization:
            return layer
        return keras.layers.BatchNormalization.from_config(config)
    if to == "layer":
        groups = 1
    else:
        _check_positions(to, layer, path)
        groups = -1 if to == "instance" else _groups(layer.moving_mean.shape[0])
    group_config = keras.layers.GroupNormalization(groups).get_config()
    shared = {key: value for key, value in config.items() if key in group_config}
    return keras.layers.GroupNormalization.from_config({**shared, "groups": groups})


def _groups(channels):
    """The largest number of groups up to 32 that `channels` can be divided into."""
    return max(groups for groups in range(1, 33) if channels % groups == 0)


def _check_positions(to, layer, path):
    """Raises ValueError unless a group of channels is known to have several values."""
    if not layer.built:
        raise ValueError(
            f'to="{to}" needs the number of channels and dimensions, so the layer must be built. '
            f"Received: {path}, not built. Call the model on a batch first."
        )
    if layer.input_spec.ndim == 2:
        raise ValueError(
            f'to="{to}" normalises over positions (pixels, time steps), which vectors do not '
            f"have. Received: {path}, on vectors of {layer.moving_mean.shape[0]}. For this layer "
            f'take "layer": to=lambda layer: "layer" if layer.name == {layer.name!r} else "{to}".'
        )
