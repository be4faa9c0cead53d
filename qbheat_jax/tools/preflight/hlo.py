"""Count collectives, kernels and HBM traffic in the HLO text of a compiled program.

XLA's `cost_analysis` counts a loop body once, and counts on-chip traffic like HBM traffic. This module counts a loop body
once per iteration, each branch of a conditional once, and HBM traffic only. All figures are per device and step.
"""

import collections
import dataclasses
import math
import re

# Bits of the types whose names do not hold the number. Those of f32, bf16, f8e4m3fn and c64 do.
BITS = {"pred": 8, "token": 0, "opaque": 0}

# Least bytes that a device sends in each collective among n devices, as a multiple of its size. This is the cost of a ring,
# which is optimal on links of equal bandwidth.
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

# Opcodes that move no data themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call opt-barrier optimization-barrier "
    "after-all partition-id replica-id add-dependency domain".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Kinds of a GPU's custom calls by the prefix of their targets. The Triton ones are Pallas kernels.
_LIBRARIES = {
    "__cublas": "cuBLAS products",
    "__cudnn$conv": "cuDNN convolutions",
    "__cudnn$fmha": "cuDNN attention",
    "__gpu$xla.gpu.triton": "Pallas kernels",
    "mosaic_gpu": "Pallas kernels",
}

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type of HLO.

    Attributes:
      dtype: Name of the element type, such as "bf16".
      shape: Tuple of ints.
      layout: Layout, such as "1,0:T(8,128)S(1)".
    """

    dtype: str
    shape: tuple
    layout: str

    @property
    def bits(self):
        """Bits of one element."""
        return BITS[self.dtype] if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])

    @property
    def bytes(self):
        """Bytes of the elements."""
        return math.prod(self.shape) * self.bits // 8

    @property
    def padded(self):
        """Bytes with tile padding. A TPU stores the last two dimensions in whole tiles, such as 8 x 128."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if not tile or not self.shape:
            return self.bytes
        order = [int(d) for d in self.layout.split(":")[0].split(",") if d]
        shape = [self.shape[d] for d in order]
        for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if i < len(shape):
                shape[i] = -(-shape[i] // n) * n
        return math.prod(shape) * self.bits // 8

    @property
    def in_hbm(self):
        """Whether the array is in HBM."""
        return "S(" not in self.layout  # other memory spaces are on the chip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An HLO instruction.

    Attributes:
      name: Name without "%".
      arrays: Tuple of `Array`, its results.
      opcode: Such as "fusion".
      operands: Tuple of the operands' names.
      text: Attributes, and the number of a parameter or constant.
    """

    name: str
    arrays: tuple
    opcode: str
    operands: tuple
    text: str

    @property
    def op_name(self):
        """The JAX operation in the metadata, or ""."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def target(self):
        """The target of a custom call, or ""."""
        found = _TARGET.search(self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step of one device.

    Attributes:
      count: How often they run.
      bytes: The larger of their input and output bytes.
      sent: Least bytes sent to other devices.
    """

    count: int = 0
    bytes: int = 0
    sent: float = 0.0

    def __add__(self, other):
        return Collective(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)


def _type(text):
    """Return (text of the type, rest of the line). The type of a tuple ends at its closing bracket."""
    if not text.startswith("("):
        head, _, rest = text.partition(" ")
        return head, rest
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[: match.end()], text[match.end() :]
    return text, ""


def _arrays(text):
    return tuple(
        Array(dtype, tuple(int(n.strip("<=")) for n in shape.split(",") if n), layout or "")
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _operands(rest):
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


class Module:
    """A parsed HLO program.

    Args:
      text: HLO text of the compiled program.
      devices: Number of devices, which is the group size of collectives that name no group.
    """

    def __init__(self, text, devices):
        self._devices, self._computations, self._entry = devices, {}, None
        current = None
        for line in text.splitlines():
            header = _HEADER.match(line) if not line.startswith(" ") else None
            if header:
                current = self._computations[header[2]] = {}
                if header[1]:
                    self._entry = header[2]
            elif current is not None:
                found = _INSTRUCTION.match(line)
                if found:
                    self._add(current, found[1], found[2])

    @staticmethod
    def _add(computation, name, text):
        kind, rest = _type(text)
        opcode = _OPCODE.match(rest)
        if not opcode:
            return
        operands, attributes = _operands(rest[opcode.end() :])
        names = tuple(_NAME.findall(operands))
        number = operands if opcode[1] in ("parameter", "constant") else ""
        computation[name] = Instruction(name, _arrays(kind), opcode[1], names, number + attributes)

    def executed(self):
        """Return [(instruction, its computation, executions per step), ...], without the insides of fusions."""
        return list(self._walk(self._entry, 1))

    def _walk(self, name, times):
        computation = self._computations.get(name, {})
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.opcode in ("fusion", "fusion-start"):
                continue
            turns = (self.turns(instruction) or 1) if instruction.opcode == "while" else 1
            for called in self._called(instruction):
                yield from self._walk(called, times * turns)

    def turns(self, loop):
        """Return the iterations of a while loop, from the compiler's note or a `counter < constant` condition, else None."""
        found = _TRIPS.search(loop.text)
        if found:
            return int(found[1])
        condition = self._computations.get(re.search(r"condition=%?([\w.\-]+)", loop.text)[1], {})
        compare = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.text]
        limits = [i.text for i in condition.values() if i.opcode == "constant"]
        number = re.match(r"\d+", limits[0]) if len(compare) == len(limits) == 1 else None
        return int(number[0]) if number else None

    @staticmethod
    def _called(instruction):
        if instruction.opcode not in ("while", "conditional", "call", "fusion", "fusion-start", "async-start"):
            return ()
        branches = _BRANCHES.search(instruction.text)
        return (*_CALLED.findall(instruction.text), *(_NAME.findall(branches[1]) if branches else ()))

    def unknown_loops(self):
        """Return the number of loops with unknown iteration counts. Their bodies count once."""
        return sum(i.opcode == "while" and self.turns(i) is None for i, _, _ in self.executed())

    def serial_gathers(self):
        """Return [(iterations, op_name), ...] of loops that the compiler made from a gather or scatter, one index each."""
        loops = ((i, re.search(r"(gather|scatter)[\w\-]*$", i.op_name)) for i, _, _ in self.executed())
        return [(self.turns(i), i.op_name) for i, found in loops if i.opcode == "while" and found and self.turns(i)]

    def launches(self):
        """Return {kind of kernel or copy: launches per step} on a GPU, the most frequent first.

        Each instruction that computes or copies counts once, even a library call that launches several kernels. The
        zero-fills before reductions and library calls are not counted.
        """
        found = collections.Counter()
        for instruction, _, times in self.executed():
            found[self._launched(instruction)] += times
        found.pop(None, None)
        return dict(found.most_common())

    def _launched(self, instruction):
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in (*_FREE, "async", "async-update") or opcode.endswith("-done"):
            return None
        if opcode in SENT:
            return "collectives"
        if opcode == "copy":
            return "copies"
        if opcode == "custom-call":
            kinds = (kind for prefix, kind in _LIBRARIES.items() if instruction.target.startswith(prefix))
            return next(kinds, "others")
        if opcode == "fusion":
            inner = self._inner(instruction).values()
            product = "kind=kCustom" in instruction.text and any(i.opcode == "dot" for i in inner)
            return "Triton products" if product else "fusions"
        return "others"

    def collectives(self):
        """Return {kind: Collective} per step, including those in fusions and loops, for groups of several devices."""
        found = collections.defaultdict(Collective)
        for _, kind, collective in self.each_collective():
            found[kind] += collective
        return dict(found)

    def each_collective(self):
        """Yield (op_name, kind, Collective) for every collective instruction."""
        for instruction, computation, times in self.executed():
            yield from self._collective(instruction, computation, times, "")

    def _collective(self, instruction, computation, times, within):
        if instruction.opcode == "fusion":
            for called in self._called(instruction):
                inner = self._computations.get(called, {})
                for i in inner.values():
                    yield from self._collective(i, inner, times, f"{instruction.name} {called}")
        kind = instruction.opcode.removesuffix("-start")
        if kind not in SENT:
            return
        group = self._group(instruction.text)
        if group < 2:
            return
        read = sum(a.bytes for name in instruction.operands for a in _of(computation, name))
        size = max(read, read * group if kind == "all-gather" else 0)
        if kind == "all-reduce" and "all-reduce-scatter" in within:
            kind = "reduce-scatter"  # the TPU compiler's form of it
        yield instruction.op_name, kind, Collective(times, times * size, times * SENT[kind](group) * size)

    def _group(self, text):
        """Return the group size of a collective, from any of HLO's three notations."""
        if "source_target_pairs=" in text:
            return self._devices
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:\([^)]*\)|<[^>]*>)?,? *\{([^}]*)\}", text)
        if mesh:
            sizes = dict(re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh[1]))
            names = [n.strip().strip("'") for n in mesh[2].split(",")]
            # A split axis is written as 'axis':(before)size.
            split = [re.fullmatch(r"([\w.\-]+)'?:\(\d+\)(\d+)", n) for n in names]
            return math.prod(int(s[2]) if s else int(sizes.get(n, 1)) for n, s in zip(names, split) if n)
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
        if iota:
            return int(iota[2])
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
        return len(listed[1].split(",")) if listed else self._devices

    def traffic(self):
        """Return (bytes, padding): HBM reads and writes per step, and the part of them that is tile padding.

        An instruction reads its operands and writes its results once. If a fusion only slices an operand, the slices
        count; if it updates an operand in place, the update counts. On-chip memory does not count.
        """
        movements = list(self._movements())
        padded = sum(filled for *_, filled in movements)
        return padded, padded - sum(plain for *_, plain, _ in movements)

    def traffic_by_part(self):
        """Return {part of the model: HBM bytes without padding}, the largest first; see `part` for the names.

        The compiler's prefetches have no name and count towards the instruction that made their data.
        """
        found = collections.Counter()
        for instruction, computation, plain, _ in self._movements():
            while not instruction.op_name and instruction.operands and instruction.operands[0] in computation:
                instruction = computation[instruction.operands[0]]
            found[part(instruction.op_name) or "other"] += plain
        return dict(found.most_common())

    def _movements(self):
        """Yield (instruction, its computation, bytes moved per step, the same with padding) if any are moved."""
        for instruction, computation, times in self.executed():
            plain, filled = self._moved(instruction, computation)
            if filled:
                yield instruction, computation, times * plain, times * filled

    def recomputed(self):
        """Return (number of instructions, bytes moved) that the compiler recomputes to save memory."""
        found = [(i, plain) for i, _, plain, _ in self._movements() if ".remat" in i.name]
        return len(found), sum(plain for _, plain in found)

    def most_padded(self):
        """Return (Array, op_name) of the array with the most bytes of padding, or None."""
        arrays = ((a, i.op_name) for i, _, _ in self.executed() if i.opcode not in _FREE for a in i.arrays if a.in_hbm)
        return max(arrays, key=lambda a: a[0].padded - a[0].bytes, default=None)

    def _moved(self, instruction, computation):
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or opcode in ("async-start", "async-update"):
            return 0, 0
        if opcode == "slice-start":  # (whole, part, ...)
            whole, part = instruction.arrays[:2]
            moved = [part] * (whole.in_hbm + part.in_hbm)
            return sum(a.bytes for a in moved), sum(a.padded for a in moved)
        moved = [a for a in self._written(instruction, computation) if a.in_hbm]
        for position, name in enumerate(instruction.operands):
            arrays = [a for a in _of(computation, name) if a.in_hbm]
            moved += self._read(instruction, position, arrays, computation)
        return sum(a.bytes for a in moved), sum(a.padded for a in moved)

    def _written(self, instruction, computation):
        if instruction.opcode == "dynamic-update-slice":
            return _of(computation, instruction.operands[1])
        if instruction.opcode.endswith("-start"):  # (operands, results, counters); of a copy (result, operand, ...)
            if instruction.opcode == "all-reduce-start":  # the only one with the type of its result
                return instruction.arrays
            if instruction.opcode == "copy-start":
                return instruction.arrays[:1]
            operands = sum(len(_of(computation, name)) for name in instruction.operands)
            return [a for a in instruction.arrays[operands:] if a.shape or a.dtype not in ("u32", "s32")]
        if instruction.opcode == "custom-call" and instruction.target.startswith(("__cublas", "__cudnn")):
            last = instruction.arrays[-1]
            scratch = len(instruction.arrays) > 1 and last.dtype in ("u8", "s8") and len(last.shape) == 1
            return instruction.arrays[:-1] if scratch else instruction.arrays
        if instruction.opcode == "fusion":
            inner = self._inner(instruction)
            updates = [i for i in inner.values() if i.opcode == "dynamic-update-slice"]
            whole = {(a.dtype, a.shape): _of(inner, u.operands[1]) for u in updates for a in u.arrays}
            return [w for a in instruction.arrays for w in whole.get((a.dtype, a.shape), (a,))]
        return instruction.arrays

    def _inner(self, instruction):
        return self._computations.get(next(iter(self._called(instruction)), ""), {})

    def _read(self, instruction, position, arrays, computation):
        """Return the arrays that an instruction reads from one operand."""
        if not arrays:
            return []
        if instruction.opcode in _SLICES and position == 0:
            return list(instruction.arrays)
        if instruction.opcode == "dynamic-update-slice" and position == 0:
            return []
        if instruction.opcode == "fusion":
            inner = self._inner(instruction)
            numbers = {i.text.partition(",")[0]: i.name for i in inner.values() if i.opcode == "parameter"}
            parameter = numbers.get(str(position), "")
            users = [i for i in inner.values() if parameter in i.operands]
            if users and all(
                u.opcode in (*_SLICES, "dynamic-update-slice") and u.operands[0] == parameter for u in users
            ):
                return [a for u in users if u.opcode in _SLICES for a in u.arrays]
        return arrays


def part(op_name):
    """Return the part of the model that an op_name belongs to.

    It is the path of modules, at most three names, with digits replaced by "*". Forward and backward pass share it. The
    step's arguments give "state" or "batch".

    >>> part("jit(step)/transpose(jvp(HeatDecoder))/block3/attn/qkv/dot_general")
    'HeatDecoder/block*/attn'
    """
    argument = re.match(r"(state|batch)\b", op_name)
    if argument:
        return argument[1]
    names = re.sub(r"\w+\(|\)", "", op_name).split("/")  # without jit, jvp, transpose, vmap
    return re.sub(r"\d+", "*", "/".join(names[1:-1][:3]))


def _of(computation, name):
    return computation[name].arrays if name in computation else ()
