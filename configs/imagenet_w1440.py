"""QB-Heat, Mobile-Former w1440 (14M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice or several GPUs.

    qbheat pretrain --config configs/imagenet_w1440.py --workdir gs://BUCKET/w1440 --config.data.tfds_dir gs://BUCKET/tfds

The recipe of imagenet_w720.py, with an encoder of 11.8M parameters (14M with the paper's classifier). Lengths, baselines
and probes are the same.

Expected: more than w720; the paper's figures for this size are not known to us. This recipe is ours. We have not run it to
the end, nor measured its cost.
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.encoder.name = "mobile_former_w1440"
    return config
