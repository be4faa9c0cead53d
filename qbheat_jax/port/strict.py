"""Check a file against a model: no name missing, none left over, every shape right. Name the likely cause of differences."""

import dataclasses
import itertools
import os

from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.port import names, shapes, tables
from qbheat_jax.train.config_tables import CLASSIFIER

LISTED = 10
# Share of wrong names up to which another architecture is named as the cause.
NEAR = 0.1


@dataclasses.dataclass(frozen=True)
class Differences:
    """Differences of a file from a model: {name: shape} missing and extra, {name: (found, wanted)} misshapen."""

    missing: dict
    extra: dict
    misshapen: dict

    def __len__(self):
        return len(self.missing) + len(self.extra) + len(self.misshapen)

    def only(self, keep):
        """Return the differences whose name fulfils `keep`."""
        return Differences(*({n: v for n, v in part.items() if keep(n)} for part in dataclasses.astuple(self)))

    def lines(self):
        kinds = (
            [f"{name} is {_show(found)}, not {_show(wanted)}" for name, (found, wanted) in self.misshapen.items()],
            [f"missing {name} {_show(shape)}" for name, shape in self.missing.items()],
            [f"extra {name} {_show(shape)}" for name, shape in self.extra.items()],
        )
        return [line for row in itertools.zip_longest(*kinds) for line in row if line]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a file's names map to a model.

    Attributes:
      wanted: {path: PyTorch's name, or names of its parts}, see `Table.torch_names`.
      shapes: {path: shape}.
      dialect: as in `Table.dialect_of`.
      differences: Differences.
      ignored: names that flax does not need.
      dropped: names of the classifier, where it is dropped.
    """

    wanted: dict
    shapes: dict
    dialect: str
    differences: Differences
    ignored: tuple
    dropped: tuple


def plan(found, config, table):
    """Return the Plan of a file's {name: shape} for the model of a config."""
    wanted_shapes = shapes.of(config)
    dialect = table.dialect_of(wanted_shapes, found)
    wanted = table.torch_names(wanted_shapes, dialect)
    shape_of = {}
    for path, shape in wanted_shapes.items():
        shape_of |= names.torch_shapes(path, shape, wanted[path])
    ignored = tuple(name for name in found if table.is_ignored(name))
    dropped = (
        () if config.head.classes else tuple(name for name in found if table.is_head(name) and name not in ignored)
    )
    given = {name: shape for name, shape in found.items() if name not in {*ignored, *dropped}}
    differences = Differences(
        {name: shape for name, shape in shape_of.items() if name not in given},
        {name: shape for name, shape in given.items() if name not in shape_of},
        {n: (given[n], s) for n, s in shape_of.items() if n in given and not names.same_shape(given[n], s)},
    )
    return Plan(wanted, wanted_shapes, dialect, differences, ignored, dropped)


def check(plan, found, config, table, source, wrappers):
    """Raise UserError with the likely cause and the first differences, unless the file fits."""
    if not len(plan.differences):
        return
    lines = plan.differences.lines()
    more = f", and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    cause = likeliest(plan, found, config, table, wrappers)
    cause = f"{cause} (" if cause else ""
    raise UserError(
        f"{os.path.basename(source)} does not fit {config.encoder.name}: {cause}{', '.join(lines[:LISTED])}{more}"
        f"{')' if cause else ''}"
    )


def likeliest(plan, found, config, table, wrappers):
    """Return the likely cause of the differences, or "" where it is unknown."""
    encoder = plan.differences.only(lambda name: not table.is_head(name))
    if len(encoder):
        return _other_architecture(encoder, found, config, table) or _prefix(plan, found)
    return _head(plan, found, config, table, wrappers)


def _head(plan, found, config, table, wrappers):
    held = [name for name in found if table.is_head(name)]
    if not held:
        where = f"below {wrappers[-1]}" if wrappers and wrappers[-1].endswith(".") else "in it"
        return f"there is no classifier {where}: pass --head drop"
    if "MoCo's encoder_q." in wrappers or {"fc.0.weight", "fc.2.weight"} <= set(held):
        modules = " and ".join(sorted({name.rpartition(".")[0] for name in held}))
        return f"it has the projection of a pre-training method ({modules}), not a classifier: pass --head drop"
    classifier = plan.wanted["params/head/classifier/kernel"]
    classes, width = found.get(classifier, ())[:1], found.get(classifier, ())[1:]
    wanted = plan.differences.misshapen.get(classifier, ((), ()))[1]
    if wanted and width == wanted[1:] and classes != (0,):
        classes = classes[0]
        return f"the head has {classes:,} classes, the config {config.head.classes:,}: pass --head drop, or --classes {classes}"
    return "its classifier is another one: pass --head drop"


def _other_architecture(ours, found, config, table):
    """Name the architecture or stride that the file nearly fits; "" where there is none."""
    best, least = None, len(ours)
    for arch in registry.names():
        try:
            other = tables.of(arch)
            options = other.options(found)
        except UserError:
            continue
        signs = other.signs(registry.encoder(arch))
        if any(found.get(name) != shape for name, shape in signs.items()):
            continue
        strides = registry.ENCODERS[arch].strides
        for stride in {options["encoder.stride"]} & set(strides) if "encoder.stride" in options else strides:
            fields = {**options, "encoder.name": arch, "encoder.stride": stride, "image_size": stride}
            candidate = config_lib.resolve({**fields, "head.classes": 0}, CLASSIFIER)
            count = len(plan(found, candidate, other).differences)
            if count < least and count <= NEAR * len(found):
                best, least = (arch, stride), count
    if best is None:
        return ""
    arch, stride = best
    own = next(iter(registry.ENCODERS[arch].strides))
    with_stride = f" with --stride {stride}" if stride != own or arch == config.encoder.name else ""
    return f"this looks like {arch}{with_stride}, you said {config.encoder.name}"


def _prefix(plan, found):
    """Name a prefix that all names share and that hides some wanted names; "" where there is none."""
    wanted = {name for named in plan.wanted.values() for name in names.parts(named)}
    prefix = os.path.commonprefix(list(found)).rpartition(".")[0]
    if prefix and wanted & {name.removeprefix(f"{prefix}.") for name in found}:
        return f"every name in it begins with {prefix}.: pass --prefix {prefix}."
    return ""


def _show(shape):
    return f"[{', '.join(map(str, shape))}]"
