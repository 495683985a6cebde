"""Random trainings, each written as a script that compares it with the large batch.

The script is what the test runs, so a failure is printed as a script that anyone can run alone. It
sets three figures: how far the accumulated weights are from the large batch's (`difference`), how
far those of the large batch with its examples in another order are (`control`, what rounding alone
does), and how far the large batch moved the weights (`movement`).
"""

import dataclasses

from hypothesis import strategies as st

from tests.oracle import KERAS, WAYS

# The first choice of each list is the simplest, which a failure is shrunk to.

# Code that makes a model of features (3 for each example), with 2 outputs for each example.
_FEATURES = {
    "dense": """
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])""",
    "regularised": """
    inputs = keras.Input((3,))
    x = layers.Dense(4, "tanh", kernel_regularizer="l2", activity_regularizer="l2")(inputs)
    return keras.Model(inputs, layers.Dense(2, bias_regularizer="l2")(x))""",
    "frozen": """
    frozen = layers.Dense(4, "tanh", trainable=False)
    return keras.Sequential([keras.Input((3,)), frozen, layers.Dense(3), layers.Dense(2)])""",
    "dictionary": """
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    shared = layers.Dense(4, "tanh")
    x = layers.Multiply()([shared(inputs["a"]), shared(inputs["b"])])
    return keras.Model(inputs, layers.Dense(2)(x))""",
    "two_outputs": """
    inputs = keras.Input((3,))
    x = layers.Dense(4, "tanh")(inputs)
    return keras.Model(inputs, [layers.Dense(2, name="first")(x), layers.Dense(2)(x)])""",
    "added_mean": """
    class Penalty(layers.Layer):
        def call(self, inputs):
            self.add_loss(0.1 * keras.ops.mean(inputs**2))
            return inputs

    inputs = keras.Input((3,))
    x = Penalty()(layers.Dense(4, "tanh")(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))""",
    "added_sum": """
    class Penalty(layers.Layer):
        def call(self, inputs):
            self.add_loss(0.1 * keras.ops.sum(inputs**2, axis=-1))
            return inputs

    inputs = keras.Input((3,))
    x = Penalty()(layers.Dense(4, "tanh")(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))""",
    "subclassed": """
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = layers.Dense(4, "gelu"), layers.Dense(2)
            self.norm = layers.LayerNormalization()

        def call(self, inputs, training=False):
            return self.head(self.norm(self.hidden(inputs)))

    model = Net()
    model(np.zeros((1, 3)))
    return model""",
    "rank_3": """
    inputs = keras.Input((3,))
    x = layers.Dense(4, "tanh")(layers.Reshape((3, 1))(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))""",
    "batch_norm": """
    inputs = keras.Input((3,))
    x = layers.BatchNormalization()(layers.Dense(4, "tanh", use_bias=False)(inputs))
    x = layers.BatchNormalization(momentum=0.9)(layers.Dense(3, use_bias=False)(x))
    return keras.Model(inputs, layers.Dense(2)(x))""",
    "convolution": """
    inputs = keras.Input((3,))
    x = layers.Conv1D(4, 2, activation="swish", padding="same")(layers.Reshape((3, 1))(inputs))
    x = layers.GlobalAveragePooling1D()(layers.GroupNormalization(2)(x))
    return keras.Model(inputs, layers.Dense(2)(x))""",
}
# The same for 5 tokens for each example, of which the last may be padding (0).
_TOKENS = {
    "embedding": """
    inputs = keras.Input((5,), dtype="int32")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(7, 4)(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))""",
    "recurrent": """
    inputs = keras.Input((5,), dtype="int32")
    x = layers.GRU(3, reset_after=False)(layers.Embedding(7, 4, mask_zero=True)(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))""",
    "attention": """
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))""",
    "masked_tokens": """
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Dense(3, "tanh")(layers.Embedding(7, 4, mask_zero=True)(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))""",
}
_NETWORKS = _FEATURES | _TOKENS

_LOSSES = [
    "keras.losses.MeanSquaredError()",
    "keras.losses.MeanSquaredError(reduction='mean_with_sample_weight')",
    "keras.losses.MeanSquaredError(reduction='sum')",
    "keras.losses.Huber()",
    "keras.losses.MeanAbsoluteError()",
    "keras.losses.BinaryCrossentropy(from_logits=True)",
    "keras.losses.CosineSimilarity()",
    "own_loss",
]
_OPTIMIZERS = [
    "SGD(0.05",
    "SGD(0.05, momentum=0.9, nesterov=True",
    "Adam(0.01",
    "AdamW(0.01, weight_decay=0.1",
    "RMSprop(0.01, centered=True",
    "Adagrad(0.05",
    "Adadelta(1.0",
    "Adamax(0.01",
    "Nadam(0.01",
    "Ftrl(0.05",
    "Lamb(0.01",
    "Adafactor(0.01",
    "SGD(keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5), momentum=0.5",
]
# Those whose update is linear in the gradient. Keras's others square the rows of a sparse gradient
# before it adds up those that are repeated, so that the large batch is no oracle for embeddings.
_LINEAR = [o for o in _OPTIMIZERS if o.startswith("SGD")]
_OPTIMIZER_OPTIONS = [
    "",
    ", clipnorm=0.1",
    ", clipvalue=0.01",
    ", global_clipnorm=0.1",
    ", use_ema=True, ema_momentum=0.9",
    ", use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2",
]
_WEIGHTS = ["none", "sample_weight", "sample_weight_with_zeros", "token_weight"]
_DATA = ["arrays", "tensors", "dataset", "unknown_length", "py_dataset"]
_EXECUTIONS = {
    "graph": "",
    "eager": ", run_eagerly=True",
    "jit": ", jit_compile=True",
    "steps_per_execution": ", steps_per_execution=3",
    "one_replica": "",
    "two_replicas": "",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training; `script` says what each choice is.

    Attributes:
        way: One of `tests.oracle.WAYS`.
        micro: Examples in a micro-batch, on one replica.
        micro_batches: Micro-batches in an effective batch, on one replica.
        examples: Examples in the data.
    """

    way: str
    network: str
    loss: str
    optimizer: str
    option: str
    weights: str
    data: str
    execution: str
    micro: int
    micro_batches: int
    examples: int
    seed: int

    @property
    def replicas(self):
        """Replicas that train; 0 without a strategy."""
        return {"one_replica": 1, "two_replicas": 2}.get(self.execution, 0)


@st.composite
def cases(draw):
    """A strategy of the cases whose result equals the large batch's, as the docs have it."""

    def choose(values):
        return draw(st.sampled_from(list(values)))

    way, execution = choose(WAYS), choose(_EXECUTIONS)
    # The optimizer cannot know what a mask leaves of a micro-batch, nor what is a sum; exact batch
    # norm is one mode's. Keras divides by the number of replicas what `add_loss` adds up.
    excluded = set()
    if way == "optimizer":
        excluded |= {"masked_tokens", "added_sum"}
    if way != "micro_batch_size":
        excluded.add("batch_norm")
    if execution == "two_replicas":
        excluded.add("added_sum")
        if KERAS < (3, 14):
            excluded.add("regularised")  # activity regularisers are such sums there
    network = choose(name for name in _NETWORKS if name not in excluded)
    tokens = network in _TOKENS
    per_token = network == "masked_tokens"
    # Keras takes one weight for each value of the loss, which here is one for each token.
    weights = choose(w for w in _WEIGHTS if w == "none" or per_token == (w == "token_weight"))
    loss = choose(
        name
        for name in _LOSSES
        if way != "optimizer" or weights == "none" or "mean_with_sample_weight" not in name
    )
    micro, micro_batches = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    replicas = 2 if execution == "two_replicas" else 1
    effective = micro * micro_batches * replicas
    # Replicas of unequal shares do not make the large batch's mean in Keras itself.
    whole = way == "optimizer" or replicas == 2
    extra = 0 if whole else draw(st.integers(0, effective - 1))
    return Case(
        way=way,
        network=network,
        loss=loss,
        optimizer=choose(_LINEAR if tokens else _OPTIMIZERS),
        option=choose([o for o in _OPTIMIZER_OPTIONS if not (tokens and "clip" in o)]),
        weights=weights,
        data=choose(_DATA),
        execution=execution,
        micro=micro,
        micro_batches=micro_batches,
        examples=effective * draw(st.integers(1, 2)) + extra,
        seed=draw(st.integers(0, 9)),
    )


def script(case):
    """The source text of a script that runs a case; it also prints the three figures."""
    tokens = case.network in _TOKENS
    shape = "(EXAMPLES, 5, 2)" if case.network == "masked_tokens" else "(EXAMPLES, 2)"
    x = {True: "rng.integers(1, 7, (EXAMPLES, 5))", False: "rng.normal(size=(EXAMPLES, 3))"}[tokens]
    padding = "x[np.arange(5) >= rng.integers(1, 6, (EXAMPLES, 1))] = 0" if tokens else ""
    if case.network == "dictionary":
        x = f'{{"a": {x}, "b": {x}}}'
    y = f"rng.normal(size={shape})"
    if "Crossentropy" in case.loss:
        y = f"(rng.normal(size={shape}) > 0).astype('float64')"
    if case.network == "two_outputs":
        y = f"({y}, {y})"
    weights = {
        "none": "None",
        "sample_weight": "rng.uniform(0.2, 2.0, EXAMPLES)",
        "sample_weight_with_zeros": "rng.integers(0, 3, EXAMPLES).astype('float64')",
        "token_weight": "rng.uniform(0.2, 2.0, (EXAMPLES, 5))",
    }[case.weights]
    losses = f'{{"loss": {case.loss}}}'
    if case.network == "two_outputs":
        losses = f'{{"loss": [{case.loss}, {case.loss}], "loss_weights": [1.0, 0.3]}}'
    exact = ', batch_norm="exact"' if case.network == "batch_norm" else ""
    reduction = ', reduction="sum"' if "'sum'" in case.loss else ""
    replicas = max(case.replicas, 1)
    return f"""\
import contextlib
import keras
import numpy as np
import tensorflow as tf
from keras import layers
from gradient_accumulator_tf import GradientAccumulateModel, GradientAccumulateOptimizer

keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
EXAMPLES, REPLICAS, MICRO, MICRO_BATCHES = {case.examples}, {replicas}, {case.micro}, \
{case.micro_batches}
EFFECTIVE = REPLICAS * MICRO * MICRO_BATCHES
rng = np.random.default_rng({case.seed})
x = {x}
{padding}
y = {y}
sample_weight = {weights}


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.log(1 + (y_true - y_pred) ** 2), axis=-1)


def make_model():
    keras.utils.set_random_seed({case.seed}){_NETWORKS[case.network]}


class Batches(keras.utils.PyDataset):
    def __init__(self, data, size):
        super().__init__()
        self.data, self.size = data, size

    def __len__(self):
        return -(-EXAMPLES // self.size)

    def __getitem__(self, i):
        rows = slice(i * self.size, (i + 1) * self.size)
        # Copies, as TensorFlow writes into views under a MirroredStrategy on CPUs.
        return tf.nest.map_structure(lambda a: a[rows].copy(), self.data)


def arguments_of_fit(way, order, size):
    data = (x, y) if sample_weight is None else (x, y, sample_weight)
    data = tf.nest.map_structure(lambda a: a[order], data)
    # Keras itself counts an update too many at the end of data of unknown length.
    form = "arrays" if way == "large" else {case.data!r}
    if form == "py_dataset":
        return {{"x": Batches(data, size)}}
    if form in ("dataset", "unknown_length"):
        dataset = tf.data.Dataset.from_tensor_slices(data)
        if form == "unknown_length":
            dataset = dataset.filter(lambda *_: True)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        return {{"x": dataset.batch(size).with_options(options)}}
    if form == "tensors":
        data = tf.nest.map_structure(tf.constant, data)
    return dict(zip(("x", "y", "sample_weight"), data)) | {{"batch_size": size}}


def train(way, order):
    strategy = contextlib.nullcontext()
    if {case.replicas} and way != "large":
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{{i}}" for i in range(REPLICAS)],
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        ).scope()
    with strategy:
        model, size = make_model(), EFFECTIVE
        start = model.get_weights()
        optimizer = keras.optimizers.{case.optimizer}{case.option})
        if way == "micro_batch_size":
            model = GradientAccumulateModel(model=model, micro_batch_size=MICRO{exact})
        if way == "accum_steps":
            model = GradientAccumulateModel(model=model, accum_steps=MICRO_BATCHES)
        if way == "optimizer":
            optimizer = GradientAccumulateOptimizer(optimizer, MICRO_BATCHES{reduction})
        if way in ("accum_steps", "optimizer"):
            size = REPLICAS * MICRO
        model.compile(optimizer, **{losses}{_EXECUTIONS[case.execution]})
    fit = arguments_of_fit(way, order, size)
    logs = model.fit(**fit, epochs=2, shuffle=False, verbose=0).history
    return start, model.get_weights(), logs["loss"]


def distance(a, b):
    return max(float(np.max(np.abs(v - w), initial=0.0)) for v, w in zip(a, b, strict=True))


order = np.arange(EXAMPLES)
batches = np.split(order, range(EFFECTIVE, EXAMPLES, EFFECTIVE))
start, large, large_loss = train("large", order)
_, other, _ = train("large", np.concatenate([rng.permutation(b) for b in batches]))
_, accumulated, loss = train({case.way!r}, order)
movement, control, difference = (
    distance(large, start), distance(large, other), distance(large, accumulated)
)
loss_difference = distance(large_loss, loss) if {case.way!r} == "micro_batch_size" else 0.0
print(f"{{difference=:.1e}} {{loss_difference=:.1e}} {{control=:.1e}} {{movement=:.1e}}")
"""
