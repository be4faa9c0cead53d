"""Run commands one after the other in one process, since starting one takes seconds: JSON lists in, JSON results out."""

import json
import os
import sys
import tempfile
import traceback


def main():
    """Read a line of JSON, a command's arguments, from stdin; write {"code", "out", "err"} for it; until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    from qbheat_jax import cli

    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # Of the whole process: what C++ prints counts too.
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
