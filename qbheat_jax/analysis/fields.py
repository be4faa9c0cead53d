"""Config fields of an analysis."""

from qbheat_jax.config import POSITIVE, SEED, Field, Table, at_least
from qbheat_jax.data.fields import DATA
from qbheat_jax.models.fields import ENCODER

ANALYSE = Table(
    {
        "seed": Field(0, "which images are drawn, and the random encoder to compare with", SEED),
        **{name: DATA[name] for name in ("data.tfds_dir", "data.max_bad_fraction")},
        **ENCODER,
        "data.source": Field("", "images, labels or not; empty: those the encoder was trained on"),
        "encoder.name": Field("", "the encoder of --init random; a directory brings its own"),
        "image_size": Field(0, "pixels a side; 0: as the encoder was trained", at_least(0)),
        "batch_size": Field(64, "images encoded at once", POSITIVE),
        "images": Field(
            500, "images that maps are fitted on, at most; half as many each to choose and to test", at_least(4)
        ),
    }
)
