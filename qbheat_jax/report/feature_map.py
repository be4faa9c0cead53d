"""A t-SNE picture of an encoder's features on labelled images, coloured by class."""

import numpy as np

from qbheat_jax import data
from qbheat_jax.errors import UserError
from qbheat_jax.probe import knn, online
from qbheat_jax.report import charts

# Images of the picture, and images encoded at once.
IMAGES, _BATCH = 500, 50
# Classes with a colour of their own; those with the most images get one.
CLASSES = 20


def draw(config, model):
    """Return the picture of a run, or None where its images have no labels.

    Args:
      config: The run's.
      model: `api.Model`.

    Returns:
      {"svg", "n": images, "split", "classes": number of classes in it}.

    Raises:
      UserError: scikit-learn is missing, or the images cannot be read.
    """
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    split = next((name for name in ("test", "val", "train") if name in source.splits), next(iter(source.splits)))
    if source.classes(split) is None:
        return None
    features, labels = _encoded(online.sample(source, split, IMAGES, config.seed), model)
    names, labels = source.classes(split), labels.astype(np.int64)
    if len(labels) < 4 or len(np.unique(labels)) < 2:
        return None
    places = embed(features, config.seed)
    common = np.argsort(-np.bincount(labels), kind="stable")[:CLASSES]
    groups = [(str(names[c]).replace("_", " "), places[labels == c]) for c in sorted(common) if (labels == c).any()]
    rest = places[~np.isin(labels, common)]
    return {
        "svg": charts.feature_map(groups, rest),
        "n": len(labels),
        "split": split,
        "classes": len(np.unique(labels)),
    }


def embed(features, seed):
    """Return t-SNE's places float32 [N, 2] of features [N, C] by their direction. A seed gives one picture."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError(f"it needs scikit-learn ({error}): pip install 'qbheat_jax[report]'") from error
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(knn.unit(features))


def _encoded(sample, model):
    """Return (features float32 [N, C], labels int32 [N]) of the labelled images of a sample."""
    spec = data.ImageSpec(model.config.image_size)
    batches, parts = data.eval_batches(sample, spec, split=online.SPLIT, batch_size=_BATCH), []
    try:
        for batch in batches:
            kept = batch["mask"] & (batch["label"] >= 0)
            parts.append((np.asarray(model.features(batch["image"])).mean((1, 2))[kept], batch["label"][kept]))
    finally:
        batches.close()
    features, labels = (np.concatenate(column) for column in zip(*parts))
    return features, labels
