"""The command line: parse, dispatch, exit code. `qbheat COMMAND ...` is `python -m qbheat_jax COMMAND ...`.

Exit codes are those of errors.py. stdout carries results, stderr the log.
"""

import argparse
import itertools
import json
import logging
import os
import re
import sys

from qbheat_jax import __version__, console, paths
from qbheat_jax.errors import CLOSED, PREEMPTED, RUN_FAILED, UserError
from qbheat_jax.train import runtime

log = logging.getLogger("qbheat")

OVERRIDE = re.compile(r"--config\.([\w.]+)(?:=(.*))?", re.DOTALL)


def main(argv=None):
    """Runs one command -> exit code. A user's mistake is one line on stderr; QBHEAT_DEBUG=1 shows the traceback too."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        try:
            argv, overrides = split_overrides(argv)
            arguments = _with_paths(_parser().parse_args(argv))
            runtime.expect_no_tpu()
            runtime.expect_no_gpu()
            runtime.tune_gpu()
            if getattr(arguments, "workdir", None):
                from qbheat_jax.train import compilation_cache

                compilation_cache.keep(arguments.workdir)
            arguments.command(arguments, overrides)
        except SystemExit as end:  # argparse's, which has printed what it was asked for
            if end.code:
                raise
        console.flush()
        return 0
    except UserError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail(console.INTERRUPTED, RUN_FAILED)
    except OSError as error:  # a disk that has become read-only, a folder that is gone
        reason = error.strerror or error
        return _fail(f"{error.filename}: {reason}" if error.filename else reason, RUN_FAILED)
    except MemoryError as error:
        return _fail(f"out of memory: {error}", RUN_FAILED)
    except Exception as error:
        # XLA and tensorstore report what the machine refuses (memory, disk) by a status word in the text.
        if re.search(r"RESOURCE_EXHAUSTED|No space left|out of memory", str(error), re.IGNORECASE):
            return _fail(
                f"{str(error).splitlines()[0]} (try a smaller batch_size, or free memory and disk)", RUN_FAILED
            )
        # What the machines that are left see when another one of the run is gone.
        if re.search(r"UNAVAILABLE|DEADLINE_EXCEEDED|Gloo|closed by peer|heartbeat", str(error)):
            return _fail(
                f"another process of the run is gone ({str(error).splitlines()[0][:200]}): start all of them again, they go on "
                "from the last checkpoint",
                RUN_FAILED,
            )
        raise


# Arguments that are paths, or lists of them, by the command's own name, and what stands in their place without being one.
_PATHS = ("config", "workdir", "init", "source", "to", "json", "images", "tfds_dir")
_NO_PATHS = ("random", "pixels", "histogram")


def _with_paths(arguments):
    """Expand every path that was given, by the rule of `paths`. A data source expands its own."""
    given = {
        name: value for name, value in vars(arguments).items() if name in _PATHS and isinstance(value, (str, list))
    }
    if not given.get("tfds_dir"):
        given.pop("tfds_dir", None)  # its default
    for name, value in given.items():
        flag = {"source": "--from", "images": "an image's path"}.get(name, f"--{name}".replace("_", "-"))
        texts = [value] if isinstance(value, str) else value
        texts = [text if text in _NO_PATHS else paths.expand(text, flag) for text in texts]
        setattr(arguments, name, texts[0] if isinstance(value, str) else texts)
    return arguments


def _fail(message, code):
    if code == CLOSED:
        return code
    console.tell(f"qbheat: {message}" if code == PREEMPTED else f"qbheat: error: {message}")
    if os.environ.get("QBHEAT_DEBUG"):
        log.exception("traceback, because QBHEAT_DEBUG is set")
    return code


def split_overrides(argv):
    """Takes `--config.key value` and `--config.key=value` out of argv -> (the rest, [(key, text), ...])."""
    rest, overrides, items = [], [], iter(argv)
    for item in items:
        match = OVERRIDE.fullmatch(item)
        if not match:
            rest.append(item)
            continue
        value = match[2] if match[2] is not None else next(items, None)
        if value is None:
            raise UserError(f"{item} needs a value")
        overrides.append((match[1], value))
    return rest, overrides


def pretrain(arguments, overrides):
    from qbheat_jax import config
    from qbheat_jax.tasks import pretrain
    from qbheat_jax.train import distributed, profile

    traced = profile.parse(arguments.profile_steps) if arguments.profile_steps is not None else None
    distributed.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    if arguments.init:
        overrides = [*overrides, ("init", arguments.init)]
    summary = pretrain.run(config.load(arguments.config, overrides), arguments.workdir, traced)
    distributed.say(json.dumps(summary))


def probe(arguments, overrides):
    """Every config with every init. One pair's result is in WORKDIR; several are in WORKDIR/PROTOCOL-INIT each."""
    from qbheat_jax import config
    from qbheat_jax.pretrained import NO_ENCODER
    from qbheat_jax.probe.encode import POOLED
    from qbheat_jax.tasks import probe

    configs = [config.load(path, overrides, config.PROBE) for path in arguments.config]
    pairs = [
        (c, init)
        for c, init in itertools.product(configs, arguments.init)
        if c.protocol in POOLED or init not in NO_ENCODER
    ]
    if not pairs:
        raise UserError(
            f"--init {' '.join(arguments.init)} has one feature vector an image: it takes protocol='lin' or 'knn'"
        )
    runs = [init for init in arguments.init if init != "random" and init not in NO_ENCODER]
    names = {init: init if init not in runs else "run" for init in arguments.init}
    if len(runs) > 1:
        names.update({init: os.path.basename(os.path.normpath(init)) for init in runs})
    folders = [os.path.join(arguments.workdir, f"{probe.name(c)}-{names[init]}") for c, init in pairs]
    if len(set(folders)) < len(pairs):
        raise UserError(f"two probes would write to {max(folders, key=folders.count)}: give them a --workdir each")

    def cells_first(n):  # of each init, since their means then need not be encoded again
        return arguments.init.index(pairs[n][1]), pairs[n][0].protocol in POOLED

    results, store = {}, probe.FeatureCache(os.path.join(arguments.workdir, "features"))
    for n in sorted(range(len(pairs)), key=cells_first):
        c, init = pairs[n]
        results[n] = probe.run(c, arguments.workdir if len(pairs) == 1 else folders[n], init, store)
        log.info("%s", probe.line(results[n]))
    console.say(probe.table([results[n] for n in range(len(pairs))]))


def finetune(arguments, overrides):
    from qbheat_jax import config
    from qbheat_jax.tasks import finetune
    from qbheat_jax.tasks.probe import line
    from qbheat_jax.train import distributed

    distributed.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    fields = config.load(arguments.config, [*overrides, ("init", arguments.init)], config.FINETUNE)
    result = finetune.run(fields, arguments.workdir)
    log.info("%s", line(result))
    distributed.say(json.dumps(result))


def detect(arguments, overrides):
    from qbheat_jax import config
    from qbheat_jax.tasks import detect
    from qbheat_jax.train import distributed

    distributed.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    fields = config.load(arguments.config, [*overrides, ("init", arguments.init)], config.DETECT)
    result = detect.run(fields, arguments.workdir)
    log.info("%s", detect.line(result))
    distributed.say(json.dumps(result))


def compare(arguments, overrides):
    from qbheat_jax import compare

    result = compare.run(compare.read(arguments.config, overrides), arguments.workdir)
    console.say(compare.text(result))
    failed = [cell["path"] for cell in result["cells"] if cell["state"] == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(result['cells'])} cells failed, {failed[0]} first; the same command tries them again",
            exit_code=RUN_FAILED,
        )


def port(arguments, overrides):
    from qbheat_jax import port

    _no_overrides("port", overrides)
    a = arguments
    port.port(
        a.source, a.arch, a.to, key=a.key, prefix=a.prefix, head=a.head, classes=a.classes, stride=a.stride,
        image_size=a.image_size, pixels=a.pixels,
    )  # fmt: skip
    print(a.to)


def export(arguments, overrides):
    from qbheat_jax import port

    _no_overrides("export", overrides)
    port.export(arguments.source, arguments.to, image_size=arguments.image_size, overwrite=arguments.overwrite)
    print(arguments.to)


def classify(arguments, overrides):
    from qbheat_jax.tasks import classify

    _no_overrides("classify", overrides)
    a = arguments
    if bool(a.images) == bool(a.data):
        raise UserError("classify takes either images or --data SPEC")
    if a.images:
        given = [f"--{name}" for name in ("split", "workdir", "tfds_dir") if getattr(a, name)]
        if given:
            raise UserError(f"{given[0].replace('_', '-')} goes with --data: images are classified one by one")
        console.say(classify.text(classify.images(a.init, a.images, a.top, a.image_size)))
        return
    result = classify.dataset(
        a.init, a.data, a.split, a.batch_size, a.workdir, a.image_size, a.tfds_dir, a.max_bad_fraction
    )  # fmt: skip
    log.info("%s", classify.line(result))
    console.say(json.dumps(result))


def _no_overrides(command, overrides):
    if overrides:
        raise UserError(f"--config.{overrides[0][0]}: {command} takes no config")


def preflight(arguments, overrides):
    from qbheat_jax.tools import preflight
    from qbheat_jax.tools.preflight.text import text

    a = arguments
    save = a.json or (os.path.join(a.workdir, "preflight.json") if a.workdir else None)
    result = preflight.run(a.config, overrides, a.topology, find_batch=a.find_batch, save=save)
    console.say(text(result))
    if result["error"]:
        raise UserError(f"{a.config} does not compile for {a.topology}: {result['error']}", exit_code=RUN_FAILED)
    if result["fits"] is False:
        raise UserError(
            f"{a.config} with batch_size={result['batch_size']} does not fit {a.topology}; --find-batch looks for one that "
            "does",
            exit_code=RUN_FAILED,
        )


def analyse(arguments, overrides):
    from qbheat_jax import analysis, config
    from qbheat_jax.report import analysis_page

    if arguments.data:
        overrides = [*overrides, ("data.source", arguments.data)]
    fields = config.resolve(config.parse(overrides, config.ANALYSE), config.ANALYSE)
    folder, result = analysis.run(fields, arguments.workdir, arguments.init)
    try:
        page = analysis_page.write(folder)
    finally:  # the figures are there also where the page is not
        console.say(analysis.text(result))
    console.say(page)


def bench(arguments, overrides):
    from qbheat_jax.tools import bench
    from qbheat_jax.tools.bench import table
    from qbheat_jax.tools.bench.options import Options

    _no_overrides("bench", overrides)
    given = {name: value for name, value in vars(arguments).items() if name != "command" and value is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if given.get("peers") == ("none",):
        given["peers"] = ()

    def show(result):
        try:
            console.say(table.newest(result))
        except console.Ended:
            if not arguments.json:  # else it is the file that is wanted
                raise

    bench.run(Options(**given), show)


def report(arguments, _):
    from qbheat_jax import report

    console.say(report.write(arguments.workdir))


def doctor(arguments, _):
    from qbheat_jax.tools import doctor

    console.say(doctor.describe_data(arguments.data, arguments.tfds_dir) if arguments.data else doctor.describe())


def _add_processes(command):
    command.add_argument(
        "--coordinator", metavar="HOST:PORT", help="several processes: where number 0 listens; auto: as jax finds out"
    )
    command.add_argument("--processes", metavar="N", help="how many processes make the run")
    command.add_argument("--process", metavar="I", help="which of them this is, from 0")
    command.add_argument(
        "--wait", metavar="SECONDS", help="how long they wait for each other at the start (default: 300)"
    )


def _parser():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see {self.prog} --help)")

    parser = Parser(prog="qbheat", description="Self-supervised vision from the heat equation.")
    parser.add_argument("--version", action="version", version=f"qbheat_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(function, words, name=None):
        command = commands.add_parser(name or function.__name__, help=words, description=words)
        command.set_defaults(command=function)
        return command

    overriding = "any field of the config can be set as --config.KEY VALUE"
    command = add(pretrain, f"pre-train as a config says, or go on with the run in the workdir; {overriding}")
    command.add_argument("--config", required=True, metavar="FILE", help="a python file with get_config()")
    command.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints and figures go")
    command.add_argument("--init", metavar="DIR", help="a run or ported checkpoint to take the encoder's weights from")
    command.add_argument(
        "--profile_steps", "--profile-steps", metavar="FIRST,LAST",
        help="trace the steps after FIRST up to LAST, such as 10,13, into DIR/profile, and log the longest kernels",
    )  # fmt: skip
    _add_processes(command)

    command = add(probe, f"train a classifier on frozen features and test it; {overriding}")
    command.add_argument("--config", required=True, nargs="+", metavar="FILE", help="one recipe or more")
    command.add_argument(
        "--init", required=True, nargs="+", metavar="INIT", help="a run's DIR, random, pixels, histogram"
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="where result.json goes")

    command = add(
        compare,
        "pre-train and probe several methods for several seeds, and put them in one table; --config.KEY VALUE takes seeds, "
        "pretrain, baselines, all.FIELD, probe.FIELD, methods.NAME.FIELD",
    )
    command.add_argument("--config", required=True, metavar="FILE", help="such as configs/compare/photos.py")
    command.add_argument("--workdir", required=True, metavar="DIR", help="where runs, table and page go")

    command = add(finetune, f"train encoder and classifier from end to end and test them; {overriding}")
    command.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    command.add_argument("--init", required=True, metavar="INIT", help="a run or ported checkpoint's DIR, or random")
    command.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints and result.json go")
    _add_processes(command)

    command = add(detect, f"train a detector on a frozen encoder and measure its AP; {overriding}")
    command.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    command.add_argument("--init", required=True, metavar="INIT", help="a run or ported checkpoint's DIR, or random")
    command.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints and result.json go")
    _add_processes(command)

    command = add(port, "read a checkpoint of PyTorch's names into a workdir that every command takes")
    command.add_argument("--arch", required=True, metavar="NAME", help="an encoder, such as resnet50")
    command.add_argument(
        "--from",
        required=True,
        metavar="FILE",
        dest="source",
        help=".safetensors, .npz, .pth, .pt, .bin, or the .index.json of a checkpoint in parts",
    )
    command.add_argument("--to", required=True, metavar="DIR", help="a new workdir")
    command.add_argument("--key", metavar="KEY", help="which dict of the file to take, such as state_dict_ema")
    command.add_argument("--prefix", metavar="NAME.", help="which names to take, such as student.backbone.")
    command.add_argument("--head", default="keep", metavar="keep|drop", help="its classifier (default: keep)")
    command.add_argument("--classes", type=int, default=1000, metavar="N", help="the classifier's (default: 1000)")
    command.add_argument(
        "--stride", type=int, default=0, metavar="N", help="pixels a cell (default: the encoder's own)"
    )
    command.add_argument("--image-size", type=int, default=0, metavar="N", help="pixels a side (default: as trained)")
    command.add_argument(
        "--pixels", default="", metavar="NAME", help="normalisation it was trained with: imagenet, half, lite"
    )

    command = add(
        export, "write a workdir's weights for others: .safetensors or .npz in PyTorch's names, or .stablehlo"
    )
    command.add_argument("--from", required=True, metavar="DIR", dest="source", help="a run or ported checkpoint")
    command.add_argument("--to", required=True, metavar="FILE", help="its ending says what is written")
    command.add_argument(
        "--image-size", type=int, default=0, metavar="N", help="pixels a side (default: the workdir's)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")

    command = add(classify, "what a classifier says: top-5 of images, or top-1 and top-5 over a labelled data set")
    command.add_argument("--init", required=True, metavar="DIR", help="a ported checkpoint with its classifier")
    command.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes an image (default: 5)")
    command.add_argument("--image-size", type=int, default=0, metavar="N", help="pixels a side (default: the model's)")
    command.add_argument("--data", metavar="SPEC", help="instead of images: a labelled source, such as folder:PATH")
    command.add_argument("--split", metavar="NAME", help="its split (default: test, else val, else the only one)")
    command.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at once (default: 128)")
    command.add_argument("--workdir", metavar="DIR", help="where result.json goes (default: nowhere)")
    command.add_argument("--tfds-dir", default="", metavar="DIR", help="where tensorflow-datasets keeps its data")
    command.add_argument(
        "--max-bad-fraction", type=float, default=0.01, metavar="X", help="largest share that may be unreadable"
    )

    command = add(preflight, f"compile the train step for chips that need not be here, and tell of it; {overriding}")
    command.add_argument("--config", required=True, metavar="FILE", help="as of pretrain")
    command.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="v5e:4x4, v4:4x4x8, v5p:4x4x4, v6e:16x16, h100:8, a100:16, cpu:8, ...",
    )
    command.add_argument("--find-batch", action="store_true", help="search the largest batch that fits")
    saved = command.add_mutually_exclusive_group()
    saved.add_argument("--json", metavar="FILE", help="write the result there")
    saved.add_argument("--workdir", metavar="DIR", help="write the result to DIR/preflight.json")

    command = add(
        analyse,
        "test on an encoder's features what A and B assume, and picture it; --config.KEY VALUE takes "
        "images, seed, batch_size, image_size, encoder.*, data.tfds_dir, data.max_bad_fraction",
    )
    command.add_argument("--init", required=True, metavar="INIT", help="a run or ported checkpoint's DIR, or random")
    command.add_argument("--data", metavar="SPEC", help="images (default: those the run was trained on)")
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the files go; of the run itself, its folder analysis"
    )

    command = add(bench, "time this package against PyTorch, its methods against each other, and its input's floor")
    command.add_argument("what", metavar="WHAT", help="forward, step, heat, input, or all")
    command.add_argument(
        "--encoders", nargs="+", metavar="NAME",
        help="of forward and step (default: mobile_former_294m mobilenet_v2 resnet50 vit_s)",
    )  # fmt: skip
    command.add_argument(
        "--peers",
        nargs="+",
        metavar="WAY",
        help="how PyTorch runs: eager, channels-last, compile (default: all); or none",
    )
    for name, kind, metavar, words in (
        ("batch", int, "N", "images a batch (default: 16)"),
        ("size", int, "N", "pixels a side of forward, step and input (default: 224)"),
        ("pretrain-size", int, "N", "pixels a side of step's pre-training, which has quarters (default: 256)"),
        ("dtype", str, "T", "float32 or bfloat16 (default: float32)"),
        ("heat-batch", int, "N", "examples of heat (default: 256)"),
        ("width", int, "C", "channels of heat (default: 720)"),
        ("cells", int, "N", "cells a side of heat (default: 16)"),
        ("images", int, "N", "JPEGs of input (default: 256)"),
        ("rounds", int, "N", "runs of each candidate (default: 5)"),
        ("seconds", float, "X", "a run's length at the least, about (default: 1)"),
        ("limit", float, "X", "seconds a section, checked between candidates and rounds (default: 600; 0: none)"),
        ("threads", int, "N", "for every framework (default: all cores)"),
        ("json", str, "FILE", "write the result there"),
    ):
        command.add_argument(f"--{name}", type=kind, metavar=metavar, help=words)

    command = add(report, "write report/index.html of a run, with whatever probes lie below it")
    command.add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")

    command = add(doctor, "say what this machine has and what is missing for what, or what a data source holds")
    command.add_argument("--data", metavar="SPEC", help="look through this source instead, such as folder:PATH")
    command.add_argument("--tfds-dir", default="", metavar="DIR", help="where tensorflow-datasets keeps its data")
    return parser
