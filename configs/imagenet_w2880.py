"""QB-Heat, Mobile-Former w2880 (25M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice.

    qbheat pretrain --config configs/imagenet_w2880.py --workdir gs://BUCKET/w2880 --config.data.tfds_dir gs://BUCKET/tfds

The recipe of imagenet_w720.py, with an encoder of 3.6G multiply-adds per image of 224 pixels. The batch of 4096 keeps a large
slice busy. On fewer devices use `--config.batch_size 1024`; the learning rate is scaled by it. Lengths, baselines and probes
are the same.

Expected: more than w1440; the paper's figures for this size are not known to us. This recipe is ours. We have not run it to
the end, nor measured its cost.
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.batch_size = 4096  # so the learning rate is 2.4e-3
    config.encoder.name = "mobile_former_w2880"
    config.warmup_epochs = 20.0
    config.clip_norm = 1.0  # one odd batch must not undo a run at so high a rate
    return config
