"""Why PyTorch refused a pickle, without opening it, and the command by which its owner saves the weights alone."""

import pickletools
import re
import shlex
import zipfile

# Dicts that such a file keeps its weights in, from the outside in.
_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "model_ema", "state_dict")
# A file that asks for these is no one's checkpoint.
_HOSTILE = {"os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "pty", "ctypes"}
_HOSTILE_BUILTINS = {
    f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("eval", "exec", "compile")
}


def refusal(path, message, advice):
    """The sentence for a file that asks for more than tensors and plain containers, or whose pickle is broken.

    message: PyTorch's. advice: what to save in the place of it.
    """
    try:
        pickled = _pickle_of(path)
        operations = [
            (code.name, value) for code, value, _ in pickletools.genops(pickled)
        ]  # read, and none carried out
    except Exception:
        return f"{path} is truncated or damaged: its pickle breaks off"
    what, asked = "is pickled in a way that can run code when it is opened", ""
    if match := re.search(r"GLOBAL ([\w.]+)", message):
        what, asked = "would run code when it is opened", f" (it asks for {match.group(1)})"
    if b"torch.nn.modules" in pickled:
        what = "holds a whole pickled model, which runs code when it is opened"
    command = (
        ""
        if _hostile(operations)
        else f"; only if you trust it, this runs its code and saves that: {_command(path, operations)}"
    )
    return f"{path} {what}{asked}: it was refused, and nothing in it was run; {advice}{command}"


def _hostile(operations):
    """Whether what is asked for is nothing that a training script would save."""
    asked = {str(value) for name, value in operations if name == "GLOBAL"}
    modules = {one.partition(" ")[0].partition(".")[0] for one in asked}
    if any(name == "STACK_GLOBAL" for name, _ in operations):  # whose module is any of the texts before it
        modules |= _texts(operations)
    return bool(modules & _HOSTILE or asked & _HOSTILE_BUILTINS)


def _command(path, operations):
    """A shell command that saves the weights of a file beside it, tensors alone."""
    texts = _texts(operations)
    keys = " ".join(key for key in _KEYS if key in texts)
    code = "import sys, torch, functools; x = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    if keys:
        code += (
            f"x = functools.reduce(lambda x, k: x[k] if isinstance(x, dict) and k in x else x, {keys!r}.split(), x); "
        )
    code += (
        "x = x.state_dict() if hasattr(x, 'state_dict') else x; "
        "torch.save({k: v for k, v in x.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    target = path.with_name(f"{path.stem}.weights.pth")
    return f'python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(target))}'


def _texts(operations):
    return {str(value) for name, value in operations if "UNICODE" in name or "STRING" in name}


def _pickle_of(path):
    """The bytes of the pickle that holds a PyTorch file's object."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    with path.open("rb") as file:
        for _ in range(3):  # a legacy file's first three: its magic number, its version, the machine's byte order
            for _ in pickletools.genops(file):
                pass
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        end = file.tell()
        file.seek(start)
        return file.read(end - start)
