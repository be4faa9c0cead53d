"""QB-Heat, Mobile-Former w720 (5.8M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice or several GPUs.

    qbheat pretrain --config configs/imagenet_w720.py --workdir gs://BUCKET/w720 --config.data.tfds_dir gs://BUCKET/tfds

`--config.total_epochs 100` or `800` for the other two lengths. All devices split the batch; `--config.mesh.fsdp N` splits
parameters and optimizer state over N of them too.

Expected after 300 epochs: the paper reports 65.6 % top-1 under `tran-1` and a linear probe on par with MoCo-v2 for an
encoder of this size. This recipe is ours (the paper's is not known to us); it has not been run to the end by us, and what
it costs has not been measured. Probes: configs/lin.py, tran1.py, tran4.py, knn.py and finetune.py, which serve every run.

The comparators, with the same encoder, images and number of epochs:

    --config.objective moco
    --config.objective simmim
    --config.objective supervised --config.supervised.label_smoothing 0.1 --config.supervised.colour_jitter 0.4

MoCo-v2's queue, momentum, temperature and augmentation are its paper's by default, and so are SimMIM's patches of 32 pixels
and share of 0.6; the optimizer is AdamW here, as for all. All three encode whole images, four times the pixels that QB-Heat
does.
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
    config.encoder.name = "mobile_former_w720"
    config.dtype = "bfloat16"
    config.learning_rate = 1.5e-4  # for 256 images, so 6e-4 for the batch of 1024
    config.warmup_epochs = 15.0
    config.log_every = 100
    config.eval_every_epochs = 10.0
    config.images_every_epochs = 10.0
    config.checkpoint_every_epochs = 5.0
    return config
