"""Run commands one after the other in one process, because a start takes seconds. Input and output are JSON lines."""

import json
import os
import sys
import tempfile
import traceback


def main():
    """Read commands from stdin until its end. For each JSON list of arguments, write {"code", "out", "err"} to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    from qbheat_jax import cli

    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # Redirect the file descriptors, to capture the output of C++ code too.
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            try:
                code = cli.main(json.loads(line))
            except SystemExit as error:  # --help
                code = error.code or 0
            except BaseException:
                code = "traceback"
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        print(json.dumps({"code": code, "out": texts[0], "err": texts[1]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
