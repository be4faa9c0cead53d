"""QB-Heat on a folder of your own images (a few thousand or more), on one machine with an accelerator.

    qbheat pretrain --config configs/folder.py --workdir runs/mine --config.data.source folder:PATH

Mobile-Former w720, 256-pixel images: 16 x 16 cells, of which 8 x 8 are visible. It wants an accelerator: two CPU cores take
seven images a second, so 100 epochs of 5,000 images would take 20 hours. `configs/folder_small.py` is for a CPU.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "folder:."
    config.image_size = 256
    config.batch_size = 256
    config.total_epochs = 100
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_w720"
    config.learning_rate = 1.5e-4
    config.warmup_percent = 5.0
    config.clip_norm = 1.0
    config.log_every = 50
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 5.0
    return config
