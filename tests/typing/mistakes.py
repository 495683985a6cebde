"""Mistakes of users. `make types` fails if a line with `type: ignore` is no error any more."""

import gradient_accumulator_tf as gat

gat.GradientAccumulateOptimizer("adam", accum_steps="eight")  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam", 8, reduction="max")  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam", 8, non_finite="drop")  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam", 8, clipnorm=1.0)  # type: ignore[arg-type]
gat.GradientAccumulateOptimizer("adam")  # type: ignore[call-arg]
gat.GradientAccumulateOptimizer("adam", 8, "sum")  # type: ignore[call-arg]

gat.GradientAccumulateModel(accum_steps="eight")  # type: ignore[arg-type]
gat.GradientAccumulateModel(micro_batchsize=8)  # type: ignore[arg-type]
gat.GradientAccumulateModel(micro_batch_size=8, batch_norm="exakt")  # type: ignore[arg-type]
gat.GradientAccumulateModel(micro_batch_size=8.0)  # type: ignore[arg-type]
model = gat.GradientAccumulateModel(micro_batch_size=8)
model.micro_batch_size = "four"  # type: ignore[assignment]
model.fit(batch_size="all")  # type: ignore[arg-type]
model.fit(bath_size=8)  # type: ignore[call-arg]
gat.AccumBatchNorm(accum_steps="eight")  # type: ignore[arg-type]
report = gat.check_equivalence(model, verbose=0)  # type: ignore[call-arg]
print(report.equivalant)  # type: ignore[attr-defined]
