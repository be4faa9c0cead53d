r"""Detection on COCO, w2880 (25M parameters) frozen: for a TPU pod slice or several GPUs.

    qbheat detect --config configs/detect/coco_w2880.py --init DIR --workdir DIR/detect \
      --config.data.source coco:TRAIN_DIR,TRAIN.json,VAL_DIR,VAL.json

TRAIN_DIR, TRAIN.json: train2017 and annotations/instances_train2017.json of COCO. DIR: a run of configs/imagenet_w2880.py, or
of MoCo-v2 or supervised training with the same encoder, as a baseline. The paper's protocol is a DETR-style decoder on a frozen
backbone. It reports an AP 7.9 points above MoCo-v2 and 4.5 above supervised pre-training. The decoder and its recipe are ours;
the paper's are not known to us. We have not run this config, nor measured its cost. `--config.objective dense` chooses a dense
detector; `--config.tune True` trains the encoder too.
"""

from coco_w720 import get_config as base


def get_config():
    config = base()
    config.encoder.name = "mobile_former_w2880"  # of --init random
    return config
