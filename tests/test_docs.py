"""The documentation against the code: links, files and commands that it names exist; it has the shape that it should have."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import qbheat_jax
from qbheat_jax import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
RESULTS = [page for page in PAGES if page.parent.name == "results" and page.name != "index.md"]


def name(path):
    return str(path.relative_to(ROOT))


def without_code(text):
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text):
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-") for title in titles}


def shell_lines(text):
    """Lines of the text's shell blocks, continued lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from re.sub(r"\\\n\s*", "", block).splitlines()


COMMANDS = [
    (name(path), line) for path in TEXTS for line in shell_lines(path.read_text()) if line.startswith("qbheat ")
]
SCRIPTS = {
    script for path in TEXTS for script in re.findall(r"(?<![\w/])(?:launch|\.ci)/\w+(?:\.sh)?", path.read_text())
}


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_relative_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text()), target


@pytest.mark.parametrize("page, line", COMMANDS, ids=lambda text: text[:60])
def test_commands_are_understood(page, line):
    """By the parser of the command line; that their configs resolve is tested in test_configs.py."""
    words, _ = cli.split_overrides(shlex.split(line, comments=True)[1:])
    arguments = cli._parser().parse_args(words)
    configs = getattr(arguments, "config", None) or []
    for config in [configs] if isinstance(configs, str) else configs:
        assert (ROOT / config).exists()


def test_every_command_is_shown():
    shown = {shlex.split(line, comments=True)[1] for _, line in COMMANDS}
    (commands,) = (action.choices for action in cli._parser()._actions if action.choices)
    assert shown == set(commands)


def test_scripts_exist():
    assert SCRIPTS and all((ROOT / script).exists() for script in SCRIPTS)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_files_named_in_the_text_exist(path):
    for text in re.findall(r"`((?:configs|qbheat_jax|tests|docs|launch)/[\w/.-]+\.\w+)`", path.read_text()):
        new = path.name == "CONTRIBUTING.md" and re.search(
            r"cobble|twins|stripes|NAME|foreground|encoder\.py|base\.py|evaluate\.py", text
        )
        assert new or (ROOT / text).exists(), text


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml")

    def leaves(node):
        if isinstance(node, str):
            return [node]
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == [str(page.relative_to(ROOT / "docs")) for page in PAGES]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_a_result_has_a_question_a_table_a_command_and_the_hardware(path):
    text = path.read_text()
    assert re.match(r"# .*\?\n", text)
    assert re.search(r"^\|---", text, re.MULTILINE) and "**Hardware.**" in text
    assert any(re.match("qbheat |bash launch/", line) for line in shell_lines(text))


def test_versions_agree():
    version = qbheat_jax.__version__
    assert re.search(
        rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_package_is_type_checked_and_its_public_api_is_annotated():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["files"] == ["qbheat_jax"]
    assert {"qbheat_jax.api", "qbheat_jax.errors"} <= set(mypy["overrides"][0]["module"])
