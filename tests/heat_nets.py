"""Small nets with known activations, computed by the released programs: tests/data/heat."""

import json
import pathlib

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from qbheat_jax import pytree
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.port import names

DATA = pathlib.Path(__file__).parent / "data" / "heat"


def fields(name):
    """The fields of the VHeat of a file."""
    with safe_open(DATA / f"{name}.state_dict.safetensors", "np") as file:
        config = json.loads(file.metadata()["config"])
    dims = config["dims"]
    return {
        "dims": tuple(dims) if isinstance(dims, list) else tuple(dims * 2**n for n in range(4)),
        "depths": tuple(config["depths"]),
        "post_norm": config["post_norm"],
        "layer_scale": config["layer_scale"] is not None,
        "mlp_ratio": config.get("mlp_ratio", 4.0),
    }, config["img_size"]


def vheat(name, prefix="", **options):
    """(VHeat, its parameters, the head's, {name: known array, maps as NHWC})."""
    from qbheat_jax.port.tables.vheat import TABLE

    given, size = fields(name)
    encoder = VHeat(**given, grid=size // 4, **options)
    arrays = {
        key.removeprefix(prefix): value for key, value in load_file(DATA / f"{name}.state_dict.safetensors").items()
    }
    params = {"encoder": {}, "head": {}}
    for path, name_there in TABLE.torch_names(_paths(encoder, "head" if not prefix else "")).items():
        node = params
        *parents, leaf = path.split("/")[1:]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = names.from_torch(path, arrays.pop(name_there))
    assert not arrays
    known = load_file(DATA / f"{name}.activations.safetensors")
    known = {key: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for key, value in known.items()}
    return encoder, params["encoder"], params["head"], known


def _paths(encoder, head):
    import jax

    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), np.zeros((1, encoder.stride, encoder.stride, 3))))
    paths = [f"params/encoder/{path}" for path, _ in pytree.names(shapes["params"])]
    return paths + [f"params/head/classifier/{leaf}" for leaf in ("kernel", "bias") if head]
