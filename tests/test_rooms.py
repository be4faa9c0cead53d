"""The rule of the house: a file imports from its own room and from rooms below, and nothing imports the command line."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qbheat_jax"
# From the ground floor up; CONTRIBUTING.md says what lives where. Rooms of one line do not import each other.
FLOORS = (
    ("config", "console", "device_mesh", "atomic", "paths", "rng", "pytree", "errors", "__init__"),
    ("ops",), ("data",), ("models",), ("methods",), ("train",), ("eval",), ("api",), ("probe", "port"), ("report",),
    ("analysis",), ("tasks",), ("compare",), ("tools",), ("cli",), ("__main__",),
)  # fmt: skip
LEVELS = {room: level for level, floor in enumerate(FLOORS) for room in floor}


def room(module):
    """The room of a dotted module name of the package."""
    return (module.split(".") + ["__init__"])[1]


def imported(path):
    """Modules of the package that a file imports, also within functions: {dotted name: line}. Types alone do not count."""
    tree, found = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name: node.lineno for name in names if name.split(".")[0] == "qbheat_jax"}
    return found


def test_every_room_is_on_a_floor():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__pycache__"} == set(LEVELS)


# Imports that still go up: (file, room). A line goes when its import does.
LEFT = {
    ("analysis/__init__.py", "tasks"),
    ("config.py", "ops"),
    ("eval/detections.py", "probe"),
    ("tools/gpu_check/killed.py", "cli"),
    ("tools/gpu_check/objectives.py", "cli"),
}


def test_imports_go_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        own = file.parts[0].removesuffix(".py")
        for name, line in imported(path).items():
            other = room(name)
            # `__version__` and `load` are anyone's; `load` imports the api only when it is called.
            if other == own or own == "__init__" or other not in LEVELS or (str(file), other) in LEFT:
                continue
            ground = LEVELS[own] == LEVELS[other] == 0
            if not ground and LEVELS[other] >= LEVELS[own]:
                wrong.append(f"{file}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)
