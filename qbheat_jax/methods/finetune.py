"""Fine-tuning: supervised classification that starts from a pre-trained encoder."""

from qbheat_jax.config import BELOW_ONE, Field, at_least
from qbheat_jax.methods import base
from qbheat_jax.methods.common.mixing import CUTMIX, MIXUP, Mixing
from qbheat_jax.methods.supervised import ERASING, RAND_AUGMENT, Supervised, augmentations
from qbheat_jax.models import registry
from qbheat_jax.models.ghost_batch_norm import grouped
from qbheat_jax.ops import images as images_lib


class Finetune(Supervised):
    """`Supervised` with a dropout before the last layer, and fields of its own."""

    NAME = "finetune"
    TASK = base.FINETUNE
    TITLE = "fine-tuned classifier"
    STORY = "encoder and linear classifier trained end to end"
    FIELDS = {
        "head.classes": Field(0, "set from the data", at_least(0)),
        "head.dropout": Field(0.0, "dropout before the last layer", BELOW_ONE),
        "mixup": MIXUP,
        "cutmix": CUTMIX,
        "label_smoothing": Field(0.1, "share of the target spread over all classes", BELOW_ONE),
        "rand_augment": RAND_AUGMENT,
        "erasing": ERASING,
    }

    @classmethod
    def build(cls, config, encoder, schedule):
        head = registry.head(config.encoder.name, config.head.classes, config.head.dropout, config.dtype)
        pixels = images_lib.PIXELS[config.pixels]
        return cls(
            encoder, grouped(head, config.bn_groups), pixels, config.label_smoothing,
            mixing=Mixing(config.mixup, config.cutmix), **augmentations(config, encoder),
        )  # fmt: skip
