"""The walk-throughs of CONTRIBUTING.md, followed in a copy of the package: three files each, then one run with all of it."""

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


def insert(path, after, text):
    """Put `text` behind the one place of the file that matches `after`."""
    old = path.read_text()
    assert len(re.findall(after, old)) == 1
    path.write_text(re.sub(after, lambda match: match[0] + text, old))


def test_an_encoder_a_method_and_a_data_set_are_a_file_and_a_line_each(small_config_file, tmp_path):
    shutil.copytree(ROOT / "qbheat_jax", tmp_path / "qbheat_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("qbheat_jax/models/cobble.py", "qbheat_jax/methods/twins.py", "qbheat_jax/data/sources/stripes.py"):
        assert not (ROOT / path).exists()
        (tmp_path / path).write_text(block(path))
    # As the steps say: an import and a line.
    registry, methods = tmp_path / "qbheat_jax/models/registry.py", tmp_path / "qbheat_jax/methods/__init__.py"
    insert(registry, r"\nfrom qbheat_jax.errors import [^\n]*\n", "from qbheat_jax.models.cobble import Cobble\n")
    insert(registry, r"\nENCODERS = \{\n", block("qbheat_jax/models/registry.py"))
    insert(methods, r"\nfrom qbheat_jax.errors import [^\n]*\n", "from qbheat_jax.methods.twins import Twins\n")
    insert(methods, r"\n        Supervised,\n", "        Twins,\n")
    insert(
        tmp_path / "qbheat_jax/data/sources/__init__.py",
        r"\n    kind = spec.partition\(\":\"\)\[0\]\n",
        block("qbheat_jax/data/sources/__init__.py"),
    )
    command = [
        sys.executable,
        "-m",
        "qbheat_jax",
        "pretrain",
        "--config",
        small_config_file,
        "--workdir",
        tmp_path / "run",
    ]
    fields = {
        "encoder.name": "cobble", "objective": "twins", "twins.momentum": 0.9, "data.source": "stripes",
        "data.eval_split": "test", "total_steps": 2,
    }  # fmt: skip
    command += [f"--config.{key}={value}" for key, value in fields.items()]
    got = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout)["step"] == 2
