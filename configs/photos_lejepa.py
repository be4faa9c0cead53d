"""LeJEPA on `photos`: two views of 64 pixels and four crops of 32, with the quickstart's encoder, images and steps.

    qbheat pretrain --config configs/photos_lejepa.py --workdir runs/photos_lejepa

Blur is scaled to 64 pixels, and colours are jittered half as much as in the authors' example.
"""

from photos import get_config as base


def get_config():
    config = base()
    config.objective = "lejepa"
    config.data.local_crops = 4
    config.data.local_size = 32
    config.data.local_scale = (0.1, 0.5)
    config.lejepa = {"hidden": 512, "width": 32, "slices": 256}
    config.views = {"jitter": 0.5, "blur_sigma": (0.1, 0.6)}
    return config
