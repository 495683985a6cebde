"""What in a model makes accumulated training differ from the large batch's."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gradient_accumulator_tf import _compat
from gradient_accumulator_tf.batch_norm import is_like_batch_norm
from gradient_accumulator_tf.model import GradientAccumulateModel
from gradient_accumulator_tf.optimizer import accumulating_optimizer


class Cause(NamedTuple):
    """Something in the model that makes accumulation differ from the large batch.

    Attributes:
        kind: "batch_norm", "random", "state", "loss", "half_precision", "not_deterministic" or
            "unknown".
        where: Paths of layers or variables; empty for the model as a whole.
        advice: What it does, and what to do about it.
    """

    kind: str
    where: tuple
    advice: str


def causes_of(model, way, large, first, data, random, repeats):
    """What is known to make a difference, of what is in the model."""
    exact = way.wrapper == "model" and getattr(model, "batch_norm", None) == "exact"
    layers = list(_walk(model))
    norms = tuple(p for p, v in layers if is_like_batch_norm(v) and v.trainable)
    if norms and not exact:
        yield Cause(
            "batch_norm",
            norms,
            "normalises by the micro-batch. GradientAccumulateModel(micro_batch_size=..., "
            'batch_norm="exact") trains with the large batch\'s statistics; or freeze it, or put '
            'another in its place: swap_batch_norm(model, to="group").',
        )
    if random:
        yield Cause(
            "random",
            random,
            "draws other numbers for a micro-batch than for the large batch. The mean over many "
            "updates is the same; to compare, set its rate to 0.",
        )
    norm_weights = {id(w) for _, v in layers if is_like_batch_norm(v) for w in v.weights}
    trainable = {id(v) for v in model.trainable_weights}
    state = tuple(
        v.path
        for v, start, new in zip(model.weights, first, large.weights, strict=True)
        if id(v) not in trainable | norm_weights and np.any(new.numpy() != start)
    )
    if state:
        yield Cause(
            "state",
            state,
            "is changed in each forward pass, so once per micro-batch. If the layer uses it in "
            "training, its outputs are others than the large batch's.",
        )
    if way.wrapper == "optimizer":
        yield from _causes_of_the_loss(model, layers, data)
    elif _has_own_loss(model):
        yield Cause(
            "loss",
            (),
            "`compute_loss` is the model's own, and counts for the examples of a micro-batch. If "
            "it divides by something else, override `micro_batch_weight` to return that.",
        )
    half = {v.compute_dtype for _, v in layers} & {"float16", "bfloat16"}
    if half:
        yield Cause(
            "half_precision",
            tuple(sorted(half)),
            "rounds each micro-batch's gradient to three or four digits before it is summed. "
            "Compare in float32; in training it is as good as the large batch's own rounding.",
        )
    if not repeats:
        yield Cause(
            "not_deterministic",
            (),
            "two forward passes from the same state differ: a layer draws numbers that are not "
            "part of it (tf.random; use keras.random with a keras.random.SeedGenerator), or an "
            "operation adds up in any order (tf.config.experimental.enable_op_determinism()).",
        )
    nothing = not ((norms and not exact) or random or state or half) and repeats
    if nothing and way.wrapper == "model" and not _has_own_loss(model):
        yield Cause(
            "unknown",
            (),
            "nothing that is known for it. Does a loss or a layer look across the examples of a "
            "batch (a contrastive loss, a mean over the batch axis)? Then no sum of micro-batches' "
            "gradients is the large batch's.",
        )


def repeats_itself(model, x):
    """Whether a model in training gives the same outputs twice from the same state."""
    state = [v.numpy() for v in model.variables]
    training = {"training": True} if _compat.call_has_training_argument(model) else {}
    outputs = []
    for _ in range(2):
        for variable, value in zip(model.variables, state, strict=True):
            variable.assign(value)
        outputs.append(tf.nest.flatten(model(x, **training)))
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*outputs, strict=True))


def _causes_of_the_loss(model, layers, data):
    """Why the mean of the micro-batches' means is not the large batch's mean."""
    losses = tf.nest.flatten(_compat.compile_arguments(model)["loss"])
    own = accumulating_optimizer(model.optimizer)
    reductions = {getattr(loss, "reduction", None) for loss in losses}
    averages = own is None or own.get_config()["reduction"] == "mean"
    if "sum" in reductions and averages:
        yield Cause(
            "loss",
            (),
            "is a sum, of which the optimizer takes the mean over micro-batches. Pass "
            'reduction="sum" to GradientAccumulateOptimizer, or use GradientAccumulateModel.',
        )
    masked = tuple(p for p, v in layers if getattr(v, "mask_zero", False) or _is_masking(v))
    if masked or data[2] is not None:
        yield Cause(
            "loss",
            masked or ("sample_weight",),
            "makes micro-batches count for different amounts, which the optimizer averages alike. "
            "Use GradientAccumulateModel, or pass `weight=` to `optimizer.apply`.",
        )
    yield Cause(
        "loss",
        (),
        "if the loss is no mean over the examples, or looks across them (a contrastive loss), the "
        "mean over micro-batches is another one.",
    )


def _is_masking(layer):
    return isinstance(layer, keras.layers.Masking)


def _has_own_loss(model):
    return type(model).compute_loss not in (
        keras.Model.compute_loss,
        GradientAccumulateModel.compute_loss,
    )


def _walk(layer, path=None):
    """Every layer in a model with its path, a shared one once for each of its paths."""
    for inner in _compat.sublayers(layer):
        inner_path = inner.name if path is None else f"{path}/{inner.name}"
        yield inner_path, inner
        yield from _walk(inner, inner_path)


def random_layers(model, large):
    """Paths of the layers whose random states the training moved."""
    moved = {
        id(v)
        for v, new in zip(model.variables, large.variables, strict=True)
        if np.any(v.numpy() != new.numpy())
    }

    def states(layer):
        weights = {id(v) for v in layer.non_trainable_weights}
        return {id(v) for v in layer.non_trainable_variables} - weights

    return tuple(
        path
        for path, layer in _walk(model)
        if moved & states(layer) - set().union(*(states(v) for v in _compat.sublayers(layer)))
    )
