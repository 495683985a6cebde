"""swap_batch_norm: another normalisation in place of a model's batch normalisation."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._checks import check_keras_model
from gradient_accumulator_tf._keras.layer_pairs import paired_layers
from gradient_accumulator_tf._keras.model_copies import as_uncompiled, copy_layer
from gradient_accumulator_tf.batch_norm.kinds import is_known_batch_norm, is_like_batch_norm
from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm, check_calls

Target = Literal["accum", "group", "layer", "instance", "frozen", "batch"]
_TARGETS = get_args(Target)
_Model = TypeVar("_Model", bound=keras.Model)
_STATE = ("gamma", "beta", "moving_mean", "moving_variance")


def swap_batch_norm(
    model: _Model,
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

    The first three predict the same as before, bit for bit.

    The last three look at one example at a time, so a micro-batch trains as the large batch does.
    They keep gamma and beta (with their regularisers, constraints, and whether they are there at
    all), epsilon, axis, dtype and trainable, and lose the moving statistics: an example is
    normalised by its own mean and variance, in prediction as in training, over all positions,
    masked ones too. The trained weights around them do not expect that, so train on, or from the
    start. Where a group has a single value (instances of 1 x 1 pixels) the result is beta;
    up to 32 channels, "group" is "instance". "layer" is the layer norm of convolutional nets (Wu
    and He 2018): as batch norm does, it keeps the differences between positions, which
    `keras.layers.LayerNormalization`, over the channels of each position, takes away. For a
    sequence model, where a position must not see the others, pass a function that returns that.

    "frozen" lasts until `trainable` is set on the layer or on what it is in. "batch" leaves it.

    `to` may be a function of a `BatchNormalization` that returns the layer to put there, one of
    the names above, or None to leave it:

    ```python
    model = swap_batch_norm(model, to=lambda layer: None if layer.name == "bn_Conv1" else "group")
    ```

    An unbuilt layer that it returns gets the old one's gamma, beta and moving statistics, as far
    as it has them; one that is built keeps its own. Pass `name=layer.name` to keep the name.

    What comes back:

    - For a functional or Sequential model, a new model of the same class with the same layer
      names, outputs and weights, made by `keras.models.clone_model`. The model given stays as it
      is. Models in it are treated alike, what is shared stays shared, and other layers are copied
      through their `get_config`. If its class has a constructor of its own (KerasHub's do), that
      is not called: the new model gets the old one's attributes, with the new layers and tensors
      in them. The class still constructs batch norm: see the next point for saving.
    - For a subclassed model, that model: only its class knows how to construct it, so layers are
      replaced in place, in its attributes and in lists, tuples and dicts there, and in its
      sublayers. The order of layers and weights stays. Functional models in it are replaced.
      The class still constructs batch norm, so `load_model` would too: use `save_weights`, and to
      load, construct the model and swap again. The same is so for such layers in other models.

    Neither is compiled: an optimizer knows the old variables.

    Args:
        model: A `keras.Model`.
        to: One of the names above, or a function.
        accum_steps: Integer >= 1, for "accum" only: see `AccumBatchNorm`. Needed without a
            `GradientAccumulateModel`. Defaults to 1.

    Returns:
        The model. If it has no batch norm, the one given, with a warning. Layers that look like
        batch norm and are not known (subclasses, `renorm=True`, other packages' layers) are left
        and listed in a warning.

    Raises:
        TypeError: If `model` is not a Keras 3 model, `accum_steps` not an integer, or a function
            returns something else.
        ValueError: If `to` is none of these, if `accum_steps` is smaller than 1 or not for
            "accum", if "group" or "instance" meets a layer that is not built, or one on vectors
            (after Dense), where a group has one value or few; if a layer cannot be reached
            in a subclassed model's attributes, or if a functional model whose class has a
            constructor of its own holds variables outside of layers.

    References:
        - Wu and He 2018, Group Normalization, https://arxiv.org/abs/1803.08494
        - Ulyanov et al. 2016, Instance Normalization, https://arxiv.org/abs/1607.08022
    """
    check_keras_model(model, "Pass the keras.Model that contains the layer.")
    _check_target(to)
    if accum_steps is not None:
        accum_steps = check_calls(accum_steps)
        if to != "accum":
            raise ValueError(
                '`accum_steps` belongs to to="accum". Received: '
                f"to={to!r}, accum_steps={accum_steps}. Leave it out."
            )
    swap = _Swap(model, to, accum_steps or 1)
    if not swap.stand_ins:
        return model
    if _keras.is_functional(model):
        return swap.rebuilt(model)
    swap.change(model)
    model.compiled = False
    # Functions that were traced with the old layers.
    model.train_function = model.test_function = model.predict_function = None
    return model


class _Swap:
    """What replaces each batch norm in a model, made before the model is touched.

    Attributes:
        stand_ins: Dict of new layers by old ones: replacements, and copies once they are made.
    """

    def __init__(self, model, to, accum_steps):
        self.stand_ins = {}
        known = AccumBatchNorm if to == "batch" else keras.layers.BatchNormalization
        found, unknown, unreachable = set(), {}, {}
        for layer, path, reachable in _walk(model, model.name):
            if not is_like_batch_norm(layer):
                continue
            if not is_known_batch_norm(layer):
                unknown[layer] = f"{path} ({type(layer).__name__})"
            elif isinstance(layer, known):
                if layer not in found:
                    found.add(layer)
                    new = _replacement(layer, path, to, accum_steps)
                    if new is not layer:
                        self.stand_ins[layer] = new
                if layer in self.stand_ins and not reachable:
                    unreachable[layer] = path
        if unreachable:
            raise ValueError(
                "A subclassed model or layer must hold its batch norm in attributes, or in lists, "
                "tuples or dicts there, to have it replaced. Received, held elsewhere: "
                f"{', '.join(unreachable.values())}. Assign it to an attribute (and assign none "
                "that is then replaced), or construct the model with the other layer."
            )
        # The replacements' own, which a model's flag must not change.
        self._trainable = {new: new.trainable for new in self.stand_ins.values()}
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

    def rebuilt(self, model):
        """A functional or Sequential model like `model`, with the replacements in it."""
        if model in self.stand_ins:
            return self.stand_ins[model]
        pairs = []
        clone = self._clone(model, pairs)
        for old, new in _matched(pairs):
            _carry_state(old, new)
        # Parents first: a model's flag is set on all that is in it.
        for old, new in _matched(reversed(pairs)):
            _set_trainable(new, old.trainable)
        for new, trainable in self._trainable.items():
            _set_trainable(new, trainable)
        for old, new in _matched(pairs):
            if self.stand_ins.get(old, new) is not new:
                self.stand_ins[new] = self.stand_ins[old]
        for _, new in pairs:
            if not _keras.is_functional(new):
                self.change(new)
        return clone

    def change(self, layer):
        """Puts the replacements into a subclassed model or a layer, in place, however deep."""
        holders = _holders(layer, [])
        held = [_keras.held_layers(holder) for holder in holders]
        for inner in itertools.chain(*held):
            # Each, since what they share with each other must stay shared.
            if _keras.is_functional(inner):
                self.rebuilt(inner)
        for holder, layers in zip(holders, held, strict=True):
            new = {old: self.stand_ins[old] for old in layers if old in self.stand_ins}
            _keras.replace_layers(holder, new)

    def _clone(self, model, pairs):
        def stand_in(layer):
            if not isinstance(layer, keras.Layer):
                return layer  # an operation, which has no state
            if layer not in self.stand_ins:
                if _keras.is_functional(layer):
                    return self._clone(layer, pairs)
                self.stand_ins[layer] = copy_layer(layer)
                pairs.append((layer, self.stand_ins[layer]))
            return self.stand_ins[layer]

        clone = _cloned(model, stand_in)
        if type(clone) is not type(model):
            clone = self._as_the_class_of(model, clone, stand_in)
        self.stand_ins[model] = clone
        pairs.append((model, clone))
        return clone

    def _as_the_class_of(self, model, clone, stand_in):
        """The clone of a model whose class has a constructor of its own, with its attributes.

        Keras cannot call that constructor, and it would make the old layers. What it has left is
        the graph and the attributes, so these are what the new model is made of.
        """
        attributes = _keras.own_attributes(model, clone)
        tensors = [t for t in keras.tree.flatten(attributes) if isinstance(t, keras.KerasTensor)]
        new_tensors = {}
        if tensors:
            # The copies of tensors come with a graph that returns them as well.
            whole = _cloned(keras.Model(model.input, [model.output, tensors]), stand_in)
            output, copies = whole.output
            new_tensors = dict(zip(map(id, tensors), copies, strict=True))
            clone = keras.Model(whole.input, output, name=model.name)

        def carried(value, name):
            if isinstance(value, keras.KerasTensor):
                return new_tensors[id(value)]
            if isinstance(value, keras.Layer):
                return stand_in(value) if value.variables else value
            if isinstance(value, dict):
                return {key: carried(item, name) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                items = [carried(item, name) for item in value]
                kind = list if isinstance(value, list) else value.__class__
                return kind(*items) if hasattr(value, "_fields") else kind(items)
            if isinstance(value, (keras.Variable, keras.Metric, keras.random.SeedGenerator)):
                raise ValueError(
                    "A functional model of a class with a constructor of its own must hold its "
                    f"variables in layers. Received: {type(model).__name__} (the model "
                    f"{model.name!r}) with {type(value).__name__} in its attribute {name!r}. Pass "
                    "keras.Model(model.inputs, model.outputs)."
                )
            return value

        new_attributes = {name: carried(value, name) for name, value in attributes.items()}
        clone.dtype_policy = model.dtype_policy
        new_layers = carried(_keras.sublayers(model), "layers")
        _keras.become(clone, type(model), new_attributes, new_layers)
        return clone


def _cloned(model, stand_in):
    """A functional or Sequential model like `model`, of the layers that `stand_in` returns."""
    with as_uncompiled(model):
        if isinstance(model, keras.Sequential):
            return keras.models.clone_model(model, clone_function=stand_in)
        return keras.models.clone_model(
            model,
            input_tensors=_new_inputs(model),
            clone_function=stand_in,
            call_function=_call,
        )


def _check_target(to):
    if not callable(to) and to not in _TARGETS:
        known = " or ".join(f'"{target}"' for target in _TARGETS)
        raise ValueError(
            f"`to` must be {known}, or a function of a BatchNormalization. Received: to={to!r}."
        )


def _walk(layer, path, reachable=True, above=()):
    """Every layer with its path, and whether what holds it can be given another one.

    A shared layer comes once for each of its paths. What is in a batch norm does not come.
    """
    yield layer, path, reachable
    if is_like_batch_norm(layer):
        return
    held = None if _keras.is_functional(layer) else _keras.held_layers(layer)
    for inner in _keras.sublayers(layer):
        if inner not in above:
            can_replace = reachable and (held is None or inner in held)
            yield from _walk(inner, f"{path}/{inner.name}", can_replace, (*above, layer))


def _replacement(layer, path, to, accum_steps):
    """The layer to put in place of a batch norm, with its state; or the same layer."""
    new = to
    if callable(to):
        new = to(layer)
        if new is None:
            return layer
        if isinstance(new, str):
            _check_target(new)
        elif not isinstance(new, keras.Layer):
            raise TypeError(
                "`to` must return a Keras layer, the name of a normalisation, or None to leave "
                f"the layer. Received: {new!r} (of type {type(new).__name__}) for {path}."
            )
    if isinstance(new, str):
        new = _named(new, layer, path, accum_steps)
    if new is not layer and layer.built and not new.built:
        new.build_from_config(layer.get_build_config())
        for name in _STATE:
            value, variable = getattr(layer, name, None), getattr(new, name, None)
            if value is not None and variable is not None and variable.shape == value.shape:
                variable.assign(value)
    return new


def _named(to, layer, path, accum_steps):
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


def _new_inputs(model):
    """Inputs like a functional model's, which `clone_model` would make without their names."""
    new = {
        id(x.output): copy_layer(x) for x in model.layers if isinstance(x, keras.layers.InputLayer)
    }
    return keras.tree.map_structure(lambda tensor: new[id(tensor)].output, model.input)


def _call(layer, *args, **kwargs):
    """Calls a layer as the one that it replaces, whose call in the graph has a mask, or None."""
    if "mask" in kwargs and "mask" not in inspect.signature(layer.call).parameters:
        del kwargs["mask"]
    return layer(*args, **kwargs)


def _holders(layer, seen):
    """`layer` and what it holds and can be changed in place: no graphs, no batch norm."""
    if not (layer in seen or _keras.is_functional(layer) or is_like_batch_norm(layer)):
        seen.append(layer)
        for held in _keras.held_layers(layer):
            _holders(held, seen)
    return seen


def _matched(pairs):
    """The pairs of a layer and its copy, and after each those of what is in it.

    What is in a functional model has been copied, and paired, by itself.
    """
    for old, new in pairs:
        if _keras.is_functional(old):
            yield old, new
            continue
        try:
            # Its class may construct batch norm where another layer was put since.
            matched = paired_layers(old, new, same_classes=False)
        except ValueError as error:
            raise ValueError(
                "A layer with layers in it is copied through `get_config` and `from_config`, which "
                f"must give it the same layers. Received: {old.name!r} ({type(old).__name__}) "
                f"whose copy is not like it: {error} Create them in the constructor or in `build`, "
                "from what `get_config` returns."
            ) from error
        yield from matched


def _carry_state(old, new):
    store = {}
    old.save_own_variables(store)
    if store:
        if not new.built:
            new.build_from_config(old.get_build_config())
        new.load_own_variables(store)


def _set_trainable(layer, trainable):
    if layer.trainable != trainable:
        layer.trainable = trainable
