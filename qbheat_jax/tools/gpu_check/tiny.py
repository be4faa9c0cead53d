"""Register the encoder of `--tiny`, which compiles in a second."""

from qbheat_jax.models import registry
from qbheat_jax.models.vit import ViT
from qbheat_jax.tools.gpu_check import TINY_ENCODER


def register():
    """Add the encoder to this process's registry."""
    entry = registry.Entry(
        ViT, {"width": 16, "heads": 2, "depth": 1}, {8: {"patch": 8}}, ("class_token", "position", "grid")
    )
    registry.ENCODERS.setdefault(TINY_ENCODER, entry)
