"""Import tensorflow without its log lines and without GPUs. `data/` imports tensorflow only from here."""

import os

# Set before the import, because tensorflow prints to stderr on import. stderr is for the log and the progress bar.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# oneDNN is not needed here, and tensorflow would announce it on stderr.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf  # noqa: E402

try:
    # tensorflow would reserve all GPU memory. It only reads files and pixels here.
    tf.config.set_visible_devices([], "GPU")
except RuntimeError:
    # The importing program has used tensorflow already, and chosen its devices.
    pass

__all__ = ["tf", "untuned"]


def untuned(dataset):
    """Return the tf.data.Dataset without autotuning, so that it keeps the given numbers of threads.

    Deleting an autotuned iterator can take a minute, because it waits for the tuning thread, which sleeps.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
