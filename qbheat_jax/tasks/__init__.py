"""The commands pretrain, finetune, probe, detect and classify, one file each."""
