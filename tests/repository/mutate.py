"""Change one thing at a time in a module, and see whether its tests notice.

    python tests/repository/mutate.py MODULE.py [TESTS...] [--at-least 95] [--jobs 2] [-- ARGS]

One operator, constant or boolean is changed at a time: comparisons, `and`/`or`, `not`, arithmetic
and bit operators, numbers, texts, True and False, and conditions as a whole. Docstrings,
annotations and the words of log messages are left alone. Each mutant is tried in a copy of the
checkout, so that the checkout stays as it is. A mutant that makes the tests fail, or hang,
is noticed; the others are listed, and the exit status is 1 when too many survive. ARGS are
pytest's. The modules of NOTICED_BY need no TESTS.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
COPIED = ("pytest_vmsandbox", "tests", "pyproject.toml", "conftest.py")

HEADERS = "tests/linux/test_headers.py"
# Once more the constants, by a compiler that brings the newest headers; it takes half a second.
NEWEST_HEADERS = f"{HEADERS}::test_constants_equal_those_of_the_newest_headers_at_hand"
LONG_NAMES = f"{HEADERS}::test_a_short_name_means_what_its_long_one_means"
SHARED_NAMES = f"{HEADERS}::test_a_name_that_several_enums_have_is_one_number"
REFUSALS = "tests/linux/test_arguments.py"

# The ground that is held to 95 %, and the tests that are to notice, the quickest first.
NOTICED_BY = {
    "pytest_vmsandbox/host/permissions.py": (
        "tests/host/test_permissions.py",
        "tests/host/test_permissions_acl.py",
        "tests/host/test_permissions_users.py",
    ),
    "pytest_vmsandbox/host/socket_auth.py": ("tests/host/test_socket_auth.py",),
    "pytest_vmsandbox/host/peer_process.py": ("tests/host/test_socket_auth.py",),
    "pytest_vmsandbox/linux/arguments.py": (REFUSALS, "tests/linux/test_at.py"),
    "pytest_vmsandbox/linux/at.py": (
        "tests/linux/test_at.py",
        NEWEST_HEADERS,
        REFUSALS,
    ),
    "pytest_vmsandbox/linux/clone.py": (
        NEWEST_HEADERS,
        LONG_NAMES,
        "tests/linux/test_clone.py",
        REFUSALS,
    ),
    "pytest_vmsandbox/linux/eventfd.py": ("tests/linux/test_eventfd.py", HEADERS, REFUSALS),
    "pytest_vmsandbox/linux/mount_flags.py": (
        "tests/linux/test_mount_flags.py",
        NEWEST_HEADERS,
        LONG_NAMES,
        REFUSALS,
    ),
    "pytest_vmsandbox/linux/mount_tree.py": (
        NEWEST_HEADERS,
        SHARED_NAMES,
        REFUSALS,
        "tests/linux/test_mount_tree.py",
    ),
    "pytest_vmsandbox/linux/mounts.py": (HEADERS, REFUSALS, "tests/linux/test_mounts.py"),
    "pytest_vmsandbox/linux/namespaces.py": (REFUSALS, "tests/linux/test_namespaces.py"),
    "pytest_vmsandbox/linux/prctl.py": (
        NEWEST_HEADERS,
        LONG_NAMES,
        "tests/linux/test_prctl.py",
        "tests/linux/test_capabilities.py",
        REFUSALS,
    ),
}

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}

# How long a run without end may clean up after itself.
GRACE_S = 10

# Fields of a node that hold types.
TYPES = {"annotation", "returns"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A module with one thing changed."""

    line: int
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.before}  ->  {self.after}"


@dataclass(frozen=True, slots=True)
class Edit:
    """A change that can be made to a tree, in place; `node` is what shows it."""

    node: ast.expr | ast.stmt
    make: Callable[[], None]


# Making mutants


def make_mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a module, in the order of the tree."""
    for number in range(len(list(find_edits(ast.parse(source))))):
        tree = ast.parse(source)
        edit = list(find_edits(tree))[number]
        before = first_line(edit.node)
        edit.make()
        yield Mutant(
            line=edit.node.lineno,
            before=before,
            after=first_line(edit.node),
            text=ast.unparse(tree),
        )


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def find_edits(node: ast.AST) -> Iterator[Edit]:
    """Every change that can be made to `node` and what is in it."""
    yield from edits_of(node)
    for field, value in ast.iter_fields(node):
        if field in TYPES:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_left_alone(child):
                yield from find_edits(child)


def is_left_alone(node: ast.AST) -> bool:
    """Docstrings, log messages, types that have a name, and the list of public names."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"))):
            return True
        case ast.AnnAssign(annotation=ast.Name(id="TypeAlias")):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
    return False


def edits_of(node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.Compare(ops=operators):
            for index, operator in enumerate(operators):
                if type(operator) in OPERATORS:
                    yield Edit(node, partial(swap_in, operators, index))
        case ast.BoolOp() | ast.BinOp() | ast.AugAssign():
            if type(node.op) in OPERATORS:
                yield Edit(node, partial(swap_operator, node))
        case ast.UnaryOp(op=ast.Not()):
            yield Edit(node, partial(negate, node, "operand"))
        case ast.UnaryOp(op=ast.USub() | ast.Invert()):
            yield Edit(node, partial(setattr, node, "op", ast.UAdd()))
        case ast.Constant(value=value) if (other := another(value)) is not None:
            yield Edit(node, partial(setattr, node, "value", other))
        case ast.If() | ast.While() | ast.IfExp():
            yield from edits_of_condition(node)


def edits_of_condition(node: ast.If | ast.While | ast.IfExp) -> Iterator[Edit]:
    """The opposite of a condition that has no operator of its own to change."""
    if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
        yield Edit(node, partial(negate, node, "test"))


def another(value: object) -> object:
    """A constant that differs; None for what is no constant of interest."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "XX"
        case bytes():
            return value + b"XX"
    return None


def swap_in(operators: list[ast.cmpop], index: int) -> None:
    operators[index] = OPERATORS[type(operators[index])]()  # type: ignore[call-overload]


def swap_operator(node: ast.BoolOp | ast.BinOp | ast.AugAssign) -> None:
    node.op = OPERATORS[type(node.op)]()  # type: ignore[assignment]


def negate(node: ast.AST, field: str) -> None:
    setattr(node, field, ast.UnaryOp(op=ast.Not(), operand=getattr(node, field)))


# Trying them


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The tests that are to notice, and how they are run in a copy of the checkout."""

    module: Path
    tests: Sequence[str]
    pytest_arguments: Sequence[str]

    def passes(self, text: str, *, copy: Path, timeout_s: float) -> bool:
        """Whether the tests pass with the module so changed; a run without end does not."""
        (copy / self.module).write_text(text)
        command = [
            # What a mutant of the mount calls mounts by mistake is gone with it.
            *(["unshare", "--mount"] if os.geteuid() == 0 else []),
            *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
            *self.pytest_arguments,
            *self.tests,
        ]
        with subprocess.Popen(
            command,
            cwd=copy,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                return process.wait(timeout=timeout_s) == 0
            except subprocess.TimeoutExpired:
                # Fixtures then still remove their users and mounts, if they can.
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
                return False
            finally:
                # Reaped or not, the session is the tests' own: nothing of them may go on.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def copied_checkout() -> Iterator[Path]:
    # Other users are among the tests: they must be able to read the copy.
    with tempfile.TemporaryDirectory(prefix="vmsm-") as name:
        copy = Path(name)
        copy.chmod(0o755)
        for part in COPIED:
            source = CHECKOUT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, copy / part)
        yield copy


def survivors_of(
    mutants: Sequence[Mutant], trial: Trial, *, jobs: int, timeout_s: float
) -> Iterator[Mutant]:
    """Try all mutants, `jobs` at a time, and give those that the tests did not notice."""
    with ExitStack() as undo:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for _ in range(jobs):
            copies.put(undo.enter_context(copied_checkout()))

        def survives(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return trial.passes(mutant.text, copy=copy, timeout_s=timeout_s)
            finally:
                copies.put(copy)

        executor = ThreadPoolExecutor(jobs)
        undo.callback(executor.shutdown, cancel_futures=True)
        for tried, survived in enumerate(executor.map(survives, mutants), start=1):
            mutant = mutants[tried - 1]
            report(f"{tried}/{len(mutants)} {'SURVIVED' if survived else 'noticed'} {mutant}")
            if survived:
                yield mutant


def baseline_s(trial: Trial, source: str) -> float:
    """How long the tests take on the module as it is; they must pass."""
    with copied_checkout() as copy:
        began = time.monotonic()
        # Written by ast.unparse, as the mutants are: comments go, and `noqa` with them.
        if not trial.passes(ast.unparse(ast.parse(source)), copy=copy, timeout_s=1800):
            sys.exit("the tests fail without any change")
        return time.monotonic() - began


def report(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", type=Path, help="the module to change, from the checkout's root")
    parser.add_argument("tests", nargs="*", help="the tests that are to notice")
    parser.add_argument("--at-least", type=float, default=95.0, help="percent to be noticed")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at a time")
    parser.add_argument("--lines", default="", help="only these lines, as in 10-40")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.pytest_arguments = words[end + 1 :]
    arguments.tests = arguments.tests or NOTICED_BY.get(str(arguments.module))
    if not arguments.tests:
        parser.error(f"which tests are to notice changes of {arguments.module}?")
    return arguments


def main() -> int:
    # A shell's `&` has SIGINT ignored, which the tests would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Ended from outside, it still removes its copies.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit("terminated"))
    arguments = parse_arguments()
    source = (CHECKOUT / arguments.module).read_text()
    trial = Trial(
        module=arguments.module,
        tests=arguments.tests,
        pytest_arguments=arguments.pytest_arguments,
    )
    mutants = [
        mutant for mutant in make_mutants(source) if is_in(mutant.line, lines=arguments.lines)
    ]
    took = baseline_s(trial, source)
    report(f"{arguments.module}: {len(mutants)} mutants; the tests take {took:.1f} s")
    survivors = list(survivors_of(mutants, trial, jobs=arguments.jobs, timeout_s=20 + 4 * took))
    noticed = 100 * (1 - len(survivors) / len(mutants)) if mutants else 100.0
    report(f"{arguments.module}: {noticed:.1f} % of {len(mutants)} mutants noticed; survivors:")
    for mutant in survivors:
        report(f"  {mutant}")
    return 0 if noticed >= arguments.at_least else 1


def is_in(line: int, *, lines: str) -> bool:
    first, _, last = lines.partition("-")
    return not lines or int(first) <= line <= int(last or first)


if __name__ == "__main__":
    sys.exit(main())
