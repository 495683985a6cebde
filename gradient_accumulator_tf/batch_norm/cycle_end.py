"""Who ends the cycle of the AccumBatchNorm layers that are called: the layer or a model.

A layer outside of a `GradientAccumulateModel` counts its training calls and ends its cycle itself.
Within the model's training step the model does it, because only the model knows a partial cycle.
The same layer can be used in both ways, also by turns, so the step has to tell it in each call.

The model cannot pass an argument, so the value holds for the `with` block around the forward pass.
`replicated/scoped.py` says why, and when it can go. The value takes effect where
`AccumBatchNorm.call` reads it, and nowhere else.
"""

import contextlib
from typing import NamedTuple

from gradient_accumulator_tf.replicated.scoped import ScopedValue


class CycleEnd(NamedTuple):
    """How the cycle of the layers in a model's training step ends.

    Attributes:
        by_model: Whether the model calls `end_cycle`; otherwise each layer does.
        finite_only: Whether layers leave out the statistics of a micro-batch that are not finite.
    """

    by_model: bool = False
    finite_only: bool = False


_current = ScopedValue(CycleEnd())


def current_cycle_end():
    """The `CycleEnd` in force on this replica's thread."""
    return _current.value


@contextlib.contextmanager
def model_ends_cycle(finite_only=False):
    """Within this context AccumBatchNorm layers leave it to the caller to end their cycle.

    Each replica enters it by itself. Tracing a training step calls the layers as running it does.

    Args:
        finite_only: Whether the layers leave out statistics that are not finite.
    """
    with _current.set_to(CycleEnd(by_model=True, finite_only=finite_only)):
        yield
