"""Command line: parse the arguments, run the command, return its exit code.

`qbheat COMMAND ...` and `python -m qbheat_jax COMMAND ...` are the same program. Results go to stdout, the log goes to
stderr, and errors.py defines the exit codes.
"""

import argparse
import itertools
import json
import logging
import os
import re
import sys
import textwrap

from qbheat_jax import __version__, console, paths
from qbheat_jax.errors import CLOSED, PREEMPTED, RUN_FAILED, UserError
from qbheat_jax.train import runtime

log = logging.getLogger("qbheat")

OVERRIDE = re.compile(r"--config\.([\w.]+)(?:=(.*))?", re.DOTALL)


def main(argv=None):
    """Run one command.

    A `UserError` prints one line to stderr. QBHEAT_DEBUG=1 adds its traceback.

    Args:
      argv: List of argument strings without the program's name; None takes them from `sys.argv`.

    Returns:
      The exit code.
    """
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
        except SystemExit as end:  # argparse has printed --help or --version
            if end.code:
                raise
        console.flush()
        return 0
    except UserError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail(console.INTERRUPTED, RUN_FAILED)
    except OSError as error:  # such as a disk that became read-only, or a deleted folder
        reason = error.strerror or error
        return _fail(f"{error.filename}: {reason}" if error.filename else reason, RUN_FAILED)
    except MemoryError as error:
        return _fail(f"out of memory: {error}", RUN_FAILED)
    except Exception as error:
        # XLA and tensorstore report a lack of memory or disk only by a status word in the text.
        if re.search(r"RESOURCE_EXHAUSTED|No space left|out of memory", str(error), re.IGNORECASE):
            return _fail(
                f"{str(error).splitlines()[0]} (use a smaller batch_size, or free memory or disk space)", RUN_FAILED
            )
        # The surviving processes of a run get these errors when another process ends.
        if re.search(r"UNAVAILABLE|DEADLINE_EXCEEDED|Gloo|closed by peer|heartbeat", str(error)):
            return _fail(
                f"lost another process of the run ({str(error).splitlines()[0][:200]}): restart all processes to resume from "
                "the last checkpoint",
                RUN_FAILED,
            )
        raise


# Arguments that hold a path or a list of paths, and the values that they accept which are not paths.
_PATHS = ("config", "workdir", "init", "source", "to", "json", "images", "tfds_dir", "directory", "page")
_NO_PATHS = ("random", "pixels", "histogram")


def _with_paths(arguments):
    """Return `arguments` with `paths.expand` applied to each path. Data sources expand their own paths."""
    given = {
        name: value for name, value in vars(arguments).items() if name in _PATHS and isinstance(value, (str, list))
    }
    if not given.get("tfds_dir"):
        given.pop("tfds_dir", None)  # the default, "", is not a path
    for name, value in given.items():
        flag = {"source": "--from", "images": "IMAGE", "directory": "DIR"}.get(name, f"--{name}".replace("_", "-"))
        texts = [value] if isinstance(value, str) else value
        texts = [text if text in _NO_PATHS else paths.expand(text, flag) for text in texts]
        setattr(arguments, name, texts[0] if isinstance(value, str) else texts)
    return arguments


def _fail(message, code):
    if code == CLOSED:
        return code
    console.tell(f"qbheat: {message}" if code == PREEMPTED else f"qbheat: error: {message}")
    if os.environ.get("QBHEAT_DEBUG"):
        log.exception("traceback, shown because QBHEAT_DEBUG is set")
    return code


def split_overrides(argv):
    """Separate the config overrides from the other arguments.

    Args:
      argv: List of strings. Overrides have the form `--config.key value` or `--config.key=value`.

    Returns:
      (list of the other arguments, [(key, text), ...]).

    Raises:
      UserError: The last override has no value.
    """
    rest, overrides, items = [], [], iter(argv)
    for item in items:
        match = OVERRIDE.fullmatch(item)
        if not match:
            rest.append(item)
            continue
        value = match[2] if match[2] is not None else next(items, None)
        if value is None:
            raise UserError(f"{item} needs a value, as in {item} VALUE")
        overrides.append((match[1], value))
    return rest, overrides


def pretrain(arguments, overrides):
    """Pre-train or resume a run, and print its summary as JSON."""
    from qbheat_jax import config
    from qbheat_jax.tasks import pretrain
    from qbheat_jax.train import distributed, profile
    from qbheat_jax.train.config_tables import PRETRAIN

    traced = profile.parse(arguments.profile_steps) if arguments.profile_steps is not None else None
    distributed.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    if arguments.init:
        overrides = [*overrides, ("init", arguments.init)]
    summary = pretrain.run(config.load(arguments.config, overrides, PRETRAIN), arguments.workdir, traced)
    distributed.say(json.dumps(summary))


def probe(arguments, overrides):
    """Probe every init with every config. A single result goes to WORKDIR; several go to WORKDIR/PROTOCOL-INIT."""
    from qbheat_jax import config
    from qbheat_jax.pretrained import NO_ENCODER
    from qbheat_jax.probe.encode import POOLED, TRIVIAL
    from qbheat_jax.probe.fields import PROBE
    from qbheat_jax.tasks import probe

    configs = [config.load(path, overrides, PROBE) for path in arguments.config]
    pairs = [
        (c, init)
        for c, init in itertools.product(configs, arguments.init)
        if c.protocol in TRIVIAL or init not in NO_ENCODER
    ]
    if not pairs:
        raise UserError(
            f"--init {' '.join(arguments.init)} has no encoder and needs a --config with protocol={', '.join(TRIVIAL)}"
        )
    runs = [init for init in arguments.init if init != "random" and init not in NO_ENCODER]
    names = {init: init if init not in runs else "run" for init in arguments.init}
    if len(runs) > 1:
        names.update({init: os.path.basename(os.path.normpath(init)) for init in runs})
    folders = [os.path.join(arguments.workdir, f"{probe.name(c)}-{names[init]}") for c, init in pairs]
    if len(set(folders)) < len(pairs):
        raise UserError(
            f"--workdir {arguments.workdir}: two probes would write to {max(folders, key=folders.count)}; run them with "
            "different --workdir"
        )

    def cells_first(n):  # probes of pooled features can reuse the features of cells, so they run after
        return arguments.init.index(pairs[n][1]), pairs[n][0].protocol in POOLED

    results, store = {}, probe.FeatureCache(os.path.join(arguments.workdir, "features"))
    for n in sorted(range(len(pairs)), key=cells_first):
        c, init = pairs[n]
        results[n] = probe.run(c, arguments.workdir if len(pairs) == 1 else folders[n], init, store)
        log.info("%s", probe.line(results[n]))
    console.say(probe.table([results[n] for n in range(len(pairs))]))


def finetune(arguments, overrides):
    """Fine-tune an encoder with a classifier, and print the result as JSON."""
    from qbheat_jax import config
    from qbheat_jax.tasks import finetune
    from qbheat_jax.tasks.probe import line
    from qbheat_jax.train import distributed
    from qbheat_jax.train.config_tables import FINETUNE

    distributed.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    fields = config.load(arguments.config, [*overrides, ("init", arguments.init)], FINETUNE)
    result = finetune.run(fields, arguments.workdir)
    log.info("%s", line(result))
    distributed.say(json.dumps(result))


def detect(arguments, overrides):
    """Train a detector on a frozen encoder, and print the result as JSON."""
    from qbheat_jax import config
    from qbheat_jax.tasks import detect
    from qbheat_jax.train import distributed
    from qbheat_jax.train.config_tables import DETECT

    distributed.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    fields = config.load(arguments.config, [*overrides, ("init", arguments.init)], DETECT)
    result = detect.run(fields, arguments.workdir)
    log.info("%s", detect.line(result))
    distributed.say(json.dumps(result))


def compare(arguments, overrides):
    """Run a comparison and print its table. Raise UserError with exit code 1 if a cell failed."""
    from qbheat_jax import compare
    from qbheat_jax.train import distributed

    distributed.start()
    result = compare.run(compare.read(arguments.config, overrides), arguments.workdir)
    console.say(compare.text(result))
    failed = [cell["path"] for cell in result["cells"] if cell["state"] == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(result['cells'])} cells failed, the first is {failed[0]}; run the same command to retry",
            exit_code=RUN_FAILED,
        )


def port(arguments, overrides):
    """Convert PyTorch weights to a workdir, and print its path."""
    from qbheat_jax import port

    _no_overrides("port", overrides)
    a = arguments
    port.port(
        a.source, a.arch, a.to, key=a.key, prefix=a.prefix, head=a.head, classes=a.classes, stride=a.stride,
        image_size=a.image_size, pixels=a.pixels,
    )  # fmt: skip
    print(a.to)


def export(arguments, overrides):
    """Export a workdir to a file or a folder, and print its path."""
    from qbheat_jax import port

    _no_overrides("export", overrides)
    a = arguments
    port.export(
        a.source, a.to, image_size=a.image_size, fold=a.fold, head=a.head, layout=a.layout, overwrite=a.overwrite
    )
    print(a.to)


def push(arguments, overrides):
    """Upload an exported folder to the Hugging Face hub, and print its address."""
    from qbheat_jax.port import hf

    _no_overrides("push", overrides)
    print(hf.push(arguments.source, arguments.repo, private=arguments.private))


def classify(arguments, overrides):
    """Classify image files, or measure accuracy on a labelled data set, and print the result."""
    from qbheat_jax.tasks import classify

    _no_overrides("classify", overrides)
    a = arguments
    if bool(a.images) == bool(a.data):
        raise UserError(f"classify takes either IMAGE files or --data SPEC, not {'both' if a.images else 'neither'}")
    if a.images:
        given = [f"--{name}" for name in ("split", "workdir", "tfds_dir") if getattr(a, name)]
        if given:
            raise UserError(f"{given[0].replace('_', '-')} needs --data SPEC; it does not apply to IMAGE files")
        console.say(classify.text(classify.images(a.init, a.images, a.top, a.image_size)))
        return
    result = classify.dataset(
        a.init, a.data, a.split, a.batch_size, a.workdir, a.image_size, a.tfds_dir, a.max_bad_fraction
    )  # fmt: skip
    log.info("%s", classify.line(result))
    console.say(json.dumps(result))


def embed(arguments, overrides):
    """Write features of image files or a data source to a file, and print a summary."""
    from qbheat_jax.tasks import embed

    _no_overrides("embed", overrides)
    a = arguments
    result = embed.run(
        a.init, a.to, a.images, a.data or "", a.split or "", a.cells, a.dtype, a.batch_size, a.image_size, a.tfds_dir,
        a.max_bad_fraction, a.overwrite,
    )  # fmt: skip
    console.say(json.dumps(result))


def neighbours(arguments, overrides):
    """Find the images that are most similar to some queries, write a page of them, and print them as JSON."""
    from qbheat_jax.tasks import neighbours

    _no_overrides("neighbours", overrides)
    a = arguments
    result = neighbours.run(
        a.init, a.images, a.among, a.to, a.top, a.split or "", a.batch_size, a.image_size, a.tfds_dir
    )  # fmt: skip
    console.say(json.dumps(result))


def _no_overrides(command, overrides):
    if overrides:
        raise UserError(f"--config.{overrides[0][0]} is not accepted: {command} takes no config overrides")


def preflight(arguments, overrides):
    """Compile the step for a topology and print the report. Raise UserError with exit code 1 if it does not fit or compile."""
    from qbheat_jax.tools import preflight
    from qbheat_jax.tools.preflight.text import text

    a = arguments
    save = a.json or (os.path.join(a.workdir, "preflight.json") if a.workdir else None)
    result = preflight.run(
        a.config, overrides, a.topology, find_batch=a.find_batch, inference=a.inference, save=save
    )  # fmt: skip
    console.say(text(result))
    if result["error"]:
        raise UserError(f"{a.config} does not compile for {a.topology}: {result['error']}", exit_code=RUN_FAILED)
    if result["fits"] is False:
        raise UserError(
            f"{a.config} with batch_size={result['batch_size']} does not fit {a.topology}; --find-batch searches for the "
            "largest batch that fits",
            exit_code=RUN_FAILED,
        )


def analyse(arguments, overrides):
    """Analyse an encoder's features, and print the figures and the path of the page."""
    from qbheat_jax import analysis, config
    from qbheat_jax.analysis.fields import ANALYSE
    from qbheat_jax.report import analysis_page

    if arguments.data:
        overrides = [*overrides, ("data.source", arguments.data)]
    fields = config.resolve(config.parse(overrides, ANALYSE), ANALYSE)
    folder, result = analysis.run(fields, arguments.workdir, arguments.init)
    try:
        page = analysis_page.write(folder)
    finally:  # print the figures even if the page fails
        console.say(analysis.text(result))
    console.say(page)


def bench(arguments, overrides):
    """Run benchmarks and print each table when it is ready."""
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
            if not arguments.json:  # with --json, the file is still wanted
                raise

    bench.run(Options(**given), show)


def report(arguments, _):
    """Write the page of a run, and print its path."""
    from qbheat_jax import report

    console.say(report.write(arguments.workdir))


def runs(arguments, overrides):
    """List the runs under a directory as a table or as JSON, and write their page if asked."""
    from qbheat_jax.report import runs

    _no_overrides("runs", overrides)
    a = arguments
    rows, skipped = runs.find(a.directory)
    rows, page = runs.ordered(rows, a.sort), None
    if a.page:
        from qbheat_jax.report import runs_page

        page = str(runs_page.write(a.page, a.directory, rows, skipped))
    if a.as_json:
        console.say(json.dumps({"runs": [row.to_json() for row in rows], "skipped": skipped, "page": page}, indent=2))
        return
    console.say(runs.table(rows, skipped))
    if page:
        console.say(page)


def doctor(arguments, _):
    """Print a report on this machine or on a data source."""
    from qbheat_jax.tools import doctor

    console.say(doctor.describe_data(arguments.data, arguments.tfds_dir) if arguments.data else doctor.describe())


def _add_processes(command):
    command.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0 in a run of several processes; auto: jax finds it (Slurm, Open MPI, GKE, TPU VMs)",
    )
    command.add_argument("--processes", metavar="N", help="number of processes in the run")
    command.add_argument("--process", metavar="I", help="index of this process, from 0")
    command.add_argument(
        "--wait", metavar="SECONDS", help="time that the processes wait for each other at the start (default: 300)"
    )


def _add_encoding(command):
    command.add_argument(
        "--image-size", type=int, default=0, metavar="N", help="pixels per side (default: the model's)"
    )
    command.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per batch (default: 128)")
    command.add_argument("--tfds-dir", default="", metavar="DIR", help="data directory of tensorflow-datasets")


def _parser():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (see {self.prog} --help)")

    parser = Parser(
        prog="qbheat",
        description="Self-supervised vision from the heat equation: pre-train encoders, evaluate them, and port weights. "
        "`qbheat COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"qbheat_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(function, summary, details):
        command = commands.add_parser(
            function.__name__,
            help=summary[0].lower() + summary[1:].removesuffix("."),
            description=f"{summary}\n\n{textwrap.dedent(details).strip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=function)
        return command

    overriding = "--config.KEY VALUE sets any field of the config, for example --config.batch_size 64."
    command = add(
        pretrain,
        "Pre-train an encoder, or resume the run in the workdir.",
        f"""
        Example:
          qbheat pretrain --config configs/photos.py --workdir runs/photos

        Writes config.json, metrics.jsonl, TensorBoard events, checkpoints/ and summary.json to the workdir.
        Prints the summary as JSON.
        {overriding}
        """,
    )
    command.add_argument("--config", required=True, metavar="FILE", help="Python file that defines get_config()")
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")
    command.add_argument(
        "--init", metavar="DIR", help="run or ported checkpoint that the encoder's weights are initialised from"
    )
    command.add_argument(
        "--profile_steps", "--profile-steps", metavar="FIRST,LAST",
        help="trace the steps after FIRST up to LAST, such as 10,13, into DIR/profile and log the longest kernels",
    )  # fmt: skip
    _add_processes(command)

    command = add(
        probe,
        "Train a classifier on frozen features and test it.",
        f"""
        Probes every --init with every --config.

        Example:
          qbheat probe --config configs/lin.py configs/knn.py --init runs/mine random --workdir runs/mine/probe

        Writes result.json, config.json and metrics.jsonl to the workdir, or to DIR/PROTOCOL-INIT for several probes.
        Segmentation (seg-lin, seg-knn) also writes predictions/. Prints a table of accuracies or mean IoU.
        {overriding}
        """,
    )
    command.add_argument("--config", required=True, nargs="+", metavar="FILE", help="one or more probe configs")
    command.add_argument(
        "--init",
        required=True,
        nargs="+",
        metavar="INIT",
        help="one or more of: DIR of a run or ported checkpoint, random (untrained encoder), pixels, histogram",
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the results")

    command = add(
        compare,
        "Pre-train and probe several methods over several seeds, and tabulate the results.",
        """
        A cell is one pre-training run or one probe. Only unfinished cells run, so the same command resumes a comparison.

        Example:
          qbheat compare --config configs/compare/photos.py --workdir runs/compare

        Writes METHOD/seed-S/ (a run and its probes), table.md, result.json and report/index.html to the workdir.
        Prints the table.
        --config.KEY VALUE takes these keys: seeds, pretrain, baselines, all.FIELD, probe.FIELD, methods.NAME.FIELD.
        """,
    )
    command.add_argument(
        "--config", required=True, metavar="FILE", help="comparison config, such as configs/compare/photos.py"
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the comparison")

    init = "DIR of a run or ported checkpoint, or random"
    command = add(
        finetune,
        "Train an encoder and a classifier end to end and test them, or resume such a run.",
        f"""
        Example:
          qbheat finetune --config configs/finetune.py --init runs/mine --workdir runs/mine/finetune

        Writes a run (config.json, metrics.jsonl, checkpoints/) and result.json to the workdir.
        `qbheat classify` accepts that workdir. Prints the result as JSON.
        {overriding}
        """,
    )
    command.add_argument("--config", required=True, metavar="FILE", help="fine-tuning config")
    command.add_argument("--init", required=True, metavar="INIT", help=init)
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")
    _add_processes(command)

    command = add(
        detect,
        "Train a detector on a frozen encoder and measure its AP, or resume such a run.",
        f"""
        Example:
          qbheat detect --config configs/detect/scenes.py --init runs/photos --workdir runs/photos/detect

        Writes a run (config.json, metrics.jsonl, checkpoints/), result.json, detections.json (COCO's result format)
        and curves.json (precision over recall) to the workdir. Prints the result as JSON.
        {overriding}
        """,
    )
    command.add_argument("--config", required=True, metavar="FILE", help="detection config")
    command.add_argument("--init", required=True, metavar="INIT", help=init)
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")
    _add_processes(command)

    command = add(
        port,
        "Convert PyTorch weights to a workdir that other commands accept as --init.",
        """
        Every name and shape must match the encoder, or nothing is written.

        Example:
          qbheat port --arch efficientnet_lite0 --from lite0.safetensors --to ported/lite0
          qbheat port --from hf:facebook/dinov2-small --to ported/dinov2 --head drop

        Writes a workdir with config.json and the weights. Prints its path.
        """,
    )
    command.add_argument(
        "--arch",
        metavar="NAME",
        help="encoder, such as resnet50 (default: what config.json beside the weights describes)",
    )
    command.add_argument(
        "--from",
        required=True,
        metavar="FILE",
        dest="source",
        help=".safetensors, .npz, .pth, .pt or .bin file, the .index.json of a sharded checkpoint, a folder of Hugging "
        "Face's layout, or hf:ORG/NAME of one on its hub",
    )
    command.add_argument("--to", required=True, metavar="DIR", help="new or empty directory")
    command.add_argument("--key", metavar="KEY", help="dict of the file to read, such as state_dict_ema")
    command.add_argument(
        "--prefix", metavar="NAME.", help="read only names with this prefix, such as student.backbone."
    )
    command.add_argument(
        "--head", default="keep", metavar="keep|drop", help="keep or drop the classifier (default: keep)"
    )
    command.add_argument(
        "--classes", type=int, metavar="N", help="classes of the classifier (default: config.json's, or 1000)"
    )
    command.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="pixels per cell (default: the encoder's own, or a ViT's file's)",
    )
    command.add_argument(
        "--image-size", type=int, default=0, metavar="N", help="pixels per side (default: the training size)"
    )
    command.add_argument(
        "--pixels", default="", metavar="NAME", help="normalisation in training: imagenet, half, lite or clip"
    )

    command = add(
        export,
        "Export a workdir's weights under PyTorch's names, or its program.",
        """
        Examples:
          qbheat export --from runs/photos --to photos.safetensors
          qbheat export --from ported/dinov2 --to exported/dinov2 --layout hf

        Writes FILE and prints its path. The ending of FILE selects the format: .safetensors or .npz for weights,
        .stablehlo or .onnx for a program. With --layout hf FILE is a folder that Hugging Face's transformers loads.
        """,
    )
    command.add_argument(
        "--from", required=True, metavar="DIR", dest="source", help="DIR of a run or ported checkpoint"
    )
    command.add_argument(
        "--to",
        required=True,
        metavar="FILE",
        help=".safetensors, .npz, .stablehlo or .onnx file, or a folder with --layout",
    )
    command.add_argument("--layout", default="", metavar="hf", help="write a folder of Hugging Face's layout")
    command.add_argument(
        "--head", default="keep", metavar="keep|drop", help="keep or drop the classifier (default: keep)"
    )
    command.add_argument(
        "--image-size", type=int, default=0, metavar="N", help="pixels per side (default: the workdir's)"
    )
    command.add_argument("--fold", action="store_true", help="fold the encoder for inference at that size (vheat only)")
    command.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")

    command = add(
        push,
        "Upload a folder of export --layout hf to the Hugging Face hub.",
        """
        Example:
          qbheat push --from exported/dinov2 --to ORG/NAME

        Prints the model's address. huggingface_hub's own login (hf auth login) says who may write there.
        """,
    )
    command.add_argument("--from", required=True, metavar="DIR", dest="source", help="folder of export --layout hf")
    command.add_argument("--to", required=True, metavar="ORG/NAME", dest="repo", help="model on the hub")
    command.add_argument("--private", action="store_true", help="make a new model private")

    command = add(
        classify,
        "Classify images, or measure top-1 and top-5 accuracy on a labelled data set.",
        """
        Examples:
          qbheat classify --init ported/lite0 cat.jpg dog.png
          qbheat classify --init ported/lite0 --data folder:labelled --workdir runs/labelled

        With IMAGE files, prints the most probable classes of each image.
        With --data, prints the accuracies as JSON and writes them to WORKDIR/result.json if --workdir is given.
        """,
    )
    command.add_argument(
        "--init", required=True, metavar="DIR", help="workdir with a classifier: fine-tuned, supervised or ported"
    )
    command.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes to print per image (default: 5)")
    command.add_argument(
        "--image-size", type=int, default=0, metavar="N", help="pixels per side (default: the model's)"
    )
    command.add_argument("--data", metavar="SPEC", help="labelled source, such as folder:PATH, in place of IMAGE files")
    command.add_argument(
        "--split", metavar="NAME", help="split of --data (default: test, else val, else the only split)"
    )
    command.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per batch (default: 128)")
    command.add_argument("--workdir", metavar="DIR", help="directory of result.json (default: not written)")
    command.add_argument("--tfds-dir", default="", metavar="DIR", help="data directory of tensorflow-datasets")
    command.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="largest accepted fraction of unreadable images (default: 0.01)",
    )

    command = add(
        embed,
        "Write the features of images to a file.",
        """
        Examples:
          qbheat embed --init runs/mine --to mine.npz a.jpg b.png
          qbheat embed --init runs/mine --to mine.parquet --data folder:images --split train

        FILE has a row for each image that could be read: its features, name and label. A stopped command goes on where
        it was when it is run again. Prints a summary as JSON.
        """,
    )
    command.add_argument("--init", required=True, metavar="DIR", help="DIR of a run or ported checkpoint")
    command.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    command.add_argument("--data", metavar="SPEC", help="source, such as folder:PATH, in place of IMAGE files")
    command.add_argument("--split", metavar="NAME", help="split of --data (default: the only one)")
    command.add_argument("--to", required=True, metavar="FILE", help=".npz, .parquet or .safetensors file")
    command.add_argument("--cells", action="store_true", help="features of every cell (default: their mean)")
    command.add_argument("--dtype", default="float32", metavar="T", help="float32 or float16 (default: float32)")
    command.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    _add_encoding(command)
    command.add_argument(
        "--max-bad-fraction",
        type=float,
        default=1.0,
        metavar="X",
        help="largest accepted fraction of unreadable images (default: 1)",
    )

    command = add(
        neighbours,
        "Find the nearest images by cosine similarity of features, and write a page.",
        """
        Examples:
          qbheat neighbours --init runs/mine query.jpg --among folder:images --split train
          qbheat neighbours --init runs/mine query.jpg --among mine.npz --to nearest.html

        Writes the page and prints the neighbours as JSON. FILE is one of `qbheat embed`, by the same weights.
        """,
    )
    command.add_argument("--init", required=True, metavar="DIR", help="DIR of a run or ported checkpoint")
    command.add_argument("images", nargs="+", metavar="QUERY", help="image files")
    command.add_argument(
        "--among", required=True, metavar="FILE|SPEC", help="file of `qbheat embed`, or a source such as folder:PATH"
    )
    command.add_argument("--split", metavar="NAME", help="split of the source (default: the only one)")
    command.add_argument("--to", default="neighbours.html", metavar="PAGE", help="page (default: neighbours.html)")
    command.add_argument("--top", type=int, default=8, metavar="N", help="neighbours of each query (default: 8)")
    _add_encoding(command)

    command = add(
        preflight,
        "Compile the train step ahead of time for a given TPU or GPU topology, and report memory and cost.",
        f"""
        The devices need not be present. Exit code 1 means that the step does not compile or does not fit.

        Example:
          qbheat preflight --config configs/imagenet_vit_b16.py --topology v5e:4x4 --json vit_b16.json

        Prints the report. --json and --workdir also write it as JSON.
        {overriding}
        """,
    )
    command.add_argument("--config", required=True, metavar="FILE", help="pre-training config")
    command.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="target devices: v5e:4x4, v4:4x4x8, v5p:4x4x4, v6e:16x16, h100:8, a100:16, cpu:8, ...",
    )
    command.add_argument("--find-batch", action="store_true", help="search for the largest batch that fits")
    command.add_argument(
        "--inference", action="store_true", help="compile the forward pass on whole images instead of the train step"
    )
    saved = command.add_mutually_exclusive_group()
    saved.add_argument("--json", metavar="FILE", help="write the result to FILE")
    saved.add_argument("--workdir", metavar="DIR", help="write the result to DIR/preflight.json")

    command = add(
        analyse,
        "Test the hypothesis of the matrices A and B on an encoder's features, with pictures.",
        """
        QB-Heat assumes that features change linearly from cell to cell, by the same matrices A and B everywhere.

        Example:
          qbheat analyse --init runs/photos --workdir runs/photos

        Writes analysis.json, analysis.csv, pictures and a page. They go to DIR/analysis if DIR is the run itself,
        else to DIR. Prints the figures and the path of the page.
        --config.KEY VALUE takes these keys: images, seed, batch_size, image_size, encoder.*, data.tfds_dir,
        data.max_bad_fraction.
        """,
    )
    command.add_argument("--init", required=True, metavar="INIT", help=init)
    command.add_argument("--data", metavar="SPEC", help="image source (default: the run's training data)")
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the files")

    command = add(
        bench,
        "Benchmark this package against PyTorch, its methods against each other, and its input pipeline.",
        """
        WHAT is one of:
          forward  features of each encoder, against PyTorch
          step     train step of each encoder, against PyTorch, and QB-Heat's step against SimMIM's
          heat     extrapolation of features
          input    input pipeline, against the bare cost of decoding and resizing
          all      all of these

        Example:
          qbheat bench forward --encoders resnet50 --json forward.json

        Prints Markdown tables. --json also writes the result as JSON, after each table.
        """,
    )
    command.add_argument("what", metavar="WHAT", help="forward, step, heat, input or all")
    command.add_argument(
        "--encoders", nargs="+", metavar="NAME",
        help="encoders of forward and step (default: mobile_former_294m mobilenet_v2 resnet50 vit_s)",
    )  # fmt: skip
    command.add_argument(
        "--peers",
        nargs="+",
        metavar="WAY",
        help="how PyTorch runs: eager, channels-last, compile (default: all three), or none to skip PyTorch",
    )
    for name, kind, metavar, words in (
        ("batch", int, "N", "images per batch (default: 16)"),
        ("size", int, "N", "pixels per side in forward, step and input (default: 224)"),
        ("pretrain-size", int, "N", "pixels per side of full images in the pre-training of step (default: 256)"),
        ("dtype", str, "T", "float32 or bfloat16 (default: float32)"),
        ("heat-batch", int, "N", "examples per batch in heat (default: 256)"),
        ("width", int, "C", "channels in heat (default: 720)"),
        ("cells", int, "N", "cells per side in heat (default: 16)"),
        ("images", int, "N", "JPEG files in input (default: 256)"),
        ("rounds", int, "N", "timed runs of each candidate (default: 5)"),
        ("seconds", float, "X", "approximate least length of a timed run (default: 1)"),
        ("limit", float, "X", "time limit of a table, checked between candidates and rounds (default: 600; 0: none)"),
        ("threads", int, "N", "threads of every framework (default: all cores)"),
        ("json", str, "FILE", "write the result to FILE"),
    ):
        command.add_argument(f"--{name}", type=kind, metavar=metavar, help=words)

    command = add(
        report,
        "Write an HTML page about a run and the probes below it.",
        """
        Example:
          qbheat report --workdir runs/photos

        Writes report/index.html to the workdir and prints its path.
        """,
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")

    command = add(
        runs,
        "List all runs under a directory: method, encoder, data, steps, loss, results, time and state.",
        """
        Examples:
          qbheat runs runs --sort tran-1
          qbheat runs runs --page runs/index.html

        Prints a Markdown table. States: running, finished, failed (ended with an error), killed (ended without one).
        Folders that hold no readable run are skipped and counted. --page draws the curves of all metrics that the
        runs share, one over the other.
        """,
    )
    command.add_argument("directory", metavar="DIR", help="directory with workdirs at any depth")
    command.add_argument(
        "--sort",
        default="when",
        metavar="COLUMN",
        help="run, method, encoder, data, step, loss, when, state, or a result such as tran-1, best first (default: when)",
    )
    command.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of the table")
    command.add_argument("--page", metavar="FILE.html", help="also write a page that compares the runs")

    command = add(
        doctor,
        "Report this machine's devices and packages, or check a data source.",
        """
        Examples:
          qbheat doctor
          qbheat doctor --data folder:PATH

        Prints the report and writes nothing. With --data it counts the images of each split and class, and decodes
        a sample of each split.
        """,
    )
    command.add_argument("--data", metavar="SPEC", help="check this source, such as folder:PATH")
    command.add_argument("--tfds-dir", default="", metavar="DIR", help="data directory of tensorflow-datasets")
    return parser
