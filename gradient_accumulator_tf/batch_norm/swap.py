"""swap_batch_norm: another normalisation in place of a model's batch normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_keras_model
from gradient_accumulator_tf.batch_norm.kinds import is_known_batch_norm, is_like_batch_norm
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm, check_calls
from gradient_accumulator_tf.batch_norm.layer_swap import LayerSwap
from gradient_accumulator_tf.batch_norm.replacements import Target, check_target, replacement

_Model = TypeVar("_Model", bound=keras.Model)


def swap_batch_norm(
    model: _Model,
    *,
    to: Target | Callable[[keras.layers.BatchNormalization], Target | keras.Layer | None] = "accum",
    accum_steps: int | None = None,
) -> _Model:
    """Puts another normalisation in place of each `BatchNormalization` in a model.

    ```python
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3))
    model = swap_batch_norm(model, accum_steps=8)
    ```

    | `to` | in its place |
    |---|---|
    | "accum" | `AccumBatchNorm` |
    | "batch" | `BatchNormalization`, for each `AccumBatchNorm`: the way back |
    | "frozen" | `BatchNormalization(trainable=False)`: moving statistics in training as well |
    | "group" | `GroupNormalization`, with the largest number of groups up to 32 |
    | "layer" | `GroupNormalization(groups=1)`: over all of an example |
    | "instance" | `GroupNormalization(groups=-1)`: over each channel of an example |

    With the first three, the model predicts the same as before, bit for bit. "frozen" lasts until
    `trainable` is set on the layer or on a model around it. "batch" leaves such a layer frozen.

    The last three look at one example at a time, so a micro-batch trains as the large batch does.
    They keep gamma and beta, with their regularisers and constraints, and leave out the one that
    the batch norm does not have. They keep epsilon, axis, dtype and trainable. They lose the moving
    statistics: the mean and variance are those of the example, in prediction as in training, over
    all positions, masked ones too. The trained weights do not expect that, so train the model
    further, or from the start.

    - "group" is "instance" for up to 32 channels. A group with a single value (an instance of
      1 x 1 pixels) becomes beta.
    - "layer" is the layer norm of convolutional nets (Wu and He 2018). Like batch norm it keeps the
      differences between positions. `keras.layers.LayerNormalization` normalises over the channels
      of each position and removes these differences. In a sequence model, where a position must
      not see the others, pass a function that returns that layer.

    `to` may be a function of a `BatchNormalization`. It returns the new layer, one of the names
    above, or None to leave the layer:

    ```python
    model = swap_batch_norm(model, to=lambda layer: None if layer.name == "bn_Conv1" else "group")
    ```

    A new layer that is not built gets those of gamma, beta and the moving statistics that it has
    a place for. A new layer that is built keeps its own. Pass `name=layer.name` to keep the name.

    The result depends on the kind of model:

    - For a functional or Sequential model it is a new model of the same class, made by
      `keras.models.clone_model`, with the same names of layers, outputs and weights. The given
      model stays as it is. Models in it are copied too, shared layers stay shared, and other
      layers are copied through their `get_config`. A constructor of the model's own class, as
      KerasHub's models have, is not called: the new model gets the old one's attributes, with the
      new layers and tensors in them. To load a saved one, see the next point.
    - For a subclassed model it is the given model, since only its class knows how to make one. The
      layers are replaced in its attributes, in lists, tuples and dicts there, and in its
      sublayers. The order of layers and weights stays. Functional models in it are replaced. Its
      class still makes batch norm, and so would `load_model`. So save with `save_weights`; to
      load, construct the model, swap again, and call `load_weights`. Do the same for a functional
      model with such layers in it.

    The result is not compiled, as an optimizer knows the old variables.

    Args:
        model: A `keras.Model`.
        to: One of the names above, or a function.
        accum_steps: Integer >= 1, for "accum" only: training calls per update of the moving
            statistics outside of a `GradientAccumulateModel`, as for `AccumBatchNorm`. Defaults to
            1.

    Returns:
        The model. If it has no batch norm, it is the given one, with a warning. Subclasses of
        batch norm, batch norm with `renorm=True` and those of other packages stay as they are, and
        a warning lists them.

    Raises:
        TypeError: If `model` is not a Keras 3 model, if `accum_steps` is not an integer, or if a
            function `to` returns something else.
        ValueError: If `to` is none of these; if `accum_steps` is smaller than 1, or given with
            another `to` than "accum"; if "group" or "instance" meets a layer that is not built, or
            one on vectors (after Dense), where a group has one value or few; if a layer is not in
            a subclassed model's attributes; or if a functional model whose class has a constructor
            of its own holds variables outside of layers.

    References:
        - Wu and He 2018, Group Normalization, https://arxiv.org/abs/1803.08494
        - Ulyanov et al. 2016, Instance Normalization, https://arxiv.org/abs/1607.08022
    """
    check_keras_model(model, "Pass the keras.Model that contains the layer.")
    check_target(to)
    if accum_steps is not None:
        accum_steps = check_calls(accum_steps)
        if to != "accum":
            raise ValueError(
                '`accum_steps` belongs to to="accum". Received: '
                f"to={to!r}, accum_steps={accum_steps}. Leave it out."
            )
    replacements = _replacements_in(model, to, accum_steps or 1)
    if not replacements:
        return model
    swap = LayerSwap(replacements)
    if _keras.is_functional(model):
        return swap.rebuilt(model)
    swap.change(model)
    model.compiled = False
    # Functions that were traced with the old layers.
    model.train_function = model.test_function = model.predict_function = None
    return model


def _replacements_in(model, to, accum_steps):
    """Dict of new layers by the batch norms of a model, which is not changed; may be empty.

    Raises:
        ValueError: If a batch norm is where nothing can take its place.
    """
    known = AccumBatchNorm if to == "batch" else keras.layers.BatchNormalization
    found, replacements, unknown, unreachable = set(), {}, {}, {}
    for layer, path, reachable in _walk(model, model.name):
        if not is_like_batch_norm(layer):
            continue
        if not is_known_batch_norm(layer):
            unknown[layer] = f"{path} ({type(layer).__name__})"
        elif isinstance(layer, known):
            if layer not in found:
                found.add(layer)
                new = replacement(layer, path, to, accum_steps)
                if new is not layer:
                    replacements[layer] = new
            if layer in replacements and not reachable:
                unreachable[layer] = path
    if unreachable:
        raise ValueError(
            "A subclassed model or layer must hold its batch norm in attributes, or in lists, "
            "tuples or dicts there, to have it replaced. Received, held elsewhere: "
            f"{', '.join(unreachable.values())}. Assign it to an attribute (and assign none "
            "that is then replaced), or construct the model with the other layer."
        )
    if unknown:
        warnings.warn(
            "These layers look like batch norm, but are not known, and are left as they are: "
            f"{', '.join(unknown.values())}. Construct the model with other layers there if "
            "micro-batches must not normalise by themselves.",
            UserWarning,
            stacklevel=3,
        )
    elif not found:
        warnings.warn(
            f"The model {model.name!r} has no {known.__name__} that is known; it is returned "
            "as it is.",
            UserWarning,
            stacklevel=3,
        )
    return replacements


def _walk(layer, path, reachable=True, above=()):
    """Every layer with its path, and whether its holder can be given another layer for it.

    A shared layer comes once for each of its paths. The layers in a batch norm do not come.
    """
    yield layer, path, reachable
    if is_like_batch_norm(layer):
        return
    held = None if _keras.is_functional(layer) else _keras.held_layers(layer)
    for inner in _keras.sublayers(layer):
        if inner not in above:
            can_replace = reachable and (held is None or inner in held)
            yield from _walk(inner, f"{path}/{inner.name}", can_replace, (*above, layer))
