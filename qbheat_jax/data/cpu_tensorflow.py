"""tensorflow, kept off the accelerator and quiet: the one place that the data rooms import it from."""

import os

# Before the import: tensorflow greets on stderr otherwise, which is for the log and the progress bar.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Not used by what is done with it here, and announced on stderr otherwise.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf  # noqa: E402

try:
    # It would take all of the accelerator's memory, and only handles files and pixels here.
    tf.config.set_visible_devices([], "GPU")
except RuntimeError:
    # Whoever imported this already uses tensorflow for something of their own, and has chosen its devices.
    pass

__all__ = ["tf", "untuned"]


def untuned(dataset):
    """The dataset without tensorflow's tuning of it: every number of threads is what it was given.

    An iterator that is tuned takes up to a minute to go, since it waits for the thread that tunes it, which sleeps.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
