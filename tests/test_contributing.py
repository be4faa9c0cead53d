"""The walk-throughs of CONTRIBUTING.md, followed in a copy of the package, then one run with all of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.compile(r"\*\*\d\. `([\w/.]+)`[^\n]*?\*\*.*?(?=^\*\*\d\.|^## |\Z)", re.DOTALL | re.MULTILINE)


def block(path):
    """The first block of Python in the step of CONTRIBUTING.md that is about `path`."""
    (step,) = [match[0] for match in CODE.finditer(TEXT) if match[1] == path]
    return re.search(r"```python\n(.*?)```", step, re.DOTALL)[1]


def steps(section):
    """The files that a section of CONTRIBUTING.md touches."""
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    return [match[1] for match in CODE.finditer(body)]


def copy(room, *paths):
    """Copy the package, and add the files of CONTRIBUTING.md at `paths`, which are new."""
    shutil.copytree(ROOT / "qbheat_jax", room / "qbheat_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for path in paths:
        assert not (ROOT / path).exists()
        (room / path).parent.mkdir(exist_ok=True)
        (room / path).write_text(block(path))


def insert(path, after, text):
    """Put `text` behind the one place of the file that matches `after`."""
    old = path.read_text()
    assert len(re.findall(after, old)) == 1
    path.write_text(re.sub(after, lambda match: match[0] + text, old))


def name_method(room, line, after):
    """Add an import and one line to METHODS."""
    methods, name = room / "qbheat_jax/methods/__init__.py", line.rpartition(" ")[2]
    insert(methods, r"\nfrom qbheat_jax.errors import [^\n]*\n", f"{line}\n")
    insert(methods, rf"\n        {after},\n", f"        {name},\n")


def python(room, *arguments):
    """Run a module of the copy, and return what it prints."""
    command = [sys.executable, "-m", *map(str, arguments)]
    got = subprocess.run(command, cwd=room, env={**os.environ, "PYTHONPATH": str(room)}, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout + got.stderr
    return got.stdout


def test_an_encoder_a_method_and_a_data_set_are_a_file_and_a_line_each(small_config_file, tmp_path):
    new = "qbheat_jax/models/cobble.py", "qbheat_jax/methods/twins.py", "qbheat_jax/data/sources/stripes.py"
    assert [len(steps(f"Add {what}")) for what in ("an encoder", "a method", "a data set")] == [3, 3, 3]
    copy(tmp_path, *new)
    registry = tmp_path / "qbheat_jax/models/registry.py"
    insert(registry, r"\nfrom qbheat_jax.errors import [^\n]*\n", "from qbheat_jax.models.cobble import Cobble\n")
    insert(registry, r"\nENCODERS = \{\n", block("qbheat_jax/models/registry.py"))
    name_method(tmp_path, "from qbheat_jax.methods.twins import Twins", "Supervised")
    insert(
        tmp_path / "qbheat_jax/data/sources/__init__.py",
        r"\n    kind = spec.partition\(\":\"\)\[0\]\n",
        block("qbheat_jax/data/sources/__init__.py"),
    )
    fields = {
        "encoder.name": "cobble", "objective": "twins", "twins.momentum": 0.9, "data.source": "stripes",
        "data.eval_split": "test", "total_steps": 2,
    }  # fmt: skip
    given = [f"--config.{key}={value}" for key, value in fields.items()]
    command = ["pretrain", "--config", small_config_file, "--workdir", tmp_path / "run", *given]
    assert json.loads(python(tmp_path, "qbheat_jax", *command))["step"] == 2


def test_a_dense_probe_is_five_files_whose_test_passes(tmp_path):
    files = steps("Add a probe")
    assert len(files) == 5
    copy(tmp_path, *(path for path in files if path != "qbheat_jax/methods/__init__.py"))
    name_method(tmp_path, "from qbheat_jax.methods.foreground import Foreground", "Detr")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    said = python(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_methods_foreground.py")
    assert "2 passed" in said
