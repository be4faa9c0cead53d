"""QB-Heat, ResNet-50, ImageNet-1k, 300 epochs: the encoder of most published comparisons, for a TPU pod slice or GPUs.

    qbheat pretrain --config configs/imagenet_resnet50.py --workdir gs://BUCKET/resnet50 --config.data.tfds_dir gs://BUCKET/tfds

Use `--config.total_epochs 100` or `800` for the other two lengths. Probe any run with configs/lin.py, tran1.py, tran4.py,
knn.py or finetune.py.

Expected: not known. MoCo-v2's published linear probe of a ResNet-50 is 67.5 % after 200 epochs and 71.1 % after 800, by SGD,
at stride 32 and 224 pixels (arXiv 2003.04297); `qbheat port --arch resnet50 --head drop` reads its weights. This recipe is
ours. We have not run it to the end, nor measured its cost.

Baselines with the same encoder, images and number of epochs:

    --config.objective moco
    --config.objective simmim
    --config.objective supervised --config.supervised.label_smoothing 0.1 --config.supervised.colour_jitter 0.4
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.encoder.name = "resnet50"
    config.encoder.stride = 16  # the last stage does not stride: 16 x 16 cells, of which 8 x 8 are visible
    return config
