"""What users write. `make types` must find no error in it."""

from typing import Any

import keras
import numpy as np

import gradient_accumulator_tf as gat

x, y = np.ones((64, 8)), np.ones((64, 1))


def net() -> keras.Model:
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])


optimizer = gat.GradientAccumulateOptimizer("adam", accum_steps=4, non_finite="drop_cycle")
gat.GradientAccumulateOptimizer(keras.optimizers.SGD(), {0: 1, 100: 8}, reduction="sum")
gat.GradientAccumulateOptimizer("sgd", gat.PiecewiseConstantSteps({0: 1, 100: 8}))
gat.GradientAccumulateOptimizer("sgd", lambda update: update // 100 + 1, name="grows")
optimizer.apply([np.ones(3)], [keras.Variable(np.ones(3))], weight=3)
optimizer.accum_steps = 8
updated: bool = optimizer.ended_in_update
optimizer.flush()

across = gat.GradientAccumulateModel(model=net(), accum_steps=8)
within = gat.GradientAccumulateModel(
    net(), micro_batch_size=4, batch_norm="exact", shared_inputs=[1], name="exact"
)
within.compile("adam", loss="mse", metrics=["mae"], jit_compile=True)
history = within.fit(x, y, batch_size=32, epochs=2, callbacks=[gat.ThroughputLogger(32)])
print(history.history["loss"], int(within.dropped_cycles))
size: int | None = within.micro_batch_size


class Own(gat.GradientAccumulateModel):
    def __init__(self) -> None:
        super().__init__(accum_steps=8)
        self.dense = keras.layers.Dense(1)


gat.AccumBatchNorm(accum_steps=4, momentum=0.9)
gat.AdaptiveGradientClipping("sgd", clip_factor=0.02, exclude=["bias"])
gat.scale_learning_rate(1e-3, batch_size=32, base_batch_size=256, accum_steps=8, rule="sqrt")
gat.swap_batch_norm(net(), to="group")
report = gat.check_equivalence(net(), x, y, micro_batch_size=16, verbose=0)
print(report.equivalent, [cause.kind for cause in report.causes])
shown: gat.EquivalenceReport = report
furthest: gat.VariableDifference = max(shown.variables, key=lambda v: v.relative)

swapped = gat.swap_batch_norm(net(), to=lambda layer: "group" if layer.name == "bn" else None)
swapped.summary()
gat.swap_batch_norm(within, accum_steps=8).flush()  # of the class that was given
rate: float = gat.scale_learning_rate(0.1, batch_size=32, base_batch_size=256, accum_steps=8)
keras.optimizers.SGD(rate)
gat.GradientCheckpoint(keras.layers.Dense(1), name="block")
gat.AtomicBackupAndRestore("backup", save_freq=100)
within.summary(expand_nested=True)
within.export("exported", verbose=False)


class Doubling(gat.AccumStepsSchedule):
    def __call__(self, update: Any) -> Any:
        return 1 + update // 1000


gat.GradientAccumulateOptimizer("adam", accum_steps=Doubling())
