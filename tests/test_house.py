"""The order of the rooms: a module imports from the rooms below its own alone, and only probes use pmap."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qbheat_jax"

# From top to bottom. Rooms of one line do not import each other; modules of one room may.
ROOMS = """
__main__
cli
tools
compare
tasks
analysis
report
port probe
pretrained
__init__
api
eval
train
methods
models
data
ops
config
console device_mesh
atomic
paths rng pytree
errors
"""
HEIGHT = {room: -n for n, line in enumerate(ROOMS.split("\n")) for room in line.split()}

# The package's version, which anybody may read: `qbheat_jax/__init__.py` imports nothing until `load` is called.
VERSION = "qbheat_jax"
# (room, room above it) that is still to be taken apart.
EXCEPTIONS = set()


def sources():
    """{dotted module: its syntax tree} of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(module, tree, known):
    """Yield the package's modules that one imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == VERSION)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by a relative name"
            if (node.module or "").split(".")[0] == VERSION:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in known else node.module for name in names)


def room(module):
    return module.split(".")[1] if "." in module else "__init__"


@pytest.fixture(scope="module")
def house():
    """[(module, imported module), ...] over the package."""
    found = sources()
    return [(module, other) for module, tree in found.items() for other in imports(module, tree, found)]


def test_every_module_has_a_room():
    assert {room(module) for module in sources()} == set(HEIGHT)


def test_no_import_goes_up(house):
    up = [
        f"{module} -> {other}"
        for module, other in house
        if other != VERSION and room(module) != room(other) and HEIGHT[room(other)] >= HEIGHT[room(module)]
        if (room(module), room(other)) not in EXCEPTIONS
    ]
    assert not up, "\n".join(up)


def test_exceptions_are_still_needed(house):
    assert EXCEPTIONS <= {(room(module), room(other)) for module, other in house}


def test_rooms_have_no_circle(house):
    below = {name: {room(b) for a, b in house if room(a) == name and b != VERSION} - {name} for name in HEIGHT}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in below[name]:
                visit(other)
            done.add(path.pop())

    for name in HEIGHT:
        visit(name)


def test_only_probes_use_pmap():
    users = {
        module
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "pmap" and getattr(node.value, "id", "") == "jax")
        or (isinstance(node, ast.ImportFrom) and node.module == "jax" and any(a.name == "pmap" for a in node.names))
    }
    assert users == {"qbheat_jax.probe.pmap"}
    found = sources()
    importers = {m for m, tree in found.items() if "qbheat_jax.probe.pmap" in set(imports(m, tree, found))}
    assert importers and {room(module) for module in importers} == {"probe"}
