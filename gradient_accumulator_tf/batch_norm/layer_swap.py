"""LayerSwap: a model with other layers in place of some of its own."""

import inspect
import itertools

import keras

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf._keras.layer_pairs import paired_layers
from gradient_accumulator_tf._keras.model_copies import as_uncompiled, copy_layer
from gradient_accumulator_tf.batch_norm.kinds import is_like_batch_norm


class LayerSwap:
    """Puts layers in place of others: in a copy of a graph, or in place in any other layer.

    Args:
        replacements: Dict of new layers by old ones.
    """

    def __init__(self, replacements):
        # Replacements by the layers of the model, and the copies of other layers once made.
        self._stand_ins = dict(replacements)
        # A model's flag must not change those of the replacements.
        self._trainable = {new: new.trainable for new in replacements.values()}

    def rebuilt(self, model):
        """A functional or Sequential model like `model`, with the replacements in it.

        Raises:
            ValueError: If a layer's copy does not hold the layers that it holds, or if a model
                whose class has a constructor of its own holds variables outside of layers.
        """
        if model in self._stand_ins:
            return self._stand_ins[model]
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
            if self._stand_ins.get(old, new) is not new:
                self._stand_ins[new] = self._stand_ins[old]
        for _, new in pairs:
            if not _keras.is_functional(new):
                self.change(new)
        return clone

    def change(self, layer):
        """Puts the replacements into a subclassed model or a layer, in place, at any depth."""
        holders = _holders(layer, [])
        held = [_keras.held_layers(holder) for holder in holders]
        for inner in itertools.chain(*held):
            # All graphs first, so that a layer that several of them share stays shared.
            if _keras.is_functional(inner):
                self.rebuilt(inner)
        for holder, layers in zip(holders, held, strict=True):
            new = {old: self._stand_ins[old] for old in layers if old in self._stand_ins}
            _keras.replace_layers(holder, new)

    def _clone(self, model, pairs):
        """A graph's copy; adds the pairs of copied layers to `pairs`, inner ones first."""

        def stand_in(layer):
            if not isinstance(layer, keras.Layer):
                return layer  # an operation, which has no state
            if layer not in self._stand_ins:
                if _keras.is_functional(layer):
                    return self._clone(layer, pairs)
                self._stand_ins[layer] = copy_layer(layer)
                pairs.append((layer, self._stand_ins[layer]))
            return self._stand_ins[layer]

        clone = _cloned(model, stand_in)
        if type(clone) is not type(model):
            clone = _as_the_class_of(model, clone, stand_in)
        self._stand_ins[model] = clone
        pairs.append((model, clone))
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


def _as_the_class_of(model, clone, stand_in):
    """The clone of a model whose class has a constructor of its own, with its attributes.

    Keras cannot call that constructor, and the constructor would make the old layers. The new
    model gets what there is besides: the graph and the attributes.

    Args:
        model: The model.
        clone: Its clone, of Keras's class.
        stand_in: As for `_cloned`.
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


def _new_inputs(model):
    """Inputs like a functional model's, which `clone_model` would make without their names."""
    new = {
        id(x.output): copy_layer(x) for x in model.layers if isinstance(x, keras.layers.InputLayer)
    }
    return keras.tree.map_structure(lambda tensor: new[id(tensor)].output, model.input)


def _call(layer, *args, **kwargs):
    """Calls a layer like the one before it in the graph, whose call has a mask, or None."""
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
    """The pairs of a layer and its copy, and after each pair those of the layers in it.

    The layers in a functional model have been copied, and paired, by themselves.
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
