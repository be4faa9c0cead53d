"""QB-Heat, ViT-B/16, ImageNet-1k, 300 epochs: for a TPU pod slice.

    qbheat pretrain --config configs/imagenet_vit_b16.py --workdir gs://BUCKET/vit_b16 --config.data.tfds_dir gs://BUCKET/tfds

Batch, learning rate, weight decay and warm-up are MAE's (arXiv 2111.06377). `--config.total_epochs 100` or `800` for the
other two lengths. With little memory `--config.mesh.data 1 --config.mesh.fsdp -1` splits the 86M parameters and their
optimizer state over all devices. Probes: configs/lin.py, tran1.py, tran4.py, knn.py and finetune.py, which serve every run
(MAE fine-tunes a ViT-B with a `layer_decay` of 0.65).

Expected: not known. MAE's published ViT-B has 68.0 % by a linear probe and 83.6 % fine-tuned, after 1,600 epochs of 224
pixels; `qbheat port --arch vit_b --head drop` reads its weights. This recipe is ours; it has not been run to the end by us,
and what it costs has not been measured.

The comparators, with the same encoder, images and number of epochs:

    --config.objective mae --config.norm_pix True --config.norm_pix_statistics 0 --config.decoder.depth 8
    --config.objective moco
    --config.objective simmim
    --config.objective supervised --config.supervised.label_smoothing 0.1 --config.encoder.drop_path 0.1
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
    config.encoder.name = "vit_b"
    config.encoder.stride = 16
    config.dtype = "bfloat16"
    config.learning_rate = 1.5e-4  # for 256 images, so 2.4e-3 for the batch of 4096
    config.warmup_epochs = 40.0
    config.clip_norm = 1.0  # one odd batch is not to undo a run at so high a rate
    config.log_every = 100
    config.eval_every_epochs = 10.0
    config.images_every_epochs = 10.0
    config.checkpoint_every_epochs = 5.0
    return config
