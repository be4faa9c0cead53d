"""MkDocs hook: replace each line `{{ fields: NAME }}` of a page by the table of config fields of a command."""

import re

from qbheat_jax.analysis.fields import ANALYSE
from qbheat_jax.config import KINDS, UNITS
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.train import config_tables

TABLES = {
    "pretrain": config_tables.PRETRAIN,
    "finetune": config_tables.FINETUNE,
    "detect": config_tables.DETECT,
    "probe": PROBE,
    "analyse": ANALYSE,
}


def on_page_markdown(markdown, **_):
    """Return the page with its tables."""
    return re.sub(r"^\{\{ fields: (\w+) \}\}$", lambda match: table(TABLES[match[1]]), markdown, flags=re.MULTILINE)


def table(fields):
    """Return the Markdown table of {dotted key: Field}."""
    lines = ["| field | default | takes | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        doc = field.doc + (f" (also `{key}_{UNITS[0]}`, `_{UNITS[1]}`, `_{UNITS[2]}`)" if field.duration else "")
        cells = (f"`{key}`", f"`{_value(field.default)}`", _takes(field), doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _value(value):
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _takes(field):
    if not field.accept:
        return KINDS[field.type or type(field.default)]
    if callable(field.accept[0]):
        return field.accept[1]
    return ", ".join(f"`{choice}`" for choice in field.accept)
