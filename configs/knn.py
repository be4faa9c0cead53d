"""Weighted k-nearest-neighbour probe of any run. Nothing is trained, so it is the fastest probe.

    qbheat probe --config configs/knn.py --init runs/mine --workdir runs/mine/knn

Neighbours by cosine similarity of pooled features vote with weight exp(similarity / temperature) (Wu et al., arXiv 1805.01978).
Their number and the temperature are chosen on held-out images.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "knn"
    config.batch_size = 256
    config.standardise = False  # as is usual; True compares features that are centred and scaled
    config.knn = ConfigDict()
    config.knn.neighbours = (5, 10, 20, 50, 100, 200)
    config.knn.temperatures = (0.02, 0.07, 0.2)
    return config
