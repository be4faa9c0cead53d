"""QB-Heat on CIFAR-10: 32-pixel images, an encoder of stride 4, so 8 x 8 cells, of which 4 x 4 are visible.

    qbheat pretrain --config configs/cifar10.py --workdir runs/cifar10 --config.data.source folder:PATH

PATH has the files {train,test}/CLASS/*.png. These lines make it from the data set's release (cifar-10-python.tar.gz, unpacked),
pixel for pixel:

    import pathlib, pickle
    from PIL import Image

    def read(name):
        return pickle.load(open(f"cifar-10-batches-py/{name}", "rb"), encoding="latin1")

    names = read("batches.meta")["label_names"]
    for split, parts in {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}.items():
        for part in map(read, parts):
            for pixels, label, name in zip(part["data"], part["labels"], part["filenames"]):
                path = pathlib.Path("cifar10", split, names[label], name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(path)

`--config.data.source tfds:cifar10` works too, if tensorflow-datasets has prepared it. The images are decoded once and kept on
the accelerator (150 MB). A folder needs no tensorflow.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "folder:cifar10"
    config.data.device_cache = True
    config.data.crop_scale = (0.5, 1.0)
    config.image_size = 32
    config.batch_size = 64
    config.total_epochs = 20
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"
    config.encoder.stride = 4
    config.decoder = ConfigDict()
    config.decoder.width = 96
    config.decoder.depth = 1
    config.decoder.heads = 4
    config.norm_pix = True
    config.norm_pix_statistics = 1.0
    config.hog = 4.0
    config.learning_rate = 5.6e-3  # for 256 images, so 1.4e-3 for the batch of 64
    config.warmup_percent = 5.0
    config.clip_norm = 1.0
    config.log_every = 50
    config.checkpoint_every_epochs = 1.0
    config.keep = 2
    return config
