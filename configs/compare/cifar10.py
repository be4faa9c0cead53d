"""QB-Heat beside MoCo-v2, SimMIM, supervised and untrained on CIFAR-10: one encoder, one budget, `lin`, `tran-1` and k-NN.

    qbheat compare --config configs/compare/cifar10.py --workdir runs/compare-cifar10 --config.all.data.source folder:PATH

configs/cifar10.py tells how to make the folder. `--config.all.total_epochs N` sets the budget of all methods. Results after
twenty epochs, and after fewer, are in docs/results/methods-cifar10.md.

All methods have the learning rate, batch, optimizer and schedule of configs/cifar10.py. MoCo-v2's queue, momentum, temperature
and augmentation without blur are those of its authors' CIFAR-10 demo. A batch norm before its projector is added, because the
features of so small an encoder hardly differ between images. SimMIM masks patches of 8 pixels: an image has 4 x 4 of them,
closest to the 6 x 6 of its paper.
"""


def get_config():
    return {
        "seeds": (0, 1),
        "pretrain": "../cifar10.py",
        "all": {"data.eval_split": ""},  # the probes are what is compared
        "methods": {
            "qbheat": {},
            "moco": {
                "objective": "moco",
                "moco.queue": 4096,
                "moco.momentum": 0.99,
                "moco.temperature": 0.1,
                "moco.blur_share": 0.0,
                "moco.standardise": True,
                "data.crop_scale": (0.2, 1.0),
            },
            "simmim": {"objective": "simmim", "simmim.mask_size": 8, "simmim.mask_ratio": 0.6},
            "supervised": {
                "objective": "supervised",
                "supervised.label_smoothing": 0.1,
                "supervised.colour_jitter": 0.4,
            },
        },
        "probes": {"lin": "../cifar10_lin.py", "tran-1": "../cifar10_tran1.py", "knn": "../cifar10_knn.py"},
        "probe": {"refit": False},  # heads are those that were chosen, of nine tenths of the training images
        "baselines": ("random", "pixels"),
    }
