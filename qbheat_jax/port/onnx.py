"""Export a model as ONNX with weights and normalisation inside, by jax2onnx, and check it with ONNX Runtime."""

import contextlib
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax import methods
from qbheat_jax.data.specs.clips import ClipsSpec
from qbheat_jax.errors import UserError, first_line

# Largest accepted error of ONNX Runtime, over the largest output.
TOLERANCE = 1e-4


def serialise(model):
    """Return the bytes of an ONNX file of an api.Model: images uint8 [batch, S, S, 3] -> logits float32 [batch, classes].

    An encoder of clips takes uint8 [batch, 2, T, S, S, 3], T as in training. Without a classifier it returns the feature
    map float32 [batch, S / stride, S / stride, C]. S is the config's image_size; the batch size is free.

    Raises:
      UserError: jax2onnx or onnxruntime is missing, jax2onnx does not convert this encoder, or the program computes
        something else in ONNX Runtime.
    """
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f".onnx needs jax2onnx and onnxruntime ({error}): pip install 'qbheat_jax[onnx]'") from error
    config = model.config
    frames = config.get("data", {}).get("frames", ClipsSpec.frames)
    shape = model.encoder.example_shape(config.image_size, frames)
    variables = jax.tree.map(jnp.asarray, model.variables)

    def call(images):
        return methods.forward(model.objective, variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    try:
        with _any_backend(), _quiet("onnx_ir"):
            program = jax2onnx.to_onnx(
                call,
                [jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)],
                input_names=["images"],
                output_names=["output"],
            )
            data = program.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: it warns about shapes that it then finds by itself
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
        (got,) = session.run(None, {"images": images})
    except Exception as error:  # of many kinds, from three libraries
        raise UserError(
            f"encoder.name={config.encoder.name!r} cannot be written as .onnx: {type(error).__name__}: {first_line(error)}; "
            ".stablehlo takes every encoder"
        ) from error
    expected = np.asarray(jax.jit(call)(images))
    wrong = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not wrong <= TOLERANCE:
        raise UserError(
            f"encoder.name={config.encoder.name!r} cannot be written as .onnx: ONNX Runtime differs by {wrong:.1e} of the "
            f"largest output, more than {TOLERANCE:g}; .stablehlo takes every encoder"
        )
    return data


@contextlib.contextmanager
def _any_backend():
    """Trace the form for any backend where an operation has one for each: ONNX has no primitive that chooses."""

    def default(*arguments, default=None, **forms):
        return (default or forms["cpu"])(*arguments)

    jax.clear_caches()  # parts that are jitted by themselves keep how they were traced
    with mock.patch.object(jax.lax, "platform_dependent", default):
        yield
    jax.clear_caches()


@contextlib.contextmanager
def _quiet(name):
    """Keep a library's warnings out of the log."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
