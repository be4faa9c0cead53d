"""The loop: resumed equals uninterrupted bit for bit, other runs are refused, NaN stops, damaged checkpoints fall back."""

import json
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
from etils.epath import testing as epath_testing

import qbheat_jax
from qbheat_jax import api, data, methods
from qbheat_jax.errors import UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import config_tables, loop, metrics
from qbheat_jax.train.checkpoint import Checkpoints
from tests.batches import train_batches

ONE_DEVICE = {"mesh.data": 1}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Bit for bit is promised on one device."""
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *a: device)


def losses(workdir):
    return {line["step"]: line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line}


def variables(workdir):
    return api.load(workdir).variables


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps on one device."""
    from tests.conftest import SMALL

    workdir = tmp_path_factory.mktemp("whole")
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: device)
        summary = pretrain.run(config_tables.resolve(SMALL), workdir)
    return workdir, summary


class Killed(Exception):
    pass


def stop_after(monkeypatch, steps):
    """Makes the loop die after `steps` steps, as a kill would: nothing is saved on the way out."""
    original = metrics.Progress.advance
    count = [0]

    def advance(self, step):
        original(self, step)
        count[0] += 1
        if count[0] > steps:
            raise Killed

    monkeypatch.setattr(metrics.Progress, "advance", advance)


def test_a_run_leaves_its_workdir(whole):
    workdir, summary = whole
    assert summary["step"] == 6 and summary["skipped_files"] == 0
    assert sorted(losses(workdir)) == [1, 2, 4, 6]
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3
    assert Checkpoints(workdir).steps() == [2, 4, 6]
    val = [line for line in metrics.read(workdir) if "val/loss" in line]
    assert [line["step"] for line in val] == [6]
    assert val[0]["val/loss"] == summary["val/loss"]


def test_resumed_equals_uninterrupted_bit_for_bit(whole, small_config, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "qbheat")
    for steps in (1, 2, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Killed):
                pretrain.run(small_config(), tmp_path)
    pretrain.run(small_config(), tmp_path)
    assert "resuming" in caplog.text and "at step 2 of 6" in caplog.text
    expected, got = variables(whole[0]), variables(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, expected, got)
    assert losses(tmp_path)[6] == losses(whole[0])[6]
    steps = [line["step"] for line in metrics.read(tmp_path) if "train/loss" in line]
    assert steps == sorted(set(steps)), "the figures of a step are told once"


def test_a_finished_run_is_left_alone(whole, small_config):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    assert pretrain.run(small_config(), workdir)["step"] == 6
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert json.loads((workdir / "summary.json").read_text())["val/loss"] > 0


@pytest.mark.parametrize("last", [4, 6])
def test_figures_that_an_ended_process_owed_are_made_up_for(small_config, tmp_path, monkeypatch, last):
    """SIGTERM within an evaluation leaves a checkpoint without its figures: in the middle of a run, and at its end."""
    config = small_config(eval_every=2)
    with monkeypatch.context() as patch:
        if last < 6:
            stop_after(patch, last)
            with pytest.raises(Killed):
                pretrain.run(config, tmp_path)
        else:
            pretrain.run(config, tmp_path)
    step = Checkpoints(tmp_path).steps()[-1]
    lines = metrics.read(tmp_path)
    owed = [line for line in lines if line["step"] == step and "val/loss" in line]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line not in owed))
    (tmp_path / "summary.json").unlink(missing_ok=True)
    summary = pretrain.run(config, tmp_path)
    told = [line for line in metrics.read(tmp_path) if "val/loss" in line]
    assert [line["step"] for line in told] == [2, 4, 6] and told[step // 2 - 1] == owed[0]
    assert summary["val/loss"] == told[-1]["val/loss"]


def test_another_run_in_the_workdir_is_refused(whole, small_config):
    with pytest.raises(UserError, match=r"holds another run, with learning_rate=0.01 \(now 0.5\)"):
        pretrain.run(small_config(learning_rate=0.5), whole[0])
    # Where and how a run is watched may change.
    assert pretrain.run(small_config(log_every=3, keep=5), whole[0])["step"] == 6


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_newest_checkpoint_falls_back(whole, small_config, tmp_path, damage, caplog, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    shutil.copytree(whole[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "6" / "state"
    # All of its data files: which of them hold the arrays (and which are left over from the merging) is Orbax's affair.
    for file in (p for p in newest.rglob("d/*") if p.is_file()):
        content = bytearray(file.read_bytes())
        if damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)
    if damage == "remove":
        shutil.rmtree(newest / "d")
    summary = pretrain.run(small_config(), tmp_path / "run")
    assert "checkpoint 6 is damaged" in caplog.text
    assert summary["step"] == 6
    jax.tree.map(np.testing.assert_array_equal, variables(whole[0]), variables(tmp_path / "run"))
    assert not unraisable, "no tracebacks of reads that nobody waited for"


def test_loading_too_finds_out_bits_that_changed(whole, tmp_path, monkeypatch, caplog):
    """A checkpoint that reads without complaint, but not as it was written, is passed over by `load` as by the loop."""
    shutil.copytree(whole[0], tmp_path / "run")
    original = Checkpoints._restore

    def flipped(self, step, **items):
        restored = original(self, step, **items)
        if step == 6 and "state" in restored:
            kernel = restored["state"]["params"]["encoder"]["conv"]
            kernel["kernel"] = np.asarray(kernel["kernel"]) * np.float32(1.0000002)
        return restored

    monkeypatch.setattr(Checkpoints, "_restore", flipped)
    assert api.load(tmp_path / "run").step == 4
    assert "checkpoint 6 is damaged (the bit sums differ" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "6").exists()


def test_all_checkpoints_damaged_is_an_error(whole, small_config, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    for step in (2, 4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "state")
    with pytest.raises(UserError, match=r"none of the checkpoints \[2, 4, 6\] can be read") as caught:
        pretrain.run(small_config(), tmp_path / "run")
    assert caught.value.exit_code == 1


def test_a_checkpoint_that_lost_its_config_is_passed_over(whole, small_config, tmp_path, caplog):
    import shutil

    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6" / "config")
    assert api.load(tmp_path / "run").step == 4
    assert "checkpoint 6 is damaged" in caplog.text
    for step in (2, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "config")
    with pytest.raises(UserError, match=r"none of the checkpoints \[2, 4, 6\] can be read"):
        pretrain.run(small_config(), tmp_path / "run")


def test_how_a_run_is_watched_may_differ_from_its_checkpoint(whole, small_config, tmp_path):
    import shutil

    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"log_every": 7, "keep": 1}))
    assert api.load(tmp_path / "run").config.log_every == 7
    path.write_text(json.dumps(config | {"learning_rate": 0.5}))
    with pytest.raises(UserError, match=r"learning_rate=0.5, .* learning_rate=0.01"):
        api.load(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(small_config, tmp_path):
    config = small_config(total_steps=20, learning_rate=1e38, log_every=5, checkpoint_every=5)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+; .*lower learning_rate") as caught:
        pretrain.run(config, tmp_path)
    assert caught.value.exit_code == 1
    for step in Checkpoints(tmp_path).steps():
        assert step < int(str(caught.value).split("at step ")[1].split(";")[0])


def test_the_same_seed_gives_the_same_loss_and_another_seed_another(whole, small_config, tmp_path):
    pretrain.run(small_config(total_steps=6), tmp_path / "same")
    pretrain.run(small_config(seed=4), tmp_path / "other")
    assert losses(tmp_path / "same") == losses(whole[0])
    assert losses(tmp_path / "other") != losses(whole[0])


def test_load_gives_features_and_reconstructions(whole):
    model = qbheat_jax.load(whole[0])
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    assert model.features(images).shape == (3, 4, 4, 16)
    filled = np.asarray(model.reconstruct(images, [0, 4, 8]))
    assert filled.dtype == np.uint8 and filled.shape == images.shape
    np.testing.assert_array_equal(filled[0, :16, :16], images[0, :16, :16])
    assert (filled[0, 16:] != images[0, 16:]).any()
    with pytest.raises(UserError, match="placement 1 was not trained on: this run takes 0, 2, 4, 6, 8"):
        model.reconstruct(images, 1)
    with pytest.raises(UserError, match=r"uint8 \[B, H, W, 3\] is needed"):
        model.features(images.astype(np.float32))


def test_load_of_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run: there is no config.json"):
        qbheat_jax.load(tmp_path)


def test_waiting_for_data_counts_while_the_device_has_nothing_to_do(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 4.0, 10.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    progress = metrics.Progress(0, 100, batch_size=4)
    for busy in (False, True):  # from 1.0 to 4.0; then from 4.0 on, beside a step
        with progress.waiting(lambda busy=busy: busy):
            pass
    assert progress.report(2, 1.0) == {"images_per_second": 0.8, "data_wait": 0.3}


def test_the_device_is_busy_until_its_last_step_is_done(tmp_path):
    class Loss(float):
        ready = False

        def is_ready(self):
            return self.ready

    history, loss = loop._History(tmp_path, 0), Loss(1.0)
    assert not history.busy()
    history.add(1, {"loss": loss})
    assert history.busy()
    loss.ready = True
    assert not history.busy()


def test_shapes_of_the_loop_are_those_of_the_data(small_config):
    config = small_config()
    source = data.open_source(config.data.source, image_size=32)
    batch = next(
        train_batches(
            source,
            split="train",
            batch_size=16,
            image_size=32,
            seed=0,
            placements=(0,),
            crop_scale=(0.2, 1),
            crop_ratio=(0.75, 1.33),
            flip=True,
        )  # fmt: skip
    )
    for name, shape in methods.batch_spec(config).shapes(config.batch_size).items():
        assert batch[name].shape == shape.shape and batch[name].dtype == shape.dtype
    assert methods.build(config).encoder.stride == 8


def test_a_bucket_is_a_workdir_too(tmp_path, monkeypatch):
    """What a bucket does not offer, adding to a file, is not asked of it."""

    def local(path):
        return str(path).replace("gs://bucket", str(tmp_path))

    def opened(original, path, mode):
        assert str(path).startswith("gs://bucket/run") and "a" not in mode
        return original(local(path), mode)

    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)  # whose file system would be taken
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)  # with which a board would be opened in the bucket
    (tmp_path / "run").mkdir()
    with epath_testing.mock_epath(open=opened, exists=lambda original, path: original(local(path))):
        for first in (0, 1):
            writer = metrics.Writer("gs://bucket/run", first)
            for step in (1, 2, 3)[first:]:
                writer.write(step, {"train/loss": step + first})
            writer.close()
        assert losses("gs://bucket/run") == {1: 1.0, 2: 3.0, 3: 4.0}
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
