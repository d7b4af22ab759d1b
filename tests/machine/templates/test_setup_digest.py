"""What makes a setup another one, and what does not."""

from __future__ import annotations

import functools
import importlib
import linecache
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox import RequestInvalid, Template
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.input_digest import digest_inputs
from pytest_vmsandbox.machine.templates.setup_digest import digest_setup
from pytest_vmsandbox.machine.templates.template import Recipe

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Loads a text as a module, each time a file of its own with the same module's name."""
    numbers = iter(range(100))

    def load(text: str) -> Any:
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        (directory / "some_tests.py").write_text(text)
        module = types.ModuleType("some_tests")
        module.__file__ = str(directory / "some_tests.py")
        monkeypatch.setitem(sys.modules, "some_tests", module)
        exec(compile(text, module.__file__, "exec"), vars(module))
        return module

    return load


def digest_of(module: Any, **how: Any) -> str:
    return digest_setup(module.setup, **{"key": None, **how})


PLAIN = "def setup(vm):\n    vm.run('true')\n"


def test_the_same_text_elsewhere_is_the_same(load: Callable[[str], Any]) -> None:
    assert digest_of(load(PLAIN)) == digest_of(load("\n\n" + PLAIN + "\n# and more\nX = 1\n"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PLAIN, PLAIN.replace("true", "false")),
        ("X = 1\ndef setup(vm): vm.run(X)\n", "X = 2\ndef setup(vm): vm.run(X)\n"),
        (
            "X = {'a': [1, (2, b'3')]}\ndef setup(vm): vm.run(X)\n",
            "X = {'a': [1, (2, b'4')]}\ndef setup(vm): vm.run(X)\n",
        ),
        (
            "X = [[1], 2]\ndef setup(vm): vm.run(X)\n",
            "X = [[1, 2]]\ndef setup(vm): vm.run(X)\n",
        ),
        (
            "def f(vm): vm.run('a')\ndef setup(vm): f(vm)\n",
            "def f(vm): vm.run('b')\ndef setup(vm): f(vm)\n",
        ),
        (
            "X = 1\ndef g(): return X\ndef f(): return g()\ndef setup(vm): [f() for _ in vm]\n",
            "X = 2\ndef g(): return X\ndef f(): return g()\ndef setup(vm): [f() for _ in vm]\n",
        ),
        (
            "class C:\n    x = 1\ndef setup(vm): C()\n",
            "class C:\n    x = 2\ndef setup(vm): C()\n",
        ),
        (
            "def make(x):\n    def setup(vm): vm.run(x)\n    return setup\nsetup = make('a')\n",
            "def make(x):\n    def setup(vm): vm.run(x)\n    return setup\nsetup = make('b')\n",
        ),
        (
            "from functools import partial\ndef f(vm, x): pass\nsetup = partial(f, x=1)\n",
            "from functools import partial\ndef f(vm, x): pass\nsetup = partial(f, x=2)\n",
        ),
        (
            "A = 1\ndef setup(vm, x=A): pass\n",
            "A = 2\ndef setup(vm, x=A): pass\n",
        ),
    ],
)
def test_what_it_does_and_what_it_uses_make_it_another(
    load: Callable[[str], Any], one: str, other: str
) -> None:
    assert digest_of(load(one)) == digest_of(load(one))
    assert digest_of(load(one)) != digest_of(load(other))


HELPERS = "def install(vm): vm.run('a')\n"


@pytest.fixture
def load_with(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Loads a text as a module beside others, given by name, which are loaded only if imported."""
    monkeypatch.syspath_prepend(tmp_path / "beside")
    (tmp_path / "beside").mkdir()

    def load_with(text: str, **beside: str) -> Any:
        for name, content in beside.items():
            sys.modules.pop(name, None)
            (tmp_path / "beside" / f"{name}.py").write_text(content)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return load(text)
        finally:
            sys.dont_write_bytecode = before

    yield load_with
    for name in ("some_helpers", "some_others"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "text",
    [
        "import some_helpers\ndef setup(vm): some_helpers.install(vm)\n",
        "from some_helpers import install\ndef setup(vm): install(vm)\n",
        "def setup(vm):\n    import some_helpers\n    some_helpers.install(vm)\n",
        "def setup(vm):\n    from some_helpers import install\n    install(vm)\n",
        "def setup(vm):\n    def inner():\n        from some_helpers import install\n    inner()\n",
        "import some_others\ndef setup(vm): some_others.some_helpers.install(vm)\n",
        "def setup(vm):\n    import some_others\n",
        "class C:\n    def m(self):\n        import some_helpers\ndef setup(vm): C().m()\n",
    ],
)
def test_own_modules_count_by_their_text(load_with: Callable[..., Any], text: str) -> None:
    others = "import some_helpers\n"

    def digest(helpers: str) -> str:
        return digest_of(load_with(text, some_helpers=helpers, some_others=others))

    assert digest(HELPERS) == digest(HELPERS)
    assert digest(HELPERS) != digest(HELPERS.replace("'a'", "'b'"))


def test_what_is_taken_of_a_module_counts_by_its_value(load_with: Callable[..., Any]) -> None:
    module = load_with(
        "import some_helpers\ndef setup(vm): vm.run(some_helpers.WORD)\n",
        some_helpers="WORD = 'a'\n",
    )
    before = digest_of(module)

    module.some_helpers.WORD = "b"

    assert digest_of(module) != before


@pytest.mark.parametrize(
    "text",
    [
        "def setup(vm):\n    import some_helpers\n",
        "import some_others\ndef setup(vm): some_others.later()\n",
    ],
)
def test_a_module_counts_the_same_before_it_is_loaded(
    load_with: Callable[..., Any], text: str
) -> None:
    module = load_with(
        text,
        some_helpers=HELPERS + CLASSES,
        some_others="def later():\n    import some_helpers\n",
    )
    assert "some_helpers" not in sys.modules
    before = digest_of(module)

    importlib.import_module("some_helpers")

    assert digest_of(module) == before


def test_what_was_loaded_of_a_module_counts_though_it_was_edited(
    load_with: Callable[..., Any], tmp_path: Path
) -> None:
    text = "import some_helpers\ndef setup(vm): some_helpers\n"
    edited = HELPERS.replace("'a'", "'b'")
    old = load_with(text, some_helpers=HELPERS)
    (tmp_path / "beside" / "some_helpers.py").write_text(edited)
    of_both = digest_of(old)

    assert of_both != digest_of(load_with(text, some_helpers=edited))
    assert of_both != digest_of(load_with(text, some_helpers=HELPERS))


def test_who_imports_whom_in_a_circle_comes_to_an_end(load_with: Callable[..., Any]) -> None:
    module = load_with(
        "import some_helpers\ndef setup(vm): some_helpers\n",
        some_helpers="import some_others\n",
        some_others="import some_helpers\n",
    )

    assert digest_of(module)


DECORATED = """
import functools
def decorate(function):
    @functools.wraps(function)
    def wrapper(vm):
        vm.run('before')
        function(vm)
    return wrapper
@decorate
def setup(vm): vm.run('a')
"""
MANAGED = """
import contextlib
@contextlib.contextmanager
def managed(vm):
    vm.run('a')
    yield
def setup(vm):
    with managed(vm): pass
"""
CLASSES = """
import dataclasses, functools
def used(): return 'a'
WORD = 'b'
class Base:
    def below(self): return used()
@dataclasses.dataclass
class C(Base):
    size: int = 3
    def m(self): return used()
    @staticmethod
    def s(): return WORD
    @functools.cached_property
    def p(self): return 'c'
def setup(vm): C().m()
"""
PATTERN = f"import re\nX = re.compile({'x' * 300 + 'a'!r})\ndef setup(vm): X\n"
CACHED = "import functools\n@functools.cache\ndef f(): return 'a'\ndef setup(vm): f()\n"


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (DECORATED, "'before'", "'after'"),
        (DECORATED, "'a'", "'b'"),
        (MANAGED, "'a'", "'b'"),
        (CLASSES, "'a'", "'x'"),
        (CLASSES, "'b'", "'x'"),
        (CLASSES, "'c'", "'x'"),
        (CLASSES, "size: int = 3", "size: int = 4"),
        (PATTERN, "xa'", "xb'"),
        (PATTERN, "a')", "a', re.I)"),
        (CACHED, "'a'", "'b'"),
    ],
)
def test_what_is_behind_what_it_uses_counts(
    load: Callable[[str], Any], text: str, old: str, new: str
) -> None:
    assert old in text
    assert digest_of(load(text)) == digest_of(load(text))
    assert digest_of(load(text)) != digest_of(load(text.replace(old, new)))


def test_what_ran_is_not_taken_for_what_the_file_says_by_now(load: Callable[[str], Any]) -> None:
    before = load(PLAIN)
    digest = digest_of(before)
    now = PLAIN.replace("true", "false")

    Path(before.__file__).write_text(now)
    linecache.checkcache()
    of_both = digest_of(before)

    assert of_both not in (digest, digest_of(load(now)))


def test_sets_count_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "some_tests.py").write_text("def setup(vm): return vm in {'a', 'b', 'c', 'd'}\n")
    program = (
        "import some_tests\n"
        "from pytest_vmsandbox.machine.templates.setup_digest import digest_setup\n"
        "print(digest_setup(some_tests.setup))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }

    assert len(digests) == 1


def test_own_code_called_as_a_module_of_python_is_own(load: Callable[[str], Any]) -> None:
    """Whose code it is is told by its file: `test` and `code` are modules of Python's too."""

    def digest(text: str) -> str:
        module = load(text)
        module.setup.__module__ = "test.support"
        return digest_of(module)

    assert digest(PLAIN) != digest(PLAIN.replace("true", "false"))


def test_code_among_installed_packages_counts_by_its_file(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    (tmp_path / "site-packages").mkdir()
    installed = tmp_path / "site-packages" / "some_package.py"
    installed.write_text("def f(): return 'a'\n")
    monkeypatch.delitem(sys.modules, "some_package", raising=False)
    module = load("from some_package import f\ndef setup(vm): f()\n")
    before = digest_of(module)

    installed.write_text("def f(): return 'b'\n")

    assert digest_of(module) != before
    del sys.modules["some_package"]


def test_a_list_that_holds_itself_comes_to_an_end() -> None:
    around: list[object] = [1]
    around.append({"in": around})

    def setup(vm: object) -> object:
        return around

    assert digest_setup(setup) == digest_setup(setup)


def test_what_it_does_not_use_is_nothing_to_it(load: Callable[[str], Any]) -> None:
    text = "X = 1\nY = open\nrun = object()\ndef setup(vm): vm.run(X)\n"

    assert digest_of(load(text)) == digest_of(load(text.replace("Y = open", "Y = print")))


def test_functions_that_call_each_other_come_to_an_end(load: Callable[[str], Any]) -> None:
    text = "def f(): g()\ndef g(): f()\ndef setup(vm): f(); setup\n"

    assert digest_of(load(text)) == digest_of(load(text))


class Colour(Enum):
    RED = "red"


def test_other_peoples_code_counts_by_its_name() -> None:
    def with_path(vm: object) -> object:
        return Path.home, pytest.raises, functools.reduce, len, Colour.RED, print

    assert digest_setup(with_path, key=None)


def test_a_template_it_closes_over_counts_by_its_digest() -> None:
    def digest_with(name: str) -> str:
        recipe = Recipe(parts={"name": name})
        template = Template(name=name, recipe=recipe, root="", spec=MachineSpec())

        def setup(vm: object) -> object:
            return template

        return digest_setup(setup, key=None)

    assert digest_with("a") == digest_with("a") != digest_with("b")


def test_where_an_input_lies_is_nothing_to_it() -> None:
    def digest_with(path: Path | str, *, inputs: list[Path]) -> str:
        def setup(vm: object) -> object:
            return path

        return digest_setup(setup, inputs=inputs, key=None)

    one, other = Path("/one/site"), Path("/other/site")

    assert digest_with(one, inputs=[one]) == digest_with(other, inputs=[other])
    assert digest_with(str(one), inputs=[one]) == digest_with(one, inputs=[one])
    assert digest_with(one, inputs=[]) != digest_with(other, inputs=[])


LOG = logging.getLogger(__name__)


def test_what_can_not_be_told_is_named_and_a_key_stands_for_it() -> None:
    def setup(vm: object) -> object:
        return LOG

    with pytest.raises(RequestInvalid, match=r"LOG, a Logger, is used.*\n.*key="):
        digest_setup(setup, key=None)

    assert digest_setup(setup, key="a") != digest_setup(setup, key="b")


def test_a_function_without_source_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Python 3.13 knows of itself when it was started with -c, as the workers of xdist are.
    started_with = ["import sys\n"]
    monkeypatch.setitem(linecache.cache, "<string>", (11, None, started_with, "<string>"))
    names: dict[str, Any] = {"__name__": "typed_in"}
    exec("def setup(vm): pass", names)

    with pytest.raises(RequestInvalid, match="setup, without source"):
        digest_setup(names["setup"], key=None)
    assert digest_setup(names["setup"], key="") == digest_setup(names["setup"], key="")


# Inputs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").write_text("content")
    (root / "link").symlink_to("sub/file")
    return root


def test_a_tree_that_was_copied_is_the_same_input(tree: Path, tmp_path: Path) -> None:
    before = digest_inputs([tree])
    (tmp_path / "elsewhere").mkdir()

    moved = tree.rename(tmp_path / "elsewhere" / "tree")
    (moved / "sub" / "file").touch()

    assert digest_inputs([moved]) == digest_inputs([str(moved)]) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "sub" / "file").write_text("Content"),
        lambda root: (root / "sub" / "file").chmod(0o755),
        lambda root: (root / "sub" / "file").rename(root / "file"),
        lambda root: (root / "new").mkdir(),
        lambda root: (root / "link").unlink(),
        lambda root: ((root / "link").unlink(), (root / "link").symlink_to("sub")),
        lambda root: (root / "sub").chmod(0o700),
    ],
)
def test_each_change_in_a_tree_makes_it_another_input(
    tree: Path, change: Callable[[Path], object]
) -> None:
    before = digest_inputs([tree])

    change(tree)

    assert digest_inputs([tree]) != before


def test_two_files_are_not_one_that_holds_both(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("xy")
    (tmp_path / "b").write_text("")
    both = digest_inputs([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")

    assert digest_inputs([tmp_path / "a", tmp_path / "b"]) != both


def test_an_input_that_is_a_link_counts_by_what_it_points_to(tree: Path) -> None:
    before = digest_inputs([tree / "link"])
    (tree / "sub" / "file").write_text("Content")

    assert digest_inputs([tree / "link"]) != before


@pytest.mark.parametrize("wanted", ["path", Path("path"), [3], [None], [b"path"]])
def test_what_is_no_list_of_paths_is_refused(wanted: Any) -> None:
    with pytest.raises(RequestInvalid, match="must be a list of paths"):
        digest_inputs(wanted)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/dev/null"])
def test_an_input_that_can_not_be_read_is_named(path: str) -> None:
    with pytest.raises(RequestInvalid, match=path):
        digest_inputs([path])
