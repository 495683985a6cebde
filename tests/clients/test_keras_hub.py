"""KerasHub's tasks, tiny and with random weights, train on what they take: strings and images."""

import json

import keras
import numpy as np
import pytest

from gradient_accumulator_tf import GradientAccumulateModel
from tests.clients import client
from tests.oracle import EFFECTIVE, MODES, WAYS, difference, in_way

keras_hub = client("keras_hub")
models = keras_hub.models

# Their warnings are not this package's.
pytestmark = pytest.mark.filterwarnings("default")

WORDS = ["good", "bad", "movie", "plot", "the", "a"]
SIZE = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "dropout": 0.0}
RNG = np.random.default_rng(0)


def sentences(examples, words, between):
    lengths = RNG.integers(1, 7, size=examples)
    return [between.join(RNG.choice(words, size=length)) for length in lengths]


def text_classifier():
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *WORDS]
    tokenizer = models.BertTokenizer(vocabulary=vocabulary)
    backbone = models.BertBackbone(
        vocabulary_size=len(vocabulary), intermediate_dim=16, max_sequence_length=8, **SIZE
    )
    return models.BertTextClassifier(
        backbone,
        num_classes=2,
        preprocessor=models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8),
        dropout=0.0,
    )


def causal_lm():
    tokens = ["<|endoftext|>", *"abcd", "ab"]
    tokenizer = models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)}, merges=["a b"]
    )
    backbone = models.GPT2Backbone(
        vocabulary_size=len(tokens), intermediate_dim=16, max_sequence_length=8, **SIZE
    )
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)
    return models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def image_classifier():
    converter = keras_hub.layers.ViTImageConverter(image_size=(8, 8), scale=1 / 255, offset=-0.5)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    backbone = models.ViTBackbone(
        image_shape=(8, 8, 3), patch_size=4, dropout_rate=0.0, attention_dropout=0.0, **sizes
    )
    return models.ViTImageClassifier(
        backbone,
        num_classes=2,
        preprocessor=models.ViTImageClassifierPreprocessor(image_converter=converter),
    )


LABELS = RNG.integers(0, 2, size=2 * EFFECTIVE)
DATA = {
    text_classifier: (sentences(2 * EFFECTIVE, WORDS, " "), LABELS),
    causal_lm: (sentences(2 * EFFECTIVE, list("abcd"), ""), None),
    image_classifier: (RNG.integers(0, 256, (2 * EFFECTIVE, 8, 8, 3)).astype("float32"), LABELS),
}


def make(task):
    keras.utils.set_random_seed(1)
    return task()


def train(way, task, epochs=2):
    # Not Adam: Keras squares an embedding's gradient row by row, before it adds equal rows up.
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    model, optimizer, batch_size = in_way(way, make(task), sgd)
    model.compile(optimizer)
    x, y = DATA[task]
    valid = None if y is None else (x[:4], y[:4])
    fit = {"validation_data": valid, "epochs": epochs, "verbose": 0}
    return model, model.fit(x, y, batch_size=batch_size, **fit).history


@pytest.mark.parametrize(
    "task, ways",
    [(text_classifier, WAYS), (causal_lm, MODES), (image_classifier, ["micro_batch_size"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_task_trains_on_what_its_preprocessor_takes(task, ways):
    plain, expected = train("plain", task)
    x, _ = DATA[task]
    assert difference(plain.get_weights(), make(task).get_weights()) > 1e-2
    for way in ways:
        model, history = train(way, task)
        off = difference(model.get_weights(), plain.get_weights())
        assert off < 2e-6, f"{way}: weights differ by {off}"
        assert list(history) == list(expected)
        for name in (name for name in expected if way in MODES or name != "loss"):
            np.testing.assert_allclose(history[name], expected[name], 1e-5, err_msg=name)
        for predict in (lambda m: m.predict(x, verbose=0), lambda m: m.predict_on_batch(x)):
            np.testing.assert_allclose(predict(model), predict(plain), 1e-4, 1e-5)


def test_a_preprocessor_set_to_none_on_the_wrapper_is_not_used():
    x, y = DATA[image_classifier]
    model, *_ = in_way("micro_batch_size", make(image_classifier))
    model.compile()
    loss, _ = model.evaluate(x, y, verbose=0)
    model.preprocessor = None
    assert model.model.preprocessor is None
    unscaled, _ = model.evaluate(x, y, verbose=0)
    scaled, _ = model.evaluate(x / 255 - 0.5, y, verbose=0)
    assert scaled == pytest.approx(loss, rel=1e-5) and abs(unscaled - loss) > 1e-2


def test_a_tasks_defaults_are_those_of_its_compile(mode):
    model, _, batch_size = in_way(mode, make(text_classifier))
    model.compile()
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert float(optimizer.learning_rate) == pytest.approx(5e-5)
    x, y = DATA[text_classifier]
    logs = model.train_on_batch(x[:batch_size], y[:batch_size], return_dict=True)
    assert list(logs) == ["loss", "sparse_categorical_accuracy"]
    assert list(model.test_on_batch(x[:4], y[:4], return_dict=True)) == list(logs)


def test_a_language_model_generates_and_scores_as_without_a_wrapper():
    models = {way: train(way, causal_lm, 1)[0] for way in ("plain", "micro_batch_size")}
    tokens = np.array([[0, 1, 2, 3, 4, 5, 1, 0]])
    found = {}
    for way, model in models.items():
        model.compile(sampler="greedy")
        scores = model.score(tokens, scoring_mode="loss", target_ids=np.roll(tokens, -1, 1))
        found[way] = model.generate(["ab", "cd"], max_length=8), scores
    (texts, scores), (expected_texts, expected_scores) = found.values()
    assert texts == expected_texts and all(isinstance(text, str) for text in texts)
    np.testing.assert_allclose(scores, expected_scores, 1e-5)


def test_low_rank_adapters_are_trained_alone():
    def adapted(way):
        task = make(text_classifier)
        model, optimizer, batch_size = in_way(way, task, keras.optimizers.SGD(0.5))
        model.backbone.enable_lora(2)
        model.compile(optimizer)
        x, y = DATA[text_classifier]
        before = [keras.ops.convert_to_numpy(v) for v in task.non_trainable_variables]
        model.fit(x, y, batch_size=batch_size, epochs=2, verbose=0)
        assert difference(task.non_trainable_variables, before) == 0
        return task

    plain = adapted("plain")
    assert any("lora" in v.path for v in plain.trainable_variables)
    for way in MODES:
        assert difference(adapted(way).get_weights(), plain.get_weights()) < 2e-6, way


def test_a_preset_is_the_plain_tasks(tmp_path):
    model, _ = train("accum_steps", text_classifier, epochs=1)
    model.save_to_preset(tmp_path / "preset")
    config = json.loads((tmp_path / "preset" / "task.json").read_text())
    assert config["class_name"] == "BertTextClassifier"
    loaded = models.TextClassifier.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is models.BertTextClassifier
    x, _ = DATA[text_classifier]
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), 1e-5)


def test_a_file_holds_the_task_and_its_training(tmp_path):
    model, _ = train("micro_batch_size", text_classifier, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is GradientAccumulateModel
    x, y = DATA[text_classifier]
    for m in (model, loaded):
        m.fit(x, y, batch_size=EFFECTIVE, verbose=0)
    assert difference(loaded.get_weights(), model.get_weights()) < 1e-6
