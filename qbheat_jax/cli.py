"""The command line: parse, dispatch, exit code. `qbheat COMMAND ...` is `python -m qbheat_jax COMMAND ...`.

Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong. stdout carries results, stderr the log.
"""

import argparse
import itertools
import json
import logging
import os
import re
import sys

from qbheat_jax import __version__
from qbheat_jax.errors import RUN_FAILED, UserError

log = logging.getLogger("qbheat")

OVERRIDE = re.compile(r"--config\.([\w.]+)(?:=(.*))?", re.DOTALL)


def main(argv=None):
    """Runs one command -> exit code. A user's mistake is one line on stderr; QBHEAT_DEBUG=1 shows the traceback too."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        argv, overrides = split_overrides(argv)
        arguments = _parser().parse_args(argv)
        arguments.command(arguments, overrides)
        return 0
    except UserError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", RUN_FAILED)
    except MemoryError as error:
        return _fail(f"out of memory: {error}", RUN_FAILED)
    except Exception as error:
        # XLA and tensorstore report what the machine refuses (memory, disk) by a status word in the text.
        if re.search(r"RESOURCE_EXHAUSTED|No space left|out of memory", str(error), re.IGNORECASE):
            return _fail(
                f"{str(error).splitlines()[0]} (try a smaller batch_size, or free memory and disk)", RUN_FAILED
            )
        raise


def _fail(message, code):
    print(f"qbheat: error: {message}", file=sys.stderr)
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
    from qbheat_jax import config, pretrain

    summary = pretrain.run(config.load(arguments.config, overrides), arguments.workdir)
    print(json.dumps(summary))


def probe(arguments, overrides):
    """Every config with every init. One pair's result is in WORKDIR; several are in WORKDIR/PROTOCOL-INIT each."""
    from qbheat_jax import config, probe
    from qbheat_jax.probe.encoders import TRIVIAL

    configs = [config.load(path, overrides, config.PROBE) for path in arguments.config]
    pairs = [
        (c, init)
        for c, init in itertools.product(configs, arguments.init)
        if c.protocol == "lin" or init not in TRIVIAL
    ]
    if not pairs:
        raise UserError(f"--init {' '.join(arguments.init)} has one feature vector an image: it takes protocol='lin'")
    runs = [init for init in arguments.init if init != "random" and init not in TRIVIAL]
    names = {init: init if init not in runs else "run" for init in arguments.init}
    if len(runs) > 1:
        names.update({init: os.path.basename(os.path.normpath(init)) for init in runs})
    folders = [os.path.join(arguments.workdir, f"{c.protocol}-{names[init]}") for c, init in pairs]
    if len(set(folders)) < len(pairs):
        raise UserError(f"two probes would write to {max(folders, key=folders.count)}: give them a --workdir each")
    results = []
    for (c, init), folder in zip(pairs, folders):
        results.append(probe.run(c, arguments.workdir if len(pairs) == 1 else folder, init))
        log.info("%s", probe.line(results[-1]))
    print(probe.table(results))


def report(arguments, _):
    from qbheat_jax import report

    print(report.write(arguments.workdir))


def doctor(arguments, _):
    from qbheat_jax import doctor

    print(doctor.describe())


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

    command = add(probe, f"train a classifier on frozen features and test it; {overriding}")
    command.add_argument("--config", required=True, nargs="+", metavar="FILE", help="one recipe or more")
    command.add_argument(
        "--init", required=True, nargs="+", metavar="INIT", help="a run's DIR, random, pixels, histogram"
    )
    command.add_argument("--workdir", required=True, metavar="DIR", help="where result.json goes")

    command = add(report, "write report/index.html of a run, with whatever probes lie below it")
    command.add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")

    add(doctor, "say what this machine has and what is missing for what")
    return parser
