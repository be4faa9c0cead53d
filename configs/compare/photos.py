"""QB-Heat beside MoCo-v2, SimMIM and supervised training on `photos`, with the same encoder, images and steps.

    qbheat compare --config configs/compare/photos.py --workdir runs/compare-photos

Runs again from where it was stopped; the table, `table.md`, is whole after the first seed. A quicker look:
`--config.seeds 0 --config.all.total_steps 200`.
"""


def get_config():
    return {
        "seeds": (0, 1),
        "pretrain": "../photos.py",
        "all": {"data.eval_split": ""},  # the probes are what is compared
        "methods": {
            "qbheat": {},
            "moco": {"objective": "moco", "moco.queue": 1024, "moco.momentum": 0.99},
            "simmim": {"objective": "simmim", "simmim.mask_size": 16, "simmim.error": "target"},
            "supervised": {"objective": "supervised"},
        },
        "probes": {"lin": "../photos_lin.py", "tran-1": "../photos_tran1.py", "knn": "../photos_knn.py"},
        "baselines": ("random", "pixels", "histogram"),
    }
