"""Annotations of the public API are complete; `make types` checks that they are right."""

import inspect
from typing import get_args

import keras
import pytest

import gradient_accumulator_tf
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer
from gradient_accumulator_tf._arguments import BatchNormArguments, LayerArguments
from gradient_accumulator_tf.batch_norm.replacements import _TARGETS, Target

PUBLIC = [name for name in gradient_accumulator_tf.__all__ if name != "__version__"]


def functions_of(public):
    """The public functions of a name: itself, or constructor, methods and properties."""
    if not isinstance(public, type):
        yield public
        return
    own = [c for c in public.__mro__ if c.__module__.startswith("gradient_accumulator_tf")]
    for cls in own:
        for name, member in vars(cls).items():
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            if isinstance(member, property):
                yield from filter(inspect.isfunction, (member.fget, member.fset))
            elif isinstance(member, classmethod):
                yield member.__func__
            elif inspect.isfunction(member):
                yield inspect.unwrap(member)


def unannotated(function):
    """The parameters of a function, and "return", that have no annotation."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    for name, parameter in signature.parameters.items():
        if name not in ("self", "cls") and parameter.annotation is empty:
            yield name
    if signature.return_annotation is empty:
        yield "return"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_are_annotated(name):
    missing = {}
    for function in functions_of(getattr(gradient_accumulator_tf, name)):
        names = list(unannotated(function))
        # Properties that a function makes; their attribute has the type.
        if names and "<locals>" not in function.__qualname__:
            missing[function.__qualname__] = names
    assert not missing


def arguments_of(layer):
    parameters = inspect.signature(layer.__init__).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self", "layer"}


def test_type_checkers_know_the_arguments_of_keras_layers():
    assert set(LayerArguments.__annotations__) == arguments_of(keras.layers.Layer)
    own = arguments_of(keras.layers.BatchNormalization)
    own = {name for name in own if not name.startswith("renorm")}
    assert set(BatchNormArguments.__annotations__) == own | set(LayerArguments.__annotations__)


def test_type_checkers_know_what_batch_norm_is_swapped_for():
    assert get_args(Target) == tuple(_TARGETS)


def _model():
    return GradientAccumulateModel(
        model=keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), micro_batch_size=2
    )


@pytest.mark.parametrize(
    "make, name, value, advice",
    [
        (_model, "batch_norm", "exact", r"GradientAccumulateModel\(model.model, ..., batch_norm='"),
        (_model, "non_finite", "drop_cycle", "Make another model"),
        (_model, "shared_inputs", [1], r"shared_inputs=\[1\]\)"),
        (
            lambda: GradientAccumulateOptimizer("sgd", 2),
            "reduction",
            "sum",
            r"GradientAccumulateOptimizer\(optimizer.inner_optimizer, ..., reduction='sum'\)",
        ),
        (
            lambda: GradientAccumulateOptimizer("sgd", 2),
            "non_finite",
            "drop_cycle",
            "Make another optimizer",
        ),
    ],
)
def test_what_is_fixed_cannot_be_set(make, name, value, advice):
    owner = make()
    before = getattr(owner, name)
    with pytest.raises(AttributeError, match=f"`{name}` is given to the constructor.*{advice}"):
        setattr(owner, name, value)
    assert getattr(owner, name) == before
