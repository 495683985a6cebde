"""Every lasting change to Keras's own classes.

Each file makes one change and says why it is needed, where it takes effect and when it can go.
`replaced.py` makes it harmless to make a change twice.
"""

from gradient_accumulator_tf._keras.patches.loss_scaling import route_loss_scaling, scaler_around
from gradient_accumulator_tf._keras.patches.model_hooks import hook_into_models
from gradient_accumulator_tf._keras.patches.several_workers import mend_fit_on_several_workers

__all__ = [
    "hook_into_models",
    "mend_fit_on_several_workers",
    "route_loss_scaling",
    "scaler_around",
]
