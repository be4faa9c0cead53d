"""A model card: the short README.md that stands beside weights."""

import re

from qbheat_jax import methods, pytree

LICENCE = "Licence: (to be filled in; the weights' own, which is not this package's)"


def text(title, model, facts, usage):
    """The card. `model`: api.Model; `facts`: (words, value) rows after its own; `usage`: Markdown on how to load it."""
    config, pixels = model.config, model.objective.pixels
    channels = ", ".join(
        f"{name} {m:.4g} +- {s:.4g}" for name, m, s in zip(("red", "green", "blue"), pixels.mean, pixels.std)
    )
    count = classes(config)
    rows = [
        (
            "architecture",
            f"`{config.encoder.name}`, {model.encoder.stride} pixels a cell, {model.encoder.width} channels",
        ),
        ("parameters", f"{parameters(model.variables['params']):,}"),
        ("classifier", f"{count:,} classes" if count else "none: features only"),
        ("input", f"RGB images of {config.image_size} x {config.image_size} pixels"),
        ("normalisation", f"pixels on the 0..1 scale, less the mean, over the deviation: {channels}"),
        *facts,
    ]
    table = "\n".join(f"| {words} | {value} |" for words, value in rows)
    return f"# {title}\n\n| | |\n|---|---|\n{table}\n\n{LICENCE}\n\n{usage.strip()}\n"


def classes(config):
    """Of the classifier; 0 without one."""
    return config.head.classes if methods.of(config).classifies else 0


def parameters(params):
    """Numbers in the encoder and, where there is one, its classifier."""
    return sum(pytree.count(params[part]) for part in ("encoder", "head") if part in params)


def write(path, card):
    """Writes a card over an older one of the same file, whose licence line, if it was filled in, is kept."""
    if path.exists():
        filled = re.search(r"^Licence:.*$", path.read_text(), re.MULTILINE)
        card = card.replace(LICENCE, filled.group(0)) if filled else card
    path.write_text(card)


def place(target):
    """Where the card of a file goes: README.md of its directory, or NAME.md beside it where that is about another."""
    readme = target.with_name("README.md")
    if not readme.exists() or readme.read_text(errors="replace").startswith(f"# {target.name}\n"):
        return readme
    return target.with_name(f"{target.name}.md")
