"""SimCLR, VICReg, LeJEPA, DINO and I-JEPA on `photos`, each by its own config at the quickstart's budget.

    qbheat compare --config configs/compare/photos_objectives.py --workdir runs/compare-objectives

All train `mobile_former_tiny` but I-JEPA, whose encoder is `vit_nano`; "untrained" is `mobile_former_tiny`. The same command
resumes a stopped comparison. `--config.seeds "(0, 1)"` adds a seed.
"""


def get_config():
    names = ("simclr", "vicreg", "lejepa", "dino", "ijepa")
    return {
        "seeds": (0,),
        "pretrain": "../photos.py",
        "all": {"data.eval_split": ""},  # the probes are what is compared
        "methods": {name: {"config": f"../photos_{name}.py"} for name in names},
        "probes": {"lin": "../photos_lin.py", "tran-1": "../photos_tran1.py", "knn": "../photos_knn.py"},
        "baselines": ("random", "pixels", "histogram"),
    }
