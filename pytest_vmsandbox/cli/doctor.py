"""`vmsandbox doctor`: what this host can do, how that was seen, and what would change it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_vmsandbox.cli.arguments import add_cache_argument, cache_of
from pytest_vmsandbox.cli.exit_status import USAGE
from pytest_vmsandbox.host.facts import Capability, Fact, HostFacts, Tier, Verdict
from pytest_vmsandbox.host.firewall import Note, look_at_firewall
from pytest_vmsandbox.host.survey import keep_kernels_word, probe_host, recall_host, settle_kvm
from pytest_vmsandbox.host.tier import STANDS_ON, missing_for
from pytest_vmsandbox.host.trial import start_trial
from pytest_vmsandbox.image.cache import list_images
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.lease.bases import default_base

# What any machine takes; the rest is asked for, or is not missed.
ALWAYS_ASKED_FOR = (Capability.QEMU, Capability.IMAGE_BUILDER)

# In the words of the environment: what `--vm-require` would take.
_REQUIRE = "VMSANDBOX_REQUIRE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmsandbox doctor`."""
    add_cache_argument(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable; docs/hosts.md")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit 1 when something asked for is missing, or is kvm and no kernel was tried yet",
    )
    parser.add_argument(
        "--require",
        type=parse_capabilities,
        metavar="CAP[,CAP]",
        help=f"what is asked for; nothing, if empty (default: the environment's {_REQUIRE}; "
        f"where that is not set, {' and '.join(ALWAYS_ASKED_FOR)}, which any machine takes)",
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
    """0, or 1 where `--strict` finds something missing. Always tries anew, and remembers it.

    2, without a look, where `--strict` can't read what the environment asks for.
    """
    try:
        asked_for = _asked_for(arguments) if arguments.strict else ()
    except argparse.ArgumentTypeError as error:
        sys.stderr.write(f"vmsandbox doctor: {_REQUIRE} in the environment: {error}\n")
        return USAGE
    facts = asyncio.run(examine(cache_dir=cache_of(arguments), run_dir=default_base()))
    notes = asyncio.run(look_at_firewall(start_trial(run_dir=default_base())))
    text = json.dumps(to_report(facts, notes), indent=1) if arguments.json else render(facts, notes)
    sys.stdout.write(f"{text}\n")
    lacking = [name for name in asked_for if not facts[name].present or _is_open(facts[name])]
    if lacking:
        sys.stderr.write(f"vmsandbox doctor: asked for and missing: {', '.join(lacking)}\n")
    return 1 if lacking else 0


async def examine(*, cache_dir: Path, run_dir: Path) -> HostFacts:
    """The facts, tried anew, and KVM with the kernel of an image where the cache has one.

    Where it has none, what a kernel said before still holds.
    """
    former = recall_host(cache_dir=cache_dir, run_dir=run_dir)
    facts = await probe_host(cache_dir=cache_dir, run_dir=run_dir, reprobe=True)
    image = _image_to_try(cache_dir)
    if image is None:
        return keep_kernels_word(facts, former, cache_dir=cache_dir, run_dir=run_dir)
    return await settle_kvm(
        facts,
        cache_dir=cache_dir,
        run_dir=run_dir,
        kernel=image.kernel,
        initramfs=image.initramfs,
        command_line=" ".join(image.command_line),
    )


def _image_to_try(cache_dir: Path) -> Image | None:
    """Any image for this processor."""
    ours = (i for i in list_images(cache_dir) if i.architecture == platform.machine())
    return next(ours, None)


def _asked_for(arguments: argparse.Namespace) -> Sequence[Capability]:
    if arguments.require is not None:
        asked_for: Sequence[Capability] = arguments.require
        return asked_for
    named = os.environ.get(_REQUIRE)
    return ALWAYS_ASKED_FOR if named is None else parse_capabilities(named)


def _is_open(fact: Fact) -> bool:
    return fact.verdict is Verdict.UNCONFIRMED


def to_report(facts: HostFacts, notes: Sequence[Note] = ()) -> dict[str, object]:
    """What `--json` prints: the facts' own form, what would unlock the next tier, and notes."""
    tier = next_tier(facts)
    blocked = None if tier is None else [fact.code for fact in missing_for(tier, facts.facts)]
    noted = [note.to_json() for note in notes]
    return {**facts.to_json(), "next_tier": tier, "next_tier_needs": blocked, "notes": noted}


def next_tier(facts: HostFacts) -> Tier | None:
    """The nearest tier better than ours that something on this host keeps us out of."""
    order = list(Tier)
    better = reversed(order[1 : order.index(facts.tier)])  # nobody becomes root by a remedy
    return next((tier for tier in better if missing_for(tier, facts.facts)), None)


def render(facts: HostFacts, notes: Sequence[Note] = ()) -> str:
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
    for note in notes:
        lines += ["", f"note {note.name}: {note.value} ({note.evidence})", f"     {note.matters}"]
    return "\n".join(lines)


def _render_fact(fact: Fact) -> list[str]:
    state = "ok" if fact.present else "no"
    if _is_open(fact):
        state = "ok?"
    tiers = [tier.value for tier, needed in STANDS_ON.items() if fact.capability in needed]
    unlocks = f"  (for tier {', '.join(tiers)})" if tiers else ""
    lines = [f"{state:<4}{fact.capability:<17}{fact.evidence}{unlocks}"]
    if not fact.present:
        lines += [f"{'':21}{fact.code}", f"{'':21}try: {fact.remedy}"]
    return lines
