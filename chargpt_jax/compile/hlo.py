"""What a compiled program does, read from the text of its optimised HLO: kernels, library calls, collectives.

Only instructions that the device executes one by one count. An instruction inside a fusion is part of its kernel.
Loops multiply: with L layers, the body of a loop over layers counts L times.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "domain"),
    *("while", "conditional", "call", "partition-id", "replica-id", "add-dependency"),
}
"""Opcodes that start no work on the device by themselves."""

NO_WORK = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|Sharding|AssumeGatherIndicesInBound|PrepareAsyncCall\w+)"'
)
"""Custom calls that only name memory, layouts or facts."""

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
"""Opcodes by which devices exchange data."""


ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'
"""Marks the first of the fusions in which a TPU runs a collective in the background."""


class Instruction:
    """One line of a computation."""

    def __init__(self, name: str, text: str, root: bool):
        self.name, self.root = name, root
        end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
        self.shape, text = text[:end], text[end:].lstrip()
        start = text.index("(")
        end = _closing(text, start)
        self.opcode, self.operands, self.attributes = text[:start], text[start + 1 : end], text[end + 1 :]

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations that an attribute holds, such as 'body' or 'calls'."""
        found = re.search(rf"[ ,]{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    def operand_names(self) -> list[str]:
        """Return the names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.operands)


Computation = dict[str, Instruction]
"""{name: instruction}, in the order of the text."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one unit of a program's work executes on one device."""

    opcodes: Counter[str]
    """How often each opcode is executed, without those that start no work; collectives are included."""
    collectives: Counter[str]
    """How often each kind of collective is executed."""
    collective_bytes: Counter[str]
    """Bytes of the larger side, operands or results, of the collectives of each kind."""
    unknown_loops: int = 0
    """Loops of unknown length inside, each counted as one iteration."""

    @property
    def total(self) -> int:
        """Number of executed instructions: the kernels of a GPU."""
        return self.opcodes.total()

    def plus(self, other: "Work", times: int = 1) -> "Work":
        """Return this work and `times` the other."""
        return Work(
            self.opcodes + _times(other.opcodes, times),
            self.collectives + _times(other.collectives, times),
            self.collective_bytes + _times(other.collective_bytes, times),
            self.unknown_loops + other.unknown_loops,
        )


NOTHING = Work(Counter(), Counter(), Counter())


def work_per_unit(text: str) -> Work:
    """Return what a program executes per unit of its work.

    A program whose work is a loop of unknown length, such as the training steps of a dispatch, is measured by one
    iteration of it, and so is the loop inside that one. Other programs are measured by one execution. What is done
    once before such a loop may be more than one of its iterations, but not more than two.

    Args:
        text: the optimised HLO, as `Compiled.as_text()` returns it.
    """
    return Module(text).unit()


class Module:
    """The computations of a program."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._work: dict[str, Work] = {}
        for name, is_entry, computation in _computations(text):
            self.computations[name] = computation
            self.entry = name if is_entry else self.entry

    def unit(self) -> Work:
        """Return the work of one iteration of the innermost loop of unknown length with at least 1/3 of the work."""
        name, condition = self.entry, NOTHING
        while True:
            loops = [i for i in self.computations[name].values() if i.opcode == "while" and self.trips(name, i) is None]
            largest = max(loops, key=lambda loop: self.work(*loop.called("body")).total, default=None)
            if largest is None or 3 * self.work(*largest.called("body")).total < self.work(name).total:
                return self.work(name).plus(condition)
            (name,), condition = largest.called("body"), self.work(*largest.called("condition"))

    def work(self, name: str) -> Work:
        """Return what one execution of a computation executes."""
        if name not in self._work:
            self._work[name] = self._sum(name)
        return self._work[name]

    def _sum(self, name: str) -> Work:
        done = NOTHING
        for instruction in self.computations[name].values():
            done = done.plus(self._own(name, instruction))
            if instruction.opcode == "while":
                trips, body = self.trips(name, instruction), self.work(*instruction.called("body"))
                done = done.plus(body, 1 if trips is None else trips)
                if trips is None:
                    once = Work(Counter(), Counter(), Counter(), 1)
                    done = done.plus(once).plus(self.work(*instruction.called("condition")))
            elif instruction.opcode == "conditional":
                branches = [self.work(branch) for branch in _branches(instruction)]
                done = done.plus(max(branches, key=lambda work: work.total))
            elif instruction.opcode == "call":
                done = done.plus(self.work(*instruction.called("to_apply")))
        return done

    def _own(self, name: str, instruction: Instruction) -> Work:
        """Return what an instruction executes by itself, without the computations that it calls."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")) or NO_WORK.search(instruction.attributes):
            return NOTHING
        base = opcode.removesuffix("-start")
        if opcode in ("async-start", "call-start"):  # the computation that is called runs in the background
            (called,) = instruction.called("calls") or instruction.called("to_apply")
            return self.work(called)
        opcodes, kinds, sizes = Counter({base: 1}), Counter[str](), Counter[str]()
        inside = self._fused_collectives(instruction)
        for kind, size in inside or ([(base, self._size(name, instruction))] if base in COLLECTIVES else []):
            kinds[kind] += 1
            sizes[kind] += size
        return Work(opcodes, kinds, sizes)

    def _fused_collectives(self, instruction: Instruction) -> list[tuple[str, int]]:
        """Return kind and bytes of the collectives that a fusion performs as part of its kernel.

        A TPU runs a collective in the background in a chain of fusions, each of which repeats it: the first one counts.
        """
        if instruction.opcode != "fusion":
            return []
        found = []
        for called in instruction.called("calls"):
            inside = self.computations.get(called, {})
            starts = any(ASYNC_START in inner.attributes for inner in inside.values())
            found += [
                (_kind(inner, inside), self._size(called, inner))
                for inner in inside.values()
                if inner.opcode in COLLECTIVES and (starts or "chain_id=" not in inner.attributes)
            ]
        return found

    def _size(self, name: str, instruction: Instruction) -> int:
        """Return the bytes of the larger side of a collective."""
        computation = self.computations[name]
        known = [computation[operand].shape for operand in instruction.operand_names() if operand in computation]
        operands, results = sum(map(shape_bytes, known)), shape_bytes(instruction.shape)
        if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
            results -= operands  # their results also hold the operands
        return max(operands, results)

    def trips(self, name: str, loop: Instruction) -> int | None:
        """Return how often the body of a loop runs; None: it is not known before the program runs."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        (condition,) = loop.called("condition")
        return self._counted(self.computations[condition], self.computations[name], loop)

    def _counted(self, condition: Computation, around: Computation, loop: Instruction) -> int | None:
        """Return the iterations of a loop that counts from one constant to another, in steps of 1 as JAX's loops do."""
        (root,) = [i for i in condition.values() if i.root]
        sides = [condition.get(operand) for operand in root.operand_names()]
        if root.opcode != "compare" or "direction=LT" not in root.attributes or None in sides:
            return None
        counter, end = sides
        assert counter is not None
        index = re.search(r"index=(\d+)", counter.attributes)
        start = around.get(next(iter(loop.operand_names()), ""))
        if counter.opcode != "get-tuple-element" or index is None or start is None or start.opcode != "tuple":
            return None
        first = _constant(around.get(start.operand_names()[int(index[1])]), around)
        last = _constant(end, condition)
        return None if first is None or last is None else max(0, last - first)


def _kind(collective: Instruction, around: Computation) -> str:
    """Return the kind of a collective in a fusion; a sum of which a device uses a slice is a reduce-scatter."""
    (root,) = [instruction for instruction in around.values() if instruction.root]
    sliced = root.opcode == "dynamic-slice" and root.operand_names()[0] == collective.name
    return "reduce-scatter" if collective.opcode == "all-reduce" and sliced else collective.opcode


def shape_bytes(shape: str) -> int:
    """Return the bytes of an HLO shape, such as 'f32[3,64]{1,0}', or of all elements of a tuple of shapes."""
    total = 0
    for kind, lengths in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        elements = functools.reduce(lambda size, length: size * int(length), filter(None, lengths.split(",")), 1)
        total += -(-elements * bits // 8)
    return total


def _computations(text: str) -> Iterator[tuple[str, bool, Computation]]:
    """Yield the computations of a module: name, whether it is the entry, instructions."""
    name, is_entry, computation = "", False, Computation()
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, is_entry, computation = opened[2], bool(opened[1]), {}
        elif line.startswith("}") and name:
            yield name, is_entry, computation
        elif written := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            computation[written[2]] = Instruction(written[2], written[3], bool(written[1]))


def _constant(instruction: Instruction | None, around: Computation) -> int | None:
    """Return the value of an integer constant, or of a copy of one."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = around.get(next(iter(instruction.operand_names()), ""))
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.operands):
        return None
    return int(instruction.operands)


def _branches(instruction: Instruction) -> list[str]:
    """Return the computations of a conditional's branches."""
    named = [instruction.called(name) for name in ("branch_computations", "true_computation", "false_computation")]
    return [branch for branches in named for branch in branches]


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]!r}")


def _times(counts: Counter[str], times: int) -> Counter[str]:
    return Counter({name: count * times for name, count in counts.items()})
