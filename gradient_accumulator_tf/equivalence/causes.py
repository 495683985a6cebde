"""Why accumulated training differs from the large batch's: one small detector for each cause."""

from collections.abc import Callable

import keras

from gradient_accumulator_tf.batch_norm.kinds import is_like_batch_norm
from gradient_accumulator_tf.equivalence.evidence import Evidence
from gradient_accumulator_tf.equivalence.report import Cause

_COUPLED = (
    "GradientAccumulateModel(micro_batch_size=..., coupled_loss=True), which computes the loss "
    "from the outputs of the whole effective batch"
)


# Kinds of what a loss over the whole effective batch may mend.
_OF_LOSSES = {"loss", "coupled_loss", "order"}


def causes_of(evidence: Evidence, is_equal_if_coupled: Callable[[], bool]) -> tuple[Cause, ...]:
    """The causes that the evidence shows, or that nothing known is the cause.

    Args:
        evidence: `Evidence`.
        is_equal_if_coupled: Function that trains with `coupled_loss=True`, and returns whether that
            equals the large batch. It is called where nothing but the loss may be the cause.
    """
    wrong_reduction = _wrong_reduction(evidence)
    if wrong_reduction is not None:
        found = [wrong_reduction]  # it was tried, and explains all
    else:
        found = _found_by(DETECTORS, evidence)
        if all(cause.kind in _OF_LOSSES for cause in found) and is_equal_if_coupled():
            tried = evidence._replace(coupled_is_equal=True)
            found = _found_by((_whole_losses, _coupled_losses), tried)
    rows = [repeated_rows(evidence.repeated_rows)] if evidence.repeated_rows else []
    # Rows explain nothing that is left: what it is compared with has them added.
    return tuple([*(found or [_UNKNOWN]), *(rows if evidence.repeats else [])])


def _found_by(detectors, evidence):
    """List of the causes that detectors find."""
    return [cause for detect in detectors if (cause := detect(evidence)) is not None]


def repeated_rows(paths: tuple[str, ...]) -> Cause:
    """The cause that the plain large batch differs from one whose repeated rows are added first."""
    return Cause(
        "repeated_rows",
        paths,
        "has a gradient with a row for each use of an index (tf.IndexedSlices). On the large batch "
        "Keras's optimizer, or its clipping, takes the rows of one index one by one, and adds them "
        "afterwards. Accumulation adds them first, as the gradient of the loss is, so it was "
        "compared with a large batch that does so too. Nothing has to be done. To train a "
        "large batch in this way, put it into GradientAccumulateModel(micro_batch_size=2**31 - 1).",
    )


Detector = Callable[[Evidence], Cause | None]


def _wrong_reduction(evidence: Evidence) -> Cause | None:
    if evidence.better_reduction is None:
        return None
    if evidence.better_reduction == "mean":
        return Cause(
            "loss",
            (),
            "is a mean over the examples, while the optimizer sums over micro-batches: each step "
            'is too large, by their number. Pass reduction="mean" to GradientAccumulateOptimizer, '
            "with which it is equal (tried).",
        )
    vector = "a vector, which `tape.gradient` sums"
    if evidence.loss_vector is not None:
        vector = f"here one of shape {evidence.loss_vector}, which `tape.gradient` sums"
    other_way = "use GradientAccumulateModel, which sums it by itself."
    if evidence.way.has_own_step:
        other_way = "take the loss's mean over the examples before its gradient."
    return Cause(
        "loss",
        (),
        f"is a sum over the examples, or is not reduced ({vector}), while the optimizer takes "
        "the mean over micro-batches: each step is too small, by their number. Pass "
        f'reduction="sum" to GradientAccumulateOptimizer, with which it is equal (tried); or '
        f"{other_way}",
    )


def _batch_norm(evidence: Evidence) -> Cause | None:
    exact = evidence.way.wrapper == "model"
    exact = exact and getattr(evidence.model, "batch_norm", None) == "exact"
    norms = tuple(p for p, v in evidence.layers if is_like_batch_norm(v) and v.trainable)
    if exact or not norms:
        return None
    return Cause(
        "batch_norm",
        norms,
        "normalises by the micro-batch. GradientAccumulateModel(micro_batch_size=..., "
        'batch_norm="exact") trains with the large batch\'s statistics; or freeze it, or put '
        'another in its place: swap_batch_norm(model, to="group").',
    )


def _random(evidence: Evidence) -> Cause | None:
    if not evidence.random:
        return None
    return Cause(
        "random",
        evidence.random,
        "draws other numbers for a micro-batch than for the large batch. The mean over many "
        "updates is the same; to compare, set its rate to 0.",
    )


def _state(evidence: Evidence) -> Cause | None:
    known = {id(w) for _, v in evidence.layers if is_like_batch_norm(v) for w in v.weights}
    if not evidence.way.has_own_step:
        known |= {id(v) for v in evidence.model.trainable_weights}
    moved = {id(v) for v in evidence.moved} - known
    state = tuple(v.path for v in evidence.model.weights if id(v) in moved)
    if not state:
        return None
    if evidence.way.has_own_step:
        advice = (
            "is changed in each call of `train_step`, so once per micro-batch. If it follows the "
            "weights (a moving average of a network), change it once per update: where "
            "`optimizer.just_updated`, a bool tensor, is true."
        )
    else:
        advice = (
            "is changed in each forward pass, so once per micro-batch. If the layer uses it in "
            "training, its outputs are others than the large batch's. Change it once per update "
            "instead: not in `call`, but in a callback, where `ended_in_update` is true."
        )
    return Cause("state", state, advice)


def _order(evidence: Evidence) -> Cause | None:
    if not evidence.by_order or evidence.random or not evidence.repeats:
        return None
    return Cause(
        "order",
        (),
        "the large batch itself ends elsewhere with its examples in another order. A loss or "
        "a layer that takes examples by their place in the batch (pairs of neighbours, a shift "
        "along axis 0) needs micro-batches of whole pairs. If there is none, rounding alone "
        "does it: compare in float64, with fewer updates or a smaller learning rate.",
    )


def _half_precision(evidence: Evidence) -> Cause | None:
    half = {v.compute_dtype for _, v in evidence.layers} & {"float16", "bfloat16"}
    if not half:
        return None
    return Cause(
        "half_precision",
        tuple(sorted(half)),
        "rounds each micro-batch's gradient to three or four digits before it is summed. "
        "Compare in float32; in training it is as good as the large batch's own rounding.",
    )


def _not_deterministic(evidence: Evidence) -> Cause | None:
    if evidence.repeats:
        return None
    return Cause(
        "not_deterministic",
        (),
        "two trainings from the same state differ: something draws numbers that are not part "
        "of the model (tf.random; use keras.random with a keras.random.SeedGenerator), or an "
        "operation adds up in any order (tf.config.experimental.enable_op_determinism()).",
    )


def _several_updates(evidence: Evidence) -> Cause | None:
    if not evidence.way.calls_optimizer or evidence.updates_per_batch <= 1:
        return None
    return Cause(
        "updates",
        (),
        f"`train_step` makes {evidence.updates_per_batch:g} updates per batch (as a critic's "
        "in a WGAN), and each one counts as a micro-batch. The later ones need the weights "
        "that the earlier ones moved, so accumulation cannot equal the large batch. Make one "
        "update per batch, and give it a batch for each update.",
    )


def _loss_vector(evidence: Evidence) -> Cause | None:
    if not evidence.way.calls_optimizer or evidence.loss_vector is None:
        return None
    return Cause(
        "loss",
        (),
        f"is not reduced: `tape.gradient` sums what it is given, of shape "
        f"{evidence.loss_vector}, while the optimizer takes the {evidence.way.reduction} over "
        'micro-batches. Pass reduction="sum" to GradientAccumulateOptimizer, or take the '
        "loss's mean over the examples before its gradient. This is not all that differs.",
    )


def _masks_and_weights(evidence: Evidence) -> Cause | None:
    if not evidence.way.calls_optimizer:
        return None
    masked = tuple(
        p
        for p, v in evidence.layers
        if getattr(v, "mask_zero", False) or isinstance(v, keras.layers.Masking)
    )
    if not masked and not evidence.weighted:
        return None
    return Cause(
        "loss",
        masked or ("sample_weight",),
        "makes micro-batches count for different amounts, which the optimizer averages alike. "
        "Use GradientAccumulateModel, or pass `weight=` to `optimizer.apply`.",
    )


def _loss_of_own_step(evidence: Evidence) -> Cause | None:
    if not evidence.way.calls_optimizer:
        return None
    return Cause(
        "loss",
        (),
        "if the loss divides by something else than the examples (the sum of a mask), pass that as "
        "`weight=` to `optimizer.apply`, or use GradientAccumulateModel. If it looks across the "
        "examples (a contrastive loss), the mean over micro-batches is another one: compute it in "
        f"`compute_loss` instead of `train_step`, in {_COUPLED}; or train it on the large "
        "batch, in less memory with GradientCheckpoint.",
    )


def _own_compute_loss(evidence: Evidence) -> Cause | None:
    own = evidence.has_own_loss and not evidence.way.couples_losses
    if evidence.way.calls_optimizer or not own:
        return None
    return Cause(
        "loss",
        (),
        "`compute_loss` is the model's own, and counts for the examples of a micro-batch. If "
        "it divides by something else, such as the sum of a mask, override "
        "`micro_batch_weight` to return that. If it looks across the examples, use "
        f"{_COUPLED}.",
    )


def _whole_losses(evidence: Evidence) -> Cause | None:
    if not _may_couple(evidence) or not evidence.losses.whole:
        return None
    return Cause(
        "loss",
        evidence.losses.whole,
        "reduces to one number by itself, which counts for the examples of a micro-batch. Use "
        f"{_COUPLED}{_tried(evidence)}. Or, if the loss divides by something else than the "
        "examples, such as the sum of its own mask: derive the model from GradientAccumulateModel "
        "and override `micro_batch_weight` to return that; or let the loss return a value for each "
        'element, in a keras.losses.Loss with reduction="mean_with_sample_weight", and give the '
        "mask as `sample_weight`.",
    )


def _coupled_losses(evidence: Evidence) -> Cause | None:
    coupled, only = evidence.losses.coupled, evidence.coupled_is_equal
    if not _may_couple(evidence) or not (coupled or (only and not evidence.losses.whole)):
        return None
    reasons = "; ".join(dict.fromkeys(coupled.values())) or "the loss looks across the examples"
    return Cause(
        "coupled_loss",
        tuple(coupled),
        f"{reasons}, so that its mean over micro-batches is another loss. Use "
        f"{_COUPLED}{_tried(evidence)}.",
    )


def _may_couple(evidence: Evidence) -> bool:
    """Whether a loss that looks across the examples could make it differ, and be mended."""
    way = evidence.way
    own_loss = evidence.has_own_loss and not evidence.coupled_is_equal
    return not (way.calls_optimizer or way.couples_losses or own_loss)


def _tried(evidence: Evidence) -> str:
    return ", with which it is equal (tried)" if evidence.coupled_is_equal else ""


# In the order of the report.
DETECTORS: tuple[Detector, ...] = (
    _batch_norm,
    _random,
    _state,
    _order,
    _half_precision,
    _not_deterministic,
    _several_updates,
    _loss_vector,
    _masks_and_weights,
    _loss_of_own_step,
    _own_compute_loss,
    _whole_losses,
    _coupled_losses,
)

_UNKNOWN = Cause(
    "unknown",
    (),
    "nothing that is known for it. Look for what takes a mean, a maximum or a product over "
    "the examples, axis 0, in a loss or a layer. No sum of micro-batches' gradients is then the "
    f"large batch's. For a loss: {_COUPLED}. For a layer: let it look at one "
    "example at a time, or train it on the large batch, in less memory with GradientCheckpoint.",
)
