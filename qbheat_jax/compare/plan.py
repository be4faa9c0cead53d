"""Read and check the config file of a comparison, and plan its methods, probes and cells.

The config is a Python file whose `get_config()` returns a dict with these keys:

    seeds       Integers. Each seeds pre-training, probes and the untrained encoder. Default: (0, 1).
    pretrain    Path of the pre-training config that all methods share, relative to this file.
    all         Pre-training fields for every method.
    methods     {name: fields that differ, or {}}, in the order of the table. The field `config` replaces `pretrain` by
                another file.
    probes      {name: path of a probe or detection config}.
    probe       Probe fields for every probe. They do not apply to detectors.
    baselines   Some of "random" (the untrained encoder of `pretrain`), "pixels" and "histogram" (no encoder).
                Default: all three.

Probes use the data and the image size of `pretrain` in place of those in their own files; `probe` overrides both.
Detectors and segmentations use the data of their own files, whose images have boxes or masks.
"""

import ast
import dataclasses
import os
import re
from typing import Any

from qbheat_jax import config as config_lib
from qbheat_jax import data, device_mesh, errors
from qbheat_jax.errors import UserError
from qbheat_jax.pretrained import NO_ENCODER
from qbheat_jax.probe import splits
from qbheat_jax.probe.encode import TRIVIAL
from qbheat_jax.probe.fields import PROBE, SEGMENTS, SHARED
from qbheat_jax.tasks import detect, pretrain
from qbheat_jax.train import config_tables, optim, sharding
from qbheat_jax.train.config_tables import DETECT, PRETRAIN

BASELINES = ("random", *NO_ENCODER)
KEYS = ("seeds", "pretrain", "all", "methods", "probes", "probe", "baselines")
_NAME = re.compile(r"\w[\w+-]*")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      name: Name of the method or baseline.
      config: Pre-training config, before the seed is set; None for a baseline.
      own: {field: value} that differ from the shared config.
      steps: Pre-training steps; 0 for a baseline.
      examples: Images seen in pre-training; 0 for a baseline.
      epochs: Epochs of pre-training; 0 for a baseline.
    """

    name: str
    config: Any = None
    own: dict = dataclasses.field(default_factory=dict)
    steps: int = 0
    examples: int = 0
    epochs: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pre-training run, or one probe or detector of one encoder.

    Attributes:
      method: The `Row`.
      seed: int.
      probe: Name of the probe or detector; "" for a pre-training run.
      path: Folder of the cell, relative to the comparison's workdir.
      config: Resolved config, with the seed.
    """

    method: Row
    seed: int
    probe: str
    path: str
    config: Any

    @property
    def encoder(self):
        """The folder of the encoder, relative to the comparison's workdir."""
        return self.path.removesuffix(f"/probe/{self.probe}")

    @property
    def table(self):
        """The table of fields of `config`, such as `probe.fields.PROBE`."""
        return table_of(self.config) if self.probe else PRETRAIN

    @property
    def detects(self):
        """Whether it trains a detector."""
        return self.table is DETECT


def table_of(config):
    """Return the table of the config, or {dotted key: value}, of a probe or a detector."""
    return DETECT if config_tables.of(config) is DETECT else PROBE


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
      path: Path of the config file.
      seeds: Tuple of ints.
      methods: Tuple of `Row`, baselines last.
      probes: {name: config, before the seed is set}.
    """

    path: str
    seeds: tuple
    methods: tuple
    probes: dict

    def encoders(self):
        """Return a list of cells for each encoder, pre-training first.

        Encoders are ordered by seed, so that the first seed completes a table.
        """
        return [
            self._cells(method, seed)
            for seed in self.seeds
            for method in self.methods
            if method.name not in NO_ENCODER or seed == self.seeds[0]  # these features do not depend on the seed
        ]

    def cells(self):
        """Return the list of all cells."""
        return [cell for cells in self.encoders() for cell in cells]

    def _cells(self, method, seed):
        place = f"{method.name}/seed-{seed}"
        cells = [Cell(method, seed, "", place, _seeded(method.config, seed, PRETRAIN))] if method.config else []
        for name, config in self.probes.items():
            if method.name not in NO_ENCODER or config.get("protocol") in TRIVIAL:
                cells.append(Cell(method, seed, name, f"{place}/probe/{name}", _seeded(config, seed, table_of(config))))
        return cells


def read(path, overrides=()):
    """Read and check a comparison.

    Every config is resolved, every data source opened and every method built, so that mistakes show before the first run.

    Args:
      path: Path of the config file.
      overrides: [(key, text), ...] from the command line.

    Returns:
      The `Plan`.

    Raises:
      UserError: The comparison cannot be run.
    """
    given = config_lib.read(path)
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise errors.unknown(f"--config {path}: {unknown[0]}", unknown[0], KEYS)
    for key in ("all", "methods", "probes", "probe"):
        if not isinstance(given.setdefault(key, {}), dict):
            raise UserError(f"--config {path}: {key}={given[key]!r} is not accepted; {key} takes a dict")
    for key, text in overrides:
        _override(given, key, text)
    seeds, baselines = _seeds(given.get("seeds", (0, 1))), _baselines(given.get("baselines", BASELINES))
    for key in ("methods", "probes"):
        _names(key, given[key], BASELINES if key == "methods" else ())

    folder = os.path.dirname(os.path.abspath(path))
    base = _within("all", lambda: _merged(_file(folder, "pretrain", given.get("pretrain")), given["all"], PRETRAIN))
    _within("all", lambda: config_lib.resolve(base, PRETRAIN))
    methods = [
        _within(f"methods.{name}", lambda: _method(name, own, base, given["all"], folder))
        for name, own in given["methods"].items()
    ]
    trained = config_lib.flatten(config_lib.resolve(base, PRETRAIN).to_dict())
    shared = {key: trained[key] for key in (*SHARED, "pixels")}
    probes = {
        name: _within(f"probes.{name}", lambda: _probe(_file(folder, name, file), shared, given["probe"]))
        for name, file in given["probes"].items()
    }
    return Plan(str(path), seeds, (*methods, *map(Row, baselines)), probes)


def _method(name, own, base, shared, folder):
    own = config_lib.flatten(own)
    if "config" in own:
        base = _merged(_file(folder, "config", own.pop("config")), shared, PRETRAIN)
    config, objective, source = pretrain.prepare(config_lib.resolve(_merged(base, own, PRETRAIN), PRETRAIN))
    images = source.splits[config.data.split]
    steps = optim.total_steps(config, images)
    optim.schedule(config, steps, images)
    sharding.check_batch(config.batch_size, objective, device_mesh.make_mesh(config.mesh))
    examples = steps * config.batch_size
    return Row(name, config, own, steps, examples, examples / images)


def _probe(fields, shared, own):
    if table_of(config_lib.flatten(fields)) is DETECT:
        return _detector(fields, shared)
    fields = config_lib.flatten(fields)
    segments = fields.get("protocol") in SEGMENTS
    if segments:  # the data are the file's; the untrained encoder is that of `pretrain`
        fields = {"image_size": shared["image_size"], **fields}
        shared = {key: value for key, value in shared.items() if key.startswith("encoder.")}
    shared = {key: value for key, value in shared.items() if key in PROBE}
    config = config_lib.resolve(_merged(_merged(fields, shared, PROBE), own, PROBE), PROBE)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    test = splits.test_split(source)
    if segments:
        data.MasksSpec(config.image_size).check(source, test)
    else:
        source.check_labels("train", test)
    return config


def _detector(fields, shared):
    """Return a detector's config. Encoder and image size default to those of `pretrain`, for the untrained encoder."""
    encoder = {key: value for key, value in shared.items() if key.startswith(("encoder.", "pixels", "image_size"))}
    config = config_lib.resolve(_merged(encoder, fields, DETECT), DETECT)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    detect.checked(config, source)
    if not config.data.eval_split:
        raise UserError(
            "config field data.eval_split='' is not accepted; a comparison needs the name of a split for AP"
        )
    return config


def _merged(fields, more, table):
    return config_lib.merge(config_lib.flatten(fields), config_lib.flatten(more), table)


def _file(folder, key, path):
    if not isinstance(path, str) or not path:
        raise UserError(f"{key}={path!r} is not accepted; {key} takes the path of a config file")
    return config_lib.read(os.path.normpath(os.path.join(folder, path)))


def _seeded(config, seed, table):
    return config_lib.resolve({**config_lib.flatten(config.to_dict()), "seed": seed}, table)


def _within(place, make):
    """Return make(), and prefix its UserError with `place`, the key in the config file."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _override(given, key, text):
    """Apply one `--config.KEY text` to the dict of the config file."""
    section, _, field = key.partition(".")
    if section in ("seeds", "baselines", "pretrain") and not field:
        given[section] = os.path.abspath(text) if section == "pretrain" else _literal(text)
    elif section in ("all", "probe") and field:
        table = PROBE if section == "probe" else PRETRAIN
        given[section] = _within(section, lambda: _set(given[section], field, text, table))
    elif section == "methods" and field.partition(".")[0] in given["methods"]:
        name, _, field = field.partition(".")
        given["methods"][name] = _within(f"methods.{name}", lambda: _set(given["methods"][name], field, text, PRETRAIN))
    else:
        raise UserError(
            f"--config.{key} is not accepted; a comparison takes seeds, pretrain, baselines, all.FIELD, probe.FIELD and "
            f"methods.NAME.FIELD, where NAME is one of {', '.join(given['methods'])}"
        )


def _set(fields, field, text, table):
    return _merged(fields, config_lib.parse([(field, text)], table), table)


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _seeds(seeds):
    seeds = (seeds,) if type(seeds) is int else seeds
    whole = isinstance(seeds, (list, tuple)) and all(type(s) is int and 0 <= s < 2**32 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds!r} is not accepted; it takes distinct integers from 0 to 4294967295")
    return tuple(seeds)


def _baselines(names):
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(name in BASELINES for name in names):
        raise UserError(f"baselines={names!r} is not accepted; it takes names from {', '.join(BASELINES)}")
    return tuple(dict.fromkeys(names))


def _names(key, given, taken):
    """Check the names of methods or probes, which become folder names."""
    if not given:
        raise UserError(f"{key}={given!r} is not accepted; {key} takes at least one entry")
    for name, value in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (*taken, "report"):
            raise UserError(
                f"{key}: the name {name!r} is not accepted; it takes letters, digits, _, + and -, and is none of "
                f"{', '.join((*taken, 'report'))}"
            )
        if key == "methods" and not isinstance(value, dict):
            raise UserError(f"{key}.{name}={value!r} is not accepted: it takes a dict of fields")
