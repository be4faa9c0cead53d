"""SimCLR on `photos`: the quickstart's encoder, images and steps.

    qbheat pretrain --config configs/photos_simclr.py --workdir runs/photos_simclr

Blur is scaled to 64 pixels, and colours are jittered half as much as in the
paper: a label here is a photograph, which its colours tell.
"""

from photos import get_config as base


def get_config():
    config = base()
    config.objective = "simclr"
    config.simclr = {"temperature": 0.2, "hidden": 512, "width": 128}
    config.views = {"jitter": 0.5, "blur_sigma": (0.1, 0.6)}
    return config
