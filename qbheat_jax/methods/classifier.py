"""A ported checkpoint as a method: an encoder and, where it has classes, its head. It is evaluated, never trained."""

from qbheat_jax.config import Field, at_least
from qbheat_jax.methods import base
from qbheat_jax.methods.supervised import Supervised, build_head
from qbheat_jax.ops import images


class Classifier(Supervised):
    """`Supervised` with released weights."""

    NAME = "classifier"
    TASK = base.PORTED
    TITLE = "ported weights"
    STORY = "an encoder with the weights of a ported checkpoint"
    FIELDS = {"head.classes": Field(0, "classes of the classifier; 0: no classifier", at_least(0))}

    @classmethod
    def build(cls, config, encoder, schedule):
        return cls(encoder, build_head(config), images.PIXELS[config.pixels])
