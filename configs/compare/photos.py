"""QB-Heat beside MoCo-v2, SimMIM and supervised training on `photos`, with the same encoder, images and steps.

    qbheat compare --config configs/compare/photos.py --workdir runs/compare-photos

About forty minutes on two CPU cores; the figures to expect are in docs/results/methods-photos.md. MoCo-v2 has a batch norm
before its projector, without which so small an encoder's features hardly differ between images, and its blur is scaled to
64 pixels.
Runs again from where it was stopped; the table, `table.md`, is whole after the first seed. A quicker look:
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
