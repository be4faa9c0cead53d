"""Config fields of the data: where images come from, how they are decoded, which splits are used."""

from qbheat_jax.config import FRACTION, POSITIVE, POSITIVE_FRACTION, Field, at_least

DATA = {
    "data.source": Field("photos", "source of images, such as photos, tfds:NAME, folder:PATH or synthetic"),
    "data.tfds_dir": Field("", "folder of tensorflow-datasets; empty: its own default", resumable=True),
    "data.max_bad_fraction": Field(
        0.01, "stop when more than this share of the images cannot be read", FRACTION, resumable=True
    ),
    "data.workers": Field(0, "decoding threads of each process; 0: one for each core", at_least(0), resumable=True),
    "data.processes": Field(
        0,
        "no effect: tensorflow's threads decode JPEGs without the interpreter; accepted for older configs",
        at_least(0),
        resumable=True,
    ),
    "data.prefetch": Field(2, "batches made ready ahead of the step", at_least(1), resumable=True),
    "data.device_cache": Field(False, "keep the images on the accelerators, decoded once; needs no tensorflow"),
    "data.cache_size": Field(
        0, "longest side of cached images in pixels, longer ones are scaled down; 0: twice image_size", at_least(0)
    ),
    "data.cache_gib": Field(
        8.0, "most memory of a device that a cached split may take, in GiB", POSITIVE, resumable=True
    ),
}
# The fields of the device cache, which a detector's config does not have.
CACHE = ("data.device_cache", "data.cache_size", "data.cache_gib")
SPLIT = {"data.split": Field("train", "the split trained on")}
FEW_SHOT = {
    "data.fraction": Field(
        1.0,
        "few-shot: the share of the labelled images that is used, the same number of each class, drawn by the seed",
        POSITIVE_FRACTION,
    )
}
