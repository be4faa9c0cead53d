"""--init: every command takes what it documents and refuses everything else by the flag, the value and what it takes."""

import pytest

from qbheat_jax import analysis, api, pretrained
from qbheat_jax import config as config_lib
from qbheat_jax.analysis.fields import ANALYSE
from qbheat_jax.errors import UserError
from qbheat_jax.probe import encoders
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.tasks import classify, detect, finetune, pretrain, probe
from qbheat_jax.train import config_tables
from tests.test_tasks_classify import encoder, model  # noqa: F401

GIVEN = {"data.source": "synthetic:8", "image_size": 32}


def of(table, init=None, **fields):
    """A config of a table; fields whose names have no dot are keywords."""
    return config_lib.resolve({**GIVEN, **fields, **({} if init is None else {"init": init})}, table)


COMMANDS = {
    "pretrain": lambda init, place: pretrain.run(
        of(config_tables.PRETRAIN, init, image_size=64, batch_size=8, total_steps=1), place
    ),
    "finetune": lambda init, place: finetune.run(of(config_tables.FINETUNE, init, total_steps=1), place),
    "detect": lambda init, place: detect.run(of(config_tables.DETECT, init, total_steps=1), place),
    "probe": lambda init, place: probe.run(of(PROBE), place, init),
    "analyse": lambda init, place: analysis.run(of(ANALYSE), place, init),
    "classify": lambda init, place: classify.dataset(init, "synthetic:8", workdir=place),
}
WORDS = {"probe": ("random", "pixels", "histogram"), "classify": ()}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_does_not_take_is_refused(command, tmp_path):
    accepted = WORDS.get(command, ("random",))
    for init in ("", "random", "pixels", "histogram", "nowhere", str(tmp_path)):
        if init in accepted or (command == "pretrain" and not init):
            continue
        with pytest.raises(UserError) as caught:
            COMMANDS[command](init, tmp_path / "w")
        text = str(caught.value)
        assert caught.value.exit_code == 2 and not (tmp_path / "w").exists()
        assert "init" in text.split(init or "''")[0] and init in text, text
        assert all(word in text for word in accepted) and "directory of a run or ported checkpoint" in text


def test_words_and_directories_resolve_alike(model):  # noqa: F811
    config = of(PROBE, **{"encoder.name": "pebble"})
    for word in ("random", "pixels", "histogram"):
        found = pretrained.resolve(word, config, (word,))
        assert (found.model, found.source, found.image_size) == (None, "synthetic:8", 32)
        assert encoders.open_init(word, config).image_size == 32
    found = pretrained.resolve(model, of(PROBE, image_size=64))
    assert found.model.config.head.classes == 7 and (found.image_size, found.name) == (64, str(model))
    assert encoders.open_init(str(model), of(PROBE, image_size=64)).model.config.image_size == 64


def test_a_model_is_read_once(model, monkeypatch):  # noqa: F811
    opened = []

    class Counted(api.Checkpoints):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)

        def close(self):
            super().close()
            opened.append("closed")

    monkeypatch.setattr(api, "Checkpoints", Counted)
    pretrained.resolve(model, of(PROBE))
    assert len(opened) == 2 and opened[1] == "closed"
