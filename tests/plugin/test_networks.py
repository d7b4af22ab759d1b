"""Networks in runs of pytest: what a test does to them ends with it, and no run sees another."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

pytestmark = pytest.mark.machine


def test_what_a_test_did_to_a_network_is_over_with_it(
    run_pytest: Run, pytester: pytest.Pytester
) -> None:
    source = """
        import pytest
        pytestmark = pytest.mark.vm(network="lan")

        def test_one(vm_module, vm, vm_network):
            vm_network.loss(1.0)
            vm_network.capture()
            assert vm.run(["ping", "-c", "1", "-W", "1", vm_module.ip]).returncode != 0

        def test_two(vm_module, vm):
            vm.wait_until(["ping", "-c", "1", "-W", "1", vm_module.ip])
    """
    run_pytest(source).assert_outcomes(passed=2)

    (capture,) = pytester.path.glob("vm-artifacts/*test_one*/lan.pcap")
    assert capture.stat().st_size > 24


def _host() -> str:
    """Links, addresses, routes and rules of the namespace that this test runs in."""
    commands = ("ip -o link", "ip -o address", "ip route show table all", "ip -6 rule")
    found = []
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
        found.append("\n".join(sorted(done.stdout.splitlines())))
    return "\n".join(found)


def test_two_workers_with_the_same_names_hear_nothing_of_each_other_and_the_host_is_as_before(
    run_pytest: Run,
) -> None:
    source = """
        import os, time
        import pytest

        WORKER = os.environ["PYTEST_XDIST_WORKER"]

        @pytest.mark.parametrize("turn", range(2))
        def test_worker(turn, vm_factory, vm_network, tmp_path):
            one, two = vm_factory(count=2, network="lan", name="node")
            assert (one.ip, two.ip) == ("10.76.0.2", "10.76.0.3")
            one.write_text("/tmp/index.html", WORKER)
            one.run("httpd -h /tmp -p 80", check=True)
            with one.connect(80):
                pass
            with vm_network.capture(tmp_path / "lan.pcap") as capture:
                for _ in range(8):
                    got = two.run("wget -qO- http://node-1/", check=True).stdout
                    assert got == WORKER
                    time.sleep(0.2)
            other = {"gw0": b"gw1", "gw1": b"gw0"}[WORKER]
            assert other not in capture.path.read_bytes()
    """
    before = _host()
    result = run_pytest(source, "-n", "2", "--dist", "load")
    after = _host()

    result.assert_outcomes(passed=2)
    assert after == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("'LAN'", "can't be a network's name"),
        ("['lan', 'lan']", "twice"),
        ("'nat'", "not a name to choose"),
        ("7", "must be a name"),
    ],
)
def test_a_wrong_network_is_an_error_at_collection(run_pytest: Run, wrong: str, told: str) -> None:
    source = f"""
        import pytest

        @pytest.mark.vm(network={wrong})
        def test_it(vm):
            pass
    """
    result = run_pytest(source)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{told}*"])
