"""QB-Heat, Mobile-Former w720 (5.8M parameters), ImageNet-1k, 300 epochs: for a TPU pod slice or several GPUs.

    qbheat pretrain --config configs/imagenet_w720.py --workdir gs://BUCKET/w720 --config.data.tfds_dir gs://BUCKET/tfds

Use `--config.total_epochs 100` or `800` for the other two lengths. The batch is split over all devices;
`--config.mesh.fsdp N` also splits parameters and optimizer state over N of them.

Expected after 300 epochs: the paper reports 65.6 % top-1 under `tran-1` and a linear probe on par with MoCo-v2 for an
encoder of this size. This recipe is ours; the paper's is not known to us. We have not run it to the end, nor measured its
cost. Probe any run with configs/lin.py, tran1.py, tran4.py, knn.py or finetune.py.

Baselines with the same encoder, images and number of epochs:

    --config.objective moco
    --config.objective simmim
    --config.objective supervised --config.supervised.label_smoothing 0.1 --config.supervised.colour_jitter 0.4

MoCo-v2's queue, momentum, temperature and augmentation are those of its paper by default; so are SimMIM's patches of 32
pixels and mask ratio of 0.6. The optimizer is AdamW for all methods. The baselines encode whole images, four times as many
pixels as QB-Heat.
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
