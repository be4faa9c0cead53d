"""Part `values`: compare one encoder's features and gradients on the device with those of the CPU in float32."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax import pytree
from qbheat_jax.models import registry
from qbheat_jax.tools.gpu_check import build

# Largest accepted errors, relative to the 2-norm. On a CPU, its own variants of the operations and those for accelerators
# differ by at most 2.5e-6, 2.4e-4 and 4.9e-4 in float32; bfloat16 differs from float32 by 0.023, 0.13 and 0.30.
BOUNDS = {
    "float32": {"features": 1e-4, "gradients": 1e-2, "block": 5e-2},
    "bfloat16": {"features": 0.1, "gradients": 0.4, "block": 0.8},
}
# Least norm, as a fraction of the whole gradient's, that a block's error is divided by.
_SMALL = 0.01


def run(job):
    """Compare the device with the CPU in each dtype of `BOUNDS`."""
    batch, pixels = job.sizes.value_batch, job.sizes.value_pixels
    draw = np.random.default_rng(1)
    images = draw.normal(size=(batch, pixels, pixels, 3)).astype(np.float32)
    encoder = registry.encoder(job.name)
    shapes = jax.eval_shape(functools.partial(encoder.init, train=True), jax.random.key(0), images)
    variables = build.variables(shapes)
    cells = pixels // encoder.stride
    toward = draw.normal(size=(batch, cells, cells, encoder.width)).astype(np.float32)
    inputs = (variables["params"], variables.get("batch_stats", {}), images, toward)
    cpu, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]

    def start(dtype, where):
        """Return a future of the values: lower in this thread, compile and run in another."""
        placed = jax.device_put(inputs, where)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            lowered = jax.jit(_gradient(registry.encoder(job.name, dtype=dtype))).lower(*placed)
        # On the CPU only the values matter, so skip LLVM's optimisations to compile faster.
        options = {"xla_backend_optimization_level": 0} if where.platform == "cpu" else {}
        return pool.submit(lambda: jax.device_get(lowered.compile(compiler_options=options)(*placed)))

    job.save(doing="compiling")
    # The programs compile in parallel.
    pool = concurrent.futures.ThreadPoolExecutor()
    true = start("float32", cpu)
    found = {dtype: start(dtype, device) for dtype in BOUNDS}
    for dtype, values in found.items():
        errors = compare(true.result(), values.result())
        job.result["problems"] += wrong(errors, dtype)
        job.save(**{dtype: errors})


def _gradient(encoder):
    """Return a function (params, batch_stats, images, toward) -> (features, gradient of mean(features * toward))."""

    def value(params, batch_stats, images, toward):
        known = {"params": params, "batch_stats": batch_stats}
        (features, _), _ = encoder.apply(known, images, True, mutable=["batch_stats"])
        return (features.astype(jnp.float32) * toward).mean(), features.astype(jnp.float32)

    def both(*inputs):
        (_, features), gradients = jax.value_and_grad(value, has_aux=True)(*inputs)
        return features, gradients

    return both


def compare(true, other):
    """Return the relative errors of features and gradients.

    Args:
      true: (features, gradients), an array and a pytree.
      other: The same, to compare with `true`.

    Returns:
      {"features": error, "gradients": error, "block": largest error of a block's gradient, "block_name": its name}.
    """
    features, gradients = (
        np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(a))
        for a, b in zip(map(_flat, true), map(_flat, other))
    )
    whole = np.linalg.norm(_flat(true[1]))
    blocks = {}
    for name, tree in true[1].items():
        size = max(np.linalg.norm(_flat(tree)), _SMALL * whole)
        blocks[name] = np.linalg.norm(_flat(tree) - _flat(other[1][name])) / size
    worst = max(blocks, key=lambda name: np.nan_to_num(blocks[name], nan=np.inf))
    return {
        "features": float(features), "gradients": float(gradients), "block": float(blocks[worst]), "block_name": worst
    }  # fmt: skip


def _flat(tree):
    return np.concatenate([np.ravel(np.float64(leaf)) for _, leaf in pytree.names(tree)])


def wrong(errors, dtype):
    """Return a message for each error that exceeds its bound or is NaN."""
    return [
        f"{dtype}: {name} differ by {errors[name]:.1e}" + (f" ({errors['block_name']})" if name == "block" else "")
        for name, bound in BOUNDS[dtype].items()
        if not errors[name] <= bound
    ]
