"""QB-Heat, vHeat-T, ImageNet-1k, 300 epochs: for a TPU pod slice or GPUs.

    qbheat pretrain --config configs/imagenet_vheat_t_qbheat.py --workdir gs://BUCKET/vheat_t_qbheat --config.data.tfds_dir gs://BUCKET/tfds

Use `--config.total_epochs 100` or `800` for the other two lengths. Probe any run with configs/lin.py, tran1.py, tran4.py,
knn.py or finetune.py.

Expected: not known; vHeat is published with supervised training alone (configs/imagenet_vheat_t.py). This recipe is ours. We
have not run it to the end, nor measured its cost.

Baselines with the same encoder, images and number of epochs:

    --config.objective moco
    --config.objective simmim
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.encoder.name = "vheat_t"
    config.encoder.stride = 16  # the last stage does not stride: 16 x 16 cells, of which 8 x 8 are visible
    config.clip_norm = 5.0  # as in vHeat's own training
    return config
