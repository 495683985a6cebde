"""Keras's `fit` and `evaluate` under a MultiWorkerMirroredStrategy of several workers.

Why: two bugs of Keras make them fail.

- `Trainer._maybe_symbolic_build` averages the first batch over replicas, to know its shapes. This
  fails for a nested batch. The batch of the first local replica has the same shapes.
- `reduce_per_replica` averages the logs over their first axis. Logs are scalars and have none. The
  mean over replicas is meant.

Where it takes effect: in these two functions of `keras.src.backend.tensorflow.trainer`, if the
strategy has several workers. Everywhere else the originals run.

When it can go: each half when no supported Keras has its bug. tests/test_multi_worker.py tells.
"""

import tensorflow as tf

from gradient_accumulator_tf._keras.patches.replaced import replace_function


def mend_fit_on_several_workers():
    """Mends both bugs. A second call changes nothing."""
    from keras.src.backend.tensorflow import trainer

    has_several_workers = trainer._collective_all_reduce_multi_worker

    def build_from_local_shapes(original, self, iterator=None, data_batch=None):
        strategy = self.distribute_strategy
        if iterator is not None and has_several_workers(strategy):
            batch = next(next(iter(iterator))[-1])
            data_batch = tf.nest.map_structure(
                lambda v: strategy.experimental_local_results(v)[0], batch
            )
            iterator = None
        original(self, iterator, data_batch)

    def reduce_scalars(original, values, strategy, reduction):
        if reduction in ("auto", "mean") and has_several_workers(strategy):
            return tf.nest.map_structure(
                lambda v: strategy.reduce(tf.distribute.ReduceOp.MEAN, v, axis=None), values
            )
        return original(values, strategy, reduction)

    replace_function(trainer.TensorFlowTrainer, "_maybe_symbolic_build", build_from_local_shapes)
    replace_function(trainer, "reduce_per_replica", reduce_scalars)
