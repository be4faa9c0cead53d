"""Detection of handwritten digits on photographs (`scenes`) on a frozen encoder: for a CPU.

    qbheat detect --config configs/detect/scenes.py --init runs/photos --workdir runs/photos/detect
    qbheat detect --config configs/detect/scenes.py --init random --workdir runs/detect_random

For queries instead of cells, as in DETR:

    --config.objective detr --config.detr.queries 32 --config.learning_rate 1.6e-2

`--init random` has the quickstart's encoder. Images are not mirrored, because digits would change.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "dense"
    config.data = ConfigDict()
    config.data.source = "scenes"
    config.data.max_boxes = 8
    config.data.flip = False
    config.image_size = 128
    config.batch_size = 16
    config.total_steps = 4000
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.detector = ConfigDict()
    config.detector.stages = True
    config.detector.count = 50
    config.dense = ConfigDict()
    config.dense.strides = (8, 16, 32)
    config.dense.width = 64
    config.dense.depth = 2
    config.learning_rate = 6.4e-2  # for 256 images, so 4e-3 for the batch of 16
    config.warmup_percent = 5.0
    config.weight_decay = 0.05
    config.clip_norm = 1.0
    config.log_every = 25
    config.eval_every = 500
    config.checkpoint_every = 500
    config.keep = 1
    return config
