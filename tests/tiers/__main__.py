"""Run the suite in each tier, as the user that has it:  python -m tests.tiers [TIER...]

For each tier a user of its kind is made, with a home and a cache; the suite of this checkout runs
as that user; then everything is removed, after Ctrl-C as well. Takes root. By default the tier
`userns` runs the whole suite, the others what depends on the tier (docs/testing.md); `--whole`
runs all of it in all of them. What follows `--` is pytest's.

The exit status is 0 when nothing failed, nothing was left behind, and no test that needs a machine
was skipped for want of one.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.image.cache import ensure_image
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.image.progress import SilentProgress
from pytest_vmsandbox.linux import prctl_set_child_subreaper
from tests.people import CHECKOUT
from tests.tiers.lodging import Lodging, open_lodging
from tests.tiers.outcomes import Outcomes
from tests.tiers.survivors import end_survivors

# Once as an ordinary user everything is run; as root `make test` does that.
WHOLE = frozenset({Tier.USERNS})

_PYTEST = ("-p", "tests.tiers.outcomes", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short")
_INTERRUPTED_S = 60.0
_GRACE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    tier: Tier
    outcomes: Outcomes
    status: int
    left: Sequence[str]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing failed, nothing was left, and nothing skipped that needs a machine."""
        complaints = (*self.outcomes.failed, *self.outcomes.skipped_machines, *self.left)
        return self.status == 0 and not complaints


def main(words: Sequence[str]) -> int:
    """Run what is asked for; the exit status."""
    asked = _parse(words)
    if os.getuid() != 0:
        sys.stderr.write("it takes root: a user is made for each tier\n")
        return 2
    # SIGINT as well: a shell's `&` has it ignored, and so would be Ctrl-C in the tests.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # What outlives its pytest becomes our child, whoever it runs as.
    prctl_set_child_subreaper(enabled=True)
    image, agent = _prepare()
    rows = []
    try:
        for tier in asked.tiers or tuple(Tier):
            row = _run(Tier(tier), asked, image=image, agent=agent)
            rows.append(row)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was made is removed\n")
        return 130
    finally:
        sys.stdout.write(_table(rows))
    return 0 if all(row.good for row in rows) else 1


def _parse(words: Sequence[str]) -> argparse.Namespace:
    ours, _, theirs = _split(words)
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description=__doc__)
    parser.add_argument("tiers", nargs="*", choices=[*Tier, []], metavar="TIER")
    parser.add_argument("--whole", action="store_true", help="the whole suite in every tier")
    parser.add_argument("--jobs", type=int, default=2, help="xdist workers (2)")
    asked = parser.parse_args(ours)
    asked.pytest = theirs
    return asked


def _split(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    at = list(words).index("--") if "--" in words else len(words)
    return list(words[:at]), "--", list(words[at + 1 :])


def _prepare() -> tuple[Image, Path]:
    """The image and its agent, from our own cache: built at most once."""
    given = os.environ.get("VMSANDBOX_CACHE_DIR")
    cache = Path(given) if given else user_cache_path("vmsandbox")
    agent = agent_binary(architecture=platform.machine(), cache_dir=cache)
    return ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress()), agent


def _run(tier: Tier, asked: argparse.Namespace, *, image: Image, agent: Path) -> Row:
    began = time.monotonic()
    with open_lodging(tier, image=image, agents=[agent]) as lodging:
        outcomes = lodging.place / "tmp" / "outcomes.json"
        argv = lodging.argv(
            *(sys.executable, "-m", "pytest", *_PYTEST),
            *("-n", str(asked.jobs), "--dist", "worksteal", f"--outcomes={outcomes}"),
            f"--basetemp={lodging.place / 'tmp' / 'pytest'}",
            *(() if asked.whole or tier in WHOLE else ("--walls-only",)),
            *asked.pytest,
        )
        sys.stdout.write(f"== tier {tier}, as {lodging.user}: {shlex.join(argv)}\n")
        sys.stdout.flush()
        status = _call(argv, lodging)
        seen = Outcomes.read(outcomes)
    return Row(
        tier=tier,
        outcomes=seen,
        status=status,
        left=lodging.left,
        seconds=time.monotonic() - began,
    )


def _call(argv: Sequence[str], lodging: Lodging) -> int:
    """Run pytest to its end; when we are interrupted, so is it, and then it is waited for."""
    process = subprocess.Popen(
        argv, cwd=CHECKOUT, env=lodging.environment(), stdin=subprocess.DEVNULL
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        raise
    finally:
        try:
            process.wait(_INTERRUPTED_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        lodging.left.extend(end_survivors(grace_s=_GRACE_S))


def _table(rows: Sequence[Row]) -> str:
    lines = ["", f"{'tier':8} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>7}"]
    for row in rows:
        seen = row.outcomes
        lines.append(
            f"{row.tier:8} {seen.passed:6} {len(seen.failed):6} "
            f"{sum(seen.skipped.values()):7} {row.seconds:7.0f}  {'' if row.good else 'NOT GOOD'}"
        )
        lines += [f"    {count:4} skipped: {reason}" for reason, count in seen.skipped.items()]
        lines += [f"    FAILED {name}" for name in seen.failed]
        lines += [f"    SKIPPED, though it needs a machine: {n}" for n in seen.skipped_machines]
        lines += [f"    LEFT BEHIND {left}" for left in row.left]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
