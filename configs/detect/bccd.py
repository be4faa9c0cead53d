r"""Detection of blood cells (BCCD: 364 photographs, three classes, COCO format) on a frozen encoder: for a CPU or a GPU.

    qbheat detect --config configs/detect/bccd.py --init DIR --workdir runs/bccd \
      --config.data.source coco:IMAGES,TRAIN.json,IMAGES,VAL.json

For queries instead of cells, as in DETR:

    --config.objective detr --config.detr.queries 60 --config.learning_rate 1.6e-2 --config.image_size 192

For MobileNetV2, whose last map has stride 32, add `--config.encoder.stride 16`.

DIR: a run or a ported checkpoint, such as ImageNet's MobileNetV2 (`qbheat port --arch mobilenet_v2`). Compare with the same
encoder untrained: `--init random --config.encoder.name mobilenet_v2`.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "dense"
    config.data = ConfigDict()
    config.data.source = ""  # no path is the same on two machines
    config.data.max_boxes = 40
    config.data.jitter = (0.7, 1.4)
    config.image_size = 256
    config.batch_size = 8
    config.total_steps = 1200
    config.detector = ConfigDict()
    config.detector.stages = True
    config.dense = ConfigDict()
    config.dense.strides = (8, 16, 32)
    config.dense.width = 64
    config.dense.depth = 1
    config.learning_rate = 3.2e-2  # for 256 images, so 1e-3 for the batch of 8
    config.warmup_percent = 5.0
    config.weight_decay = 0.05
    config.clip_norm = 1.0
    config.log_every = 25
    config.eval_every = 300
    config.checkpoint_every = 300
    config.keep = 1
    return config
