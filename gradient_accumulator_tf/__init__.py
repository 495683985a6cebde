"""Gradient accumulation for Keras on TensorFlow: a large batch in a micro-batch's memory."""

from gradient_accumulator_tf._installation import check_installation as _check_installation

_check_installation()

from gradient_accumulator_tf.batch_norm.layer import AccumBatchNorm  # noqa: E402
from gradient_accumulator_tf.batch_norm.swap import swap_batch_norm  # noqa: E402
from gradient_accumulator_tf.cycle.schedules import (  # noqa: E402
    AccumStepsSchedule,
    PiecewiseConstantSteps,
)
from gradient_accumulator_tf.equivalence.check import check_equivalence  # noqa: E402
from gradient_accumulator_tf.equivalence.report import (  # noqa: E402
    Cause,
    EquivalenceReport,
    VariableDifference,
)
from gradient_accumulator_tf.gradient_checkpointing import GradientCheckpoint  # noqa: E402
from gradient_accumulator_tf.models.accumulate import GradientAccumulateModel  # noqa: E402
from gradient_accumulator_tf.models.backup import AtomicBackupAndRestore  # noqa: E402
from gradient_accumulator_tf.models.callbacks import ThroughputLogger  # noqa: E402
from gradient_accumulator_tf.optimizers.accumulate import GradientAccumulateOptimizer  # noqa: E402
from gradient_accumulator_tf.optimizers.gradient_clipping import AdaptiveGradientClipping  # noqa: E402
from gradient_accumulator_tf.optimizers.learning_rate import (  # noqa: E402
    ScaledLearningRate,
    scale_learning_rate,
)

__version__ = "0.1.0"
__all__ = [
    "AccumBatchNorm",
    "AccumStepsSchedule",
    "AdaptiveGradientClipping",
    "AtomicBackupAndRestore",
    "Cause",
    "EquivalenceReport",
    "GradientAccumulateModel",
    "GradientAccumulateOptimizer",
    "GradientCheckpoint",
    "PiecewiseConstantSteps",
    "ScaledLearningRate",
    "ThroughputLogger",
    "VariableDifference",
    "__version__",
    "check_equivalence",
    "scale_learning_rate",
    "swap_batch_norm",
]


def __dir__():
    # The folders hold no names for users, so completion does not offer them.
    return sorted(__all__)
