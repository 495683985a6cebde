"""Mistakes of users. `make types` fails if a line with `type: ignore` is no error any more."""

import gradient_accumulator_tf as gat

gat.GradientAccumulateOptimizer("adam", accum_steps="eight")  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam", 8, reduction="max")  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam", 8, non_finite="drop")  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam", 8, clipnorm=1.0)  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam")  # type: ignore[call-arg]
gat.GradientAccumulateOptimizer("adam", 8, "sum")  # type: ignore[call-arg]
optimizer = gat.GradientAccumulateOptimizer("adam", 8)
optimizer.reduction = "sum"  # type: ignore[assignment]
optimizer.accum_steps = "eight"  # type: ignore[assignment]
optimizer.apply()  # type: ignore[call-arg]

gat.GradientAccumulateModel(accum_steps="eight")  # type: ignore[arg-type]
gat.GradientAccumulateModel(micro_batchsize=8)  # type: ignore[arg-type]
gat.GradientAccumulateModel(micro_batch_size=8, batch_norm="exakt")  # type: ignore[arg-type]
gat.GradientAccumulateModel(micro_batch_size=8.0)  # type: ignore[arg-type]
model = gat.GradientAccumulateModel(micro_batch_size=8)
model.batch_norm = "exact"  # type: ignore[assignment]
model.micro_batch_size = "four"  # type: ignore[assignment]
model.fit(batch_size="all")  # type: ignore[arg-type]
model.fit(bath_size=8)  # type: ignore[call-arg]
gat.AccumBatchNorm(accum_steps="eight")  # type: ignore[arg-type]
gat.AccumBatchNorm(4, momentun=0.9)  # type: ignore[call-arg]
gat.AccumBatchNorm(4, renorm=True)  # type: ignore[call-arg]
gat.swap_batch_norm(model, to="nothing")  # type: ignore[arg-type]
gat.swap_batch_norm(model, accum_steps="eight")  # type: ignore[arg-type]

gat.AdaptiveGradientClipping("sgd", clip_factor="small")  # type: ignore[arg-type]
gat.AdaptiveGradientClipping("sgd", clipnorm=1.0)  # type: ignore[arg-type]
gat.PiecewiseConstantSteps({"first": 1})  # type: ignore[dict-item]
gat.scale_learning_rate(0.1, 32, 256)  # type: ignore[call-overload]
gat.scale_learning_rate(0.1, batch_size=32, base_batch_size=256, rule="log")  # type: ignore[call-overload]
gat.GradientCheckpoint(model, nam="block")  # type: ignore[call-arg]
gat.ThroughputLogger("all")  # type: ignore[arg-type]
gat.AtomicBackupAndRestore("backup", save_freq="hour")  # type: ignore[arg-type]

gat.check_equivalence(model, [1.0], accum_steps="eight")  # type: ignore[arg-type]
gat.check_equivalence(model, [1.0], [1.0], 16)  # type: ignore[call-arg]
report = gat.check_equivalence(model, [1.0])
print(report.equivalant)  # type: ignore[attr-defined]
print(report.causes[0].knd)  # type: ignore[attr-defined]
