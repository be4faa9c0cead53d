"""Config engine: fields, their checks, durations, the command line.

This module knows no field. The tables of fields live with their owners; `train.config_tables`, `probe.fields` and
`analysis.fields` assemble them.

A config file is a flat python file with `get_config()`. It returns an `ml_collections.ConfigDict` (or dict) of the fields
it sets; every other field takes its default. Invalid configs fail before compilation with a one-line error that names the
field, the value and what is accepted.

Durations are in steps unless the name says otherwise. Where a table has `warmup` or `eval_every`, a config may set
`warmup_epochs`, `warmup_examples` or `warmup_percent` (of the run) instead, see `optim.duration`.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
from typing import Any

import ml_collections
import numpy as np

from qbheat_jax.errors import UserError, unknown

UNITS = ("epochs", "examples", "percent")
# What fields of each type take, in words.
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "a list of numbers"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field.

    Args:
      default: Default value; its type is the field's unless `type` is set.
      doc: One line for people.
      accept: Tuple of choices, or (predicate, words for what it accepts).
      type: Type of the value, where the default is None.
      duration: Whether the value may be given in UNITS too.
      resumable: Whether it may change when an interrupted run resumes.
      excludes: Fields that a value of this one replaces.
    """

    default: Any
    doc: str
    accept: tuple | None = None
    type: "type | None" = None
    duration: bool = False
    resumable: bool = False
    excludes: tuple = ()


class Table(dict):
    """{dotted key: Field} of one kind of config, in the order of config.json.

    `checks`: functions of {dotted key: value} that raise UserError for values that do not go together. They run after every
    field has been checked by itself.
    """

    def __init__(self, fields, *checks):
        super().__init__(fields)
        self.checks = checks


def at_least(low):
    """Return the `accept` of a number with a lower bound."""
    return (lambda v: v >= low, f"a number that is at least {low}")


POSITIVE = (lambda v: v > 0, "a number above 0")
FRACTION = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
POSITIVE_FRACTION = (lambda v: 0 < v <= 1, "a number above 0, at most 1")
BELOW_ONE = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
RANGE = (lambda v: len(v) == 2 and 0 < v[0] <= v[1], "two numbers, low and high, 0 < low <= high")
FRACTION_RANGE = (lambda v: RANGE[0](v) and v[1] <= 1, "two numbers, low and high, 0 < low <= high <= 1")
SEED = (lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295")
NUMBERS = (lambda v: len(v) > 0 and all(x >= 0 for x in v), "one or more numbers, none negative")
COUNTS = (lambda v: len(v) > 0 and all(x >= 1 and x == int(x) for x in v), "one or more whole numbers above 0")


def refuse(key, value, accepted):
    """Raise the UserError for a value that a field does not take. accepted: words for what it takes."""
    raise UserError(f"config field {key}={value!r} is not accepted: it takes {accepted}")


def load(path, overrides, table):
    """Return the checked, locked ConfigDict of a config file and `(key, text)` overrides from the command line."""
    return resolve(merge(flatten(read(path)), parse(overrides, table), table), table)


def parse(overrides, table):
    """Return {key: value of the field's type} of `(key, text)` pairs."""
    return {key: _parse(text, _lookup(key, table)[0]) for key, text in overrides}


def merge(given, more, table):
    """Return {dotted key: value} of `given` updated by `more`.

    A value of `more` also removes what it replaces in `given`: the same duration in another unit, or a field that excludes it.
    """
    replaced = set()
    for key, value in more.items():
        field, base = _lookup(key, table)
        if table[base].duration:
            replaced |= {base, *(f"{base}_{unit}" for unit in UNITS)}
        if value is not None:
            replaced |= set(field.excludes)
    return {key: value for key, value in given.items() if key not in replaced} | more


def resolve(given, table):
    """Return a checked, locked ConfigDict: {dotted key: value} over the defaults of a Table.

    Raises UserError for an unknown field, a value that its field does not take, and values that do not go together.
    """
    values = {key: field.default for key, field in table.items()}
    durations = {}
    for key, value in given.items():
        field, base = _lookup(key, table)
        values[key] = _check(key, value, field)
        if durations.setdefault(base, key) != key:
            raise UserError(
                f"config fields {durations[base]} and {key} are both set: they are one duration, set one of them"
            )
        if key != base:
            del values[base]
    for check in table.checks:
        check(values)
    config = ml_collections.ConfigDict(type_safe=False)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict(type_safe=False)
            node = node[parent]
        node[leaf] = value
    return config.lock()


def flatten(config, prefix=""):
    """Return {dotted key: value} of a nested dict or ConfigDict."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (dict, ml_collections.ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_json(config):
    """Return the text of config.json, which `from_json` reads back to an equal config."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text, table):
    """Return the config of a config.json's text.

    Args:
      text: JSON.
      table: Table, or a function that returns the Table of {dotted key: value}.
    """
    try:
        given = flatten(json.loads(text))
        return resolve(given, table(given) if callable(table) else table)
    except (ValueError, AttributeError) as error:
        raise UserError(f"config.json is not a config: {error}") from error


def differing(saved, config, table):
    """Return [(key, saved, now), ...] of the fields in which a run cannot be resumed: all but the `resumable` ones.

    Args:
      saved, config: Configs or dicts.
      table: Table, or a function that returns the Table of {dotted key: value}. Fields that are newer than `saved` take its
        defaults.

    A duration is compared in the unit it is given in; None stands for a duration in another unit.
    """
    # Both as JSON gives them back: a saved list was a tuple.
    dicts = (given if isinstance(given, dict) else given.to_dict() for given in (saved, config))
    old, new = (flatten(json.loads(json.dumps(given))) for given in dicts)
    table = table(new) if callable(table) else table
    old, new = (_completed(given, table) for given in (old, new))
    keys = [key for key in {**new, **old} if not table[_lookup(key, table)[1]].resumable]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _completed(given, table):
    """Return {dotted key: value} in the table's order, with defaults for the fields that are not given."""
    values = {}
    for name, field in table.items():
        spelt = (name, *(f"{name}_{unit}" for unit in UNITS)) if field.duration else (name,)
        values |= {key: given[key] for key in spelt if key in given} or {name: json.loads(json.dumps(field.default))}
    return values


def read(path):
    """Return what get_config() of a python file returns, as a dict. Raises UserError for any error in the file."""
    if not os.path.isfile(path):
        raise UserError(f"--config {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("_qbheat_config", path)
    if spec is None:
        raise UserError(f"--config {path}: a python file with get_config() is needed")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable(os.path.dirname(os.path.abspath(path))):
            spec.loader.exec_module(module)
            config = module.get_config()
        return config if isinstance(config, dict) else config.to_dict()
    except (Exception, SystemExit) as error:  # the file runs code of its own: every error is its error
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _importable(folder):
    """Let a config import files beside it; forget them afterwards, since other folders use the same names."""
    before = set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


def _lookup(key, table):
    """Return (field, its name in the table). Raises UserError with the nearest name for an unknown field."""
    if key in table:
        return table[key], key
    key = str(key)
    inside = [field for field in table if field.startswith(f"{key}.")]
    if inside:
        raise UserError(f"config field {key} is a section, not a value: set {', '.join(inside)}")
    base, _, unit = key.rpartition("_")
    if unit in UNITS and base in table and table[base].duration:
        return Field(0.0, "", at_least(0), float), base
    raise unknown(f"config field {key}", key, table)


def _parse(text, field):
    if (field.type or type(field.default)) is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _float(number):
    """Return the float; infinity for an int that is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _check(key, value, field):
    """Return the value in the field's type. Raises UserError for a value that the field does not take."""
    kind = field.type or type(field.default)
    if value is None and field.default is None:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        numbers = [_float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else math.nan for v in value]
        if not all(map(math.isfinite, numbers)):
            refuse(key, value, "numbers")
        value = tuple(numbers)
    words = KINDS[kind]
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        refuse(key, value, words)
    if isinstance(field.accept, tuple) and callable(field.accept[0]):
        if not field.accept[0](value):
            refuse(key, value, field.accept[1])
    elif field.accept and value not in field.accept:
        refuse(key, value, "one of " + ", ".join(map(repr, field.accept)))
    return value
