"""The mutation check itself, on a module of a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("mutate.py")

MODULE = '''"""Not this text."""

from __future__ import annotations

import logging
from typing import TypeAlias

Number: TypeAlias = "int | float"

logger = logging.getLogger(__name__)

LIMIT: "int" = 3
UNUSED: "bool | None" = True


def is_below(value: "int | None" = None) -> "bool | None":
    """Nor this one."""
    logger.debug("nor what is logged: %s", 1 + 1)
    return value < LIMIT
'''

TESTS = """
from tests.limits import is_below

def test_three_is_where_it_ends():
    assert is_below(2)
    assert not is_below(3)
"""


def test_what_survives_is_listed_and_the_checkout_stays_as_it_is(tmp_path: Path) -> None:
    checkout, temporary = tmp_path / "checkout", tmp_path / "temporary"
    (checkout / "tests/repository").mkdir(parents=True)
    temporary.mkdir()
    shutil.copy(SCRIPT, checkout / "tests/repository")
    module = checkout / "tests/limits.py"
    module.write_text(MODULE)
    (checkout / "tests/test_limits.py").write_text(TESTS)
    before = _state(checkout)

    done = subprocess.run(
        [
            *(sys.executable, "-B", checkout / "tests/repository/mutate.py", "tests/limits.py"),
            *("tests/test_limits.py", "--jobs", "1", "--", "-k", "three or four"),
        ],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    *tried, summary, survivor = done.stdout.splitlines()[1:]
    assert tried == [
        "1/3 noticed line 12: 3  ->  4",
        "2/3 SURVIVED line 13: True  ->  False",
        "3/3 noticed line 19: value < LIMIT  ->  value <= LIMIT",
    ]
    assert summary == "tests/limits.py: 66.7 % of 3 mutants noticed; survivors:"
    assert survivor == "  line 13: True  ->  False"
    assert done.returncode == 1
    assert _state(checkout) == before
    assert list(temporary.iterdir()) == []


def test_without_tests_that_notice_nothing_is_tried() -> None:
    done = subprocess.run(
        [sys.executable, "-B", SCRIPT, "pytest_vmsandbox/errors.py"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert "which tests are to notice changes of pytest_vmsandbox/errors.py?" in done.stderr


def _state(checkout: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in checkout.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
