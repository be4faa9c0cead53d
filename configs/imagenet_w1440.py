"""QB-Heat, Mobile-Former w1440 (14M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice or several GPUs.

    qbheat pretrain --config configs/imagenet_w1440.py --workdir gs://BUCKET/w1440 --config.data.tfds_dir gs://BUCKET/tfds

As imagenet_w720.py, whose lengths, comparators and probes are this one's too, with an encoder of 11.8M parameters (14M with
the paper's own classifier).

Expected: more than of w720; the paper's figures for this size are not known to us. This recipe is ours; it has not been run
to the end by us, and what it costs has not been measured.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"
    config.image_size = 256
    config.batch_size = 1024
    config.total_epochs = 300
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_w1440"
    config.dtype = "bfloat16"
    config.learning_rate = 1.5e-4  # for 256 images, so 6e-4 for the batch of 1024
    config.warmup_epochs = 15.0
    config.log_every = 100
    config.eval_every_epochs = 10.0
    config.images_every_epochs = 10.0
    config.checkpoint_every_epochs = 5.0
    return config
