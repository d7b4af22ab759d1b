"""A host described with pytest-testinfra: the same tests as over ssh, on a machine of our own.

Takes the extra: `pip install pytest-vmsandbox[testinfra]`. The fixture `host` stands in for
testinfra's own of that name, so that tests that were written for it run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testinfra.host import Host

from pytest_vmsandbox import Machine


@pytest.fixture(scope="module")
def host(vm_module: Machine) -> Iterator[Host]:
    vm_module.write_text("/etc/motd", "welcome\n")
    vm_module.write_text("/srv/index.html", "it works\n")
    server = vm_module.popen(["httpd", "-f", "-p", "80", "-h", "/srv", "-u", "nobody"])
    vm_module.wait_for_port(80)
    yield vm_module.testinfra
    server.kill()


def test_the_message_of_the_day_is_for_all_to_read(host: Host) -> None:
    motd = host.file("/etc/motd")

    assert (motd.user, motd.mode, motd.content_string) == ("root", 0o644, "welcome\n")


def test_the_web_server_runs_as_nobody(host: Host) -> None:
    server = host.process.get(comm="httpd")

    assert server.user == "nobody"
    assert host.socket("tcp://80").is_listening
    assert host.check_output("wget -qO- %s", "http://127.0.0.1/") == "it works"


def test_nobody_can_t_look_into_root_s_home(host: Host) -> None:
    with host.sudo("nobody"):
        assert host.run("ls /root").failed
