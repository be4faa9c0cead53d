"""HcNet-T, supervised, ImageNet-1k, 300 epochs at 224 pixels: for a TPU pod slice or GPUs.

    qbheat pretrain --config configs/imagenet_hcnet_t.py --workdir gs://BUCKET/hcnet_t --config.data.tfds_dir gs://BUCKET/tfds

The recipe is that of HcNet (arXiv 2408.05901) and its released config of size Tiny, in bfloat16 instead of float16. It is
Swin's, as vHeat's is (configs/imagenet_vheat_t.py), with other rates, no average of the parameters, and a cosine that counts
from the first step.

Expected: not known. No weights are released. We have not run this recipe, nor measured its cost.
"""

from imagenet_vheat_t import get_config as base


def get_config():
    config = base()
    config.batch_size = 1024
    config.encoder.name = "hcnet_t"
    config.encoder.drop_path = 0.2
    config.learning_rate = 5e-4  # for 256 images: 1e-3 for 512, 2e-3 for the batch of 1024
    config.learning_rate_start = 2.5e-7
    config.learning_rate_end = 2.5e-6
    config.cosine_from = "start"
    config.weight_decay = 0.05
    config.ema = 0.0
    return config
