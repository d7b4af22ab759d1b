"""A coverage plugin: lines that need what this host lacks are not demanded.

A line, or a block's first line, that ends in `# needs kvm` is left out of the measure where the
probes find no usable KVM; likewise for every other capability. The facts are the very ones that
skip the tests of such lines, so a test can't skip while coverage still demands its lines.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from coverage import CoveragePlugin
from coverage.types import TConfigurable
from platformdirs import user_cache_path

from pytest_vmsandbox.host.facts import Capability
from pytest_vmsandbox.host.survey import probe_host


class UnreachableLines(CoveragePlugin):
    """Excludes what can't be reached here."""

    def configure(self, config: TConfigurable) -> None:
        """Part of coverage's interface."""
        cache = os.environ.get("VMSANDBOX_CACHE_DIR")
        with tempfile.TemporaryDirectory(prefix="vmsb-") as run_dir:
            facts = asyncio.run(
                probe_host(
                    cache_dir=Path(cache) if cache else user_cache_path("vmsandbox"),
                    run_dir=Path(run_dir),
                )
            )
        lacking = [capability for capability in Capability if not facts[capability].present]
        known = config.get_option("report:exclude_lines")
        assert isinstance(known, list)
        config.set_option(
            "report:exclude_lines", [*known, *(rf"# needs {name}\b" for name in lacking)]
        )


def coverage_init(reg: Any, options: Any) -> None:
    """Part of coverage's interface."""
    reg.add_configurer(UnreachableLines())
