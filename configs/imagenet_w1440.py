"""QB-Heat, Mobile-Former w1440 (14M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice or several GPUs.

    qbheat pretrain --config configs/imagenet_w1440.py --workdir gs://BUCKET/w1440 --config.data.tfds_dir gs://BUCKET/tfds

As imagenet_w720.py, whose lengths, comparators and probes are this one's too, with an encoder of 11.8M parameters (14M with
the paper's own classifier).

Expected: more than of w720; the paper's figures for this size are not known to us. This recipe is ours; it has not been run
to the end by us, and what it costs has not been measured.
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.encoder.name = "mobile_former_w1440"
    return config
