"""What makes a setup another one, and what does not."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox import RequestInvalid, Template
from pytest_vmsandbox.machine.input_digest import digest_inputs
from pytest_vmsandbox.machine.setup_digest import digest_setup
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.template import Recipe


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
        monkeypatch.setitem(__import__("sys").modules, "some_tests", module)
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


def test_a_function_without_source_needs_a_key() -> None:
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


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/dev/null"])
def test_an_input_that_can_not_be_read_is_named(path: str) -> None:
    with pytest.raises(RequestInvalid, match=path):
        digest_inputs([path])
