"""The gradient of an effective batch through its own batch norm statistics, in micro-batches.

Batch norm makes each example's output depend on every other example, so micro-batches cannot be
run to the end one by one. They can stage by stage (see `graph_cuts`). Forward, each stage runs
over all micro-batches and adds up the moments that the next stage normalises by. Backward, from the
last stage to the first, each stage is computed again under a tape, micro-batch by micro-batch. The
derivatives by a batch norm's mean and variance add up over the micro-batches, and then reach each
element `a` of its input as

    (mean_bar + 2 variance_bar (a - mean)) / n,

which the derivative that arrives through the normalised value itself is added to.

References:
    - Ioffe and Szegedy, 2015, Batch normalization (the derivatives by mean and variance).
    - Chan, Golub and LeVeque, 1979 (moments of a union of samples).
    - Chen et al., 2016, Training deep nets with sublinear memory cost (recomputation).
"""

import functools

import keras
import tensorflow as tf

from gradient_accumulator_tf import _keras
from gradient_accumulator_tf.batch_norm.moments import pooled_moments
from gradient_accumulator_tf.cycle.gradients import add_to_sums, overwritten_of, zero_sums
from gradient_accumulator_tf.cycle.micro_batches import sum_over_micro_batches
from gradient_accumulator_tf.replicated.replicas import number_of_replicas, sum_over_replicas
from gradient_accumulator_tf.stages.cuts import cut, flat_graph


class ExactBatchNorm:
    """Loss and gradient of a model on an effective batch, as if it ran in one piece.

    Args:
        model: A functional or Sequential model, built. Its `trainable` flags count as they are
            now.

    Raises:
        ValueError: If the model's graph cannot be cut at each trainable batch norm.
    """

    def __init__(self, model):
        self._model = model
        self._graph = flat_graph(model)
        self._stages = cut(self._graph)
        self._training = _Training(name="training", dtype=model.dtype_policy, autocast=False)

    def gradients(
        self, batch, micro_batch_size, variables, denominators, differentiate, finite_only=False
    ):
        """Runs forward and backward over all micro-batches; updates the moving statistics.

        Args:
            batch: The `Batch` of `(x, y, sample_weight)`.
            micro_batch_size: Examples in a micro-batch.
            variables: List of the variables to take the gradients of.
            denominators: Function of `(predict, micro_batch)` that returns a nested structure of
                scalars and None, to be added up over micro-batches and replicas. `predict(tape)`
                returns the model's predictions and has the tape record them.
            differentiate: Function of `(predict, micro_batch, totals)`, where `totals` is that
                sum on an average replica. Returns (persistent tape, targets, their output
                gradients, scalars to add up, anything).
            finite_only: Whether to leave moving statistics alone that would not be finite.

        Returns:
            List with a gradient or None for each variable, the sum of the scalars, both of this
            replica alone, and what the last micro-batch made of "anything".
        """
        *stages, last = self._stages
        state = _State(batch, micro_batch_size)
        for stage in stages:
            self._forward(stage, state)
        totals = self._totals(last, state, denominators)
        gradients, sums, rest = self._head(last, state, variables, totals, differentiate)
        positions = {id(v): i for i, v in enumerate(variables)}
        for stage in reversed(stages):
            trained = [v for v in stage.variables if id(v) in positions]
            for v, gradient in zip(trained, self._backward(stage, state, trained), strict=True):
                i = positions[id(v)]
                if gradient is not None:
                    gradients[i] = gradient if gradients[i] is None else gradients[i] + gradient
        self._update_moving_statistics(state, finite_only)
        return gradients, sums, rest

    def _forward(self, stage, state):
        """Keeps what later stages read, and finds the moments that the next ones apply."""

        def step(micro_batch, *reads):
            draws = [tf.identity(v.value) for v in stage.states]
            tensors, ends = self._run(stage, micro_batch, reads, state.moments, draws)
            for variable, end in zip(stage.states, ends, strict=True):
                variable.assign(end)
            sums = [_sums_of_moments(node, tensors[node.inputs[0]]) for node in stage.measures]
            return ([], sums), [*(tensors[key] for key in stage.keeps), *draws], None

        (_, sums), kept, _ = state.loop(
            step, state.kept_of(stage.reads), part="inputs" if stage.inputs else "none"
        )
        state.kept.update(zip(stage.keeps, kept, strict=False))
        state.draws[stage] = kept[len(stage.keeps) :]
        for node, node_sums in zip(stage.measures, sums, strict=True):
            state.moments[node], state.counts[node] = _moments(node.operation, node_sums)

    def _totals(self, stage, state, denominators):
        def step(micro_batch, *reads):
            def predict(tape):
                del tape
                draws = [tf.identity(v.value) for v in stage.states]
                return self._predict(stage, micro_batch, reads, state.moments, draws)[0]

            return ([], denominators(predict, micro_batch)), [], None

        (_, totals), _, _ = state.loop(step, state.kept_of(stage.reads))
        replicas = number_of_replicas()
        return tf.nest.map_structure(
            lambda t: None if t is None else t / replicas, sum_over_replicas(totals)
        )

    def _head(self, stage, state, variables, totals, differentiate):
        """The last stage and the loss, forward and backward."""
        inputs = _Inputs(stage, state)

        def step(micro_batch, *kept):
            reads, pending = kept[: len(stage.reads)], kept[len(stage.reads) :]
            draws = [tf.identity(v.value) for v in stage.states]

            def predict(tape):
                inputs.watch(tape, reads)
                y_pred, ends = self._predict(stage, micro_batch, reads, state.moments, draws)
                for variable, end in zip(stage.states, ends, strict=True):
                    variable.assign(end)
                return y_pred

            tape, targets, seeds, sums, rest = differentiate(predict, micro_batch, totals)
            gradients, bars, cotangents = inputs.gradients(
                tape, targets, seeds, variables, reads, pending
            )
            return ([(gradients, None)], (bars, sums)), cotangents, rest

        result, cotangents, rest = state.loop(
            step, [*state.kept_of(stage.reads), *inputs.pending], variables
        )
        groups, (bars, sums) = result
        inputs.store(bars, cotangents)
        return groups[0][0], sums, rest

    def _backward(self, stage, state, variables):
        """Gradients of `variables`; hands on the cotangents of what the stage reads."""
        inputs = _Inputs(stage, state)
        kept = [key for key in stage.keeps if key in state.cotangents]
        measured = [node.inputs[0] for node in stage.measures]
        # Taken from where they are kept, so that the operations that made them need not run again.
        known = [key for key in dict.fromkeys(measured) if key in state.kept]
        parts = (stage.reads, stage.states, kept, known, inputs.pending)
        bars_by_node = {node: state.total_bars(node) for node in stage.measures}

        def step(micro_batch, *tensors):
            tensors = iter(tensors)
            reads, draws, cotangents, values, pending = [
                [next(tensors) for _ in part] for part in parts
            ]
            with tf.GradientTape(persistent=True) as tape:
                inputs.watch(tape, reads)
                computed, _ = self._run(stage, micro_batch, reads, state.moments, draws)
            targets = dict(zip(kept, cotangents, strict=True))
            values = dict(zip(known, values, strict=True))
            for node in stage.measures:
                key = node.inputs[0]
                through_moments = _cotangent_through_moments(
                    node,
                    values.get(key, computed[key]),
                    state.moments[node],
                    bars_by_node[node],
                    state.counts[node],
                )
                targets[key] = through_moments + targets[key] if key in targets else through_moments
            gradients, bars, cotangents = inputs.gradients(
                tape,
                [computed[key] for key in targets],
                list(targets.values()),
                variables,
                reads,
                pending,
            )
            return ([(gradients, None)], bars), cotangents, None

        result, cotangents, _ = state.loop(
            step,
            [
                *state.kept_of(stage.reads),
                *state.draws[stage],
                *(state.cotangents.pop(key) for key in kept),
                *state.kept_of(known),
                *inputs.pending,
            ],
            variables,
            part="inputs" if stage.inputs else "none",
        )
        groups, bars = result
        for key in stage.keeps:
            del state.kept[key]
        inputs.store(bars, cotangents)
        return groups[0][0]

    def _predict(self, stage, micro_batch, reads, moments, draws):
        tensors, ends = self._run(stage, micro_batch, reads, moments, draws)
        outputs = [tensors[key] for key in self._graph.outputs]
        return _keras.packed_outputs(self._model, outputs), ends

    def _run(self, stage, micro_batch, reads, moments, draws):
        """Computes a stage, and changes nothing.

        Returns:
            Dict of tensors, and list of the values that the states of random layers end with.
        """
        tensors = dict(zip(stage.reads, reads, strict=True))
        if stage.inputs:
            inputs = _keras.standardized_inputs(self._model, micro_batch[0])
            tensors.update(zip(self._graph.inputs, inputs, strict=True))

        def compute():
            for node in stage.nodes:
                if node.waits:
                    outputs = [_normalized(node.operation, tensors[node.inputs[0]], *moments[node])]
                else:
                    outputs = _call(node, [tensors[key] for key in node.inputs])
                tensors.update(zip(node.outputs, outputs, strict=True))
            return ()

        # What layers would assign stays in the scope, so that a stage can be computed again.
        states = zip(stage.states, draws, strict=True)
        known = set(_operations())
        with keras.StatelessScope(state_mapping=states, collect_losses=True) as scope:
            self._training((), function=compute, training=True)
        self._check_effects(stage, scope, [op for op in _operations() if op not in known])
        return tensors, [scope.get_current_value(v) for v in stage.states]

    def _check_effects(self, stage, scope, operations):
        """Refuses layers that do in training what a second computation would not repeat."""
        layers = ", ".join(node.operation.name for node in stage.nodes if not node.waits)
        drawing = [op.type for op in operations if op.op_def.is_stateful and "Rand" in op.type]
        if drawing:
            raise ValueError(
                'With batch_norm="exact" random layers must draw the same again. Received: '
                f"TensorFlow's {drawing[0]} in one of the layers {layers}. Use keras.random with a "
                "keras.random.SeedGenerator that is an attribute of the layer."
            )
        changed = set(scope.state_mapping) - {id(v) for v in stage.states}
        if changed:
            names = [v.path for v in self._model.variables if id(v) in changed]
            raise ValueError(
                'With batch_norm="exact" no layer but batch norm may change a variable in '
                "training, since it is computed twice. Received: a layer that changes "
                f"{', '.join(names) or 'a variable outside of the model'}. Give random layers a "
                "keras.random.SeedGenerator of their own as an attribute, replace or freeze "
                'others, or pass batch_norm="micro_batch".'
            )
        if scope.losses:
            raise ValueError(
                'With batch_norm="exact" no layer may call `add_loss`. Received: '
                f"{len(scope.losses)} such losses from one of the layers {layers}. "
                'Make it an output with a loss of its own, or pass batch_norm="micro_batch".'
            )

    def _update_moving_statistics(self, state, finite_only):
        for node in self._graph.nodes:
            if not node.waits:
                continue
            layer = node.operation
            moving = (layer.moving_mean, layer.moving_variance)
            for variable, value in zip(moving, state.moments[node], strict=True):
                old = tf.cast(variable.value, value.dtype)
                new = old * layer.momentum + value * (1.0 - layer.momentum)
                # A replica without examples has no mean.
                new = tf.where(tf.equal(state.counts[node], 0), old, new)
                if finite_only:
                    new = tf.where(tf.reduce_all(tf.math.is_finite(new)), new, old)
                variable.assign(tf.cast(new, variable.dtype))


class _State:
    """What is known of an effective batch while it is on its way through the stages.

    Attributes:
        kept: Dict of `Kept` by tensor: values.
        draws: Dict of lists of `Kept` by stage: the states that its random layers started with.
        moments: Dict of (mean, variance) by batch norm.
        counts: Dict of the number of elements per channel by batch norm.
        cotangents: Dict of `Kept` by tensor: the loss's derivatives by it so far.
        bars: Dict of the derivatives by (mean, variance) so far by batch norm.
    """

    def __init__(self, batch, micro_batch_size):
        self._parts = {"all": batch, "inputs": batch.inputs(), "none": batch.counter()}
        self._micro_batch_size = micro_batch_size
        self.kept, self.draws, self.moments, self.counts = {}, {}, {}, {}
        self.cotangents, self.bars = {}, {}

    def kept_of(self, keys):
        return [self.kept[key] for key in keys]

    def loop(self, step, kept, variables=(), part="all"):
        """`sum_over_micro_batches` with `part` of the batch: "all", "inputs" or "none"."""
        # To cut what nobody reads would be a third of a deep net's graph.
        batch = self._parts[part]
        return sum_over_micro_batches(
            step,
            batch,
            self._micro_batch_size,
            zeros=lambda summands: zero_sums(summands, variables),
            add=functools.partial(add_to_sums, overwritten=overwritten_of(variables)),
            kept=kept,
        )

    def total_bars(self, node):
        bars = self.bars.pop(node)
        if node.operation.synchronized:
            bars = sum_over_replicas(bars)
        return bars


class _Inputs:
    """What a stage is differentiated by, besides its variables.

    Attributes:
        pending: List of `Kept`: the cotangents that later stages have left for what is read.
    """

    def __init__(self, stage, state):
        self._stage, self._state = stage, state
        self._keys = [key for key in stage.reads if state.kept[key].rest.dtype.is_floating]
        self._started = [key for key in self._keys if key in state.cotangents]
        self.pending = [state.cotangents[key] for key in self._started]

    def _sources(self, reads):
        by_key = dict(zip(self._stage.reads, reads, strict=True))
        moments = [self._state.moments[node] for node in self._stage.applies]
        return [by_key[key] for key in self._keys], moments

    def watch(self, tape, reads):
        tape.watch(self._sources(reads))

    def gradients(self, tape, targets, seeds, variables, reads, pending):
        """Gradients by the variables, by the moments, and by what is read."""
        tensors, moments = self._sources(reads)
        seeds = [tf.cast(seed, t.dtype) for seed, t in zip(seeds, targets, strict=True)]
        gradients, bars, cotangents = tape.gradient(
            targets, (list(variables), moments, tensors), output_gradients=seeds
        )
        bars = tf.nest.map_structure(_or_zeros, bars, moments)
        bars = tf.nest.map_structure(lambda bar: tf.cast(bar, tf.float64), bars)
        cotangents = [_or_zeros(*pair) for pair in zip(cotangents, tensors, strict=True)]
        earlier = dict(zip(self._started, pending, strict=True))
        cotangents = [
            c + earlier[key] if key in earlier else c
            for key, c in zip(self._keys, cotangents, strict=True)
        ]
        return gradients, bars, cotangents

    def store(self, bars, cotangents):
        self._state.cotangents.update(zip(self._keys, cotangents, strict=True))
        for node, new in zip(self._stage.applies, bars, strict=True):
            old = self._state.bars.get(node)
            self._state.bars[node] = new if old is None else tf.nest.map_structure(tf.add, old, new)


class _Training(keras.layers.Layer):
    """A layer to call others in, which take `training` from the outermost call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.built = True

    def call(self, inputs, function, training=None):
        return function()


def _operations():
    """The operations traced so far; none where they run at once."""
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()


def _call(node, inputs):
    args, kwargs = node.fill_in(dict(zip(node.slots, inputs, strict=True)))
    layer = node.operation
    if isinstance(layer, keras.Layer) and _keras.call_has_training_argument(layer):
        kwargs = {**kwargs, "training": True}  # as Keras overrides it
    return keras.tree.flatten(layer(*args, **kwargs))


def _as_normalized(layer, inputs):
    """A batch norm's input in the dtype that Keras's layer normalises it in."""
    inputs = tf.cast(inputs, layer.compute_dtype)
    return tf.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))


def _normalized(layer, inputs, mean, variance):
    """A batch norm's output with the given statistics."""
    inputs = _as_normalized(layer, inputs)
    outputs = keras.ops.batch_normalization(
        inputs,
        mean,
        variance,
        axis=layer.axis,
        offset=tf.cast(layer.beta, inputs.dtype) if layer.center else None,
        scale=tf.cast(layer.gamma, inputs.dtype) if layer.scale else None,
        epsilon=layer.epsilon,
    )
    return tf.cast(outputs, layer.compute_dtype)


def _other_axes(layer, inputs):
    axis = layer.axis % inputs.shape.rank
    return [i for i in range(inputs.shape.rank) if i != axis]


def _sums_of_moments(node, inputs):
    """A micro-batch's part in the sums of `pooled_moments`, shifted by the moving mean."""
    layer = node.operation
    inputs = _as_normalized(layer, inputs)
    mean, variance = tf.nn.moments(inputs, _other_axes(layer, inputs))
    mean, variance = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
    count = tf.cast(tf.size(inputs), tf.float64) / inputs.shape[layer.axis]
    offset = mean - _shift(layer)
    sums = (count * offset, count * (variance + offset**2))
    empty = tf.equal(count, 0)
    return count, *(tf.where(empty, tf.zeros_like(s), s) for s in sums)


def _shift(layer):
    return tf.cast(_keras.replica_local(layer.moving_mean.value), tf.float64)


def _moments(layer, sums):
    """((mean, variance), count) of an effective batch, in the dtype that it is normalised in."""
    if layer.synchronized:
        sums = sum_over_replicas(sums)
    count, first, second = sums
    dtype = keras.backend.result_type(layer.compute_dtype, "float32")
    moments = pooled_moments(count, first, second, _shift(layer))
    return tuple(tf.cast(moment, dtype) for moment in moments), count


def _cotangent_through_moments(node, inputs, moments, bars, count):
    """The derivative by a batch norm's input that goes through mean and variance."""
    layer = node.operation
    values = _as_normalized(layer, inputs)
    shape = [1] * values.shape.rank
    shape[layer.axis] = -1
    by_mean, by_variance = (tf.reshape(bar / count, shape) for bar in bars)
    offset = values - tf.reshape(moments[0], shape)
    by_mean, by_variance = (tf.cast(bar, values.dtype) for bar in (by_mean, by_variance))
    return tf.cast(by_mean + 2.0 * by_variance * offset, inputs.dtype)


def _or_zeros(gradient, like):
    return tf.zeros_like(like) if gradient is None else tf.convert_to_tensor(gradient)
