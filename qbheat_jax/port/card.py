"""Model cards: the short README.md beside weights."""

import re

from qbheat_jax import methods, pytree

LICENCE = "Licence: (to be filled in; the weights' own, which is not this package's)"


def text(title, model, facts, usage):
    """Return the card's Markdown. `facts`: further (label, value) rows; `usage`: Markdown on loading the file."""
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
    """Return the number of classes of the classifier; 0 without one."""
    return config.head.classes if methods.of(config).classifies else 0


def parameters(params):
    """Return the number of parameters of the encoder and the classifier."""
    return sum(pytree.count(params[part]) for part in ("encoder", "head") if part in params)


def write(path, card):
    """Write a card. Keep the licence line of an older card at `path`."""
    if path.exists():
        filled = re.search(r"^Licence:.*$", path.read_text(), re.MULTILINE)
        card = card.replace(LICENCE, filled.group(0)) if filled else card
    path.write_text(card)


def place(target):
    """Return the path of a file's card: README.md beside it, or NAME.md where that README is about another file."""
    readme = target.with_name("README.md")
    if not readme.exists() or readme.read_text(errors="replace").startswith(f"# {target.name}\n"):
        return readme
    return target.with_name(f"{target.name}.md")
