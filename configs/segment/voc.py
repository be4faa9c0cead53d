"""Linear segmentation of PASCAL VOC 2012 on a frozen encoder: for an accelerator, or hours of a CPU.

    qbheat probe --config configs/segment/voc.py --init runs/mine --workdir runs/mine/voc \
      --config.data.source masks:VOCdevkit/VOC2012

1,464 images train and 1,449 of val are measured; a tenth of train chooses the learning rate. For the nearest cells instead:

    --config.protocol seg-knn --config.standardise False --config.knn.bank 1000000

We have not run it: the images are not ours to pass on, and were not at hand.
"""

from lin import get_config as base


def get_config():
    config = base()
    config.data.source = "masks:VOCdevkit/VOC2012"
    config.image_size = 512
    config.encoder.name = "vit_s"  # of --init random
    config.knn = {"neighbours": (10, 30), "temperatures": (0.02, 0.07)}
    config.cache_gib = 32.0
    return config
