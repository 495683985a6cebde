"""Copies of Keras optimizers for other variables, with the state that still applies."""

from gradient_accumulator_tf._keras.optimizers import innermost, variable_key


def rebuilt_optimizer(optimizer, variables):
    """A copy of an optimizer for other variables, with the state of those that it trained.

    Keras's optimizers accept no other variables once they are built. Three things are private:

    - Slots are in lists in the order of `_trainable_variables`. A slot is found by its place there,
      because several may have one path.
    - What is excluded from weight decay (`_exclude_from_weight_decay`, and the patterns with it) is
      in no config and in no variable.
    - A moving average (`_model_variables_moving_average`) starts at its variable only in the first
      update. So the averages of new variables are set here.

    Args:
        optimizer: A built Keras optimizer.
        variables: List of the variables of the copy.
    """
    copy = type(optimizer).from_config(optimizer.get_config())
    copy.build(variables)
    new, old = innermost(copy), innermost(optimizer)
    assigned = set()
    for o, like in zip(_with_inner(new), _with_inner(old), strict=True):
        for slot, value in _slots_of_same_variables(o, like):
            slot.assign(value)
            assigned.add(id(slot))
    # Other state belongs to no variable, such as the learning rate, or has its path in its own.
    in_lists = {id(slot) for o in _with_inner(new) for _, slots in _slots(o) for slot in slots}
    kept = {variable.path: variable for variable in optimizer.variables}
    for variable in copy.variables:
        if id(variable) not in in_lists and variable.path in kept:
            variable.assign(kept[variable.path])
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    averages = getattr(new, "_model_variables_moving_average", ())
    for variable, average in zip(new._trainable_variables, averages, strict=False):
        if average is not None and id(average) not in assigned:
            average.assign(variable)
    return copy


def _with_inner(optimizer):
    """List of an optimizer and, for a `MultiOptimizer`, of those in it."""
    return [optimizer, *getattr(optimizer, "optimizers", [])]


def _slots(optimizer):
    """Yields names and lists of an optimizer's slots. A list has a slot or None per variable."""
    variables = getattr(optimizer, "_trainable_variables", [])
    for name, slots in vars(optimizer).items():
        all_of_them = name in ("_variables", "_trainable_variables")
        if isinstance(slots, list) and len(slots) == len(variables) and not all_of_them:
            yield name, slots


def _slots_of_same_variables(new, old):
    """Yields pairs of slots that two optimizers of a kind have for the same variable."""
    indices = {variable_key(old, v): i for i, v in enumerate(old._trainable_variables)}
    kept = dict(_slots(old))
    for name, slots in _slots(new):
        for variable, slot in zip(new._trainable_variables, slots, strict=True):
            index = indices.get(variable_key(new, variable))
            if slot is not None and index is not None and name in kept:
                yield slot, kept[name][index]


def copied_optimizer(optimizer, pairs):
    """A copy of an optimizer for the variables of a copy of its model, with all of its state.

    Two optimizers of a kind have their variables in the same order if they train their models'
    variables in the same order (`Optimizer._trainable_variables`). What is excluded from weight
    decay (`Optimizer._use_weight_decay`) is in no config.

    Args:
        optimizer: The optimizer, built or not.
        pairs: List of tuples (variable of its model, variable of the model's copy).

    Raises:
        ValueError: If it trains variables that the model does not have.
    """
    copy = type(optimizer).from_config(optimizer.get_config())
    old, new = innermost(optimizer), innermost(copy)
    if getattr(old, "_exclude_from_weight_decay", None) is not None:
        excluded = [b for a, b in pairs if not old._use_weight_decay(a)]
        new.exclude_from_weight_decay(var_list=excluded)
    if not optimizer.built:
        return copy
    by_key = {variable_key(old, a): b for a, b in pairs}
    keys = [variable_key(old, v) for v in old._trainable_variables]
    unknown = [v for v, k in zip(old._trainable_variables, keys, strict=True) if k not in by_key]
    if unknown:
        names = ", ".join(getattr(v, "path", v.name) for v in unknown)
        raise ValueError(f"the optimizer trains {names}, which the model does not have.")
    copy.build([by_key[key] for key in keys])
    for variable, value in zip(copy.variables, optimizer.variables, strict=True):
        variable.assign(value)
    return copy
