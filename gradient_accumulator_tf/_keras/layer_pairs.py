"""The pairs of a model's layers and variables with those of its copy."""

import keras

from gradient_accumulator_tf._keras.graphs import (
    has_plain_call,
    held_layers_by_path,
    is_functional,
)
from gradient_accumulator_tf._keras.layers import sublayers


def paired_layers(old, new, same_classes=True):
    """Pairs the layers in a model or layer with those in another one of its kind.

    Layers in a graph are paired by their name. If the names differ, because Keras named the layers
    anew, they are paired by their place in the graph. Other layers are paired by the attribute that
    holds them. A layer that is held in several places must be one layer in both.

    Args:
        old: A model or layer.
        new: The other one. Layers in it are built as those of `old` are.
        same_classes: Whether the two of a pair must be of one class.

    Returns:
        List of tuples (layer of `old`, layer of `new`), each once: first the two themselves, then
        the layers in them.

    Raises:
        ValueError: If a layer in one has none in the other, with their names.
    """
    # By `id`: the pair of each layer of `old`, and the layer of `old` for each of `new`.
    pairs, taken = {}, {}

    def pair(old, new, path):
        known, owner = pairs.get(id(old)), taken.get(id(new))
        if known is not None or owner is not None:
            if known is None or known[1] is not new:
                raise ValueError(
                    f"{path} is shared in one and not in the other: it is "
                    f"{_names([old if known is None else known[1], new])}."
                )
            return
        one_class = type(old) is type(new) or _are_plain_graphs(old, new)
        if same_classes and not one_class:
            raise ValueError(f"{path} is {_names([old])} in one, {_names([new])} in the other.")
        pairs[id(old)], taken[id(new)] = (old, new), old
        _build_like(old, new)
        for name, a, b in _children(old, new, path):
            pair(a, b, f"{path}/{name}")

    pair(old, new, old.name)
    return list(pairs.values())


def paired_variables(layers):
    """Pairs the variables of paired layers, random states too.

    Args:
        layers: List of tuples, from `paired_layers`.

    Returns:
        List of tuples (variable of the first, variable of the second), each once.

    Raises:
        ValueError: If the variables of two layers differ, with their names.
    """
    pairs, seen = [], set()
    for old, new in layers:
        for a, b in _own_variables(old, new):
            if id(a) not in seen:
                seen.add(id(a))
                pairs.append((a, b))
    return pairs


def _are_plain_graphs(*layers):
    """Whether layers are graphs with Keras's own `call`, of whatever class."""
    return all(map(has_plain_call, layers))


def _build_like(old, new):
    """Builds `new` as `old` is built, if its class has a `build` of its own."""
    own_build = type(old).build not in (keras.Layer.build, keras.Model.build)
    if own_build and old.built and not new.built:
        config = old.get_build_config()
        if config:
            new.build_from_config(config)


def _children(old, new, path):
    """List of tuples (name, layer directly in `old`, layer directly in `new`)."""
    keys, others = _keyed_children(old), _keyed_children(new)
    if is_functional(old) and is_functional(new):
        graphs = _graph_layers(old), _graph_layers(new)
        names = [[layer.name for layer in graph] for graph in graphs]
        same_names = sorted(names[0]) == sorted(names[1])
        for known, graph in zip((keys, others), graphs, strict=True):
            for i, layer in enumerate(graph):
                known["graph", layer.name if same_names else i] = layer
    found, left = [], _without_inputs(sublayers(old))
    missing = _without_inputs(sublayers(new))
    for key in keys:
        if key in others:
            a, b = keys[key], others[key]
            found.append((a.name, a, b))
            left = [v for v in left if v is not a]
            missing = [v for v in missing if v is not b]
    # Layers that no attribute holds (any more) are paired by class and name, or by class alone.
    for tell in (lambda v: (type(v), v.name), type):
        for a in list(left):
            like = [[v for v in vs if tell(v) == tell(a)] for vs in (left, missing)]
            if [len(vs) for vs in like] == [1, 1]:
                found.append((a.name, a, like[1][0]))
                left.remove(a)
                missing.remove(like[1][0])
    if left or missing:
        held = [
            f"{_names(layers)} in {which}"
            for layers, which in ((left, "one"), (missing, "the other"))
            if layers
        ]
        rest = "and cannot be told apart" if left and missing else "and nothing in its place"
        raise ValueError(f"{path} holds {' and '.join(held)}, {rest}.")
    return found


def _keyed_children(layer):
    """Dict of the layers directly in a layer by each of the attributes that hold them."""
    direct = {id(v) for v in sublayers(layer)}
    return {
        path: held
        for path, held in held_layers_by_path(layer).items()
        if id(held) in direct and not isinstance(held, keras.layers.InputLayer)
    }


def _graph_layers(model):
    return _without_inputs(model.layers)


def _without_inputs(layers):
    """The layers without `InputLayer`s, which have no state, and names that Keras counts up."""
    return [v for v in layers if not isinstance(v, keras.layers.InputLayer)]


def _own_variables(old, new):
    """Pairs of the two layers' own variables, without those of the layers in them."""
    inner = [
        {id(v) for sublayer in sublayers(layer) for v in sublayer.variables} for layer in (old, new)
    ]
    own = [
        [v for v in layer.variables if id(v) not in ids]
        for layer, ids in zip((old, new), inner, strict=True)
    ]
    names = [[v.name for v in variables] for variables in own]
    if len(set(names[0])) == len(names[0]) and set(names[0]) == set(names[1]):
        named = {v.name: v for v in own[1]}
        own[1] = [named[name] for name in names[0]]
    if [tuple(v.shape) for v in own[0]] != [tuple(v.shape) for v in own[1]]:
        shown = [", ".join(f"{v.path} {tuple(v.shape)}" for v in vs) or "none" for vs in own]
        raise ValueError(
            f"{type(old).__name__} {old.name!r} has the variables {shown[0]} in one, {shown[1]} in "
            "the other."
        )
    return zip(*own, strict=True)


def _names(layers):
    return ", ".join(f"{type(v).__name__} {v.name!r}" for v in layers)
