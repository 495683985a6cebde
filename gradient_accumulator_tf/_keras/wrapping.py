"""Private questions of Keras and TensorFlow that a model wrapper answers for the model in it."""

from gradient_accumulator_tf._keras.graphs import has_graph


class AnswersForModel:
    """Mixin for a `keras.Model` around another one, its attribute `model`, or None if alone.

    Saved models and weights of the wrapper shall be those of the model in it. Keras and TensorFlow
    ask for what they need by private names, and the wrapper overrides these. Such an override can
    go when nothing asks for its name any more; tests/test_model_saving.py and
    tests/test_model_as_keras.py save in all formats.
    """

    @property
    def _build_shapes_dict(self):
        # TFLite reads it from a model that is no graph of layers. Keras writes it when it builds a
        # model, and the wrapper itself may never be built.
        model = vars(self).get("model")
        if model is None:
            return vars(self).get("_build_shapes_dict")
        if has_graph(model):
            return {"input_shape": model.input_shape}
        return model._build_shapes_dict

    @_build_shapes_dict.setter
    def _build_shapes_dict(self, value):
        vars(self)["_build_shapes_dict"] = value

    @property
    def _default_save_signature(self):
        # `tf.saved_model.save` and TFLite take the signature to serve from it. Keras makes it from
        # a functional model's inputs, which the wrapper lacks.
        return (super() if self.model is None else self.model)._default_save_signature

    def _obj_type(self):
        # Files of weights are laid out by it.
        return super()._obj_type() if self.model is None else self.model._obj_type()
