"""Every file of configs/ resolves and builds, and so does every command of their docstrings and of the documentation."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from qbheat_jax import cli, methods, pretrained
from qbheat_jax import config as config_lib
from qbheat_jax.models import registry
from qbheat_jax.ops import quarters
from qbheat_jax.probe import encode
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.train import optim
from qbheat_jax.train.config_tables import DETECT, FINETUNE, PRETRAIN

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in (".", "detect", "segment") for path in (ROOT / "configs" / folder).glob("*.py"))
TABLES = {"pretrain": PRETRAIN, "probe": PROBE, "finetune": FINETUNE, "detect": DETECT}
IMAGENET = 1_281_167


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def commands(text):
    """[(command, its config files, its overrides as pairs), ...] of the lines of a text that are `qbheat COMMAND ...`."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        words = shlex.split(line.strip()) if re.match(r"( {4})?qbheat (\w+) ", line) else []
        if not words or words[1] not in TABLES or "--config" not in words:
            continue
        files = words[words.index("--config") + 1 :]
        files = files[: next((n for n, word in enumerate(files) if word.startswith("--")), len(files))]
        found.append((words[1], files, overrides(words)))
    return found


def overrides(words):
    return cli.split_overrides(words)[1]


def check(command, path, changes=()):
    """The resolved config; UserError where it, or what is built from it, cannot be."""
    config = config_lib.load(path, changes, TABLES[command])
    if command == "pretrain":
        if config.objective == "supervised":
            config = config_lib.load(path, [*changes, ("head.classes", "10")], PRETRAIN)
        methods.build(config)
    elif command == "detect":
        fields = {"encoder.name": config.encoder.name or "mobilenet_v2", "image_size": config.image_size or 256}
        methods.build(pretrained.with_fields(config, {**fields, "detector.classes": 3}, DETECT))
    elif config.encoder.name:  # otherwise --init brings it
        assert config.encoder.name in registry.names()
    return config


def test_there_are_the_configs_of_every_experiment():
    names = {path.stem for path in FILES}
    assert {"folder", "lin", "tran1", "tran4", "knn", "finetune"} <= names
    assert {f"imagenet_{name}" for name in ("w720", "w1440", "w2880", "resnet50", "vit_b16")} <= names
    for name in ("photos", "cifar10"):
        assert {name, f"{name}_lin", f"{name}_tran1", f"{name}_knn"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_what_its_docstring_says(path):
    """It says which command takes it, and that command does, as it is and with what the docstring has to set."""
    text = docstring(path)
    own = [(command, changes) for command, files, changes in commands(text) if str(path.relative_to(ROOT)) in files]
    assert own, "the docstring gives no command"
    for command, changes in own:
        check(command, path, changes)
    # Overrides that stand alone, indented or in backquotes, are for the same command.
    alone = re.findall(r"^ {4}(--config\..*)$", text, re.M) + re.findall(r"`(--config\.[^`]*)`", text)
    for changes in map(overrides, map(shlex.split, alone)):
        check(own[0][0], path, [change for change in changes if not re.fullmatch("[A-Z]+", change[1])])


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = [
    (page.relative_to(ROOT), command, file, changes)
    for page in PAGES
    for command, files, changes in commands(page.read_text())
    for file in files
]


@pytest.mark.parametrize(
    "page, command, file, changes", SHOWN, ids=lambda part: str(part) if isinstance(part, Path) else ""
)
def test_the_commands_of_the_documentation_resolve(page, command, file, changes):
    check(command, ROOT / file, changes)


def test_lin_trains_sixteen_rates_at_once():
    for optimizer in ("sgd", "lars"):
        config = config_lib.load(ROOT / "configs" / "lin.py", [("optimizer", optimizer)], PROBE)
        assert len(set(config.learning_rates)) >= 16 and config.optimizer == optimizer
        assert config.protocol in encode.POOLED


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("imagenet")], ids=lambda path: path.stem
)
@pytest.mark.parametrize("epochs", [100, 300, 800])
def test_the_lengths_of_imagenet(path, epochs):
    config = config_lib.load(path, [("total_epochs", str(epochs))], PRETRAIN)
    steps = optim.total_steps(config, IMAGENET)
    assert steps == epochs * IMAGENET // config.batch_size
    assert 0 < optim.duration(config, "warmup", steps, IMAGENET) < steps / 2
    assert config.dtype == "bfloat16"
    if config.objective == "qbheat":
        cells = config.image_size // methods.build(config).encoder.stride
        quarters.check_grid(cells, cells, quarters.PLACEMENT_SETS[config.quarter.placements])
        assert cells == 16


# Of the official recipes: peak, start and end of the rate, weight decay, drop path, EMA, and the rate after 20 epochs over the
# peak.
RECIPES = {
    "vheat_t": (2e-3, 2e-6, 2e-5, 0.08, 0.1, 0.9999, 1.0),
    "hcnet_t": (2e-3, 1e-6, 1e-5, 0.05, 0.2, 0.0, 0.9891),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_supervised_recipes_are_the_official_ones(name):
    config = config_lib.load(ROOT / "configs" / f"imagenet_{name}.py", [], PRETRAIN)
    peak, start, end, decay, drop_path, ema, begun = RECIPES[name]
    rate = optim.schedule(config, optim.total_steps(config, IMAGENET), IMAGENET)
    warm = optim.duration(config, "warmup", config.total_steps, IMAGENET)
    assert optim.peak_learning_rate(config) == pytest.approx(peak) and config.total_epochs == 300
    found = [float(rate(step)) for step in (0, warm, optim.total_steps(config, IMAGENET))]
    assert found == pytest.approx([start, begun * peak, end], rel=1e-3)
    assert (config.weight_decay, config.encoder.drop_path, config.ema) == (decay, drop_path, ema)
    assert (config.adam_b1, config.adam_b2, config.adam_eps, config.clip_norm) == (0.9, 0.999, 1e-8, 5.0)
    assert config.supervised.to_dict() == dict(
        label_smoothing=0.1, colour_jitter=0.0, mixup=0.8, cutmix=1.0, rand_augment=9.0, erasing=0.25
    )
    assert config.image_size == 224 and config.data.crop_scale == (0.08, 1.0) and config.data.flip
