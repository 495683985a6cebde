"""A model's twin: the same layers and attributes, with the training methods of another model."""

import types

import keras

from gradient_accumulator_tf import _keras


class _Unannounced:
    """Base that comes first, so that the `__init_subclass__` of a user's class does not run.

    It may register subclasses or check them, and a twin's class is none that a user wrote.
    """

    def __init_subclass__(cls):
        """Does nothing."""


def make_twin(model, trainer):
    """The model's twin: an object of its class whose training methods end in `trainer`'s.

    The `fit` of the model's class runs, and its `super().fit` is `trainer.fit`, as if the class had
    been derived from `trainer`'s class in place of `keras.Model`. Attributes that `compile` and
    `fit` set (`optimizer`, `stop_training`) are those of `trainer`. All others are shared by the
    model and its twin.

    Args:
        model: A `keras.Model` of any class.
        trainer: Another model. Its class is not in the bases of the model's class.

    Returns:
        An object whose `__class__` is the model's.
    """
    cls = type(model)
    end = type("Trainer", (keras.Model,), _ends_in(trainer))

    def fill(namespace):
        namespace["__module__"], namespace["__doc__"] = cls.__module__, cls.__doc__
        # Files and configs name the model's class, and its `from_config` returns an object of it.
        namespace["__class__"] = property(lambda self: cls)
        namespace["__new__"] = lambda _, *args, **kwargs: cls(*args, **kwargs)
        for name in _keras.TRAINER_ATTRIBUTES:
            namespace[name] = _attribute_of(trainer, name)

    # In Python's method resolution order `end` comes right before `keras.Model`.
    bases = (_Unannounced, end) if cls is keras.Model else (_Unannounced, cls, end)
    twin = object.__new__(types.new_class(cls.__name__, bases, exec_body=fill))
    object.__setattr__(twin, "__dict__", vars(model))
    return twin


def _ends_in(trainer):
    """Dict of all training methods of `trainer`'s class, with `trainer` as their `self`.

    The methods are looked up in the class, because `trainer` itself may have the twin's methods as
    attributes.
    """

    def method(name):
        def call(self, *args, **kwargs):
            return getattr(type(trainer), name)(trainer, *args, **kwargs)

        return call

    return {name: method(name) for name in _keras.trainer_methods()}


def _attribute_of(trainer, name):
    return property(
        lambda self: getattr(trainer, name),
        lambda self, value: setattr(trainer, name, value),
        lambda self: delattr(trainer, name),
    )
