"""What in a model makes accumulated training differ from the large batch's."""

import contextlib
import functools
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.kinds import is_like_batch_norm
from gradient_accumulator_tf.cycle.loss_recorder import call_and_keep_values
from gradient_accumulator_tf.models.accumulate import GradientAccumulateModel


class Cause(NamedTuple):
    """Something in the model that makes accumulation differ from the large batch.

    Attributes:
        kind: "batch_norm", "random", "state", "updates", "loss", "order",
            "half_precision", "not_deterministic" or "unknown".
        where: Paths of layers or variables; empty for the model as a whole.
        advice: What it does, and what to do about it.
    """

    kind: str
    where: tuple[str, ...]
    advice: str


class Evidence(NamedTuple):
    """What the trainings of the copies showed.

    Attributes:
        random: Paths of the layers whose random states moved.
        by_order: Whether the large batch ends elsewhere with its examples in another order.
        updates_per_batch: Number of updates that the large batches' training made for each.
        weighted: Whether there are sample weights.
        moved: The model's variables that moved: of a model with a `train_step` of its own in the
            first micro-batch of a cycle, where none should; of others in the large batches'
            training.
        whole_losses: Names of the compiled losses that reduce to a number by themselves.
        better_reduction: "sum" or "mean" if the optimizer accumulates to the large batch with it,
            and not as it is; else None.
        loss_vector: Shape of a target with several elements that the training asked a gradient of,
            as text; or None.
        repeats: Whether the large batches' training, made again, ended in the same weights.
    """

    random: tuple
    by_order: bool
    updates_per_batch: float
    weighted: bool
    moved: list
    whole_losses: tuple = ()
    better_reduction: Any = None
    loss_vector: Any = None
    repeats: bool = True


def causes_of(model, way, evidence):
    """What is known to make a difference, of what is in the model."""
    if evidence.better_reduction is not None:
        yield _wrong_reduction(way, evidence)
        return
    found = list(_causes_in_layers(model, way, evidence))
    yield from found
    if way.calls_optimizer:
        yield from _causes_of_own_step(model, way, evidence)
    elif has_own_loss(model):
        yield Cause(
            "loss",
            (),
            "`compute_loss` is the model's own, and counts for the examples of a micro-batch. If "
            "it divides by something else, such as the sum of a mask, override "
            "`micro_batch_weight` to return that.",
        )
    elif evidence.whole_losses:
        yield Cause(
            "loss",
            evidence.whole_losses,
            "reduces to one number by itself, which counts for the examples of a micro-batch. If "
            "it divides by something else, such as the sum of its own mask, derive the model from "
            "GradientAccumulateModel and override `micro_batch_weight` to return that; or let the "
            "loss return a value for each element, in a keras.losses.Loss with "
            'reduction="mean_with_sample_weight", and give the mask as `sample_weight`. If it '
            "looks across the examples (a contrastive loss), no sum of micro-batches is the large "
            "batch's.",
        )
    elif not found:
        yield Cause(
            "unknown",
            (),
            "nothing that is known for it. Look for what takes a mean, a maximum or a product over "
            "the examples, axis 0, in a loss (a contrastive one does) or a layer. No sum of "
            "micro-batches' gradients is then the large batch's: let it look at one example at a "
            "time, or train it on the large batch, in less memory with GradientCheckpoint.",
        )


def _wrong_reduction(way, evidence):
    """The cause that another reduction of the optimizer removes, which was tried."""
    if evidence.better_reduction == "sum":
        vector = "a vector, which `tape.gradient` sums"
        if evidence.loss_vector is not None:
            vector = f"here one of shape {evidence.loss_vector}, which `tape.gradient` sums"
        advice = (
            f"is a sum over the examples, or is not reduced ({vector}), while the optimizer takes "
            "the mean over micro-batches: each step is too small, by their number. Pass "
            'reduction="sum" to GradientAccumulateOptimizer, with which it is equal (tried); or '
            + (
                "take the loss's mean over the examples before its gradient."
                if way.has_own_step
                else "use GradientAccumulateModel, which sums it by itself."
            )
        )
    else:
        advice = (
            "is a mean over the examples, while the optimizer sums over micro-batches: each step "
            'is too large, by their number. Pass reduction="mean" to GradientAccumulateOptimizer, '
            "with which it is equal (tried)."
        )
    return Cause("loss", (), advice)


def _causes_in_layers(model, way, evidence):
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
    if evidence.random:
        yield Cause(
            "random",
            evidence.random,
            "draws other numbers for a micro-batch than for the large batch. The mean over many "
            "updates is the same; to compare, set its rate to 0.",
        )
    others = {id(w) for _, v in layers if is_like_batch_norm(v) for w in v.weights}
    if not way.has_own_step:
        others |= {id(v) for v in model.trainable_weights}
    moved = {id(v) for v in evidence.moved}
    state = tuple(v.path for v in model.weights if id(v) in moved - others)
    if state and way.has_own_step:
        yield Cause(
            "state",
            state,
            "is changed in each call of `train_step`, so once per micro-batch. If it follows the "
            "weights (a moving average of a network), change it once per update: where "
            "`optimizer.just_updated`, a bool tensor, is true.",
        )
    elif state:
        yield Cause(
            "state",
            state,
            "is changed in each forward pass, so once per micro-batch. If the layer uses it in "
            "training, its outputs are others than the large batch's. Change it once per update "
            "instead: not in `call`, but in a callback, where `ended_in_update` is true.",
        )
    if evidence.by_order and not evidence.random and evidence.repeats:
        yield Cause(
            "order",
            (),
            "the large batch itself ends elsewhere with its examples in another order. A loss or "
            "a layer that takes examples by their place in the batch (pairs of neighbours, a shift "
            "along axis 0) needs micro-batches of whole pairs. If there is none, rounding alone "
            "does it: compare in float64, with fewer updates or a smaller learning rate.",
        )
    half = {v.compute_dtype for _, v in layers} & {"float16", "bfloat16"}
    if half:
        yield Cause(
            "half_precision",
            tuple(sorted(half)),
            "rounds each micro-batch's gradient to three or four digits before it is summed. "
            "Compare in float32; in training it is as good as the large batch's own rounding.",
        )
    if not evidence.repeats:
        yield Cause(
            "not_deterministic",
            (),
            "two trainings from the same state differ: something draws numbers that are not part "
            "of the model (tf.random; use keras.random with a keras.random.SeedGenerator), or an "
            "operation adds up in any order (tf.config.experimental.enable_op_determinism()).",
        )


def _causes_of_own_step(model, way, evidence):
    """Why the mean of the micro-batches' gradients is not the large batch's."""
    if evidence.updates_per_batch > 1:
        yield Cause(
            "updates",
            (),
            f"`train_step` makes {evidence.updates_per_batch:g} updates per batch (as a critic's "
            "in a WGAN), and each one counts as a micro-batch. The later ones need the weights "
            "that the earlier ones moved, so accumulation cannot equal the large batch. Make one "
            "update per batch, and give it a batch for each update.",
        )
    if evidence.loss_vector is not None:
        yield Cause(
            "loss",
            (),
            f"is not reduced: `tape.gradient` sums what it is given, of shape "
            f"{evidence.loss_vector}, while the optimizer takes the {way.reduction} over "
            'micro-batches. Pass reduction="sum" to GradientAccumulateOptimizer, or take the '
            "loss's mean over the examples before its gradient. This is not all that differs.",
        )
    masked = tuple(
        p
        for p, v in _walk(model)
        if getattr(v, "mask_zero", False) or isinstance(v, keras.layers.Masking)
    )
    if masked or evidence.weighted:
        yield Cause(
            "loss",
            masked or ("sample_weight",),
            "makes micro-batches count for different amounts, which the optimizer averages alike. "
            "Use GradientAccumulateModel, or pass `weight=` to `optimizer.apply`.",
        )
    yield Cause(
        "loss",
        (),
        "if the loss divides by something else than the examples (the sum of a mask), pass that as "
        "`weight=` to `optimizer.apply`, or use GradientAccumulateModel. If it looks across the "
        "examples (a contrastive loss), the mean over micro-batches is another one: train it on "
        "the large batch, in less memory with GradientCheckpoint.",
    )


def reduced_by_themselves(model, batch):
    """Names of the compiled losses whose own function returns one number for a whole batch.

    Args:
        model: A model that was trained.
        batch: `(x, y, sample_weight)` for it.
    """
    found = []

    def replace(loss):
        def seen(y_true, y_pred, sample_weight=None):
            value, values = call_and_keep_values(loss, y_true, y_pred, sample_weight)
            if values is not None and values.shape.rank == 0:
                found.append(loss.name)
            return value

        return seen

    x, y, sample_weight = batch
    try:
        y_pred = model.predict(x, verbose=0)
        with _keras.replaced_losses(model, replace):
            _keras.compute_loss(model, x, y, y_pred, sample_weight)
    except Exception:  # a model that trains may do neither of the two by itself
        return ()
    return tuple(found)


@contextlib.contextmanager
def recorded_vectors():
    """Within this context, notes what a `tf.GradientTape` differentiates that is not a scalar.

    Only by variables, as a gradient by inputs is meant for each example, and without gradients of
    outputs, as those reduce it. Yields the list of the shapes, as text.
    """
    original, shapes = tf.GradientTape.gradient, []

    @functools.wraps(original)
    def gradient(tape, target, sources, output_gradients=None, *args, **kwargs):
        flat = tf.nest.flatten(sources)
        if output_gradients is None and any(
            isinstance(v, tf.Variable | keras.Variable) for v in flat
        ):
            shapes.extend(
                str(t.shape)
                for t in tf.nest.flatten(target)
                if tf.is_tensor(t) and t.shape.rank != 0
            )
        return original(tape, target, sources, output_gradients, *args, **kwargs)

    tf.GradientTape.gradient = gradient
    try:
        yield shapes
    finally:
        tf.GradientTape.gradient = original


def has_own_loss(model):
    """Whether the model computes its loss by itself."""
    return type(model).compute_loss not in (
        keras.Model.compute_loss,
        GradientAccumulateModel.compute_loss,
    )


def _walk(layer, path=None):
    """Every layer in a model with its path, a shared one once for each of its paths."""
    for inner in _keras.sublayers(layer):
        inner_path = inner.name if path is None else f"{path}/{inner.name}"
        yield inner_path, inner
        yield from _walk(inner, inner_path)


def random_layers(model, moved):
    """Paths of the layers whose random states are among the variables that training moved."""
    moved = {id(v) for v in moved}

    def states(layer):
        weights = {id(v) for v in layer.non_trainable_weights}
        return {id(v) for v in layer.non_trainable_variables} - weights

    return tuple(
        path
        for path, layer in _walk(model)
        if moved & states(layer) - set().union(*(states(v) for v in _keras.sublayers(layer)))
    )
