"""Linear segmentation on a frozen encoder: digits on photographs (`scenes`), or any images with masks.

    qbheat probe --config configs/segment/lin.py --init runs/photos random pixels --workdir runs/photos/segment
    qbheat report --workdir runs/photos/segment/seg-lin-run

For other images:

    --config.data.source masks:PATH --config.image_size 512

A classifier of every cell is trained, six learning rates at once, and held-out images choose the best. Its scores are
scaled up to the masks. `--init random` has the quickstart's encoder. An encoder with cells of 16 pixels sees more at
`--config.image_size 256`.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "seg-lin"
    config.data = ConfigDict()
    config.data.source = "scenes"
    config.image_size = 128
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.batch_size = 32
    config.total_epochs = 20.0
    config.optimizer = "adamw"
    config.learning_rates = tuple(0.008 * 2.0**k for k in range(6))
    config.weight_decays = (1e-4,)
    return config
