"""vHeat-T, supervised, ImageNet-1k, 300 epochs at 224 pixels: for a TPU pod slice or GPUs.

    qbheat pretrain --config configs/imagenet_vheat_t.py --workdir gs://BUCKET/vheat_t --config.data.tfds_dir gs://BUCKET/tfds

The recipe is that of vHeat (arXiv 2405.16555) and its released code, in bfloat16 instead of float16: AdamW, mixup and cutmix,
RandAugment, random erasing, label smoothing, stochastic depth, and an average of the parameters, which is what is evaluated.
The rates grow with the batch: the peak is 2e-3 for 2048 images. `--config.mesh.data 1 --config.mesh.fsdp -1` splits
parameters and optimizer state over all devices.

Expected: 82.2 % top-1 is published for the released weights (paper and README of vHeat). We have not run this recipe, nor
measured its cost. Evaluate a run, or released weights that `qbheat port` has read, on the validation images:

    qbheat classify --init gs://BUCKET/vheat_t --data tfds:imagenet2012 --split validation --tfds-dir gs://BUCKET/tfds

Images are cropped to the central 7/8 of the shorter side and resized by Pillow's bicubic. That is the official evaluation, up
to a shift of less than a pixel of the original.
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.objective = "supervised"
    config.image_size = 224
    config.batch_size = 2048
    config.data.crop_scale = (0.08, 1.0)
    config.encoder.name = "vheat_t"
    config.encoder.drop_path = 0.1
    config.supervised = {
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "rand_augment": 9.0,
        "erasing": 0.25,
    }
    config.learning_rate = 2.5e-4  # for 256 images: 5e-4 for 512, 2e-3 for the batch of 2048
    config.learning_rate_start = 2.5e-7
    config.learning_rate_end = 2.5e-6
    config.warmup_epochs = 20.0
    config.weight_decay = 0.08
    config.adam_b2 = 0.999
    config.clip_norm = 5.0
    config.ema = 0.9999
    return config
