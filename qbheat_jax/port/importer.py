"""Port a file of weights to a workdir: config, checkpoint, provenance and a model card."""

import importlib.metadata
import json
import logging
import os

import jax.numpy as jnp
import numpy as np
from etils import epath

from qbheat_jax import api, atomic, methods, pytree
from qbheat_jax import config as config_lib
from qbheat_jax.data import labels
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.models import registry
from qbheat_jax.ops.images import PIXELS
from qbheat_jax.port import card, files, hf, names, shards, strict, tables, wrappers
from qbheat_jax.train.checkpoint import Checkpoints
from qbheat_jax.train.config_tables import CLASSIFIER

log = logging.getLogger("qbheat")

# Image size of weights that do not determine it.
IMAGE_SIZE = 224


def port(source, arch, workdir, *, key=None, prefix=None, head="keep", classes=None, stride=0, image_size=0, pixels=""):
    """Make a workdir that every command takes from a file of weights. Nothing in the file is run.

    Args:
      source: .safetensors, .npz, PyTorch's .pth, .pt, .bin, or the index of a checkpoint in parts; a folder of Hugging Face's
        layout, or hf:ORG/NAME of one on its hub.
      arch: an encoder of the registry; None for that which config.json beside the weights describes.
      workdir: a new or empty directory, or one that holds this port.
      key: the dict inside the file to take, where it holds several.
      prefix: of the names to take, where the file has an unknown prefix, or two encoders.
      head: "keep" takes the classifier, "drop" leaves it.
      classes: of the classifier; None for config.json's, or else 1,000.
      stride: as in `registry.encoder`.
      image_size: pixels a side; 0 for the size the weights were made for. Size-dependent parameters are resampled.
      pixels: one of images.PIXELS; "" for the one told beside the weights, or else the architecture's usual one.

    Returns:
      The content of WORKDIR/provenance.json.

    Raises:
      UserError: the file cannot be read or does not fit, in which case nothing is written; or the workdir is not free.
    """
    for name, value, accepted in (("head", head, ("keep", "drop")), ("pixels", pixels, ("", *PIXELS))):
        if value not in accepted:
            raise UserError(f"--{name} {value}: it takes {', '.join(filter(None, accepted))}")
    workdir = epath.Path(workdir)
    _check_free(workdir)
    given, (source, told) = source, hf.locate(source)
    arch, described = _described(arch, told)
    table = tables.of(arch)
    pixels = pixels or hf.pixels(source, told)
    outputs = hf.classes(told)
    classes = (len(outputs) or 1000) if classes is None else classes
    tree, kind = files.read(source)
    held = wrappers.unwrap(tree, source, key, prefix, arch)
    for notice in held.notices:
        log.info("%s", notice)
    found = {name: tuple(array.shape) for name, array in held.arrays.items()}
    config = _config(
        arch, {**table.options(found), **described}, classes if head == "keep" else 0, stride, image_size, pixels
    )
    plan = strict.plan(found, config, table)
    strict.check(plan, found, config, table, source, held.wrappers)
    leaves, stored_as = _converted(plan, held.arrays, source)
    resampled = ""
    if image_size and image_size != config.image_size:
        config, leaves, resampled = _resampled(config, leaves, image_size)
    provenance = {
        "source": os.path.basename(source),
        **({"hub": str(given)} if str(given).startswith(hf.HUB) else {}),
        "sha256": files.sha256(source),
        "bytes": os.path.getsize(source),
        **_parts(source),
        "format": kind,
        "stored_as": stored_as,
        "wrappers": list(held.wrappers),
        "key": held.key,
        "arch": arch,
        "config": config_lib.flatten(config.to_dict()),
        "names": plan.dialect or "usual",
        "resampled": resampled,
        "renamed": {name: path for path in sorted(plan.wanted) for name in names.parts(plan.wanted[path])},
        "ignored": list(plan.ignored),
        "dropped": [*held.dropped, *plan.dropped],
        "versions": _versions(kind),
    }
    provenance = json.loads(json.dumps(provenance))  # as it is read back
    _report(provenance)
    _write(workdir, config, leaves, provenance, outputs if len(outputs) == config.head.classes else [])
    return provenance


def _described(arch, told):
    """Return (arch, {config field: value}) of the user's --arch and of a config.json beside the weights, {} for none."""
    if not arch and not told:
        known = ", ".join(name for name in registry.names())
        raise UserError(f"--arch is missing, and no config.json beside the weights describes them: it takes {known}")
    if not arch:
        arch, options = hf.describe(told)
        log.info("config.json describes %s", arch)
        return arch, options
    try:
        described, options = hf.describe(told) if told else ("", {})
    except UserError:  # the user's word is enough
        return arch, {}
    return arch, options if described == arch else {}


def _parts(source):
    """Return the SHA-256 of each part of a checkpoint in parts; {} for one file."""
    parts = shards.parts(source)
    return {"parts": {part.name: files.sha256(part) for part in parts}} if parts else {}


def _config(arch, options, classes, stride, image_size, pixels):
    """Return the workdir's config, for images of the size that the weights were made for."""
    own = {name.removeprefix("encoder."): value for name, value in options.items()}
    patch = own.pop("stride", 0)
    stride = stride or (0 if patch == registry.encoder(arch).stride else patch)
    made_for = registry.encoder(arch, stride=stride, **own).image_size
    config = config_lib.resolve(
        {
            "encoder.name": arch,
            "encoder.stride": stride,
            "image_size": made_for or image_size or IMAGE_SIZE,
            "pixels": pixels or registry.released_pixels(arch),
            "head.classes": classes,
            **{name: value for name, value in options.items() if name != "encoder.stride"},
        },
        CLASSIFIER,
    )
    methods.build(config)  # raises where fields do not fit together
    return config


def _converted(plan, arrays, source):
    """Return ({path: float32 array in flax's layout}, the stored types)."""
    leaves, types = {}, {}
    for path, name in plan.wanted.items():
        for part in names.parts(name):
            array = arrays[part]
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(
                    f"{os.path.basename(source)}: {part} is stored as {array.dtype}, not as floating-point numbers"
                )
            types.setdefault(array.dtype.name, part)
        leaf = names.put_together(path, arrays, name, plan.shapes[path])
        leaves[path] = np.ascontiguousarray(leaf.astype(np.float32))
        if not np.isfinite(leaves[path]).all():
            named = " or ".join(names.parts(name))
            raise UserError(f"{os.path.basename(source)}: {named} holds numbers that are not finite")
    if set(types) != {"float32"}:
        rounded = "rounded to" if "float64" in types else "kept exactly, as"
        log.info("weights stored as %s are %s float32", ", ".join(sorted(types)), rounded)
    return leaves, ", ".join(sorted(types))


def _resampled(config, leaves, image_size):
    """Return (config, leaves, notice) with the encoder's size-dependent parameters fitted to another image size."""
    resized = methods.build(config).encoder.resize(_nested(leaves)["params"]["encoder"], image_size)
    options = {f"encoder.{name}": value for name, value in resized.options.items()}
    fields = {**config_lib.flatten(config.to_dict()), "image_size": image_size, **options}
    sized = config_lib.resolve(fields, CLASSIFIER)
    methods.build(sized)
    log.info("%s", resized.notice)
    encoder = {f"params/encoder/{name}": np.asarray(leaf) for name, leaf in pytree.names(resized.params)}
    return sized, {**leaves, **encoder}, resized.notice


def _versions(kind):
    packages = ("qbheat_jax", "jax", "flax", "numpy", *(("torch",) if "PyTorch" in kind else ()))
    return {name: importlib.metadata.version(name) for name in packages}


def _report(provenance):
    p = provenance
    log.info("%s: %s, %s, SHA-256 %s", p["source"], p["format"], p["stored_as"], p["sha256"])
    if p["wrappers"]:
        log.info("taken out of its wrappers: %s", ", ".join(p["wrappers"]))
    if p["dropped"]:
        log.info("not taken: %s", _some(p["dropped"]))
    if p["ignored"]:
        log.info("not needed: %s", _some(p["ignored"]))
    log.info("%d arrays of %s, none missing and none left over", len(p["renamed"]), p["arch"])


def _some(listed):
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


# --- The workdir -----------------------------------------------------------------------------------------------------

# provenance.json is written first and config.json last. Nothing loads a workdir without config.json, so an interrupted port is
# recognised and repeated.


def _check_free(workdir):
    """Raise UserError for a workdir that holds anything but a port."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--to {workdir} is a file: name a directory, new or empty")
    if workdir.exists() and any(workdir.iterdir()) and not (workdir / "provenance.json").exists():
        raise UserError(f"--to {workdir} already holds something: name a new or empty directory")


def _write(workdir, config, leaves, provenance, outputs):
    with writing(f"--to {workdir}", RUN_FAILED):
        if _begun(workdir, provenance):
            log.info("%s holds this port already", workdir)
            return
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write(workdir / "provenance.json", json.dumps(provenance, indent=1) + "\n")
        if (workdir / "checkpoints").exists():
            (workdir / "checkpoints").rmtree()
        variables = _nested(leaves)
        text = config_lib.to_json(config)
        checkpoints = Checkpoints(workdir)
        try:
            state = {"step": np.zeros((), np.int32), **variables, "opt_state": {}, "ema": {}}
            checkpoints.save(0, state, 0, text)
            checkpoints.wait()
        finally:
            checkpoints.close()
        if config.head.classes and not labels.write(workdir, config.head.classes) and outputs:
            labels.save(workdir, [(name, name) for name in outputs])
        model = api.Model(config, variables, 0)
        card.write(workdir / "README.md", card.text(config.encoder.name, model, _origin(provenance), _usage(workdir)))
        atomic.write(workdir / "config.json", text)


def _begun(workdir, provenance):
    """Return whether the workdir holds this whole port. Raise UserError where it holds another."""
    path = workdir / "provenance.json"
    if not path.exists():
        return False
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = {}
    same = all(there.get(field) == value for field, value in provenance.items() if field != "versions")
    if there and not same:
        raise UserError(
            f"--to {workdir} holds the port of another file or with other options ({there.get('source')}, "
            f"{there.get('arch')}): name a new or empty directory"
        )
    return same and (workdir / "config.json").exists()


def _nested(leaves):
    """Return {"params/encoder/...": array} as {"params": {...}, "batch_stats": {...}}."""
    tree = {"params": {}, "batch_stats": {}}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _origin(provenance):
    rows = [("source", f"`{provenance['source']}`, {provenance['bytes']:,} bytes, SHA-256 `{provenance['sha256']}`")]
    if provenance["resampled"]:
        rows.append(("changed", provenance["resampled"]))
    return rows


def _usage(workdir):
    return (
        "Every name's place is in `provenance.json`. To load it:\n\n```python\nimport qbheat_jax\n\n"
        f"model = qbheat_jax.load({workdir.name!r})\n```\n\nand for PyTorch:\n\n```sh\n"
        f"qbheat export --from {workdir.name} --to model.safetensors\n```"
    )
