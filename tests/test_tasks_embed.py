"""Features in files, alike in all formats, resumed after a kill; and the neighbours that they give."""

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import api, atomic, cli, config, methods
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.probe import embeddings
from qbheat_jax.tasks import embed, neighbours
from qbheat_jax.train import config_tables
from qbheat_jax.train.checkpoint import Checkpoints

SIZE, CELLS, WIDTH = 32, 4, 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A ported encoder of random weights."""
    import jax

    workdir = tmp_path_factory.mktemp("run")
    given = {"objective": "classifier", "encoder.name": "pebble", "image_size": SIZE}
    fields = config.resolve(given, config_tables.CLASSIFIER)
    variables = methods.build(fields).init(jax.random.key(0), {"image": np.zeros((1, SIZE, SIZE, 3), np.uint8)})
    text = config.to_json(fields)
    (workdir / "config.json").write_text(text)
    saved = Checkpoints(workdir)
    saved.save(0, {"step": np.zeros((), np.int32), **variables, "opt_state": {}, "ema": {}}, 0, text)
    saved.close()
    return workdir


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder with train/{red,blue}/N.png, 11 images and a broken one."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for n in range(11):
        pixels = generator.integers(0, 40, (SIZE, SIZE, 3))
        pixels[..., 2 * (n % 2)] += 200
        path = folder / "train" / ("red", "blue")[n % 2] / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "train" / "red" / "05.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(run, images, tmp_path_factory):
    """(the summary, the `Embeddings`) of the folder."""
    to = tmp_path_factory.mktemp("to") / "all.npz"
    return embed.run(run, str(to), spec=f"folder:{images}", batch_size=3), embeddings.read(str(to))


def test_a_row_for_each_readable_image(run, images, whole):
    summary, found = whole
    paths = sorted(images.glob("train/*/*.png"))  # as the source lists them: blue before red
    kept = [path for path in paths if path.read_bytes() != b"no image"]
    assert found.names == [str(path) for path in kept] and summary["n"] == 11 and summary["skipped"] == 1
    assert found.about["class_names"] == ["blue", "red"]
    assert found.labels.tolist() == [int(path.parent.name == "red") for path in kept]
    assert [str(paths[i]) for i in found.index] == found.names
    pixels = np.stack([np.asarray(Image.open(path)) for path in kept])
    expected = np.asarray(api.load(run).features(pixels)).mean((1, 2))
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.features.dtype == np.float32 and summary["shape"] == [11, WIDTH]


@pytest.mark.parametrize("ending", embeddings.FORMATS)
def test_formats_are_read_back_alike(run, images, whole, tmp_path, ending):
    """By the command line, the cells in half precision."""
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    to = tmp_path / f"cells{ending}"
    command = ["embed", "--init", str(run), "--data", f"folder:{images}", "--to", str(to), "--cells"]
    assert cli.main([*command, "--dtype", "float16", "--batch-size", "3"]) == 0
    found = embeddings.read(str(to))
    assert found.features.shape == (11, CELLS, CELLS, WIDTH) and found.features.dtype == np.float16
    assert found.names == whole[1].names
    for name in ("labels", "index"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole[1], name))
    np.testing.assert_allclose(found.features.astype(np.float64).mean((1, 2)), whole[1].features, atol=2e-3)
    assert {p.name for p in tmp_path.iterdir()} == {to.name}
    assert cli.main(command) == BAD_INPUT  # it is not replaced by mistake


def test_files_are_embedded_as_folders_are(run, images, whole, tmp_path, capsys):
    paths = [str(images / "train" / part) for part in ("red/02.png", "red/05.png", "blue/01.png")]
    assert (
        cli.main(["embed", "--init", str(run), "--to", str(tmp_path / "some.npz"), *paths, str(tmp_path / "gone.jpg")])
        == 0
    )
    summary = json.loads(capsys.readouterr().out)
    found = embeddings.read(str(tmp_path / "some.npz"))
    assert found.names == [paths[0], paths[2]] and (summary["n"], summary["skipped"]) == (2, 2)
    assert found.labels.tolist() == [-1, -1] and found.index.tolist() == [0, 2]
    expected = [whole[1].features[whole[1].names.index(name)] for name in found.names]
    np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-6)


def test_a_killed_command_goes_on(run, images, whole, tmp_path, monkeypatch):
    to, write, written = str(tmp_path / "all.npz"), atomic.write, []

    def killed_after_two(path, content):
        if path.suffix == ".npz":
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path.name)
        write(path, content)

    def again(**fields):
        return embed.run(run, to, spec=f"folder:{images}", **{"batch_size": 3, **fields})

    monkeypatch.setattr(embed, "_IMAGES", 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed.atomic, "write", killed_after_two)
        again()
    assert written == ["000000000-000000003.npz", "000000003-000000006.npz"]
    encoded, batches = [], embed.Encoding.batches

    def counted(self, source, split):
        encoded.append(source.splits[split])
        return batches(self, source, split)

    monkeypatch.setattr(embed.Encoding, "batches", counted)
    assert again(batch_size=2)["n"] == 11 and encoded == [6]
    found = embeddings.read(to)
    assert found.names == whole[1].names and found.index.tolist() == whole[1].index.tolist()
    np.testing.assert_allclose(found.features, whole[1].features, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "all.npz.parts").exists()


def test_parts_of_another_command_are_made_anew(run, images, tmp_path):
    place = tmp_path / "all.npz.parts"
    place.mkdir()
    (place / "about.json").write_text("{}")
    (place / "000000000-000000012.npz").write_bytes(b"")
    assert embed.run(run, str(tmp_path / "all.npz"), spec=f"folder:{images}", batch_size=3)["n"] == 11


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "a.csv", "b.png"],
        ["--to", "a.npz"],
        ["--to", "a.npz", "b.png", "--data", "photos"],
        ["--to", "a.npz", "b.png", "--split", "train"],
        ["--to", "a.npz", "b.png", "--dtype", "int8"],
        ["--to", "gs://bucket/a.npz", "b.png"],
        ["--to", "a.npz", "--data", "photos"],
        ["--to", "a.npz", "gone.png"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_refused(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["embed", "--init", str(run), *arguments]) == BAD_INPUT
    assert not list(tmp_path.iterdir())


def test_parquet_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"qbheat_jax\[embed\]"):
        embeddings.check("a.parquet")


class Pictures(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.found.append(dict(attributes))


@pytest.mark.parametrize("file", [True, False])
def test_neighbours_are_of_the_query_s_colour(run, images, tmp_path, capsys, file):
    among, query = f"folder:{images}", str(images / "train" / "red" / "02.png")
    if file:
        among = str(tmp_path / "all.safetensors")
        embed.run(run, among, spec=f"folder:{images}", batch_size=3)
    page = tmp_path / "near.html"
    command = ["neighbours", "--init", str(run), query, "--among", among, "--to", str(page), "--top", "4"]
    assert cli.main([*command, "--batch-size", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["page"] == str(page) and result["n"] == 11
    (entry,) = result["queries"]
    similar = [near["similarity"] for near in entry["neighbours"]]
    assert [near["class"] for near in entry["neighbours"]] == ["red"] * 4
    assert similar == sorted(similar, reverse=True) and query not in [near["name"] for near in entry["neighbours"]]
    pictures = Pictures(page.read_text()).found
    assert len(pictures) == 5 and all(p["src"].startswith("data:image/png") and p["alt"] for p in pictures)


def test_features_of_another_encoder_are_refused(run, images, tmp_path):
    among = str(tmp_path / "all.npz")
    embed.run(run, among, spec=f"folder:{images}", batch_size=3)
    query = [str(images / "train" / "red" / "02.png")]
    with pytest.raises(UserError, match="image size"):
        neighbours.run(run, query, among, str(tmp_path / "near.html"), image_size=2 * SIZE)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "all.npz").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        neighbours.run(run, query, str(tmp_path / "torn.npz"), str(tmp_path / "near.html"))
