r"""Detection on COCO, w720 (5.8M parameters) frozen: for a TPU pod slice or several GPUs.

    qbheat detect --config configs/detect/coco_w720.py --init DIR --workdir DIR/detect \
      --config.data.source coco:TRAIN_DIR,TRAIN.json,VAL_DIR,VAL.json

TRAIN_DIR, TRAIN.json: train2017 and annotations/instances_train2017.json of COCO. DIR: a run of configs/imagenet_w720.py, or
of MoCo-v2 or supervised training with the same encoder, as a baseline. The paper's protocol is a DETR-style decoder on a frozen
backbone. It reports an AP 7.9 points above MoCo-v2 and 4.5 above supervised pre-training. The decoder and its recipe are ours;
the paper's are not known to us. We have not run this config, nor measured its cost. `--config.objective dense` chooses a dense
detector; `--config.tune True` trains the encoder too.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "detr"
    config.data = ConfigDict()
    config.data.source = ""  # no path is the same on two machines
    config.data.max_boxes = 100
    config.data.jitter = (0.5, 1.6)
    config.image_size = 640
    config.batch_size = 128
    config.total_epochs = 50.0
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_w720"  # of --init random
    config.dtype = "bfloat16"
    config.detr = ConfigDict()
    config.detr.size = "base"
    config.detr.queries = 100
    config.detr.anchors = True
    config.learning_rate = 4e-4  # for 256 images, so 2e-4 for the batch of 128
    config.warmup_percent = 1.0
    config.weight_decay = 1e-4
    config.clip_norm = 0.1
    config.log_every = 100
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 1.0
    return config
