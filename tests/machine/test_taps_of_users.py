"""Taps of an ordinary user, on a host whose device for them everybody may open."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.image.cache import ensure_image
from pytest_vmsandbox.image.progress import SilentProgress
from pytest_vmsandbox.linux.tun import DEVICE
from tests.people import CHECKOUT, require_root_and_sudo
from tests.tiers.lodging import Lodging, open_lodging

pytestmark = pytest.mark.machine

INNER = """
def test_networks_are_of_taps(vm_factory, vm_network):
    one, two = vm_factory(count=2, network="lan")
    ping = ["ping", "-c", "1", "-W", "5", two.ip]
    assert one.facts.tier == "{tier}"
    assert one.facts.wires == "tap"
    assert one.run(ping).returncode == 0
    vm_network.loss(1.0)
    assert one.run(["ping", "-c", "1", "-W", "1", two.ip]).returncode != 0
    vm_network.heal()
    assert one.run(ping).returncode == 0
    two.popen("nc -ll -p 7 -e cat")
    two.wait_for_port(7)
    with two.connect(7) as sock:
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
"""

# In a mount namespace of its own: no other process of this host sees that device.
OPENED = f"""
set -e
mount -t tmpfs tmpfs "$1"
mknod "$1/tun" c 10 200
chmod "$2" "$1/tun"
mount --bind "$1/tun" {DEVICE}
shift 2
exec "$@"
"""


@pytest.fixture(params=["userns", "qemu-vm"])
def lodging(request: pytest.FixtureRequest) -> Iterator[Lodging]:
    require_root_and_sudo()
    if not Path(DEVICE).is_char_device():
        pytest.skip(f"there is no {DEVICE}")
    given = os.environ.get("VMSANDBOX_CACHE_DIR")
    cache = Path(given) if given else user_cache_path("vmsandbox")
    agent = agent_binary(architecture=platform.machine(), cache_dir=cache)
    image = ensure_image("mini", cache_dir=cache, agent=agent, progress=SilentProgress())
    with open_lodging(request.param, image=image, agents=[agent]) as lodging:
        yield lodging
    assert not lodging.left


@pytest.mark.parametrize(("mode", "said"), [("0666", "1 passed"), ("0600", "VMS-TAP-DENIED")])
def test_an_ordinary_user_has_taps_where_the_device_lets_him(
    lodging: Lodging, mode: str, said: str
) -> None:
    place = lodging.place / "tests"
    place.mkdir()
    (place / "test_inner.py").write_text(INNER.format(tier=lodging.tier))
    (place / "pytest.ini").write_text("[pytest]\n")
    (lodging.place / "dev").mkdir()
    for made in (place, *place.iterdir(), lodging.place / "dev"):
        shutil.chown(made, lodging.user)  # who removes it
    inner = lodging.argv(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rsfE", place),
        *(f"--vm-tier={lodging.tier}", "--vm-wires=tap"),
    )

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", OPENED, "sh", lodging.place / "dev", mode, *inner],
        cwd=place,
        env={**lodging.environment(), "PYTHONPATH": str(CHECKOUT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )

    assert said in done.stdout, done.stdout
    assert "failed" not in done.stdout
