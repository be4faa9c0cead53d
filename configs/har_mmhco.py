"""MMHCO-HAR on HARDVS 2.0: the released recipe, from the weights of vHeat-S.

    qbheat port --arch vheat_s --from vHeat_small.pth --to ported/vheat_s --head drop
    qbheat pretrain --config configs/har_mmhco.py --init ported/vheat_s --workdir runs/har --config.data.source har:HARDVS
    qbheat classify --init runs/har --data har:HARDVS --split test

`--config.init ""` trains from random weights. For PokerEvent use `--config.data.source har:PokerEvent,1`.

Expected: the paper reports 53.2 % top-1 on HARDVS 2.0 (arXiv 2504.05830). We have not run this. Its program keeps the
checkpoint that is best on the test list; here the last one is measured. What differs besides:

* The learning rate follows a cosine. The program divides it by ten at epoch 25 of 30.
* All parameters train at one rate. The program gives the head 5 times the rate and freezes layer norms, layer scale and the
  frequency embeddings, because its groups of parameters know no other layers.
* The frequency embeddings take the mean features of each clip, with their gradient, as the paper states.
  `--config.encoder.fve_mode noise --config.encoder.routing sampled` does what the program does.

QB-Heat pre-training sees the same quarter of every frame of both modalities, and predicts the mean frame of each:

    --config.objective qbheat --config.image_size 256 --config.encoder.stride 16 --config.encoder.fve_mode static
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "supervised"
    config.data = ConfigDict()
    config.data.source = "har:HARDVS"
    config.image_size = 224
    config.batch_size = 16  # four on each of four GPUs
    config.total_epochs = 30.0
    config.encoder = ConfigDict()
    config.encoder.name = "mmhco_s"
    config.encoder.drop_path = 0.3
    config.optimizer = "sgd"
    config.momentum = 0.9
    config.learning_rate = 1.6e-2  # for 256 clips, so 1e-3 for the batch of 16
    config.weight_decay = 1e-4
    config.clip_norm = 20.0
    config.log_every = 50
    config.eval_every_epochs = 1.0
    config.checkpoint_every_epochs = 1.0
    return config
