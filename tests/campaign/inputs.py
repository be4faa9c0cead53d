"""Malformed inputs of every kind, made by a seeded mutator. A command must exit with 0, or with 1 or 2 and one error line."""

import io
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image

from tests.campaign import runs

# Time limit of a command in seconds.
LIMIT = 120


def run(place, count, until, report):
    """Try malformed inputs of each kind in turn.

    Args:
      place: `Path` of a folder for the files.
      count: Number of inputs.
      until: Time of `time.monotonic` at which to stop.
      report: Function (kind, what, wrong) that is called after each try, such as a `Tally`.
    """
    base = _base(place)
    worker, made = Worker(place), place / "input"
    kinds = itertools.cycle((_image, _folder, _image, _annotations, _weights, _checkpoint, _config, _words))
    for number, kind in zip(range(count), kinds):
        if time.monotonic() > until:
            break
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        arguments = kind(runs.seeded("inputs", number), made, base)
        wrong = worker.judge(arguments)
        if wrong:
            kept = place.parent / f"campaign-input-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(made, kept, symlinks=True, ignore=_not_copied)
            print(f"--- input {number}, kept in {kept}: {arguments}\n{wrong}", flush=True)
        report(f"malformed {kind.__name__[1:]}", f"input {number}", wrong and wrong.splitlines()[0])
    worker.close()
    shutil.rmtree(made, ignore_errors=True)


def _not_copied(folder, names):
    """Return the names that `shutil.copytree` should ignore: pipes and broken links."""
    paths = {name: os.path.join(folder, name) for name in names}
    return [name for name, path in paths.items() if not (os.path.isfile(path) or os.path.isdir(path))]


class Worker:
    """A process that runs the commands. It is replaced after a hang or crash."""

    def __init__(self, home):
        self._process, self._home = None, str(home)

    def judge(self, arguments):
        """Run a command. Return None if it ends as it should, else the reason."""
        if self._process is None:
            self._begin()
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=LIMIT)
        except queue.Empty:
            answer = None
        if answer is None:
            state = self._process.poll()
            self.close()
            return f"it took more than {LIMIT} s" if state is None else f"its process ended with exit code {state}"
        errors = [line for line in answer["err"].splitlines() if line.startswith("qbheat: error")]
        if answer["code"] not in (0, 1, 2):
            return f"exit code {answer['code']}\n{answer['err'][-2000:]}"
        if "Traceback" in answer["err"]:
            return f"a traceback was printed\n{answer['err'][-2000:]}"
        if len(errors) != (answer["code"] != 0):
            return f"{len(errors)} error lines with exit code {answer['code']}\n{answer['err'][-2000:]}"
        return None

    def _begin(self):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1", "HOME": self._home}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=runs.ROOT, env=environment,
        )  # fmt: skip
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()

    def close(self):
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _read(stream, answers):
    for line in stream:
        answers.put(json.loads(line))
    answers.put(None)


def _base(place):
    """Train a small run and export its weights in three file formats. Return the run's workdir."""
    run = runs.Run(place, "base", steps=4)
    run.start()
    codes = run.wait(300)
    if any(codes):
        raise RuntimeError(run.log())
    for name in ("weights.safetensors", "weights.npz"):
        command = [sys.executable, "-m", "qbheat_jax", "export", "--from", str(run.workdir), "--to", str(place / name)]
        subprocess.run(command, check=True, cwd=runs.ROOT, capture_output=True)
    try:
        import torch

        with np.load(place / "weights.npz") as arrays:
            torch.save({"state_dict": {k: torch.from_numpy(v) for k, v in arrays.items()}}, place / "weights.pth")
    except ImportError:
        pass
    return run.workdir


# --- Kinds: each function takes (draw, empty folder, workdir of the base run) and returns the command's arguments ------


def _spoiled(draw, data):
    """Return damaged bytes: truncated, flipped, overwritten, repeated, padded or empty."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3))):
        size = max(1, len(data))
        begin, length = draw.randrange(size), draw.choice((1, 4, 64, 4096))
        kind = draw.choice(("cut", "flip", "head", "overwrite", "zero", "drop", "repeat", "pad", "nothing"))
        if kind == "cut":
            data = data[:begin]
        elif kind == "flip" and data:
            data[begin] ^= 1 << draw.randrange(8)
        elif kind == "head" and data:
            data[draw.randrange(min(len(data), 64))] = draw.randrange(256)
        elif kind == "overwrite":
            data[begin : begin + length] = draw.randbytes(min(length, size - begin))
        elif kind == "zero":
            data[begin : begin + length] = bytes(min(length, size - begin))
        elif kind == "drop":
            del data[begin : begin + length]
        elif kind == "repeat":
            data[begin:begin] = data[begin : begin + length]
        elif kind == "pad":
            data += draw.randbytes(length)
        elif kind == "nothing" and draw.random() < 0.2:
            data = bytearray()
    return bytes(data)


def _encoded(kind, mode="RGB", **options):
    ramp = np.arange(40 * 48 * 3, dtype=np.uint32).reshape(40, 48, 3) * 37 % 251
    image = Image.fromarray(ramp.astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((ramp[..., 0] * 257).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


_ENDINGS = (
    (".jpg", "JPEG", "RGB", {}), (".jpg", "JPEG", "L", {"progressive": True}), (".jpeg", "JPEG", "CMYK", {}),
    (".png", "PNG", "RGBA", {}), (".png", "PNG", "I;16", {}), (".png", "PNG", "P", {}), (".gif", "GIF", "P", {}),
    (".webp", "WEBP", "RGB", {}), (".bmp", "BMP", "RGB", {}), (".tif", "TIFF", "RGB", {}), (".tiff", "TIFF", "I;16", {}),
    (".tif", "TIFF", "RGB", {"compression": "tiff_lzw"}), (".ppm", "PPM", "RGB", {}), (".jp2", "JPEG2000", "RGB", {}),
    (".avif", "AVIF", "RGB", {}), (".tga", "TGA", "RGB", {}), (".pcx", "PCX", "RGB", {}), (".qoi", "QOI", "RGB", {}),
)  # fmt: skip


def _image(draw, folder, base):
    """Make a damaged image next to a good one."""
    ending, kind, mode, options = draw.choice(_ENDINGS)
    data = _encoded(kind, mode, **options)
    (folder / f"good{ending}").write_bytes(data)
    # Use its own ending, another format's, or none.
    name = f"bad{draw.choice((ending, ending, ending, draw.choice(_ENDINGS)[0], ''))}"
    (folder / name).write_bytes(_spoiled(draw, data))
    return ["doctor", "--data", f"folder:{folder}"]


_NAMES = (
    "train", "Train", "val", "validation", "test", "test-dev", "images", "labels", "a", "b", "A", "class one", "@eaDir", ".git",
    "__MACOSX", "ünï", "x" * 200, "two\nlines", "-dash", "~", "%s{}", "train2017", "training_set", "1", "'\"", "emoji 🐈",
)  # fmt: skip


def _folder(draw, folder, base):
    """Make a tree of odd names, links, pipes and files that are not images."""
    data = _encoded("PNG")
    folders = [folder]
    for _ in range(draw.randrange(1, 14)):
        here, name = draw.choice(folders), draw.choice(_NAMES)
        path = here / name
        kind = draw.choice(
            ("folder", "folder", "image", "image", "text", "pipe", "loop", "up", "gone", "empty", "bytes")
        )
        if os.path.lexists(path):
            continue
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "pipe":
            os.mkfifo(path.with_name(f"{name[:90]}.jpg"))
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "up":
            path.symlink_to(folder)
        elif kind == "gone":
            path.with_name(f"{name[:90]}.png").symlink_to(folder / "nowhere.png")
        elif kind == "bytes":
            with open(os.path.join(os.fsencode(here), b"\xff\xfe%d.png" % draw.randrange(99)), "wb") as file:
                file.write(data)
        else:
            ending = {"image": draw.choice((".png", ".PNG", "")), "text": ".txt", "empty": ".png"}[kind]
            content = {"image": data, "text": b"no image", "empty": b""}[kind]
            here.joinpath(f"{name[:90]}{draw.randrange(99)}{ending}").write_bytes(content)
    spec = draw.choice((folder, folder, folder, f"{folder}/", draw.choice(folders)))
    return ["doctor", "--data", f"folder:{spec}"]


_ODD = (
    None, True, False, 0, -1, 1.5, 1e400, 2**70, "", " ", "7", "64.0", "nan", "x", [], [1], {}, {"id": 1}, float("nan"),
    "../..", "a\0b", "\ud800",
)  # fmt: skip


def _annotations(draw, folder, base):
    """Make a file in COCO's format with odd values, odd keys or odd bytes."""
    for n in range(3):
        (folder / f"{n}.png").write_bytes(_encoded("PNG"))
    truth = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 40} for n in range(3)],
        "categories": [{"id": n, "name": f"kind {n}"} for n in range(2)],
        "annotations": [
            {"id": n, "image_id": n % 3, "category_id": n % 2, "bbox": [n, n, 9, 9], "area": 81, "iscrowd": 0}
            for n in range(5)
        ],
    }
    for _ in range(draw.choice((1, 1, 2, 4))):
        entries = truth[draw.choice(list(truth))]
        entry = draw.choice(entries)
        key = draw.choice(list(entry)) if isinstance(entry, dict) else 0
        kind = draw.choice(("value", "value", "value", "remove", "entry", "inside"))
        if kind == "value" and isinstance(entry, dict):
            entry[key] = draw.choice(_ODD)
        elif kind == "remove" and isinstance(entry, dict):
            entry.pop(key)
        elif kind == "inside" and isinstance(entry, dict) and isinstance(entry.get("bbox"), list) and entry["bbox"]:
            entry["bbox"][draw.randrange(len(entry["bbox"]))] = draw.choice(_ODD)
        else:
            entries[draw.randrange(len(entries))] = draw.choice(_ODD)
    data = json.dumps(truth).encode()
    data = draw.choice(
        (data, data, data, data, b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), _spoiled(draw, data))
    )
    (folder / "a.json").write_bytes(data)
    return ["doctor", "--data", f"coco:{folder},{folder}/a.json"]


def _weights(draw, folder, base):
    """Make a damaged file of weights with its own or another ending."""
    source = draw.choice(sorted(base.parent.glob("weights.*[zhs]")))
    ending = draw.choice((source.suffix, source.suffix, ".pth", ".bin", ""))
    path = folder / f"spoiled{ending}"
    path.write_bytes(_spoiled(draw, source.read_bytes()))
    arch = draw.choice(("mobilenet_v2", "mobilenet_v2", "mobilenet_v2", "resnet50", "nothing"))
    more = draw.choice(((), ("--head", "drop"), ("--key", "model"), ("--classes", "10")))
    return ["port", "--arch", arch, "--from", str(path), "--to", str(folder / "ported"), *more]


def _checkpoint(draw, folder, base):
    """Make a workdir with a damaged, emptied or removed file."""
    workdir = folder / "run"
    shutil.copytree(base, workdir)
    files = sorted(path for path in workdir.rglob("*") if path.is_file())
    for path in draw.sample(files, draw.choice((1, 1, 2))):
        if draw.random() < 0.2:
            path.unlink()
        else:
            path.write_bytes(_spoiled(draw, path.read_bytes()))
    return ["export", "--from", str(workdir), "--to", str(folder / "out.npz")]


_VALUES = (
    "0", "-1", "nan", "1e99", "''", "None", "True", "[]", "{}", "'x'", "(1, 2)", "2**70", "object()", "1/0", "b'x'",
    "0.5",
)  # fmt: skip
_FIELDS = (
    "seed", "image_size", "batch_size", "total_steps", "learning_rate", "warmup", "data", "encoder", "encoder.name",
    "heat.depth", "data.source", "data.processes", "data.crop_scale", "mesh", "mesh.fsdp", "dtype", "objective", "keep",
    "init", "total_epochs", "log_every", "quarter.placements", "decoder.width", "decoder.heads", "no_such_field",
    "clip_norm", "accumulate", "norm_pix",
)  # fmt: skip


def _config(draw, folder, base):
    """Make a config file with odd values, odd fields or invalid Python."""
    text = "".join(
        f"    config[{name!r}] = {value!r}\n" for name, value in runs.CONFIG.items() if not isinstance(value, dict)
    )
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    config = ConfigDict()\n{text}"
    for name, value in runs.CONFIG.items():
        if isinstance(value, dict):
            text += f"    config.{name} = ConfigDict({value!r})\n"
    for _ in range(draw.choice((1, 1, 2))):
        text += f"    config.{draw.choice(_FIELDS)} = {draw.choice(_VALUES)}\n"
    text += "    return config\n"
    if draw.random() < 0.15:
        text = _spoiled(draw, text.encode()).decode(errors="replace")
    (folder / "config.py").write_text(text, errors="replace")
    return [
        "preflight",
        "--config",
        str(folder / "config.py"),
        "--topology",
        draw.choice(("gpu:1", "gpu:8", "gpu:0", "x:1")),
    ]


_WORDS = (
    "pretrain", "probe", "finetune", "detect", "compare", "port", "export", "classify", "analyse", "report",
    "preflight", "doctor", "--config", "--workdir", "--init", "--from", "--to", "--arch", "--data", "--config.seed",
    "--config.total_steps=1", "--top", "--config.", "--config.data.source", "--batch-size", "--image-size", "", "x",
    "0", "-1", "nan", "~", "/dev/null", "random", "--help", "--no-such-flag", "folder:", "synthetic", "coco:a,b",
    "configs/lin.py", "mobilenet_v2", "a\0b", "é\n", "--coordinator",
)  # fmt: skip


def _words(draw, folder, base):
    """Make a command line of odd words."""
    words = [draw.choice(_WORDS[:12]), *draw.choices(_WORDS, k=draw.randrange(7))]
    # A --workdir at the end keeps commands from writing elsewhere.
    return [*words, "--workdir", str(folder / "workdir")] if draw.random() < 0.5 else words
