"""The notebook of the quickstart: it has no outputs, its commands are understood, and all of its cells run."""

import ast
import json
import re
import shlex
import time
from pathlib import Path

import pytest

from qbheat_jax import cli

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    """[(kind, source), ...] of the notebook."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(PATH.read_text())["cells"]]


def test_it_is_committed_without_outputs():
    notebook = json.loads(PATH.read_text())
    for cell in notebook["cells"]:
        assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None)


def test_its_commands_are_understood_and_its_code_is_python(cells):
    code = [text for kind, text in cells if kind == "code"]
    shell = [line for kind, text in cells for line in text.splitlines() if re.match("qbheat [a-z]", line)]
    assert len(shell) == 3
    lines = [line.removeprefix("qbheat ") for line in shell]
    for node in (node for text in code for node in ast.walk(ast.parse(text.replace(";", "")))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "qbheat":
            lines.append(eval(ast.unparse(node.args[0]), {"STEPS": 1}))
    assert len(lines) == 5
    for line in lines:
        arguments = cli._parser().parse_args(cli.split_overrides(shlex.split(line, comments=True))[0])
        configs = getattr(arguments, "config", None) or []
        assert all((ROOT / config).exists() for config in ([configs] if isinstance(configs, str) else configs))


def test_its_links_resolve(cells):
    links = re.findall(r"\]\(([^)]+)\)", "".join(text for kind, text in cells if kind == "markdown"))
    assert links and all((PATH.parent / link).exists() for link in links)


@pytest.mark.weekly
def test_it_runs_in_four_minutes(tmp_path):
    """As it is committed, in a kernel of its own, beside a copy of the configs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook, start = nbformat.read(PATH, as_version=4), time.perf_counter()
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert time.perf_counter() - start < 240
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 3
    said = "".join(out.get("text", "") for out in outputs)
    top1 = {name: float(value) for name, value in re.findall(r"^\| lin +\| (\S+) +\| (0\.\d+)", said, re.MULTILINE)}
    assert top1["runs/notebook"] > top1["random"] > 0.05
