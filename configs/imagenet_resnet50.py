"""QB-Heat, ResNet-50, ImageNet-1k, 300 epochs: the encoder of most published comparisons, for a TPU pod slice or GPUs.

    qbheat pretrain --config configs/imagenet_resnet50.py --workdir gs://BUCKET/resnet50 --config.data.tfds_dir gs://BUCKET/tfds

`--config.total_epochs 100` or `800` for the other two lengths. Probes: configs/lin.py, tran1.py, tran4.py, knn.py and
finetune.py, which serve every run.

Expected: not known. MoCo-v2's published linear probe of a ResNet-50 is 67.5 % after 200 epochs and 71.1 % after 800, by SGD,
at stride 32 and 224 pixels (arXiv 2003.04297); `qbheat port --arch resnet50 --head drop` reads its weights. This recipe is
ours; it has not been run to the end by us, and what it costs has not been measured.

The comparators, with the same encoder, images and number of epochs:

    --config.objective moco
    --config.objective simmim
    --config.objective supervised --config.supervised.label_smoothing 0.1 --config.supervised.colour_jitter 0.4
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
    config.encoder.name = "resnet50"
    config.encoder.stride = 16  # the last stage does not stride: 16 x 16 cells, of which 8 x 8 are visible
    config.dtype = "bfloat16"
    config.learning_rate = 1.5e-4  # for 256 images, so 6e-4 for the batch of 1024
    config.warmup_epochs = 15.0
    config.log_every = 100
    config.eval_every_epochs = 10.0
    config.images_every_epochs = 10.0
    config.checkpoint_every_epochs = 5.0
    return config
