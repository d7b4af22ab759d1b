"""Setups that fetch what they need from the world, in runs of pytest that have one of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machine.templates.template_caches import make_cache
from tests.plugin.conftest import RunInWorld

pytestmark = [pytest.mark.machine, pytest.mark.vm_requires("nat")]

TESTS = """
    import pytest
    from pytest_vmsandbox import CommandFailed

    def fetch(vm):
        vm.run(["wget", "-O", "/root/file", "http://world.test/file"], check=True, timeout=60)

    def is_shut_in(vm):
        reached = vm.run(["nc", "-w", "2", "192.0.2.1", "80"], input="").returncode == 0
        named = vm.run(["nslookup", "world.test", "10.76.255.253"]).returncode == 0
        return not reached and not named

    @pytest.fixture(scope="session")
    def fetched(vm_templates):
        return vm_templates.build(setup=fetch, setup_network="nat")

    def test_what_was_fetched_is_there_and_the_way_is_not(fetched, vm_factory):
        one, other = vm_factory(count=2, template=fetched)
        for vm in (one, other):
            assert vm.read_text("/root/file") == "the world\\n"
            assert is_shut_in(vm)
            where = "/etc/hosts /etc/resolv.conf /run /proc/net/route /proc/net/fib_trie"
            assert vm.run(f"grep -r -e 10.76.255 -e fd76 {where}").stdout == ""
            assert vm.run("ip neigh; ip route; ip -6 route show dev eth0").stdout == ""
        assert one.read_text("/etc/machine-id") != other.read_text("/etc/machine-id")

    def test_on_a_network_they_reach_each_other_and_no_more(fetched, vm_factory):
        one, other = vm_factory(count=2, template=fetched, network="lan", name="node")
        assert (one.ip, other.ip) == ("10.76.0.2", "10.76.0.3")
        one.run(["ping", "-c", "1", "-W", "5", "node-2"], check=True)
        assert is_shut_in(one)
        out = vm_factory(template=fetched, network="nat")
        fetch(out)

    def test_a_layer_fetches_for_itself(fetched, vm_templates, vm_factory):
        def shut_in(vm):
            assert is_shut_in(vm)

        async def fetch_more(vm):
            await vm.run(["wget", "-O", "/root/more", "http://world.test/"], check=True)

        middle = vm_templates.build(setup=shut_in, base=fetched)
        top = vm_templates.build(setup=fetch_more, base=middle, setup_network="nat")
        vm = vm_factory(template=top)
        assert vm.run("cat /root/file /root/more").stdout == "the world\\n" * 2
        assert is_shut_in(vm)

    def test_machines_that_are_on_it_have_it_in_their_setup(vm_templates, vm_factory):
        template = vm_templates.build(setup=fetch, network="nat", name="out")
        vm = vm_factory(template=template)
        assert vm.read_text("/root/file") == "the world\\n"
        fetch(vm)

    @pytest.mark.parametrize("where", ["http://192.0.2.1:81/", "nowhere.test"])
    def test_who_gets_nowhere_is_told_so_by_the_guest(vm_templates, tmp_path_factory, where):
        def setup(vm):
            how = "wget -O /root/file" if where.startswith("http") else "nslookup"
            vm.run(f"{how} {where}", check=True)

        told = "Connection refused" if where.startswith("http") else "NXDOMAIN"
        with pytest.raises(CommandFailed) as raised:
            vm_templates.build(setup=setup, setup_network="nat", name="nowhere")
        assert told in str(raised.value) + raised.value.stdout
"""


@pytest.mark.parametrize("tier", ["auto", "bare"])
def test_a_setup_reaches_the_world_and_its_machines_do_not(
    run_in_world: RunInWorld, tmp_path: Path, tier: str
) -> None:
    cache = make_cache(tmp_path / "cache")

    result = run_in_world(TESTS, f"--vm-tier={tier}", f"--vm-cache-dir={cache}")

    result.assert_outcomes(passed=6)
    titles = [path.read_text() for path in cache.glob("vmsandbox-templates/*/manifest.json")]
    assert titles
    assert not any("nowhere" in title for title in titles)
    assert not [
        *cache.glob("vmsandbox-templates/.new-*"),
        *cache.glob("vmsandbox-templates/.old-*"),
    ]
