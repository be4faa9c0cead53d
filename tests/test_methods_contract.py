"""A method owns everything about itself: a new one needs its class and one registration, and no other room names one."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qbheat_jax
from qbheat_jax import config as config_lib
from qbheat_jax import device_mesh, methods, pytree
from qbheat_jax.config import BELOW_ONE, Field
from qbheat_jax.data.specs.views import ViewsSpec
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.methods import base
from qbheat_jax.methods.common import encoding
from qbheat_jax.methods.common.ema import ema_update
from qbheat_jax.ops import images
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import config_tables, optim, sharding, state
from tests.conftest import SMALL

# --- A method of our own ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Twins(base.Method):
    """One view's features are to point where a teacher's features of another view point. The teacher is an EMA of the encoder.

    Its momentum rises linearly from `momentum` to 1 over the run.
    """

    encoder: Any
    schedule: base.Schedule
    momentum: float = 0.9
    pixels: images.Pixels = images.Pixels()

    NAME = "twins"
    TITLE = "Twins"
    STORY = "The encoder predicts its own moving average across two views. No labels are used."
    FIELDS = {"twins.momentum": Field(0.9, "of the teacher at the first step", BELOW_ONE)}
    sharded_like_params = ("teacher",)

    @classmethod
    def check(cls, values):
        if values["accumulate"] > 1:
            config_lib.refuse("accumulate", values["accumulate"], "1 with objective='twins'")

    @classmethod
    def build(cls, config, encoder, schedule):
        return cls(encoder, schedule, config.twins.momentum, images.PIXELS[config.pixels])

    @classmethod
    def batch_spec(cls, config):
        return ViewsSpec.of(config, views=2)

    def init(self, rng, batch):
        encoder = self.encoder.init(rng, self.pixels.normalise(batch["image"][:1]))
        stats = {"encoder": encoder["batch_stats"]} if "batch_stats" in encoder else {}
        variables = self.init_copies({"params": {"encoder": encoder["params"]}, "batch_stats": stats})
        variables["batch_stats"]["steps"] = jnp.zeros((), jnp.int32)
        return variables

    def init_copies(self, variables):
        params, kept = variables["params"], dict(variables["batch_stats"])
        kept["teacher"] = jax.tree.map(jnp.copy, encoding.variables(params, kept))
        return {"params": params, "batch_stats": kept}

    def loss(self, params, state, batch, rng, train=True):
        first, second = (self.pixels.normalise(batch[name]) for name in ("image", "image2" if train else "image"))
        if train:
            done = state["steps"] / self.schedule.total_steps
            momentum = 1 - (1 - self.momentum) * (1 - done)
            known = jax.lax.stop_gradient(encoding.variables(params, state))
            teacher = ema_update(state["teacher"], known, momentum)
            state = {**state, "teacher": teacher, "steps": state["steps"] + 1}
        features, out, state = encoding.encode(self.encoder, params, state, first, rng, train)
        seen = encoding.pooled(features, out)
        wanted = jax.lax.stop_gradient(encoding.pooled(*self.encoder.apply(state["teacher"], second)))
        cosine = (seen * wanted).sum(-1) / (jnp.linalg.norm(seen, axis=-1) * jnp.linalg.norm(wanted, axis=-1) + 1e-6)
        weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        return ((1 - cosine) * weight).sum(), (state, {"cosine": (cosine * weight).sum()})


@pytest.fixture
def twins(monkeypatch):
    """The one registration, and the table that an import would then put together."""
    monkeypatch.setitem(methods.METHODS, Twins.NAME, Twins)
    for key, field in config_tables.pretrain().items():
        monkeypatch.setitem(config_tables.PRETRAIN, key, field)


def config_of(**fields):
    return config_tables.resolve({**SMALL, "objective": "twins", "total_steps": 3, **fields})


def test_a_new_method_trains_with_its_teacher_sharded_like_its_parameters(twins, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)  # so that even this small net is split
    made = []
    create = state.create
    monkeypatch.setattr(state, "create", lambda *args: made.append(create(*args)) or made[0])
    config = config_of(**{"mesh.data": 4, "mesh.fsdp": 2})
    summary = pretrain.run(config, tmp_path)
    assert summary["steps_run"] == 3 and np.isfinite(summary["val/loss"]) and -1 <= summary["val/cosine"] <= 1

    ((_, where),) = made
    ours, teachers = (
        dict(pytree.names(tree)) for tree in (where.params["encoder"], where.batch_stats["teacher"]["params"])
    )
    assert {name: s.spec for name, s in ours.items()} == {name: s.spec for name, s in teachers.items()}
    assert any("fsdp" in s.spec for s in teachers.values())
    assert all(s.is_fully_replicated for s in jax.tree.leaves(where.batch_stats["teacher"]["batch_stats"]))

    model = qbheat_jax.load(tmp_path)
    kept = model.variables["batch_stats"]
    assert int(kept["steps"]) == 3 and model.config.twins.momentum == 0.9
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (kept["teacher"]["params"], model.variables["params"])))
    ]
    assert 0 < max(moved) < 1  # it follows, at a distance


def test_a_teacher_of_a_vit_is_split_over_heads_too(twins, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)
    config = config_of(**{"encoder.name": "vit_micro"})
    method = methods.build(config, optim.run_schedule(config, 64))
    mesh = device_mesh.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shapes = methods.batch_spec(config).shapes(16)
    abstract = state.abstract(method, optim.optimizer(config, lambda step: 1e-3), shapes)
    where = sharding.shardings(abstract, mesh, like_params=method.sharded_like_params)
    ours, teachers = (pytree.names(tree) for tree in (where.params["encoder"], where.batch_stats["teacher"]["params"]))
    assert [(name, s.spec) for name, s in ours] == [(name, s.spec) for name, s in teachers]
    assert {axis for _, s in teachers for axis in s.spec} == {None, "fsdp", "model"}


def test_a_method_is_told_how_long_the_run_is(twins):
    config = config_of()
    _, method, _ = pretrain.prepare(config)
    assert method.schedule == base.Schedule(total_steps=3, steps_per_epoch=4.0)
    epochs = config_of(total_steps=None, total_epochs=2.5)
    assert pretrain.prepare(epochs)[1].schedule == base.Schedule(10, 4.0)
    assert methods.build(epochs).schedule == base.Schedule()
    assert optim.run_schedule(epochs) == base.Schedule() and optim.run_schedule(config) == base.Schedule(3)


def test_a_methods_own_check_refuses_before_anything_is_built(twins):
    with pytest.raises(UserError, match="accumulate=2") as caught:
        config_of(accumulate=2)
    assert caught.value.exit_code == BAD_INPUT
    with pytest.raises(UserError, match="moco.queue=40 .*batch_size=16"):
        config_tables.resolve({**SMALL, "objective": "moco", "moco.queue": 40})
    assert config_tables.resolve({**SMALL, "moco.queue": 40}).moco.queue == 40  # of another method it does not matter


def test_two_methods_share_a_field_only_as_one_object(monkeypatch):
    class Other(Twins):
        NAME = "other"
        FIELDS = {"hog": Field(0.0, "another hog")}

    monkeypatch.setitem(methods.METHODS, "other", Other)
    with pytest.raises(ValueError, match="hog"):
        methods.fields(base.PRETRAIN)


# --- Every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_declares_what_it_is(name):
    method = methods.METHODS[name]
    assert method.NAME == name and method.TITLE and method.STORY and issubclass(method, base.Method)
    table = config_tables.of({"objective": name})
    assert set(method.FIELDS) <= set(table) and name in table["objective"].accept
    assert all(table[key] is field for key, field in method.FIELDS.items())


# --- No other room names one -----------------------------------------------------------------------------------------

ROOT = Path(qbheat_jax.__file__).parent
NAMED = re.compile(rf"""([=!]=|\bin)\s*\(?\s*["']({"|".join(methods.METHODS)})["']""")
# Jobs of a check on a GPU: one a method, by its name.
TABLES_ALLOWED = {"tools/gpu_check/objectives.py"}


def strings(node):
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_compares_a_methods_name(path):
    place = str(path.relative_to(ROOT))
    if place.startswith("methods/"):
        pytest.skip("where they are at home")
    for node in ast.walk(ast.parse(path.read_text())):
        found = set()
        if isinstance(node, ast.Compare):
            literals = (
                n
                for n in (node.left, *node.comparators)
                if isinstance(n, ast.Constant | ast.Tuple | ast.List | ast.Set)
            )
            found = set().union(*map(strings, literals)) & set(methods.METHODS)
        elif isinstance(node, ast.MatchValue):
            found = strings(node) & set(methods.METHODS)
        elif isinstance(node, ast.Dict) and place not in TABLES_ALLOWED:  # a table with a row a method
            keys = set().union(*(strings(key) for key in node.keys if isinstance(key, ast.Constant)))
            found = keys & set(methods.METHODS) if len(keys & set(methods.METHODS)) > 1 else set()
        assert not found, f"{place}:{node.lineno} names {found}: let the method say it"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.j2")), ids=lambda path: path.name)
def test_no_template_compares_a_methods_name(path):
    assert not NAMED.search(path.read_text())


def test_the_walk_finds_a_comparison():
    assert NAMED.search("{% if config.objective == 'moco' %}") and NAMED.search('in ("dense", "detr")')
