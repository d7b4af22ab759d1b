"""What README.md and docs/ show is run, and what they must name is named."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from platformdirs import user_cache_path

import pytest_vmsandbox
from pytest_vmsandbox import AsyncMachine, Capability, Machine
from pytest_vmsandbox.cli import COMMANDS
from pytest_vmsandbox.host.facts import Tier, Verdict, code_of
from pytest_vmsandbox.machine.async_process import AsyncProcess
from pytest_vmsandbox.machine.machine import MachineConsole
from pytest_vmsandbox.machine.process import Process
from pytest_vmsandbox.machine.templates.cache import TemplateCache
from pytest_vmsandbox.plugin.hooks import FIXTURES
from pytest_vmsandbox.plugin.markers import EXPECTATIONS, MARKERS
from pytest_vmsandbox.plugin.options import OPTIONS
from tests.machine.templates.handmade import frozen_by_hand, publish

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("**/*.md"))]

# Found before pytester gives each run a home of its own: images are built once.
CACHE = os.environ.get("VMSANDBOX_CACHE_DIR") or str(user_cache_path("vmsandbox"))

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"VMS(?:-[A-Z]+)+")
_CODES_OF_CAPABILITIES = {code_of(name, verdict) for name in Capability for verdict in Verdict}
_BEGINNINGS_OF_CAPABILITIES = {code_of(name, Verdict.OK).removesuffix("-OK") for name in Capability}
_STATUS = re.compile(r"# exits with (\d+)$")

# These would change the host, remove something, or want a terminal.
_NOT_RUN = (["vmsandbox", "shell"], ["vmsandbox", "setup"], ["vmsandbox", "image", "rm"])
_BOOTING = (["vmsandbox", "run"], ["vmsandbox", "image", "build"])
_OTHERS = {"pip", "make", "apt-get", "git", "sudo"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a document, and the line where it begins."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def has_tests(self) -> bool:
        """Whether it is a test file."""
        return re.search(r"^\s*(async )?def test_", self.text, re.MULTILINE) is not None

    def __str__(self) -> str:
        return f"{self.document.relative_to(CHECKOUT)}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A command of a console block: how it must exit, and what it must print."""

    argv: list[str]
    status: int
    output: list[str]


def _blocks(document: Path, *languages: str) -> list[Block]:
    text = document.read_text()
    return [
        Block(
            document=document,
            line=text.count("\n", 0, found.start()) + 1,
            language=found["language"],
            text=found["text"],
        )
        for found in _FENCE.finditer(text)
        if found["language"] in languages
    ]


def _all_blocks(*languages: str) -> list[Block]:
    return [block for document in DOCUMENTS for block in _blocks(document, *languages)]


def _commands(block: Block) -> Iterator[Shown]:
    """The commands of a console block, each with the lines that follow it."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, *output = part.splitlines()
        status = _STATUS.search(line)
        yield Shown(
            argv=shlex.split(line, comments=True),
            status=int(status[1]) if status else 0,
            output=output,
        )


def _is_any_of(shown: Shown, beginnings: tuple[list[str], ...]) -> bool:
    return any(shown.argv[: len(words)] == words for words in beginnings)


def _ours(*, booting: bool) -> list[pytest.param]:  # type: ignore[valid-type]  # it is a function to mypy
    return [
        pytest.param(shown, id=shlex.join(shown.argv))
        for block in _all_blocks("console")
        for shown in _commands(block)
        if shown.argv[0] == "vmsandbox"
        and (not _is_any_of(shown, _NOT_RUN) or "--dry-run" in shown.argv)
        and _is_any_of(shown, _BOOTING) is booting
    ]


def _run(shown: Shown, **environment: str) -> None:
    program = "import sys; from pytest_vmsandbox.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *shown.argv[1:]],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == shown.status, done.stderr
    printed = done.stdout.splitlines()
    for line in shown.output:
        assert any(fnmatchcase(seen, line) for seen in printed), (line, printed)


def _named(document: str) -> str:
    return (CHECKOUT / "docs" / document).read_text()


def _public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


# What is shown is run


@pytest.mark.machine
@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if any(block.has_tests for block in _blocks(d, "python"))],
    ids=lambda document: document.name,
)
def test_the_tests_that_a_document_shows_pass(
    document: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMSANDBOX_CACHE_DIR", CACHE)
    blocks = [block for block in _blocks(document, "python") if block.has_tests]
    for block in blocks:
        pytester.path.joinpath(f"test_line_{block.line}.py").write_text(block.text)
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "addopts = --strict-markers\nfilterwarnings = error\n"
    )

    result = pytester.runpytest_subprocess("-n2", "-p", "no:cacheprovider", timeout=280)

    result.assert_outcomes(
        passed=result.parseoutcomes()["passed"], skipped=result.parseoutcomes().get("skipped", 0)
    )
    assert result.parseoutcomes()["passed"] >= len(blocks)


@pytest.mark.parametrize("block", _all_blocks("python"), ids=str)
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a template: the user's may be large, and others change it meanwhile."""
    directory = tmp_path_factory.mktemp("cache")
    publish(TemplateCache(directory), frozen_by_hand(1)).close()
    return directory


def _may_change_the_host() -> bool:
    if os.getuid() == 0:
        return True
    asked = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False, timeout=60)
    return asked.returncode == 0


@pytest.mark.parametrize("shown", _ours(booting=False))
def test_a_command_that_is_shown_does_what_is_shown(shown: Shown, templates: Path) -> None:
    if shown.argv[:2] == ["vmsandbox", "setup"] and not _may_change_the_host():
        pytest.skip("takes root, or sudo: it says what either would do")
    about_templates = shown.argv[:2] == ["vmsandbox", "cache"]
    _run(shown, **({"VMSANDBOX_CACHE_DIR": str(templates)} if about_templates else {}))


@pytest.mark.machine
@pytest.mark.parametrize("shown", _ours(booting=True))
def test_a_command_that_boots_does_what_is_shown(shown: Shown) -> None:
    _run(shown)


def test_every_pytest_command_that_is_shown_has_options_that_exist(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("def test_it(): pass")
    shown = [s for b in _all_blocks("console") for s in _commands(b) if s.argv[0] == "pytest"]
    assert shown

    for command in shown:
        result = pytester.runpytest_subprocess(*command.argv[1:], "-p", "no:cacheprovider")
        result.assert_outcomes(passed=1)


def test_every_command_that_is_shown_is_known_here() -> None:
    for block in _all_blocks("console"):
        for shown in _commands(block):
            assert shown.argv[0] in {"vmsandbox", "pytest", *_OTHERS}, str(block)


@pytest.mark.parametrize("block", _all_blocks("json"), ids=str)
def test_every_json_block_parses(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", _all_blocks("ini"), ids=str)
def test_every_ini_block_is_taken_by_pytest(block: Block, pytester: pytest.Pytester) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(block.text)
    assert parser.sections() == ["pytest"]
    pytester.makeini(block.text)
    pytester.makepyfile("def test_it(): pass")

    result = pytester.runpytest_subprocess("--strict-config", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=1)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_within_the_project_leads_somewhere(document: Path) -> None:
    for found in _LINK.finditer(document.read_text()):
        target = found["target"].partition("#")[0]
        if target and "://" not in target:
            assert (document.parent / target).exists(), target


# What must be named is named


@pytest.mark.parametrize("option", [*(option.flag for option in OPTIONS), "--vm-reprobe"])
def test_every_option_is_in_the_users_guide(option: str) -> None:
    assert f"| `{option}` |" in _named("usage.md")


@pytest.mark.parametrize("fixture", sorted(FIXTURES | {"vm_image"}))
def test_every_fixture_is_in_the_users_guide(fixture: str) -> None:
    assert f"| `{fixture}` |" in _named("usage.md")


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_and_its_arguments_are_in_the_users_guide(marker: str) -> None:
    guide = _named("usage.md")
    name, _, rest = marker.partition("(")

    assert f"**`{name}(" in guide
    for argument in re.findall(r"(\w+)=", rest):
        assert f"| `{argument}` |" in guide
    for end in EXPECTATIONS:
        assert f'`"{end}"`' in guide


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_is_in_the_users_guide(command: str) -> None:
    assert f"| `vmsandbox {command}` |" in _named("usage.md")


@pytest.mark.parametrize("name", pytest_vmsandbox.__all__)
def test_every_public_name_is_in_the_users_guide(name: str) -> None:
    assert re.search(rf"\b{name}\b", _named("usage.md"))


@pytest.mark.parametrize("kind", [Machine, AsyncMachine, MachineConsole, Process, AsyncProcess])
def test_every_verb_is_in_the_users_guide(kind: type) -> None:
    guide = (
        _named("usage.md")
        .replace("`read_*`", "read_text read_bytes")
        .replace("`write_*`", "write_text write_bytes")
    )

    assert [name for name in sorted(_public(kind)) if not re.search(rf"\b{name}\b", guide)] == []


def test_every_code_in_the_source_is_explained() -> None:
    documents = _named("hosts.md") + _named("images.md") + _named("usage.md")
    in_source = {
        code
        for path in (CHECKOUT / "pytest_vmsandbox").glob("**/*.py")
        for code in _CODE.findall(path.read_text())
    }
    assert in_source

    assert {c for c in in_source - _CODES_OF_CAPABILITIES if f"`{c}" not in documents} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_code_in_a_document_can_be_met(document: Path) -> None:
    known = _CODES_OF_CAPABILITIES | _codes_in("pytest_vmsandbox") | _codes_in("tests", "VMS-TEST")
    shown = set(re.findall(r"VMS(?:-[A-Z]+)+-?", document.read_text()))
    families = {code for code in shown if code.endswith("-")}  # VMS-TIER-...

    assert {f for f in families if not any(code.startswith(f) for code in known)} == set()
    assert shown - families - known - _BEGINNINGS_OF_CAPABILITIES == set()


def _codes_in(folder: str, beginning: str = "VMS") -> set[str]:
    """The codes that sources have, with those that they make of a tier's name."""
    found: set[str] = set()
    for path in (CHECKOUT / folder).glob("**/*.py"):
        text = path.read_text()
        for family in re.findall(r"(VMS(?:-[A-Z]+)+-)\{[\w.]*tier\.upper\(\)\}", text):
            found |= {f"{family}{tier.upper()}" for tier in Tier}
        found |= set(re.findall(rf"{_CODE.pattern}(?![-A-Z{{])", text))
    return {code for code in found if code.startswith(beginning)}


@pytest.mark.parametrize("capability", Capability)
def test_the_code_of_every_capability_is_explained(capability: Capability) -> None:
    beginning = code_of(capability, Verdict.OK).removesuffix("-OK")

    assert re.search(rf"^\| `{capability}` \|.*`{beginning}` \|$", _named("hosts.md"), re.MULTILINE)


@pytest.mark.parametrize("verdict", Verdict)
def test_every_ending_of_a_code_is_explained(verdict: Verdict) -> None:
    assert f"| `-{verdict.upper()}` |" in _named("hosts.md")


# The command's own words


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([name] for name in COMMANDS),
        *(["image", action] for action in ("build", "list", "verify", "rm")),
    ],
    ids=" ".join,
)
def test_every_subcommand_explains_itself(words: list[str]) -> None:
    _run(Shown(argv=["vmsandbox", *words, "--help"], status=0, output=["usage: vmsandbox*"]))


def test_a_subcommand_that_is_not_there_is_a_wrong_usage() -> None:
    _run(Shown(argv=["vmsandbox", "nope"], status=2, output=[]))
