"""Eight virtual CPU devices for every test, small encoders, and configs built on the one that compiles soonest."""

import gc
import importlib.metadata
import os
from typing import Any

# Compilation is twice as fast where LLVM does not optimise. Another quarter is saved by XLA's older way to emit fusions. XLA
# ends the process at a flag that it does not know, so other versions do not have it. One module of LLVM a program would save a
# fifth, but then programs for one device and for eight round differently.
QUICKLY = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
FLAGS = f"--xla_force_host_platform_device_count=8 {QUICKLY}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from qbheat_jax.models import layers, mobile_former, registry  # noqa: E402
from qbheat_jax.models.encoder import Encoder  # noqa: E402
from qbheat_jax.models.vit import ViT  # noqa: E402
from qbheat_jax.train import config_tables  # noqa: E402

# A Mobile-Former of every kind of block, small enough to compile in seconds. Known to the tests alone.
MICRO = mobile_former.Variant(4, 2, 8, ((3, 2, 8, 2, 0), (3, 2, 8, 2, 2), (1, 2, 8, 1, 2)), width=16)
registry.ENCODERS.setdefault("micro", registry._mobile_former(MICRO))
# Of the kinds of blocks only the two that compile soonest.
FORMER = mobile_former.Variant(4, 2, 8, ((3, 2, 8, 2, 0), (1, 2, 8, 2, 2)), width=16)
registry.ENCODERS.setdefault("former_micro", registry._mobile_former(FORMER))


class Pebble(Encoder):
    """One convolution and a batch norm: the least that an objective can train. It compiles in no time."""

    width: int = 16
    stride: int = 8
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(self.width, (8, 8), (8, 8), padding="VALID", use_bias=False, dtype=self.dtype, name="conv")(images)
        x = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(x)
        return jax.nn.gelu(x), {"conv": x}


class PebbleClips(Pebble):
    """`Pebble` of every frame of a clip [B, 2, T, H, W, 3]; the features are the mean over modalities and frames."""

    takes_clips = True

    @nn.compact
    def __call__(self, clips, train=False):
        frames = clips.reshape(-1, *clips.shape[3:])
        x, out = Pebble(self.width, self.stride, dtype=self.dtype, name="frame")(frames, train)
        return x.reshape(len(clips), -1, *x.shape[1:]).mean(1), out


registry.ENCODERS.setdefault("pebble", registry.Entry(Pebble, {}, {8: {}}))
registry.ENCODERS.setdefault("pebble_clips", registry.Entry(PebbleClips, {}, {8: {}}))
VIT_FIELDS = {"width": 16, "heads": 2, "depth": 1}
VIT_OPTIONS = ("class_token", "position", "grid")
registry.ENCODERS.setdefault("vit_micro", registry.Entry(ViT, VIT_FIELDS, {8: {"patch": 8}}, VIT_OPTIONS))

# All encoders that tests add to the registry.
TESTS_OWN = ("micro", "pebble", "pebble_clips", "vit_micro", "nano", "resnet_micro", "former_micro")

SMALL = {
    "seed": 3,
    "data.source": "synthetic:64",
    "image_size": 32,
    "batch_size": 16,
    "total_steps": 6,
    "encoder.name": "pebble",
    "decoder.width": 16,
    "decoder.depth": 1,
    "decoder.heads": 2,
    "heat.init_scale": 0.1,
    "learning_rate": 1e-2,
    "warmup": 1,
    "log_every": 2,
    "checkpoint_every": 2,
    "monitors.images": 0,  # another program to compile, which tests/test_probe_online.py looks at
}


def pytest_collection_finish():
    """Collect garbage less often: traces make objects by the million, and to search them is a quarter of their time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def leave_one_device(patch):
    """What `one_device` does, for fixtures of a wider scope, by their own `pytest.MonkeyPatch`."""
    device = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda *a: device)
    patch.setattr(jax, "local_devices", lambda *a: device)


def interrupt_after_save(monkeypatch, checkpoints, last, run):
    """Call `run`, which ends by KeyboardInterrupt once the class `checkpoints` has saved step `last`."""
    save = checkpoints.save

    def stops(self, step, *rest):
        save(self, step, *rest)
        if step == last:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save", stops)
        run()


@pytest.fixture
def one_device(monkeypatch):
    """One device in the place of eight: programs compile sooner, and what is promised bit for bit can be asked for."""
    leave_one_device(monkeypatch)


@pytest.fixture
def small_config():
    """Function of overrides ({"dotted.key": value} or keywords for undotted keys) -> a checked pre-training config."""

    def make(overrides=None, **undotted):
        return config_tables.resolve({**SMALL, **(overrides or {}), **undotted})

    return make


SMALL_FILE = '''
"""The tests' small run."""


def get_config():
    return {fields!r}
'''


@pytest.fixture
def small_config_file(tmp_path):
    """Path of a config file with the fields of SMALL."""
    nested = {}
    for key, value in SMALL.items():
        *parents, leaf = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    path = tmp_path / "small.py"
    path.write_text(SMALL_FILE.format(fields=nested))
    return path
