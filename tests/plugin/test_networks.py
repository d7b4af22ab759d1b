"""Networks in runs of pytest: what a test does to them ends with it, and no run sees another."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from tests.homes import WORLD, Home, NetworkNamespace
from tests.network_state import Notices, read_state
from tests.people import CHECKOUT

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


TWO_WORKERS = """
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
        one.forward(80)
        with vm_network.capture(tmp_path / "lan.pcap") as capture:
            for _ in range(8):
                got = two.run("wget -qO- http://node-1/", check=True).stdout
                assert got == WORKER
                time.sleep(0.2)
        other = {"gw0": b"gw1", "gw1": b"gw0"}[WORKER]
        assert other not in capture.path.read_bytes()
"""


def test_what_broke_a_network_is_named_in_the_report_and_in_the_summary(run_pytest: Run) -> None:
    source = f"""
        import signal, sys
        from pytest_vmsandbox.lease.entries import Role
        from pytest_vmsandbox.lease.layout import LEDGER
        from pytest_vmsandbox.lease.ledger import read_ledger
        from pytest_vmsandbox.plugin.session import worker_of

        sys.path.insert(0, {str(CHECKOUT)!r})
        from tests.signals import send_signal

        def test_switch(vm_factory, vm_network, request):
            vm_factory(network="lan")
            ledger = read_ledger(worker_of(request.config).directory.path / LEDGER)
            for entry in ledger.entries.values():
                if getattr(entry, "role", None) is Role.SWITCH:
                    send_signal(entry.identity.pid, signal.SIGKILL)
            while vm_network.counts():
                pass

        def test_name(vm_factory):
            vm_factory(network="lan", name="db")
            vm_factory(network="lan", name="db")
    """
    result = run_pytest(source)

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "E * pytest_vmsandbox.errors.SwitchDied: the network: the switch has ended*",
            "E * pytest_vmsandbox.errors.NameTaken: network 'lan' has a machine 'db' already",
            "SwitchDied: the switch has ended; *",
        ]
    )


@pytest.fixture
def host(request: pytest.FixtureRequest) -> NetworkNamespace:
    """What the runs take for the host's network: one where nobody else is, if we may have it."""
    if os.getuid() == 0:
        home: Home = request.getfixturevalue("home")
        return home.inside
    return request.getfixturevalue("own_namespace")  # type: ignore[no-any-return]  # as it says


def test_two_workers_with_the_same_names_hear_nothing_of_each_other_and_the_host_is_as_ever(
    pytester: pytest.Pytester, host: NetworkNamespace
) -> None:
    pytester.makepyfile(TWO_WORKERS)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    before = host.do(read_state)
    notices = host.do(Notices)

    argv = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2")
    result = pytester.run(*host.argv(*argv), timeout=240)
    told = host.do(notices.drain)
    after = host.do(read_state)
    notices.close()

    result.assert_outcomes(passed=2)
    assert told == []
    assert after == before


def test_a_change_of_the_hosts_network_would_be_seen(home: Home) -> None:
    notices = home.inside.do(Notices)
    states = [home.inside.do(read_state)]
    for change in (
        ("link", "set", "wan", "mtu", "1400"),
        ("link", "add", "one", "type", "veth", "peer", "other"),
        ("address", "add", "192.0.2.1/24", "dev", "one"),
        ("route", "add", "192.0.2.0/24", "via", WORLD),
        ("rule", "add", "from", "192.0.2.9", "lookup", "7"),
    ):
        home.inside.run("ip", *change)
        assert home.inside.do(notices.drain), change
        states.append(home.inside.do(read_state))
        assert states[-1] != states[-2], change
    notices.close()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("'LAN'", "can't be a network's name"),
        ("['lan', 'lan']", "twice"),
        ("'host'", "not a name to choose"),
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
