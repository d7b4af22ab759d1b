"""`vmsandbox doctor`: what this host can do, how that was seen, and what would change it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence

from platformdirs import user_cache_path

from pytest_vmsandbox.host.facts import Capability, Fact, HostFacts, Tier, Verdict
from pytest_vmsandbox.host.survey import probe_host
from pytest_vmsandbox.host.tier import STANDS_ON, missing_for
from pytest_vmsandbox.lease.run_directory import default_base

# In the words of the environment: what `--vm-require` would take.
_REQUIRE = "VMSANDBOX_REQUIRE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmsandbox doctor`."""
    parser.add_argument("--json", action="store_true", help="machine-readable; docs/hosts.md")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 when something required is missing"
    )
    parser.add_argument(
        "--require",
        type=parse_capabilities,
        default=os.environ.get(_REQUIRE, ""),
        metavar="CAP[,CAP]",
        help=f"what --strict requires (default: {_REQUIRE}; without both, everything)",
    )


def parse_capabilities(text: str) -> tuple[Capability, ...]:
    """The capabilities in a comma list; an unknown one is an error that names them all."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = set(words) - set(Capability)
    if unknown:
        known = ", ".join(Capability)
        raise argparse.ArgumentTypeError(f"no capability {', '.join(sorted(unknown))} in: {known}")
    return tuple(map(Capability, words))


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 where `--strict` finds something missing. Always tries anew, and remembers it."""
    facts = asyncio.run(
        probe_host(cache_dir=user_cache_path("vmsandbox"), run_dir=default_base(), reprobe=True)
    )
    text = json.dumps(to_report(facts), indent=1) if arguments.json else render(facts)
    sys.stdout.write(f"{text}\n")
    required: Sequence[Capability] = arguments.require or tuple(Capability)
    lacking = [capability for capability in required if not facts[capability].present]
    return 1 if arguments.strict and lacking else 0


def to_report(facts: HostFacts) -> dict[str, object]:
    """What `--json` prints: the facts' own form, and what would unlock the next tier."""
    tier = next_tier(facts)
    blocked = None if tier is None else [fact.code for fact in missing_for(tier, facts.facts)]
    return {**facts.to_json(), "next_tier": tier, "next_tier_needs": blocked}


def next_tier(facts: HostFacts) -> Tier | None:
    """The nearest tier better than ours that something on this host keeps us out of."""
    order = list(Tier)
    better = reversed(order[1 : order.index(facts.tier)])  # nobody becomes root by a remedy
    return next((tier for tier in better if missing_for(tier, facts.facts)), None)


def render(facts: HostFacts) -> str:
    """The report for a reader."""
    lines = [
        f"tier   {facts.tier}: {facts.tier_reason}",
        f"accel  {facts.accel}: {facts.accel_reason}",
        f"speed  deadlines are multiplied by {facts.time_scale:g}",
        "",
        *(line for capability in Capability for line in _render_fact(facts[capability])),
    ]
    tier = next_tier(facts)
    if tier is not None:
        needed = "; ".join(f"{fact.remedy}" for fact in missing_for(tier, facts.facts))
        lines += ["", f"to unlock the tier {tier}: {needed}"]
    return "\n".join(lines)


def _render_fact(fact: Fact) -> list[str]:
    state = "ok" if fact.present else "no"
    if fact.verdict is Verdict.UNCONFIRMED:
        state = "ok?"
    tiers = [tier.value for tier, needed in STANDS_ON.items() if fact.capability in needed]
    unlocks = f"  (for tier {', '.join(tiers)})" if tiers else ""
    lines = [f"{state:<4}{fact.capability:<17}{fact.evidence}{unlocks}"]
    if not fact.present:
        lines += [f"{'':21}{fact.code}", f"{'':21}try: {fact.remedy}"]
    return lines
