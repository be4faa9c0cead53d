"""QB-Heat, Mobile-Former w2880 (25M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice.

    qbheat pretrain --config configs/imagenet_w2880.py --workdir gs://BUCKET/w2880 --config.data.tfds_dir gs://BUCKET/tfds

As imagenet_w720.py, whose lengths, comparators and probes are this one's too, with 3.6G multiply-adds an image of 224 pixels
and a batch of 4096, so that a large slice has enough to do. On fewer devices `--config.batch_size 1024`, which the learning
rate follows.

Expected: more than of w1440; the paper's figures for this size are not known to us. This recipe is ours; it has not been
run to the end by us, and what it costs has not been measured.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"
    config.image_size = 256
    config.batch_size = 4096
    config.total_epochs = 300
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_w2880"
    config.dtype = "bfloat16"
    config.learning_rate = 1.5e-4  # for 256 images, so 2.4e-3 for the batch of 4096
    config.warmup_epochs = 20.0
    config.clip_norm = 1.0  # one odd batch is not to undo a run at so high a rate
    config.log_every = 100
    config.eval_every_epochs = 10.0
    config.images_every_epochs = 10.0
    config.checkpoint_every_epochs = 5.0
    return config
