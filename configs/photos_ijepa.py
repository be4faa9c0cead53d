"""I-JEPA on `photos`: a small ViT with patches of 8 pixels, the quickstart's images and steps.

    qbheat pretrain --config configs/photos_ijepa.py --workdir runs/photos_ijepa

The encoder sees 26 of the 64 cells of an image. Momentum and predictor are those of a short run of a small encoder.
"""

from photos import get_config as base


def get_config():
    config = base()
    config.objective = "ijepa"
    config.encoder.name = "vit_nano"
    config.decoder = {"width": 64, "depth": 2, "heads": 2}
    config.ijepa = {"momentum": 0.99}
    return config
