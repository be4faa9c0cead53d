"""QB-Heat's choices one by one on `photos`: propagator, directions, placements, decoder, targets, and cells of the loss.

    qbheat compare --config configs/compare/ablations.py --workdir runs/ablations

`qbheat` is configs/photos.py unchanged: `offset`, untied directions, four corners and the centre, one decoder block, pixels
normalised within each patch and their statistics, histograms of gradients, loss on masked cells. Every other method differs
from it in one choice, which its name gives. `cosine` replaces A and B by heat conduction in the visible block.
"""


def get_config():
    return {
        "seeds": (0, 1),
        "pretrain": "../photos.py",
        "all": {"data.eval_split": ""},  # the probes are what is compared
        "methods": {
            "qbheat": {},
            "power": {"heat.propagator": "power"},
            "exp": {"heat.propagator": "exp"},
            "spectral": {"heat.propagator": "spectral"},
            "cosine": {"heat.propagator": "cosine"},
            "tied": {"heat.directions": "tied"},
            "corners": {"quarter.placements": "corners"},
            "center": {"quarter.placements": "center"},
            "all9": {"quarter.placements": "all9"},
            "depth0": {"decoder.depth": 0},
            "depth2": {"decoder.depth": 2},
            "depth4": {"decoder.depth": 4},
            "no-norm-pix": {"norm_pix": False},
            "loss-on-all": {"loss_on": "all"},
            "no-hog": {"hog": 0.0},
        },
        "probes": {"lin": "../photos_lin.py", "tran-1": "../photos_tran1.py"},
        "baselines": ("random",),
    }
