"""QB-Heat beside MoCo-v2, SimMIM and supervised training on `photos`, with the same encoder, images and steps.

    qbheat compare --config configs/compare/photos.py --workdir runs/compare-photos

It takes about forty minutes on two CPU cores. Expected results are in docs/results/methods-photos.md. MoCo-v2 has a batch norm
before its projector, because the features of so small an encoder hardly differ between images. Its blur is scaled to 64 pixels.
The same command resumes a stopped comparison. `table.md` has all rows after the first seed. For a quicker look use
`--config.seeds 0 --config.all.total_steps 200`.
"""


def get_config():
    return {
        "seeds": (0, 1),
        "pretrain": "../photos.py",
        "all": {"data.eval_split": "", "total_steps": 800},  # the probes are what is compared
        "methods": {
            "qbheat": {},
            "moco": {
                "objective": "moco",
                "moco.queue": 1024,
                "moco.momentum": 0.99,
                "moco.standardise": True,
                "moco.blur_sigma": (0.1, 0.6),
            },
            "simmim": {"objective": "simmim", "simmim.mask_size": 16, "simmim.error": "target"},
            "supervised": {"objective": "supervised"},
        },
        "probes": {"lin": "../photos_lin.py", "tran-1": "../photos_tran1.py", "knn": "../photos_knn.py"},
        "baselines": ("random", "pixels", "histogram"),
    }
