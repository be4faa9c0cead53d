"""Batches: their contract, their one global order, what becomes of bad files, and every refusal's words."""

import io
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import data
from qbheat_jax.data import augment, decode, order, placement
from qbheat_jax.data.sources import photos
from qbheat_jax.data.specs import image as image_lib
from qbheat_jax.data.specs.image import MEAN_GREY
from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.ops.quarters import PLACEMENT_SETS
from qbheat_jax.probe import splits
from tests.batches import eval_batches, spec_of, train_batches

EVAL = {"image_size": 32, "seed": 0, "placements": (0, 2, 4, 6, 8)}
TRAIN = {**EVAL, "split": "train", "crop_scale": (0.2, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": True}
KEYS = {"image", "quarter", "label", "mask", "index"}


@pytest.fixture(scope="module")
def twenty():
    return data.open_source("photos")


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """A folder of 50 images, each of one colour and size of its own, no two classes alike."""
    root = tmp_path_factory.mktemp("fifty")
    for k in range(50):
        folder = root / "train" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + k, 30), (k * 5, 0, 255 - k)).save(folder / f"{k:02}.png")
    return data.open_source(f"folder:{root}")


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def same(a, b):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        assert one.keys() == other.keys() == KEYS
        for key in KEYS:
            np.testing.assert_array_equal(one[key], other[key], key)


def refused(words, call, *args, **kwargs):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("spec", ["photos", "synthetic:200"])
def test_contract(spec):
    iterator = train_batches(data.open_source(spec), batch_size=24, position=48, **TRAIN)
    assert iterator.position == 48
    for batch in take(iterator, 3):
        assert batch.keys() == KEYS
        assert batch["image"].shape == (24, 32, 32, 3) and batch["image"].dtype == np.uint8
        assert batch["mask"].shape == (24,) and batch["mask"].dtype == bool and batch["mask"].all()
        for key in ("quarter", "label", "index"):
            assert batch[key].shape == (24,) and batch[key].dtype == np.int32
        assert set(batch["quarter"]) <= {0, 2, 4, 6, 8}
    assert iterator.position == 48 + 72


def test_labels_and_pixels_belong_to_the_index(twenty):
    settings = {**TRAIN, "image_size": 64, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": False}
    (batch,) = take(train_batches(twenty, batch_size=100, **settings), 1)
    np.testing.assert_array_equal(batch["image"], twenty.images("train")[batch["index"]])
    np.testing.assert_array_equal(batch["label"], twenty.labels("train")[batch["index"]])


def test_two_runs_are_equal_and_seeds_and_epochs_differ(twenty):
    first = take(train_batches(twenty, batch_size=250, workers=2, **TRAIN), 11)
    same(first, take(train_batches(twenty, batch_size=250, workers=1, prefetch=1, **TRAIN), 11))
    (other,) = take(train_batches(twenty, batch_size=250, **{**TRAIN, "seed": 1}), 1)
    for key in ("image", "index", "quarter"):
        assert (first[0][key] != other[key]).any()
        assert (first[0][key] != first[10][key]).any()
    assert sorted(joined(first[:10], "index")) == list(range(2500))
    # The same example in the next epoch: another crop.
    again = np.flatnonzero(np.isin(first[10]["index"], first[0]["index"]))
    assert len(again)
    for k in again:
        before = np.flatnonzero(first[0]["index"] == first[10]["index"][k])[0]
        assert (first[10]["image"][k] != first[0]["image"][before]).any()


def test_both_mirrored_and_plain_images_come_out(twenty):
    settings = {**TRAIN, "image_size": 64, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    (batch,) = take(train_batches(twenty, batch_size=200, **settings), 1)
    original = twenty.images("train")[batch["index"]]
    plain = (batch["image"] == original).all((1, 2, 3))
    mirrored = (batch["image"] == original[:, :, ::-1]).all((1, 2, 3))
    assert (plain | mirrored).all() and 60 < plain.sum() < 140


@pytest.mark.parametrize("spec", ["folder", "synthetic:50"])
@pytest.mark.parametrize("position", [8, 13, 48, 104])
def test_resuming_from_any_position_equals_the_uninterrupted_stream(fifty, spec, position):
    source = fifty if spec == "folder" else data.open_source(spec)
    whole = take(train_batches(source, batch_size=1, **TRAIN), position + 16)[position:]
    resumed = take(train_batches(source, batch_size=8, position=position, **TRAIN), 2)
    for key in KEYS:
        np.testing.assert_array_equal(joined(whole, key), joined(resumed, key), key)


@pytest.mark.parametrize("spec", ["folder", "synthetic:50"])
def test_any_number_of_processes_makes_the_same_global_batches(fifty, spec):
    source = fifty if spec == "folder" else data.open_source(spec)
    alone = take(train_batches(source, batch_size=16, **TRAIN), 4)
    for count in (2, 4):
        shares = [
            take(train_batches(source, batch_size=16, process_index=h, process_count=count, **TRAIN), 4)
            for h in range(count)
        ]
        assert shares[0][0]["image"].shape[0] == 16 // count
        same(alone, [{key: joined(batch, key) for key in KEYS} for batch in zip(*shares)])


def test_resuming_on_another_number_of_processes_sees_every_example_of_the_epoch_once(fifty):
    seen, position = [], 0
    for count, batches in ((1, 2), (2, 1), (4, 2), (1, 1)):
        iterators = [
            train_batches(fifty, batch_size=8, position=position, process_index=h, process_count=count, **TRAIN)
            for h in range(count)
        ]
        seen += [joined(take(iterator, batches), "index") for iterator in iterators]
        assert len({iterator.position for iterator in iterators}) == 1
        position = iterators[0].position
    seen = np.concatenate(seen)
    assert len(seen) == 48 and len(set(seen)) == 48
    (last,) = take(train_batches(fifty, batch_size=2, position=position, **TRAIN), 1)
    assert sorted([*seen, *last["index"]]) == list(range(50))


VIEWS = KEYS | {"image2"}


@pytest.mark.parametrize("spec", ["photos", "synthetic:200"])
def test_two_views_are_two_crops_of_one_example(spec):
    source = data.open_source(spec)
    settings = {**TRAIN, "batch_size": 20, "position": 40}
    alone = take(train_batches(source, **settings), 2)
    for one, both in zip(alone, take(train_batches(source, views=2, **settings), 2)):
        assert both.keys() == VIEWS and both["image2"].dtype == np.uint8 and both["image2"].shape == (20, 32, 32, 3)
        for key in KEYS:  # the first is what it was
            np.testing.assert_array_equal(one[key], both[key], key)
        assert (both["image"] != both["image2"]).any((1, 2, 3)).all()
    if spec == "photos":
        return
    # Of noise: the same image moved around, mirrored or not.
    moved = set()
    for one, two in zip(both["image"], both["image2"]):
        turned = [np.roll(one, (-down, 0), (0, 1))[:, ::way] for down in range(32) for way in (1, -1)]
        (place,) = [k for k, image in enumerate(turned) if sorted(image[0].tolist()) == sorted(two[0].tolist())
                    and any((np.roll(image, right, 1) == two).all() for right in range(32))]  # fmt: skip
        moved.add(place)
    assert len(moved) > 10 and {place % 2 for place in moved} == {0, 1} and not moved & {0, 1}


def test_the_second_view_shows_its_own_box(twenty):
    settings = {**TRAIN, "batch_size": 30, "views": 2, "image_size": 24}
    (batch,) = take(train_batches(twenty, **settings), 1)
    otherwise = 0
    for index, pixels in zip(batch["index"], batch["image2"]):
        whole = twenty.images("train")[index]
        generator = augment.rng(0, 0, index, "crop2")
        box = augment.random_resized_crop_box(generator, 64, 64, TRAIN["crop_scale"], TRAIN["crop_ratio"])
        mirrored = bool(augment.flips(0, 0, index, "flip2"))
        expected = augment.crop_resize(whole, box, 24)
        np.testing.assert_array_equal(pixels, augment.flip(expected) if mirrored else expected)
        otherwise += mirrored != bool(augment.flips(0, 0, index))
    assert 5 < otherwise < 25  # mirrored by a draw of its own


@pytest.mark.parametrize("spec", ["folder", "synthetic:50"])
def test_two_views_resume_and_are_shared(fifty, spec):
    source = fifty if spec == "folder" else data.open_source(spec)
    settings = {**TRAIN, "batch_size": 8, "views": 2}
    alone = take(train_batches(source, **settings), 9)[6:]
    shares = [take(train_batches(source, position=48, process_index=h, process_count=2, **settings), 3) for h in (0, 1)]
    for one, *parts in zip(alone, *shares):
        for key in VIEWS:
            np.testing.assert_array_equal(one[key], joined(parts, key), key)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation(n):
    orders = [order.permute(np.arange(n), n, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(one) == list(range(n)) for one in orders)
    if n > 10:
        assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != list(range(n))


def test_the_order_of_a_huge_epoch_takes_no_memory():
    n = 1 << 40
    some = order.Order(n, 5, shuffle=True)(np.array([0, 1, n - 1, n]))
    assert some[0].tolist() == [0, 0, 0, 1] and len(set(some[1].tolist())) == 4 and max(some[1]) < n


@pytest.mark.parametrize("placements", PLACEMENT_SETS.values(), ids=PLACEMENT_SETS)
def test_placements_are_drawn_from_the_asked_set_all_of_them_and_evenly(placements):
    drawn = placement.draw(0, 3, np.arange(9000), placements)
    assert drawn.dtype == np.int32
    values, counts = np.unique(drawn, return_counts=True)
    assert (
        tuple(values) == placements and (np.abs(counts - 9000 / len(placements)) < 0.12 * 9000 / len(placements)).all()
    )
    assert placement.draw(0, 3, 17, placements) == drawn[17]
    if len(placements) > 1:
        assert (placement.draw(0, 4, np.arange(9000), placements) != drawn).any()


@pytest.mark.parametrize("spec", ["photos", "synthetic:8000"])
def test_evaluation_is_in_order_and_padded(spec):
    source = data.open_source(spec, image_size=32)
    batches = list(eval_batches(source, split="test", batch_size=384, epochs=2, **EVAL))
    assert len(batches) == 6
    for k, batch in enumerate(batches):
        start = k % 3 * 384
        real = min(384, 1000 - start)
        assert batch["mask"].tolist() == [True] * real + [False] * (384 - real)
        np.testing.assert_array_equal(batch["index"][:real], np.arange(start, start + real))
        assert (batch["index"][real:] == -1).all() and (batch["label"][real:] == -1).all()
        assert (batch["image"][real:] == MEAN_GREY).all()
        assert set(batch["quarter"]) <= set(EVAL["placements"])
        np.testing.assert_array_equal(batch["label"][:real], source.labels("test")[start : start + real])
    same(batches[:3], batches[3:])
    np.testing.assert_array_equal(
        joined(batches[:3], "quarter")[:1000], placement.draw(0, 0, np.arange(1000), EVAL["placements"])
    )


def test_every_process_evaluates_the_same_number_of_batches(twenty):
    alone = list(eval_batches(twenty, split="val", batch_size=48, **EVAL))
    shares = [
        list(eval_batches(twenty, split="val", batch_size=48, process_index=h, process_count=4, **EVAL))
        for h in range(4)
    ]
    assert [len(share) for share in shares] == [11] * 4
    same(alone, [{key: joined(batch, key) for key in KEYS} for batch in zip(*shares)])
    assert joined(alone, "mask").sum() == 500


def test_evaluation_scales_the_shorter_side_and_cuts_out_the_centre(tmp_path):
    photograph = photos.load("coffee")
    (tmp_path / "test").mkdir()
    Image.fromarray(photograph).save(tmp_path / "test" / "coffee.png")
    source = data.open_source(f"folder:{tmp_path}")
    (batch,) = eval_batches(source, split="test", batch_size=1, **{**EVAL, "image_size": 224})
    height, width = photograph.shape[:2]
    scaled = Image.fromarray(photograph).resize((round(width * 256 / height), 256), Image.Resampling.BICUBIC)
    left = (scaled.width - 224) // 2
    expected = np.asarray(scaled.crop((left, 16, left + 224, 240))).astype(int)
    assert np.abs(batch["image"][0] - expected)[4:-4, 4:-4].mean() < 3


def jpeg_bytes(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_only_the_box_of_a_jpeg_sees_the_same_pixels(subsampling, progressive, mode):
    from qbheat_jax.data import jpeg

    image = Image.fromarray(photos.load("coffee")[:237, :301]).convert(mode)
    content = jpeg_bytes(
        image, quality=85, progressive=progressive, **({"subsampling": subsampling} if mode == "RGB" else {})
    )
    whole = decode.decode(content)
    for index in range(25):
        box = augment.random_resized_crop_box(augment.rng(0, 0, index, "crop"), 237, 301, (0.05, 1.0), (0.75, 4 / 3))
        crop = jpeg.window(content, lambda height, width, box=box: box, 64)()
        assert np.abs(augment.crop_resize(whole, box, 64).astype(int) - crop).max() <= 2


@pytest.mark.parametrize(
    "height, width", [(64, 64), (90, 100), (100, 90), (40, 90), (90, 40), (20, 30), (30, 20), (1, 1)]
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_tensorflow_resizes_as_pillow_does(height, width, mirrored):
    import PIL
    import tensorflow as tf

    from qbheat_jax.data import jpeg

    image = np.ascontiguousarray(photos.load("coffee")[:height, :width])
    difference = np.abs(
        augment.resize(image, 64, mirrored) - jpeg.resize(image, 64, tf.constant(mirrored)).numpy().astype(int)
    )
    if int(PIL.__version__.split(".")[0]) >= 13:  # the order of the axes is the same
        assert difference.max() <= 1 and difference.mean() < 0.002
    else:
        assert difference.mean() < 0.3


def test_boxes_drawn_in_the_graph_are_those_of_augment():
    import tensorflow as tf

    from qbheat_jax.data import jpeg

    epochs, indices = np.arange(60) % 3, 7 * np.arange(60)
    draws = augment.uniforms(5, epochs, indices, "crop", 22)
    found = {scale: tf.function(lambda shape, draws, scale=scale: jpeg.random_box(shape, draws, scale, (0.75, 4 / 3)))
             for scale in ((0.2, 1.0), (0.9, 1.0))}  # fmt: skip
    fallbacks, sizes = 0, np.random.default_rng(0).integers(1, 700, (60, 2)).tolist()
    for k, (height, width) in enumerate(sizes):
        for scale, box in found.items():
            generator = augment.rng(5, epochs[k], indices[k], "crop")
            expected = augment.random_resized_crop_box(generator, height, width, scale, (0.75, 4 / 3))
            assert tuple(box(tf.constant([height, width]), tf.constant(draws[k])).numpy()) == expected
            fallbacks += expected[0] == (height - expected[2]) // 2 and expected[1] == (width - expected[3]) // 2
        central = jpeg.centre_box(tf.constant([height, width]), 224).numpy()
        assert tuple(central) == augment.centre_box(height, width, 224)
    assert fallbacks > 10
    assert tuple(jpeg.centre_box(tf.constant([224, 224]), 224).numpy()) == (0, 0, 224, 224)


def test_only_whole_upright_jpegs_are_left_to_tensorflow():
    import tensorflow as tf

    from qbheat_jax.data import jpeg

    def exif(orientation, *others):
        block = Image.Exif()
        for tag in others:
            block[tag] = "text"
        block[0x0112] = orientation
        return block

    def box_of(height, width):
        return 0, 0, height, width

    image = Image.fromarray(photos.load("coffee")[:40, :50])
    plain = jpeg_bytes(image)
    rotation = b'<rdf:Description tiff:Orientation="6"/>'
    upright = {
        "plain": plain, "grey": jpeg_bytes(image.convert("L")), "progressive": jpeg_bytes(image, progressive=True),
        "profile": jpeg_bytes(image, icc_profile=b"x" * 3000), "exif": jpeg_bytes(image, exif=exif(1, 0x010F, 0x0110)),
        "big-endian": jpeg_bytes(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0"),
    }  # fmt: skip
    for name, content in upright.items():
        assert jpeg.is_plain(tf.constant(content)), name
        assert jpeg.window(content, box_of, 32)().shape == (32, 32, 3), name
    others = {
        "turned": jpeg_bytes(image, exif=exif(6)), "turned later": jpeg_bytes(image, exif=exif(6, 0x010F)), "torn": plain[:-50],
        "turned by XMP": jpeg_bytes(image, xmp=rotation), "png": b"\x89PNG" + plain, "empty": b"", "one byte": b"\xff",
    }  # fmt: skip
    for name, content in others.items():
        assert not jpeg.is_plain(tf.constant(content)), name
        if len(content) > 4 and name != "png":
            assert jpeg.window(content, box_of, 32) is None, name
    # What `is_plain` is not sure of, Pillow looks at.
    far = jpeg_bytes(image, icc_profile=b"x" * 9000)
    assert not jpeg.is_plain(tf.constant(far)) and jpeg.window(far, box_of, 32)().shape == (32, 32, 3)
    assert jpeg.window(jpeg_bytes(image.convert("CMYK")), box_of, 32) is None


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of 40 images: JPEGs of noise and, here and there, one that is torn, turned, of ink, corrupt or no JPEG."""
    root = tmp_path_factory.mktemp("mixed")
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for k in range(40):
        image, path = Image.fromarray(np.roll(noise, 7 * k, 1)), root / "train" / "ab"[k % 2] / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k == 5:
            image = image.convert("CMYK")
        image.save(path, **({"exif": turned} if k == 4 else {}), **({"format": "PNG"} if k == 6 else {}))
    torn, corrupt = (root / "train" / "ab"[k % 2] / f"{k:02}.jpg" for k in (7, 11))
    torn.write_bytes(torn.read_bytes()[:900])
    content = bytearray(corrupt.read_bytes())
    content[content.index(b"\xff\xc4") + 4] = 0xFF  # a table of codes
    corrupt.write_bytes(content)
    source = data.open_source(f"folder:{root}")
    (root / "train" / "b" / "13.jpg").unlink()
    return source


def pillow(source, batch, views=1):
    """The crops of a training batch as Pillow makes them of whole images, and which of them there are."""
    names = ("seed", "flip", "placements", "crop_scale", "crop_ratio")
    spec = spec_of(32, views=views, **{name: TRAIN[name] for name in names})
    made = image_lib.build(
        spec, lambda _, index: source.fetch("train", index), np.zeros(len(batch["index"]), int), batch["index"].astype(int),
        data.BadFiles(1.0, 40),
    )  # fmt: skip
    return made


def test_mixed_files_are_what_pillow_makes_of_them(mixed):
    bad = data.BadFiles(1.0, 40)
    (batch,) = take(train_batches(mixed, batch_size=40, views=2, bad=bad, **TRAIN), 1)
    expected = pillow(mixed, batch, 2)
    assert {os.path.basename(name) for name in bad.names} == {"07.jpg", "11.jpg", "13.jpg"}
    assert (
        set(batch["index"][~batch["mask"]]) == set(expected["index"][~expected["mask"]]) and batch["mask"].sum() == 37
    )
    for key in KEYS - {"image"}:
        if key != "label":  # of a file that is gone there is one in its folder's name
            np.testing.assert_array_equal(batch[key], expected[key], key)
    for key in ("image", "image2"):
        difference = np.abs(batch[key].astype(int) - expected[key])
        assert difference.max() <= 2 and difference.mean() < 0.05, "decoding a part of a JPEG may round otherwise"


def test_pixels_do_not_depend_on_what_else_is_in_a_chunk(mixed):
    whole = take(train_batches(mixed, batch_size=40, workers=2, **TRAIN), 1)
    for how in ({"batch_size": 1}, {"batch_size": 8, "workers": 1, "prefetch": 1}):
        parts = take(train_batches(mixed, **how, **TRAIN), 40 // how["batch_size"])
        for key in KEYS:
            np.testing.assert_array_equal(joined(whole, key), joined(parts, key), key)


def functions_of(graph):
    """{name: set of operations} of all functions of a GraphDef, and the calls between them."""
    return {f.signature.name: f.node_def for f in graph.library.function}


def test_no_interpreter_makes_a_jpeg(mixed, monkeypatch):
    import tensorflow as tf

    from qbheat_jax.data import pipeline
    from qbheat_jax.data.batches import Plan

    spec = spec_of(32, 0, True, crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3))
    work = pipeline._Work(Plan(mixed, "train", spec, 40, 0, 1, None))
    graph = tf.compat.v1.GraphDef.FromString(pipeline.dataset(work, 1, 1)._as_serialized_graph().numpy())
    functions = functions_of(graph)

    def reached(nodes, seen):
        """The operations of `nodes` and of all functions that they call, but for the branch that is Python's."""
        for node in nodes:
            yield node.op
            for name, value in node.attr.items():
                called = [value.func.name] if value.HasField("func") else [f.name for f in value.list.func]
                for function in set(called) - seen:
                    if function in functions:
                        seen.add(function)
                        yield from reached(functions[function], seen)

    jpegs = [name for name, nodes in functions.items() if any(node.op == "ReadFile" for node in nodes)
             or {"DecodeAndCropJpeg"} & set(reached(nodes, {name}))]  # fmt: skip
    (example,) = [name for name in jpegs if "crops" in name]
    made = set(reached(functions[example], {example}))
    assert {"ReadFile", "DecodeAndCropJpeg", "ScaleAndTranslate"} <= made
    assert not made & {"PyFunc", "EagerPyFunc", "PyFuncStateless"}

    # And none is called: not once for the JPEGs of a chunk.
    calls = []
    monkeypatch.setattr(pipeline._Work, "_made", lambda *a: calls.append(a) or pytest.fail("Python made a chunk"))
    paths = [path for path in mixed.paths("train") if int(os.path.basename(path)[:2]) > 13]
    monkeypatch.setitem(mixed._files, "train", paths)
    monkeypatch.setitem(mixed.splits, "train", len(paths))
    (batch,) = take(train_batches(mixed, batch_size=26, **TRAIN), 1)
    assert batch["mask"].all() and not calls


def bag(root, bad):
    """40 images in many formats below root/train, and `bad` broken files among them."""
    (root / "train").mkdir(parents=True)
    for k in range(40):
        mode, kind = (("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "gif"))[k % 5]
        image = Image.new("RGB", (40, 30), (k * 6, 100, 50))
        # quantize, where convert would dither.
        (image.quantize(4) if mode == "P" else image.convert(mode)).save(root / "train" / f"{k:02}.{kind}")
    whole = (root / "train" / "00.jpg").read_bytes()
    for k in range(bad):
        # By turns truncated, corrupt, and empty.
        (root / "train" / f"bad{k}.jpg").write_bytes((whole[: len(whole) // 2], b"no image", b"")[k % 3])
    return data.open_source(f"folder:{root}")


def test_bad_files_are_masked_counted_once_and_named_in_the_log(tmp_path, caplog):
    source = bag(tmp_path, bad=3)
    bad = data.BadFiles(0.1, source.splits["train"])
    with caplog.at_level(logging.WARNING, "qbheat"):
        batches = take(train_batches(source, batch_size=43, bad=bad, **TRAIN), 2)
    assert bad.count == 3
    names = [record.getMessage() for record in caplog.records if record.name == "qbheat"]
    assert sorted(re.search(r"bad\d\.jpg", name)[0] for name in names) == ["bad0.jpg", "bad1.jpg", "bad2.jpg"]
    for batch in batches:
        assert batch["mask"].sum() == 40
        assert sorted(batch["index"][~batch["mask"]]) == [40, 41, 42]
        assert (batch["image"][~batch["mask"]] == MEAN_GREY).all()
        # Every format shows its colour; grey ones (k % 5 == 1) have lost theirs.
        for image, index in zip(batch["image"][batch["mask"]], batch["index"][batch["mask"]]):
            if index % 5 != 1:
                assert np.abs(image.astype(int) - (index * 6, 100, 50)).max() <= 8


def test_too_many_bad_files_stop_the_run(tmp_path):
    source = bag(tmp_path, bad=3)
    iterator = train_batches(source, batch_size=43, bad=data.BadFiles(0.05, 43), **TRAIN)
    words = "3 of 43 images (7.0%) cannot be decoded, more than data.max_bad_fraction=0.05 allows (first: "
    error = refused(words, next, iterator)
    assert error.exit_code == RUN_FAILED and "bad" in str(error) and "raise data.max_bad_fraction" in str(error)


def test_a_file_that_has_vanished_is_a_bad_file(tmp_path):
    source = bag(tmp_path, bad=0)
    os.remove(tmp_path / "train" / "07.png")
    bad = data.BadFiles(1.0, 40)
    (batch,) = take(train_batches(source, batch_size=40, bad=bad, **TRAIN), 1)
    assert batch["mask"].sum() == 39 and [os.path.basename(name) for name in bad.names] == ["07.png"]


def test_bad_files_limit():
    bad = data.BadFiles(0.5, 4)
    for name in ("a", "b", "b"):
        bad.add(name, "broken")
    bad.check()
    assert bad.count == 2
    bad.add("c", "broken")
    refused("3 of 4 images (75.0%) cannot be decoded, more than data.max_bad_fraction=0.5 allows (first: a", bad.check)


def test_refusals(twenty, fifty):
    dev = {**TRAIN, "split": "dev"}
    refused("has no split 'dev': it has 'train' (2500 images)", train_batches, twenty, batch_size=8, **dev)
    refused("split 'train' has 50 images, fewer than batch_size=64", train_batches, fifty, batch_size=64, **TRAIN)
    refused(
        "batch_size=10 cannot be shared by 4 processes: use a multiple of 4",
        train_batches, fifty, batch_size=10, process_count=4, **TRAIN,
    )  # fmt: skip
    refused("has no split 'test': it has 'train' (50 images)", eval_batches, fifty, split="test", batch_size=8, **EVAL)


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_synthetic_batches_need_no_tensorflow():
    done = run(
        "import sys; from qbheat_jax import data; from tests.batches import eval_batches, train_batches\n"
        "s = data.open_source('synthetic:64', image_size=16)\n"
        f"next(train_batches(s, batch_size=8, **{TRAIN!r}))\n"
        f"list(eval_batches(s, split='test', batch_size=8, **{EVAL!r}))\n"
        "data.open_source('photos')\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'tensorflow_datasets', 'jax')))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_abandoned_iterator_neither_hangs_nor_complains_at_exit():
    done = run(
        "from qbheat_jax import data; from tests.batches import eval_batches, train_batches\n"
        f"it = train_batches(data.open_source('photos'), batch_size=64, prefetch=8, **{TRAIN!r})\n"
        "next(it); print('here', flush=True)"
    )
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def prepared(folder, kind, lengths=(20, 7, 23)):
    """Data set `toy` as tfds leaves it on disk: 50 train images in three files, 5 validation; image k is grey 5 k."""
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    path = folder / "toy" / "1.0.0"
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
        }
    )
    template = tfds.core.ShardedFileTemplate(
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name="toy",
        filetype_suffix=kind,
        data_dir=path,
    )
    splits = []
    for name, shards in (("train", lengths), ("validation", (5,))):
        split = tfds.core.SplitInfo(name=name, shard_lengths=list(shards), num_bytes=0, filename_template=template)
        splits.append(split)
        values = iter(range(sum(shards)))
        for file, count in zip(split.filepaths, shards):
            if kind == "tfrecord":
                writer = tf.io.TFRecordWriter(str(file))
            else:
                writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for _ in range(count):
                k = next(values)
                writer.write(
                    features.serialize_example({"image": np.full((9, 12, 3), k * 5, np.uint8), "label": k % 3})
                )
            writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=path, features=features, split_infos=splits, filename_template=template, check_data=False
    )
    return data.open_source("tfds:toy", tfds_dir=str(folder))


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def toy(request, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp(request.param), request.param)


def test_tfds_prepared_on_disk(toy):
    assert toy.splits == {"train": 50, "val": 5} and toy.class_names == ["a", "b", "c"]
    batches = take(train_batches(toy, batch_size=10, **TRAIN), 10)
    epochs = [joined(batches[:5], "index"), joined(batches[5:], "index")]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50)) and epoch.tolist() != list(range(50))
    assert (epochs[0] != epochs[1]).any()
    for batch in batches:
        assert batch["mask"].all()
        assert (batch["image"] == (batch["index"] * 5)[:, None, None, None]).all()
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    evaluated = list(eval_batches(toy, split="validation", batch_size=4, epochs=2, **EVAL))
    assert [batch["index"].tolist() for batch in evaluated] == [[0, 1, 2, 3], [4, -1, -1, -1]] * 2


def test_a_subset_of_tfds_is_read_and_shared(toy):
    """What few-shot probes and analyses read; of TFRecord it is filtered out of the stream, by index of ArrayRecord."""
    chosen = [3, 5, 8, 13, 21, 34]
    subset = splits.Subset(toy, {"few": [("train", np.array(chosen))]})
    values, found = [], splits.labels(toy, "train")
    assert found.tolist() == [k % 3 for k in range(50)]
    for h in range(2):
        batches = list(eval_batches(subset, split="few", batch_size=4, process_index=h, process_count=2, **EVAL))
        values += [image[0, 0, 0] for b in batches for image, real in zip(b["image"], b["mask"]) if real]
    assert sorted(values) == [5 * k for k in chosen]
    batches = take(train_batches(subset, batch_size=6, **{**TRAIN, "split": "few"}), 2)
    assert all(sorted(batch["label"]) == sorted(k % 3 for k in chosen) for batch in batches)


def test_tfds_resumes_and_shares(toy):
    whole = take(train_batches(toy, batch_size=8, **TRAIN), 9)
    same(whole[5:], take(train_batches(toy, batch_size=8, position=40, **TRAIN), 4))
    shares = [
        take(train_batches(toy, batch_size=8, position=40, process_index=h, process_count=2, **TRAIN), 4)
        for h in range(2)
    ]
    same(whole[5:], [{key: joined(batch, key) for key in KEYS} for batch in zip(*shares)])


@pytest.mark.parametrize("random_access", [False, True])
def test_tfds_mocked(random_access, monkeypatch):
    import tensorflow_datasets as tfds

    from qbheat_jax.data.sources import tfds as tfds_lib

    monkeypatch.setattr(tfds_lib, "_has_random_access", lambda info: random_access)
    with tfds.testing.mock_data(num_examples=12):
        source = data.open_source("tfds:cifar10")
        assert source.splits["train"] == 12 and source.random_access is random_access
        source.check_labels("train", "test")
        batches = take(train_batches(source, batch_size=4, **TRAIN), 6)
        assert sorted(joined(batches[:3], "index")) == sorted(joined(batches[3:], "index")) == list(range(12))
        assert joined(batches, "mask").all() and joined(batches, "image").std() > 20
        same(batches[2:], take(train_batches(source, batch_size=4, position=8, **TRAIN), 4))
        evaluated = list(eval_batches(source, split="test", batch_size=8, **EVAL))
        assert joined(evaluated, "mask").tolist() == [True] * 12 + [False] * 4


def test_tfds_that_decodes_all_the_same():
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def as_dataset(self, *args, **kwargs):
        images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 1), np.uint8)
        return tf.data.Dataset.from_tensor_slices({"image": images, "label": np.arange(6, dtype=np.int64)})

    with tfds.testing.mock_data(num_examples=6, as_dataset_fn=as_dataset):
        source = data.open_source("tfds:mnist")
        (batch,) = take(train_batches(source, batch_size=6, **TRAIN), 1)
    assert (batch["image"] == batch["label"][:, None, None, None]).all() and batch["mask"].all()


def test_tfds_damaged_file(tmp_path):
    source = prepared(tmp_path, "tfrecord", lengths=(10,))
    (file,) = (tmp_path / "toy" / "1.0.0").glob("toy-train*")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="data.source='tfds:toy' cannot be read: ") as caught:
        take(train_batches(source, batch_size=10, **TRAIN), 2)
    assert caught.value.exit_code == RUN_FAILED


def test_tfds_damaged_record_is_a_bad_file(tmp_path):
    prepared(tmp_path, "array_record", lengths=(40,))
    (file,) = (tmp_path / "toy" / "1.0.0").glob("toy-train*")
    content = bytearray(file.read_bytes())
    content[3000:3050] = bytes(value ^ 255 for value in content[3000:3050])
    file.write_bytes(content)
    bad = data.BadFiles(0.1, 40)
    source = data.open_source("tfds:toy", tfds_dir=str(tmp_path))
    (batch,) = take(train_batches(source, batch_size=40, bad=bad, **TRAIN), 1)
    (broken,) = batch["index"][~batch["mask"]]
    assert bad.names == (f"tfds:toy train[{broken}]",)


def test_tfds_refusals(tmp_path):
    def refuse(words, spec):
        refused(words, data.open_source, spec, tfds_dir=str(tmp_path))

    refuse("data.source='tfds:nonesuch'", "tfds:nonesuch")
    refuse("data.source='tfds:cifar10'", "tfds:cifar10")
    refuse("run 'tfds build cifar10 --file_format=array_record'", "tfds:cifar10")
    refuse("BuilderConfig foo not found", "tfds:cifar10/foo")
    refuse("has no image feature: its features are idx, label, sentence", "tfds:glue/cola")
    refuse("data.source='tfds:'", "tfds:")
