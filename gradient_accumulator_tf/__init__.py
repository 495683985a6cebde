"""Gradient accumulation for Keras on TensorFlow: a large batch in a micro-batch's memory."""

from gradient_accumulator_tf._compat import check_installation as _check_installation

_check_installation()

from gradient_accumulator_tf.backup import AtomicBackupAndRestore  # noqa: E402
from gradient_accumulator_tf.batch_norm import AccumBatchNorm  # noqa: E402
from gradient_accumulator_tf.callbacks import ThroughputLogger  # noqa: E402
from gradient_accumulator_tf.equivalence import check_equivalence  # noqa: E402
from gradient_accumulator_tf.gradient_checkpointing import GradientCheckpoint  # noqa: E402
from gradient_accumulator_tf.gradient_clipping import AdaptiveGradientClipping  # noqa: E402
from gradient_accumulator_tf.layer_swap import swap_batch_norm  # noqa: E402
from gradient_accumulator_tf.learning_rate import (  # noqa: E402
    ScaledLearningRate,
    scale_learning_rate,
)
from gradient_accumulator_tf.model import GradientAccumulateModel  # noqa: E402
from gradient_accumulator_tf.optimizer import GradientAccumulateOptimizer  # noqa: E402
from gradient_accumulator_tf.schedules import (  # noqa: E402
    AccumStepsSchedule,
    PiecewiseConstantSteps,
)

__version__ = "0.1.0"
__all__ = [
    "AccumBatchNorm",
    "AccumStepsSchedule",
    "AdaptiveGradientClipping",
    "AtomicBackupAndRestore",
    "GradientAccumulateModel",
    "GradientAccumulateOptimizer",
    "GradientCheckpoint",
    "PiecewiseConstantSteps",
    "ScaledLearningRate",
    "ThroughputLogger",
    "__version__",
    "check_equivalence",
    "scale_learning_rate",
    "swap_batch_norm",
]
