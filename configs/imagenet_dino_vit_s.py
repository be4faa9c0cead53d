"""DINO, ViT-S/16, ImageNet-1k: the recipe of the paper (arXiv 2104.14294) for 8 to 16 GPUs or a TPU pod slice.

    qbheat pretrain --config configs/imagenet_dino_vit_s.py --workdir gs://BUCKET/dino_s --config.data.tfds_dir gs://BUCKET/tfds

Batch, rates, schedules, crops and head are those of the released 800 epochs of ViT-S/16. Position codes are interpolated for
small crops.

Expected: not known. The paper reports 77.0 % by a linear probe and 74.5 % by k-NN, of the teacher and of four layers; here
the student's last layer is probed. We have not run it to the end, nor measured its cost.
"""

from imagenet_vit_b16 import get_config as base


def get_config():
    config = base()
    config.objective = "dino"
    config.image_size = 224
    config.data.crop_scale = (0.25, 1.0)
    config.data.local_crops = 10
    config.data.local_size = 96
    config.data.local_scale = (0.05, 0.25)
    config.batch_size = 1024
    config.total_epochs = 800
    config.encoder.name = "vit_s"
    config.encoder.class_token = True
    config.encoder.position = "learnt"
    config.encoder.grid = 14
    config.encoder.drop_path = 0.1
    config.dino = {
        "gain": True,
        "teacher_temperature": 0.07,
        "warmup_temperature": 0.04,
        "warmup_epochs": 30.0,
        "frozen_epochs": 1.0,
        "momentum": 0.996,
    }
    config.learning_rate = 5e-4  # for 256 images, so 2e-3 for the batch of 1024
    config.learning_rate_end = 2.5e-6  # so 1e-5
    config.warmup_epochs = 10.0
    config.weight_decay = 0.04
    config.weight_decay_end = 0.4
    config.adam_b2 = 0.999
    config.clip_norm = 0.0
    return config
