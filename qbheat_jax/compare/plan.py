"""What is compared: a config file, read and checked to its last field, as methods, probes, and the cells they make.

A config file of a comparison is a flat python file with `get_config()` that returns a dict:

    seeds       whole numbers; each is that of pre-training, probes and untrained encoder at once. Default: (0, 1)
    pretrain    the pre-training that all methods share: a config file, its path beginning at this file
    all         fields of pre-training, set for every method
    methods     name -> the fields in which the method differs, {} for none; in the order of the table. `config` among
                them names another file to begin with than `pretrain`
    probes      name -> a config file of a probe, or of a detector
    probe       fields of probing, set for every probe; not for detectors
    baselines   of "random" (the encoder of `pretrain`, untrained), "pixels" and "histogram" (no encoder). Default: all

Probes look at the images that were trained on, at their size; of their files the rest counts. `probe` may say otherwise.
Detectors look at the images that their own file names.
"""

import ast
import dataclasses
import os
import re
from typing import Any

from qbheat_jax import config as config_lib
from qbheat_jax import data, device_mesh, errors
from qbheat_jax.config import DETECT, DETECTORS, PRETRAIN, PROBE
from qbheat_jax.errors import UserError
from qbheat_jax.probe import splits
from qbheat_jax.probe.encode import POOLED
from qbheat_jax.probe.encoders import NO_ENCODER
from qbheat_jax.tasks import detect, pretrain
from qbheat_jax.train import optim, sharding

BASELINES = ("random", *NO_ENCODER)
KEYS = ("seeds", "pretrain", "all", "methods", "probes", "probe", "baselines")
_NAME = re.compile(r"\w[\w+-]*")


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table. config: of its pre-training, whatever the seed; None for a baseline. own: the fields that differ.

    steps, examples, epochs: the length of its pre-training; 0 for a baseline.
    """

    name: str
    config: Any = None
    own: dict = dataclasses.field(default_factory=dict)
    steps: int = 0
    examples: int = 0
    epochs: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pre-training (`probe` is empty), or one probe or detector of one encoder. path: its folder in the comparison's."""

    method: Method
    seed: int
    probe: str
    path: str
    config: Any

    @property
    def encoder(self):
        """The folder of the encoder probed."""
        return self.path.removesuffix(f"/probe/{self.probe}")

    @property
    def table(self):
        """The fields of its config."""
        return table_of(self.config) if self.probe else PRETRAIN

    @property
    def detects(self):
        return self.table is DETECT


def table_of(config):
    """The fields of the config of a probe or a detector."""
    return DETECT if config.get("objective") in DETECTORS else PROBE


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole comparison. probes: name -> config, whatever the seed."""

    path: str
    seeds: tuple
    methods: tuple
    probes: dict

    def encoders(self):
        """A list of the cells of each encoder, its pre-training first, seed by seed: the first seed gives a whole table."""
        return [
            self._cells(method, seed)
            for seed in self.seeds
            for method in self.methods
            if method.name not in NO_ENCODER or seed == self.seeds[0]  # of features that no seed changes one is enough
        ]

    def cells(self):
        return [cell for cells in self.encoders() for cell in cells]

    def _cells(self, method, seed):
        place = f"{method.name}/seed-{seed}"
        cells = [Cell(method, seed, "", place, _seeded(method.config, seed, PRETRAIN))] if method.config else []
        for name, config in self.probes.items():
            if method.name not in NO_ENCODER or config.get("protocol") in POOLED:
                cells.append(Cell(method, seed, name, f"{place}/probe/{name}", _seeded(config, seed, table_of(config))))
        return cells


def read(path, overrides=()):
    """Config file and `(key, text)` overrides from the command line -> Plan. Raises UserError for what cannot be run.

    All configs are resolved, all data opened and all objectives built, so that no mistake comes to light hours later.
    """
    given = config_lib.read(path)
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise errors.unknown(f"--config {path}: {unknown[0]}", unknown[0], KEYS)
    for key in ("all", "methods", "probes", "probe"):
        if not isinstance(given.setdefault(key, {}), dict):
            raise UserError(f"--config {path}: {key}={given[key]!r} is not accepted: it takes a dict")
    for key, text in overrides:
        _override(given, key, text)
    seeds, baselines = _seeds(given.get("seeds", (0, 1))), _baselines(given.get("baselines", BASELINES))
    for key in ("methods", "probes"):
        _names(key, given[key], BASELINES if key == "methods" else ())

    folder = os.path.dirname(os.path.abspath(path))
    base = _within("all", lambda: _merged(_file(folder, "pretrain", given.get("pretrain")), given["all"], PRETRAIN))
    _within("all", lambda: config_lib.resolve(base))
    methods = [
        _within(f"methods.{name}", lambda: _method(name, own, base, given["all"], folder))
        for name, own in given["methods"].items()
    ]
    trained = config_lib.flatten(config_lib.resolve(base).to_dict())
    shared = {key: trained[key] for key in (*config_lib.SHARED, "pixels")}
    probes = {
        name: _within(f"probes.{name}", lambda: _probe(_file(folder, name, file), shared, given["probe"]))
        for name, file in given["probes"].items()
    }
    return Plan(str(path), seeds, (*methods, *map(Method, baselines)), probes)


def _method(name, own, base, shared, folder):
    own = config_lib.flatten(own)
    if "config" in own:
        base = _merged(_file(folder, "config", own.pop("config")), shared, PRETRAIN)
    config, objective, source = pretrain.prepare(config_lib.resolve(_merged(base, own, PRETRAIN)))
    images = source.splits[config.data.split]
    steps = optim.total_steps(config, images)
    optim.schedule(config, steps, images)
    sharding.check_batch(config.batch_size, objective, device_mesh.make_mesh(config.mesh))
    examples = steps * config.batch_size
    return Method(name, config, own, steps, examples, examples / images)


def _probe(fields, shared, own):
    if config_lib.flatten(fields).get("objective") in DETECTORS:
        return _detector(fields, shared)
    shared = {key: value for key, value in shared.items() if key in PROBE}
    config = config_lib.resolve(_merged(_merged(fields, shared, PROBE), own, PROBE), PROBE)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    source.check_labels("train", splits.test_split(source))
    return config


def _detector(fields, shared):
    """Its encoder and size are the pre-training's where it does not say otherwise, which is for the untrained one."""
    encoder = {key: value for key, value in shared.items() if key.startswith(("encoder.", "pixels", "image_size"))}
    config = config_lib.resolve(_merged(encoder, fields, DETECT), DETECT)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    detect.checked(config, source)
    if not config.data.eval_split:
        raise UserError("config field data.eval_split='' is not accepted: a comparison needs a split to measure AP on")
    return config


def _merged(fields, more, table):
    return config_lib.merge(config_lib.flatten(fields), config_lib.flatten(more), table)


def _file(folder, key, path):
    if not isinstance(path, str) or not path:
        raise UserError(f"{key}={path!r} is not accepted: it takes the path of a config file")
    return config_lib.read(os.path.normpath(os.path.join(folder, path)))


def _seeded(config, seed, table):
    return config_lib.resolve({**config_lib.flatten(config.to_dict()), "seed": seed}, table)


def _within(place, make):
    """make(), and where it refuses, the place in the file that it is about."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _override(given, key, text):
    """Puts one `--config.KEY text` where the file has it."""
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
            f"--config.{key}: a comparison takes seeds, pretrain, baselines, all.FIELD, probe.FIELD, and "
            f"methods.NAME.FIELD, NAME one of {', '.join(given['methods'])}"
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
        raise UserError(f"seeds={seeds!r} is not accepted: it takes whole numbers from 0 to 4294967295, each once")
    return tuple(seeds)


def _baselines(names):
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(name in BASELINES for name in names):
        raise UserError(f"baselines={names!r} is not accepted: it takes names out of {', '.join(BASELINES)}")
    return tuple(dict.fromkeys(names))


def _names(key, given, taken):
    """Names are those of folders."""
    if not given:
        raise UserError(f"{key} is empty: it takes at least one of them")
    for name, value in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (*taken, "report"):
            raise UserError(
                f"{key}: the name {name!r} is not accepted: it takes letters, digits, _, + and -, and none of "
                f"{', '.join((*taken, 'report'))}"
            )
        if key == "methods" and not isinstance(value, dict):
            raise UserError(f"{key}.{name}={value!r} is not accepted: it takes a dict of fields")
