"""QB-Heat, Mobile-Former w2880 (25M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice.

    qbheat pretrain --config configs/imagenet_w2880.py --workdir gs://BUCKET/w2880 --config.data.tfds_dir gs://BUCKET/tfds

As imagenet_w720.py, whose lengths, comparators and probes are this one's too, with 3.6G multiply-adds an image of 224 pixels
and a batch of 4096, so that a large slice has enough to do. On fewer devices `--config.batch_size 1024`, which the learning
rate follows.

Expected: more than of w1440; the paper's figures for this size are not known to us. This recipe is ours; it has not been
run to the end by us, and what it costs has not been measured.
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.batch_size = 4096  # so the learning rate is 2.4e-3
    config.encoder.name = "mobile_former_w2880"
    config.warmup_epochs = 20.0
    config.clip_norm = 1.0  # one odd batch must not undo a run at so high a rate
    return config
