"""Linear segmentation of ADE20K, 150 classes, on a frozen encoder: for an accelerator.

    qbheat probe --config configs/segment/ade20k.py --init runs/mine --workdir runs/mine/ade20k \
      --config.data.source masks:ADEChallengeData2016

20,210 images train and 2,000 of validation are measured; a tenth of train chooses the learning rate. Features of ViT-S/16 at
512 pixels take 35 GB and lie in files below the workdir, if `cache_gib` is smaller; masks take about 16 GB of memory. We have
not run it: the images were not at hand.
"""

from voc import get_config as base


def get_config():
    config = base()
    config.data.source = "masks:ADEChallengeData2016"
    config.total_epochs = 10.0
    return config
