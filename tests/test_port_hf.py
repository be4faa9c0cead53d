"""Hugging Face's layout: models of transformers come in by their config.json, compute the same, and go back as they were."""

import json
import sys
import types

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import qbheat_jax
from qbheat_jax import cli, port
from qbheat_jax.errors import BAD_INPUT, RUN_FAILED, UserError
from qbheat_jax.models import registry
from qbheat_jax.models.convnext import ConvNeXt
from qbheat_jax.models.vit import ViT
from qbheat_jax.port import hf
from tests import hf_models
from tests.conftest import TESTS_OWN

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def without_the_tests_own(monkeypatch):
    """Sizes tell an encoder's name: those that other tests added must not be found first."""
    for name in TESTS_OWN:
        monkeypatch.delitem(registry.ENCODERS, name, raising=False)


UNUSED = "embeddings.mask_token"  # of masked pre-training


def enter(name, patch):
    """Add the encoder of a case to the registry; return its name there."""
    if name == "convnext":
        entry = registry.Entry(ConvNeXt, hf_models.ENTRIES[name], {32: {}})
    else:
        entry = registry._vit((8,), **hf_models.ENTRIES.get(name, hf_models.FIELDS))
    patch.setitem(registry.ENCODERS, f"tiny_{name}", entry)
    return f"tiny_{name}"


def unpack(name, folder):
    """Write the folder of a case as `save_pretrained` does; return (weights, what is known of them, config)."""
    path = hf_models.DATA / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
    weights = load_file(path)
    known = {key: weights.pop(key) for key in hf_models.KNOWN if key in weights}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights, known, config


def close(ours, known):
    """Within 1e-4 of the scale."""
    ours = np.asarray(ours)
    assert ours.shape == known.shape and known.std() > 0.1
    assert np.abs(ours - known).max() < 1e-4 * np.abs(known).max()


def check(workdir, known):
    """The model of a workdir, which computes what is known."""
    model = qbheat_jax.load(workdir)
    close(model.features(known["input"], normalized=True), known["features"])
    if "logits" in known:
        close(model.logits(known["input"], normalized=True), known["logits"])
    return model


@pytest.fixture
def case(request, tmp_path, monkeypatch):
    """(name of a case, its encoder's name, its folder, weights, what is known, config)."""
    name = request.param
    return name, enter(name, monkeypatch), tmp_path / "given", *unpack(name, tmp_path / "given")


def ported(case, tmp_path):
    """The workdir of a case, ported without naming the architecture."""
    name, arch, folder, _, known, _ = case
    head = "keep" if "logits" in known else "drop"
    made = port.port(folder, None, tmp_path / "in", head=head, image_size=known["input"].shape[1])
    assert made["arch"] == arch and made["names"].startswith("hf ")
    return tmp_path / "in"


@pytest.mark.parametrize("case", hf_models.CASES, indirect=True)
def test_a_model_computes_the_same_and_goes_back_bit_for_bit(case, tmp_path):
    name, arch, folder, weights, known, config = case
    workdir = ported(case, tmp_path)
    model = check(workdir, known)
    port.export(workdir, tmp_path / "out", layout="hf")
    after = load_file(tmp_path / "out" / "model.safetensors")
    weights.pop(UNUSED, None), after.pop(UNUSED, None)
    assert after.keys() == weights.keys()
    resampled = [key for key in after if not np.array_equal(after[key], weights[key])]
    assert all("position_embedding" in key for key in resampled)
    assert bool(resampled) == (model.encoder.image_size not in (None, config["image_size"]))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf.describe(written) == (arch, {**hf.describe(config)[1], **_eps(written)})
    assert {key: written[key] for key in ("model_type", "architectures")}.items() <= config.items()
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()
    told = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert told["size"]["height"] == model.config.image_size


def _eps(written):
    """vit's epsilon of 1e-12 is kept, convnext has none of its own."""
    return {} if written["model_type"] == "convnext" else {"encoder.norm_eps": written["layer_norm_eps"]}


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_parts_labels_and_pixels_are_read_beside_the_weights(case, tmp_path):
    name, _, folder, weights, known, config = case
    names = ["cat", "dog", "red fox"]
    (folder / "config.json").write_text(json.dumps({**config, "id2label": dict(enumerate(names))}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[n::2]) for n in range(2)]
    files = [f"model-0000{n + 1}-of-00002.safetensors" for n in range(2)]
    for file, half in zip(files, halves):
        save_file(half, folder / file)
    places = {key: file for file, half in zip(files, halves) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    model = check(ported(case, tmp_path), known)
    assert model.class_names == names and model.config.pixels == "half" and model.config.head.classes == 3
    port.export(tmp_path / "in", tmp_path / "out", layout="hf")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written["id2label"].values()) == names
    with pytest.raises(UserError, match="already holds something"):
        port.export(tmp_path / "in", tmp_path / "out", layout="hf")
    port.export(tmp_path / "in", tmp_path / "out", layout="hf", head="drop", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["ViTModel"]
    assert not any(key.startswith("classifier") for key in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    "case, own",
    [
        ("dinov2_registers", {"register_tokens", "blocks.1.mlp.w12.weight", "blocks.0.ls1.gamma"}),
        (
            "dinov3_gated",
            {"storage_tokens", "blocks.1.mlp.w2.bias", "blocks.1.attn.qkv.bias_mask", "rope_embed.periods"},
        ),
    ],
    indirect=["case"],
)
def test_a_model_in_the_names_of_its_release_and_back(case, own, tmp_path):
    _, arch, _, _, known, _ = case
    first = qbheat_jax.load(ported(case, tmp_path))
    port.export(tmp_path / "in", tmp_path / "release.safetensors")
    held = load_file(tmp_path / "release.safetensors")
    assert own <= held.keys() and held["blocks.0.attn.qkv.weight"].shape == (48, 16)
    assert held.get("rope_embed.periods", np.zeros(2)).shape == (2,)
    save_file({f"teacher.backbone.{name}": array for name, array in held.items()}, tmp_path / "teacher.safetensors")
    port.port(tmp_path / "teacher.safetensors", arch, tmp_path / "again", head="drop")
    again = qbheat_jax.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, first.variables["params"], again.variables["params"])
    for name in ("position", "registers", "mlp", "norm_eps", "stride", "class_token"):
        assert first.config.encoder[name] == again.config.encoder[name]


# --- What config.json describes --------------------------------------------------------------------------------------

_VIT_S = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 14}


@pytest.mark.parametrize(
    "config, arch",
    [
        ({"model_type": "dinov2", **_VIT_S, "mlp_ratio": 4}, "vit_s"),
        ({"model_type": "dinov3_vit", **_VIT_S, "intermediate_size": 1536}, "vit_s"),
        (
            {
                "model_type": "dinov3_vit",
                **_VIT_S,
                "intermediate_size": 1536,
                "use_gated_mlp": True,
                "hidden_act": "silu",
            },
            "vit_s_plus",
        ),
        (
            {
                "model_type": "dinov2",
                "hidden_size": 1536,
                "num_attention_heads": 24,
                "num_hidden_layers": 40,
                "patch_size": 14,
                "mlp_ratio": 4,
                "use_swiglu_ffn": True,
            },
            "vit_g",
        ),
        ({"model_type": "clip", "vision_config": {**_VIT_S, "intermediate_size": 1536}}, "vit_s"),
        ({"model_type": "convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 27, 3]}, "convnext_s"),
        ({"architecture": "vit_small_patch14_dinov2.lvd142m"}, "vit_s"),
        ({"architecture": "vit_tiny_patch16_224"}, "vit_ti"),
        ({"architecture": "convnext_base.fb_in22k"}, "convnext_b"),
        ({"architecture": "vit_huge_plus_patch16_dinov3"}, "vit_h_plus"),
        ({"architecture": "resnet50"}, "resnet50"),
    ],
)
def test_architecture_in_a_config(config, arch):
    assert hf.describe(config)[0] == arch


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "bert"}, "config.json is of a bert"),
        ({"model_type": "dinov2", "hidden_size": 384}, "config.json of a dinov2 lacks 'num_attention_heads'"),
        ({"model_type": "vit", **_VIT_S, "intermediate_size": 1000}, "which is no encoder of"),
        ({"model_type": "vit", **_VIT_S, "intermediate_size": 1536, "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"architecture": "vit_small_r26_s32_224x"}, "vit_small_r26_s32_224x"),
        ({"architecture": "swin_tiny"}, "swin_tiny"),
    ],
)
def test_configs_that_describe_no_encoder(config, words):
    with pytest.raises(UserError, match=words) as caught:
        hf.describe(config)
    assert caught.value.exit_code == BAD_INPUT


def test_without_a_config_the_architecture_must_be_named(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--arch is missing"):
        port.port(tmp_path / "a.safetensors", None, tmp_path / "to")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match="has none of model.safetensors"):
        port.port(tmp_path, None, tmp_path / "to")
    assert not (tmp_path / "to").exists()


# --- What transformers has no model of -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoder, words",
    [
        (ViT(position="learnt", grid=2), "no class_token"),
        (ViT(class_token=True, fc_norm=True), "fc_norm"),
        (ViT(class_token=True, position="rope"), "no layer_scale"),
        (ViT(class_token=True, registers=2), "registers"),
        (ViT(class_token=True, mlp="swiglu"), "a gated MLP"),
        (ViT(class_token=True, mlp="quick_gelu"), "quick_gelu"),
        (ViT(class_token=True, pre_norm=True, layer_scale=1.0), "layer_scale"),
        (ConvNeXt(last_stride=1), "stride 16"),
        (registry.encoder("resnet18"), "takes a ViT or a ConvNeXt"),
    ],
)
def test_encoders_without_a_model_in_transformers(encoder, words):
    with pytest.raises(UserError, match=f"--layout hf: .*{words}") as caught:
        hf.model_type(encoder)
    assert caught.value.exit_code == BAD_INPUT


@pytest.mark.parametrize("flags", [("--layout", "onnx"), ("--head", "lose")])
def test_export_refuses_other_values(flags, tmp_path, capsys):
    assert cli.main(["export", "--from", str(tmp_path), "--to", str(tmp_path / "to"), *flags]) == BAD_INPUT
    assert " ".join(flags) in capsys.readouterr().err


# --- The hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A huggingface_hub that keeps what it is asked for in `calls`; `found` is the folder that it has."""
    made = types.SimpleNamespace(calls=[], found=None, refuses=None)

    def snapshot_download(name, revision, allow_patterns):
        made.calls.append((name, revision, tuple(allow_patterns)))
        if made.found is None:
            raise ConnectionError("offline\nand not in the cache")
        return str(made.found)

    class HfApi:
        def create_repo(self, name, **options):
            if made.refuses:
                raise PermissionError(made.refuses)
            made.calls.append(("create", name, options))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **options):
            made.calls.append(("upload", options["repo_id"], options["folder_path"]))

    module = types.SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return made


@pytest.mark.parametrize("case", ["dinov3"], indirect=True)
def test_a_model_of_the_hub(case, hub, tmp_path, capsys):
    _, arch, hub.found, _, known, _ = case
    command = ["port", "--from", "hf:org/tiny@main", "--to", str(tmp_path / "in"), "--head", "drop"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "in")
    assert [call[:2] for call in hub.calls] == [("org/tiny", "main")]
    provenance = json.loads((tmp_path / "in" / "provenance.json").read_text())
    assert (provenance["hub"], provenance["arch"]) == ("hf:org/tiny@main", arch)
    assert provenance["source"] == "model.safetensors" and UNUSED in provenance["ignored"]


def test_a_model_that_is_neither_cached_nor_reached(hub, tmp_path, capsys):
    assert cli.main(["port", "--from", "hf:org/tiny", "--to", str(tmp_path / "in")]) == RUN_FAILED
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--from hf:org/tiny" in message and message.endswith("offline")
    assert cli.main(["port", "--from", "hf:tiny", "--to", str(tmp_path / "in")]) == BAD_INPUT


def test_without_huggingface_hub(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["port", "--from", "hf:org/tiny", "--to", str(tmp_path / "in")]) == BAD_INPUT
    assert "qbheat_jax[hf]" in capsys.readouterr().err


def test_push(hub, tmp_path, capsys):
    command = ["push", "--from", str(tmp_path), "--to", "org/tiny"]
    assert cli.main(command) == BAD_INPUT and not hub.calls
    for name, text in {"config.json": '{"model_type": "vit"}', "model.safetensors": "", "README.md": ""}.items():
        (tmp_path / name).write_text(text)
    assert cli.main([*command[:-1], "tiny"]) == BAD_INPUT and not hub.calls
    capsys.readouterr()
    assert cli.main([*command, "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://huggingface.co/org/tiny"
    assert hub.calls == [
        ("create", "org/tiny", {"private": True, "exist_ok": True}),
        ("upload", "org/tiny", str(tmp_path)),
    ]
    hub.refuses = "401\nno"
    assert cli.main(command) == RUN_FAILED
    assert "--to org/tiny was not uploaded: 401" in capsys.readouterr().err


# --- Against the libraries themselves --------------------------------------------------------------------------------


@pytest.mark.weekly
@pytest.mark.parametrize("name", hf_models.CASES)
def test_parity_with_transformers_both_ways(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    enter(name, monkeypatch)
    model, images = hf_models.build(name, seed=3), hf_models.images_for(name)
    known = {"input": images, **hf_models.compute(model, name, images)}
    model.save_pretrained(tmp_path / "given")
    workdir = ported((name, f"tiny_{name}", tmp_path / "given", {}, known, {}), tmp_path)
    check(workdir, known)
    port.export(workdir, tmp_path / "out", layout="hf")
    made = getattr(transformers, hf_models.CASES[name][0])
    back, notes = made.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values()), notes
    after = hf_models.compute(back.eval(), name, images)
    for key, value in after.items():
        assert np.abs(value - known[key]).max() < 1e-4 * np.abs(known[key]).max()
    own = qbheat_jax.load(workdir).encoder.image_size
    if own in (None, hf_models.CASES[name][1].get("image_size")):
        state = back.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key != UNUSED)


def timm_models():
    """{name: (a function that builds a small model of timm, fields of the registry's entry, side of the images)}."""
    import timm.models.convnext
    import timm.models.vision_transformer as vit

    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 24, "num_classes": 3}
    return {
        "augreg": (lambda: vit.VisionTransformer(**small), hf_models.FIELDS, 24),
        "mae": (lambda: vit.VisionTransformer(**small, global_pool="avg"), hf_models.FIELDS, 24),
        "dinov2": (lambda: vit.VisionTransformer(**small, init_values=1e-5), hf_models.FIELDS, 24),
        "convnext": (
            lambda: timm.models.convnext.ConvNeXt(dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_classes=3),
            hf_models.ENTRIES["convnext"],
            64,
        ),
    }


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["augreg", "mae", "dinov2", "convnext"])
def test_parity_with_timm_and_back(name, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    build, fields, side = timm_models()[name]
    entry = registry.Entry(ConvNeXt, fields, {32: {}}) if name == "convnext" else registry._vit((8,), **fields)
    monkeypatch.setitem(registry.ENCODERS, "tiny", entry)
    model = hf_models.randomise(build(), torch.Generator().manual_seed(4))
    torch.save(
        {"state_dict": {f"model._orig_mod.{key}": value for key, value in model.state_dict().items()}},
        tmp_path / "a.pth",
    )
    port.port(tmp_path / "a.pth", "tiny", tmp_path / "in", classes=3, image_size=side)
    images = np.random.default_rng(2).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        features, logits = model.forward_features(x), model(x).numpy()
    ours = qbheat_jax.load(tmp_path / "in")
    if name == "convnext":
        features = features.permute(0, 2, 3, 1)
    else:
        features = features[:, 1:].reshape(2, 3, 3, 16)
    close(ours.features(images, normalized=True), features.numpy())
    close(ours.logits(images, normalized=True), logits)
    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    assert after.keys() == model.state_dict().keys()
    assert all(np.array_equal(after[key], value.numpy()) for key, value in model.state_dict().items())
