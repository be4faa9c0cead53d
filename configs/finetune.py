"""Fine-tuning of any run or ported checkpoint end to end, on the images it was trained on or on others.

    qbheat finetune --config configs/finetune.py --init runs/mine --workdir runs/mine/finetune

The fine-tuning recipe of masked image modelling (BEiT, arXiv 2106.08254; MAE, arXiv 2111.06377): AdamW, layer-wise
decay of the learning rate, mixup, cutmix, label smoothing, drop path, EMA of the parameters. With few images or few
epochs less regularisation is better: `--config.mixup 0 --config.cutmix 0`.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256
    config.total_epochs = 100.0
    config.learning_rate = 5e-4  # for 256 images
    config.warmup_epochs = 5.0
    config.weight_decay = 0.05
    config.layer_decay = 0.75
    config.mixup = 0.8
    config.cutmix = 1.0
    config.label_smoothing = 0.1
    config.encoder = ConfigDict()
    config.encoder.drop_path = 0.1
    config.ema = 0.9999
    config.dtype = "bfloat16"
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 5.0
    return config
