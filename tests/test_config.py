"""Configs: defaults resolve, files and the command line are read, and every mistake is one sentence that helps."""

import ast
import json
import math
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from qbheat_jax import config as config_lib
from qbheat_jax import methods
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.ops import heat, quarters
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.train import config_tables
from qbheat_jax.train.config_tables import PRETRAIN

BASE = {"total_steps": 10}
FIELDS = [(name, key) for name, fields in (("PRETRAIN", PRETRAIN), ("PROBE", PROBE)) for key in fields]
TABLES = {"PRETRAIN": (PRETRAIN, BASE), "PROBE": (PROBE, {})}


def kind(field):
    return field.type or type(field.default)


CHOICES = [
    (t, k)
    for t, k in FIELDS
    if kind(TABLES[t][0][k]) is str and TABLES[t][0][k].accept and not callable(TABLES[t][0][k].accept[0])
]


def refusal(function, *args):
    """The one line of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        function(*args)
    assert caught.value.exit_code == BAD_INPUT and "\n" not in str(caught.value)
    return str(caught.value)


def write(tmp_path, body, name="config.py"):
    path = tmp_path / name
    path.write_text(body)
    return str(path)


def from_file(tmp_path, *overrides, body="def get_config():\n    return {'total_steps': 10}\n", fields=PRETRAIN):
    return config_lib.load(write(tmp_path, body), overrides, fields)


def test_the_engine_knows_no_field():
    """It imports no room; every table is put together above it."""
    tree = ast.parse(Path(config_lib.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.startswith("qbheat_jax")} == {"qbheat_jax.errors"}


# --- Defaults -------------------------------------------------------------------------------------------------------


def test_pretrain_defaults_are_those_of_the_method():
    config = config_tables.resolve(BASE)
    assert set(config_lib.flatten(config)) == set(PRETRAIN)
    assert config.total_steps == 10 and config.total_epochs is None
    assert (config.image_size, config.batch_size, config.seed) == (256, 1024, 0)
    assert (config.learning_rate, config.weight_decay, config.adam_b1, config.adam_b2) == (1.5e-4, 0.05, 0.9, 0.95)
    assert config.heat.to_dict() == dict(propagator="offset", directions="untied", norm="none", init_scale=0.0)
    assert (config.decoder.width, config.decoder.depth, config.decoder.heads) == (512, 4, 8)
    assert (config.quarter.placements, config.loss_on, config.norm_pix) == ("corners_center", "masked", False)
    assert config.data.crop_scale == (0.2, 1.0) and config.mesh.to_dict() == {"data": -1, "fsdp": 1, "model": 1}


def test_probe_defaults_resolve():
    config = config_lib.resolve({}, PROBE)
    assert set(config_lib.flatten(config)) == set(PROBE)
    assert (config.protocol, config.optimizer, config.learning_rates) == ("lin", "sgd", (0.1,))


def test_choices_are_those_of_the_code_that_takes_them():
    assert PRETRAIN["heat.propagator"].accept == heat.PROPAGATORS
    assert PRETRAIN["heat.directions"].accept == heat.DIRECTIONS
    assert PRETRAIN["heat.norm"].accept == heat.NORMS
    assert PRETRAIN["quarter.placements"].accept == tuple(quarters.PLACEMENT_SETS)
    assert heat.Heat(**config_tables.resolve(BASE).heat.to_dict()) == heat.Heat()


@pytest.mark.parametrize("placements", PRETRAIN["quarter.placements"].accept)
@pytest.mark.parametrize("dtype", PRETRAIN["dtype"].accept)
def test_choices_build(placements, dtype):
    encoder = {"encoder.name": "resnet18", "encoder.stride": 16, "image_size": 64}
    given = BASE | encoder | {"quarter.placements": placements, "dtype": dtype}
    objective = methods.build(config_tables.resolve(given))
    assert objective.decoder.placements == quarters.PLACEMENT_SETS[placements]


def test_config_is_locked():
    config = config_tables.resolve(BASE)
    with pytest.raises(AttributeError):
        config.batchsize = 3
    with pytest.raises(AttributeError):
        config.heat.propagators = "exp"


# --- Every field ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table,key", FIELDS)
def test_every_field_refuses_other_types(table, key):
    fields, base = TABLES[table]
    field = fields[key]
    takes, wrong = {
        int: ("a whole number", [True, 1.5, "3", [1]]),
        float: ("a number", [True, "0.1", math.nan, math.inf]),
        bool: ("True or False", [1, "True", [True]]),
        str: ("text", [3, True, ["a"]]),
        tuple: ("a list of numbers", [0.5, "0.5", True]),
    }[kind(field)]
    for value in wrong if field.default is None else [*wrong, None]:
        message = refusal(config_lib.resolve, base | {key: value}, fields)
        assert message == f"config field {key}={value!r} is not accepted: it takes {takes}"


@pytest.mark.parametrize("table,key", [(t, k) for t, k in FIELDS if kind(TABLES[t][0][k]) in (int, float)])
def test_every_number_has_a_range(table, key):
    fields, base = TABLES[table]
    value = kind(fields[key])(-5)
    message = refusal(config_lib.resolve, base | {key: value}, fields)
    assert message.startswith(f"config field {key}={value!r} is not accepted: it takes a number")


@pytest.mark.parametrize("table,key", CHOICES)
def test_every_choice_is_spelt_out(table, key):
    fields, base = TABLES[table]
    message = refusal(config_lib.resolve, base | {key: "wave"}, fields)
    choices = ", ".join(repr(c) for c in fields[key].accept)
    assert message == f"config field {key}='wave' is not accepted: it takes one of {choices}"
    for choice in fields[key].accept:
        needs = {"weight_decays": (1.0,)} if choice == "ridge" else {}
        assert config_lib.flatten(config_lib.resolve(base | needs | {key: choice}, fields))[key] == choice


@pytest.mark.parametrize("table,key", FIELDS)
def test_every_field_says_what_it_is(table, key):
    assert TABLES[table][0][key].doc


@pytest.mark.parametrize(
    "key,value,takes",
    [
        ("data.max_bad_fraction", 1.1, "a number from 0 to 1"),
        ("encoder.drop_path", 1.0, "a number from 0 to below 1"),
        ("adam_b2", 1.0, "a number from 0 to below 1"),
        ("adam_eps", 0.0, "a number above 0"),
        ("learning_rate_end", 2e-4, "a number that is at most learning_rate=0.00015"),
        ("supervised.rand_augment", 10.5, "a number from 0 to 10"),
        ("supervised.erasing", 1.5, "a number from 0 to 1"),
        ("supervised.mixup", -1.0, "a number that is at least 0"),
        ("batch_size", 0, "a number above 0"),
        ("image_size", 0, "a number above 0"),
        ("learning_rate", 0.0, "a number above 0"),
        ("total_steps", 0, "a number above 0"),
        ("data.prefetch", 0, "a number that is at least 1"),
        ("weight_decay", -0.1, "a number that is at least 0"),
        ("mesh.data", 0, "a number of devices, or -1 for all that are left"),
        ("mesh.fsdp", -2, "a number of devices, or -1 for all that are left"),
        ("data.crop_ratio", (0.5,), "two numbers, low and high, 0 < low <= high"),
        ("data.crop_ratio", (0.5, 0.2), "two numbers, low and high, 0 < low <= high"),
        ("data.crop_ratio", (0.0, 1.0), "two numbers, low and high, 0 < low <= high"),
        ("data.crop_scale", ("a", "b"), "numbers"),
        ("data.crop_scale", (True, 1.0), "numbers"),
        ("warmup_epochs", -1.0, "a number that is at least 0"),
        ("warmup_percent", "5", "a number"),
    ],
)
def test_values_out_of_range(key, value, takes):
    message = refusal(config_lib.resolve, BASE | {key: value}, PRETRAIN)
    if isinstance(value, tuple) and takes != "numbers":
        assert message.startswith(f"config field {key}=(") and message.endswith(f" is not accepted: it takes {takes}")
    else:
        assert message == f"config field {key}={value!r} is not accepted: it takes {takes}"


@pytest.mark.parametrize("value", [(), (0.1, -0.1)])
def test_lists_of_the_probe(value):
    message = refusal(config_lib.resolve, {"learning_rates": value}, PROBE)
    assert message.endswith("is not accepted: it takes one or more numbers, none negative")


def test_whole_numbers_and_lists_are_taken_for_what_they_mean():
    config = config_tables.resolve({"total_epochs": 3, "weight_decay": 0, "data.crop_scale": [1, 1]})
    assert type(config.total_epochs) is type(config.weight_decay) is float
    assert config.data.crop_scale == (1.0, 1.0) and type(config.data.crop_scale) is tuple


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key,meant",
    [
        ("heat.propogator", "heat.propagator"),
        ("batchsize", "batch_size"),
        ("learning_rates", "learning_rate"),
        ("total_step", "total_steps"),
        ("mesh.fdsp", "mesh.fsdp"),
    ],
)
def test_unknown_field_names_the_likeliest(key, meant):
    assert (
        refusal(config_lib.resolve, BASE | {key: 1}, PRETRAIN)
        == f"config field {key} is unknown; did you mean {meant}?"
    )


def test_unknown_field_without_a_likely_one_lists_them():
    message = refusal(config_lib.resolve, BASE | {"zzzz": 1}, PRETRAIN)
    assert message == f"config field zzzz is unknown; there are {', '.join(PRETRAIN)}"


@pytest.mark.parametrize("key", ["batch_size_epochs", "total_steps_percent", "warmup_minutes", "keep_examples"])
def test_only_durations_have_units(key):
    assert refusal(config_lib.resolve, BASE | {key: 1}, PRETRAIN).startswith(f"config field {key} is unknown; ")


@pytest.mark.parametrize("section", ["data", "mesh", "heat"])
@pytest.mark.parametrize("value", ["photos", None, 3])
def test_a_section_is_not_a_value(tmp_path, section, value):
    body = f"def get_config():\n    return {{'total_steps': 10, {section!r}: {value!r}}}\n"
    assert refusal(config_lib.load, write(tmp_path, body), (), PRETRAIN).startswith(f"config field {section} ")


def test_a_value_is_not_a_section(tmp_path):
    body = "def get_config():\n    return {'total_steps': 10, 'batch_size': {'train': 4}}\n"
    assert refusal(config_lib.load, write(tmp_path, body), (), PRETRAIN).startswith(
        "config field batch_size.train is unknown; "
    )


# --- Durations and combinations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["warmup", "log_every", "eval_every", "checkpoint_every"])
@pytest.mark.parametrize("unit", config_lib.UNITS)
def test_durations_in_other_units_take_the_place_of_steps(base, unit):
    flat = config_lib.flatten(config_tables.resolve(BASE | {f"{base}_{unit}": 2}))
    assert flat[f"{base}_{unit}"] == 2.0 and base not in flat


@pytest.mark.parametrize("given", [{"warmup": 3, "warmup_epochs": 1.0}, {"warmup_epochs": 1.0, "warmup": 3}])
def test_a_duration_in_steps_and_in_another_unit(given):
    message = refusal(config_lib.resolve, BASE | given, PRETRAIN)
    assert message.startswith("config field") and "warmup_epochs" in message and "warmup " in message


@pytest.mark.parametrize(
    "given,said",
    [
        ({}, "total_steps=None and total_epochs=None"),
        ({"total_steps": 3, "total_epochs": 2}, "total_steps=3 and total_epochs=2.0"),
    ],
)
def test_exactly_one_length_of_the_run(given, said):
    assert refusal(config_lib.resolve, given, PRETRAIN) == f"config fields {said}: exactly one of them must be set"


@pytest.mark.parametrize(
    "given,field,takes",
    [
        ({"decoder.width": 100}, "decoder.width=100", "a multiple of 4 and of decoder.heads=8"),
        ({"decoder.width": 6, "decoder.heads": 3}, "decoder.width=6", "a multiple of 4 and of decoder.heads=3"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh.fsdp=-1", "a number of devices when mesh.data is -1"),
    ],
)
def test_combinations_that_cannot_be(given, field, takes):
    message = refusal(config_lib.resolve, BASE | given, PRETRAIN)
    assert message.startswith(f"config field {field} is not accepted: it takes {takes}")


# --- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key,text,value",
    [
        ("norm_pix", "true", True),
        ("norm_pix", "False", False),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", "2", 2.0),
        ("batch_size", "64", 64),
        ("data.crop_scale", "(0.5, 1.0)", (0.5, 1.0)),
        ("data.crop_scale", "[0.5, 1]", (0.5, 1.0)),
        ("data.source", "2024", "2024"),
        ("data.source", "True", "True"),
        ("data.source", "folder:/data/my photos", "folder:/data/my photos"),
        ("data.eval_split", "", ""),
        ("heat.propagator", "exp", "exp"),
        ("mesh.fsdp", "2", 2),
    ],
)
def test_overrides_are_read_as_the_field_means(tmp_path, key, text, value):
    found = config_lib.flatten(from_file(tmp_path, (key, text)))[key]
    assert found == value and type(found) is type(value)


def test_overrides_win_and_none_clears(tmp_path):
    lengths = ("total_steps", "none"), ("total_epochs", "2"), ("warmup_percent", "5")
    config = from_file(tmp_path, *lengths, ("seed", "1"), ("seed", "2"))
    assert (config.total_steps, config.total_epochs, config.warmup_percent, config.seed) == (None, 2.0, 5.0, 2)


@pytest.mark.parametrize(
    "key,text,said",
    [
        ("batch_size", "many", "config field batch_size='many' is not accepted: it takes a whole number"),
        ("batch_size", "64.5", "config field batch_size=64.5 is not accepted: it takes a whole number"),
        ("learning_rate", "nan", "config field learning_rate='nan' is not accepted: it takes a number"),
        ("learning_rate", "1e999", "config field learning_rate=inf is not accepted: it takes a number"),
        ("learning_rate", "__import__('os')", "is not accepted: it takes a number"),
        ("norm_pix", "yes", "config field norm_pix='yes' is not accepted: it takes True or False"),
        ("norm_pix", "", "config field norm_pix='' is not accepted: it takes True or False"),
        ("data.crop_scale", "0.5", "config field data.crop_scale=0.5 is not accepted: it takes a list of numbers"),
        ("dtype", "float16", "config field dtype='float16' is not accepted: it takes one of 'float32', 'bfloat16'"),
        ("data.sauce", "photos", "config field data.sauce is unknown; did you mean data.source?"),
    ],
)
def test_bad_overrides(tmp_path, key, text, said):
    assert said in refusal(from_file, tmp_path, (key, text))


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["{inner}", "ml_collections.ConfigDict({inner})", "ml_collections.FrozenConfigDict({inner})"]
)
def test_a_file_may_give_nested_or_dotted_fields(tmp_path, form):
    inner = "{'total_steps': 10, 'heat': {'propagator': 'exp'}}"
    body = f"import ml_collections\ndef get_config():\n    return {form.format(inner=inner)}\n"
    config = from_file(tmp_path, body=body)
    assert (config.heat.propagator, config.heat.directions, config.total_steps) == ("exp", "untied", 10)
    dotted = from_file(tmp_path, body="def get_config():\n    return {'total_steps': 10, 'heat.propagator': 'exp'}\n")
    assert dotted == config


@pytest.mark.parametrize(
    "body,said",
    [
        ("def get_config(:\n", "SyntaxError: "),
        ("import nonexistent_module_of_mine\n", "ModuleNotFoundError: No module named 'nonexistent_module_of_mine'"),
        ("seed = 3\n", "AttributeError: "),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass\n", "NoneType"),
        ("def get_config(size):\n    return {}\n", "TypeError: "),
    ],
)
def test_a_broken_file(tmp_path, body, said):
    path = write(tmp_path, body)
    message = refusal(config_lib.load, path, (), PRETRAIN)
    assert message.startswith(f"--config {path}: ") and said in message


def test_a_file_that_is_not_there_or_not_python(tmp_path):
    missing = str(tmp_path / "none.py")
    assert refusal(config_lib.load, missing, (), PRETRAIN) == f"--config {missing}: there is no such file"
    assert "there is no such file" in refusal(config_lib.load, str(tmp_path), (), PRETRAIN)
    text = write(tmp_path, "{}", "config.txt")
    assert refusal(config_lib.load, text, (), PRETRAIN) == f"--config {text}: a python file with get_config() is needed"


# --- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given,fields",
    [
        (BASE, PRETRAIN),
        ({"total_epochs": 2.5, "warmup_epochs": 1, "data.crop_scale": (0.3, 1), "norm_pix": True}, PRETRAIN),
        ({"protocol": "tran-1", "learning_rates": [0.1, 1.0]}, PROBE),
    ],
)
def test_json_round_trip(given, fields):
    config = config_lib.resolve(given, fields)
    again = config_lib.from_json(config_lib.to_json(config), fields)
    assert again == config and config_lib.flatten(again) == config_lib.flatten(config)
    assert isinstance(again, ml_collections.ConfigDict) and again.is_locked


def test_json_of_another_table_is_refused():
    text = config_lib.to_json(config_lib.resolve({}, PROBE))
    assert "is unknown" in refusal(config_lib.from_json, text, PRETRAIN)


# --- What must not end in a traceback --------------------------------------------------------------------------------


HUGE = 10**400


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": HUGE},
        {"data.crop_scale": (0.2, HUGE)},
        {"warmup_epochs": HUGE},
        {"data.crop_scale": (0.2, math.inf)},
        {"data.crop_ratio": (0.5, math.nan)},
        {"data.crop_scale": (0.2, 5.0)},
        {"seed": 2**64},
        {1: 2},
        {"warmup_epochs": 1.0, "warmup_percent": 2.0},
        {"data": {}},
    ],
    ids=lambda given: str(given)[:40],
)
def test_odd_values_are_refused(given):
    assert refusal(config_lib.resolve, BASE | given, PRETRAIN).startswith("config field")


ODD_TEXT = ["{[]: 1}", "-" * 100000 + "1", "(" * 1000, "1" * 5000, "\0", "...", "b'1'"]


@pytest.mark.parametrize("text", ODD_TEXT, ids=range(len(ODD_TEXT)))
def test_odd_text_is_refused(tmp_path, text):
    assert refusal(from_file, tmp_path, ("seed", text)).startswith("config field seed=")


@pytest.mark.parametrize(
    "key,value", [("batch_size", np.int64(4)), ("learning_rate", np.float64(0.1)), ("norm_pix", np.True_)]
)
def test_numpy_scalars_are_numbers(key, value):
    found = config_lib.flatten(config_tables.resolve(BASE | {key: value}))[key]
    assert found == value and type(found) is kind(PRETRAIN[key])


@pytest.mark.parametrize(
    "saved, now, differs",
    [
        ({}, {}, []),
        ({"warmup": 3}, {"warmup": 4}, [("warmup", 3, 4)]),
        ({"warmup_epochs": 1.0}, {}, [("warmup", None, PRETRAIN["warmup"].default), ("warmup_epochs", 1.0, None)]),
        ({}, {"warmup_epochs": 1.0}, [("warmup", PRETRAIN["warmup"].default, None), ("warmup_epochs", None, 1.0)]),
        ({"warmup_epochs": 1.0}, {"warmup_epochs": 2.0}, [("warmup_epochs", 1.0, 2.0)]),
        ({"log_every": 5}, {"log_every_epochs": 1.0}, []),
        ({"data.crop_scale": (0.5, 1.0)}, {"data.crop_scale": [0.5, 1.0]}, []),
    ],
)
def test_configs_differ_by_value_and_unit(saved, now, differs):
    saved, now = (config_tables.resolve(BASE | given) for given in (saved, now))
    as_json = json.loads(config_lib.to_json(saved))
    found = config_lib.differing(as_json, now, PRETRAIN)
    assert sorted(found) == differs and found == config_lib.differing(as_json, now.to_dict(), PRETRAIN)
    # Fields that are newer than what was saved had their default, and those that are gone are not asked for.
    for name in ("ema", "heat"):
        as_json.pop(name)
    assert config_lib.differing(as_json | {"gone": 1}, now, PRETRAIN) == found


def test_a_config_imports_the_file_beside_it(tmp_path):
    """Each folder its own, though the names are the same, and nothing stays imported."""
    for number in (3, 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "base.py").write_text(f"def get_config():\n    return {{'seed': {number}}}\n")
        (folder / "mine.py").write_text(
            "from base import get_config as base\n\n\ndef get_config():\n    return base() | {'keep': 2}\n"
        )
        assert config_lib.read(folder / "mine.py") == {"seed": number, "keep": 2}
