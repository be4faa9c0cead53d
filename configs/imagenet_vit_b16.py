"""QB-Heat, ViT-B/16, ImageNet-1k, 300 epochs: for a TPU pod slice.

    qbheat pretrain --config configs/imagenet_vit_b16.py --workdir gs://BUCKET/vit_b16 --config.data.tfds_dir gs://BUCKET/tfds

Batch, learning rate, weight decay and warm-up are MAE's (arXiv 2111.06377). Use `--config.total_epochs 100` or `800` for
the other two lengths. With little memory, `--config.mesh.data 1 --config.mesh.fsdp -1` splits the 86M parameters and their
optimizer state over all devices. Probe any run with configs/lin.py, tran1.py, tran4.py, knn.py or finetune.py. (MAE
fine-tunes a ViT-B with a `layer_decay` of 0.65.)

Expected: not known. MAE's published ViT-B reaches 68.0 % by a linear probe and 83.6 % fine-tuned, after 1,600 epochs at 224
pixels; `qbheat port --arch vit_b --head drop` reads its weights. This recipe is ours. We have not run it to the end, nor
measured its cost.

Baselines with the same encoder, images and number of epochs:

    --config.objective mae --config.norm_pix True --config.norm_pix_statistics 0 --config.decoder.depth 8
    --config.objective moco
    --config.objective simmim
    --config.objective supervised --config.supervised.label_smoothing 0.1 --config.encoder.drop_path 0.1
"""

from imagenet_w720 import get_config as base


def get_config():
    config = base()
    config.batch_size = 4096  # so the learning rate is 2.4e-3
    config.encoder.name = "vit_b"
    config.encoder.stride = 16
    config.warmup_epochs = 40.0
    config.clip_norm = 1.0  # one odd batch must not undo a run at so high a rate
    return config
