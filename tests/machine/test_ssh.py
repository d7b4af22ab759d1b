"""`vm.ssh_config()`: the host's own ssh, to a guest with Debian's OpenSSH server."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import get_host

from pytest_vmsandbox import (
    AsyncMachine,
    AsyncMachineFactory,
    HostUnfit,
    Machine,
    MachineFactory,
    RequestInvalid,
    Template,
    TemplateBuilder,
    TimedOut,
)
from pytest_vmsandbox.machine.ssh_key import worker_key
from tests.machine.sshd_tree import sshd_tree, start_sshd

pytestmark = pytest.mark.skipif(
    shutil.which("ssh") is None, reason="no ssh here: apt-get install openssh-client"
)

# Under emulation the handshake takes seconds.
SSH_S = 60


@pytest.fixture(scope="session")
def with_sshd(vm_templates: TemplateBuilder) -> Template:
    """A machine in which sshd runs; what is made of it has the host key of them all."""
    tree = sshd_tree()

    def setup(vm: Machine) -> None:
        start_sshd(vm, tree)

    return vm_templates.build(setup=setup, inputs=[tree], name="with sshd")


@pytest.fixture
def vm(vm_factory: MachineFactory, with_sshd: Template) -> Machine:
    return vm_factory(template=with_sshd, name="target")


def ssh(config: Path, name: str, *command: str) -> subprocess.CompletedProcess[str]:
    """What the host's ssh makes of it."""
    return subprocess.run(
        ["ssh", "-F", config, name, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SSH_S,
        check=False,
    )


def test_the_host_s_ssh_runs_a_command_in_the_guest_that_it_knows_by_name(vm: Machine) -> None:
    done = ssh(vm.ssh_config(), "target", "id -un; hostname; exit 7")

    assert (done.returncode, done.stdout) == (7, "root\ntarget\n"), done.stderr


def test_files_go_there_and_back(vm: Machine, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(content)
    config = vm.ssh_config()

    for source, target in (("file", "target:/root/copy"), ("target:/root/copy", "back")):
        subprocess.run(
            ["scp", "-q", "-F", config, source, target],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            timeout=SSH_S,
            check=True,
        )

    assert vm.read_bytes("/root/copy") == (tmp_path / "back").read_bytes() == content


def test_what_ssh_reads_is_this_configuration_and_nothing_else(vm: Machine) -> None:
    config = vm.ssh_config()
    said = subprocess.run(
        ["ssh", "-G", "-F", config, "target"], capture_output=True, text=True, check=True
    )
    options = dict(line.partition(" ")[::2] for line in said.stdout.splitlines())

    assert options["hostname"] == "127.0.0.1"
    assert options["user"] == "root"
    assert options["stricthostkeychecking"] in ("true", "yes")
    assert options["globalknownhostsfile"] == "/dev/null"
    assert options["identitiesonly"] == "yes"
    assert options["forwardagent"] == "no"
    assert options["hostkeyalias"] == vm.id
    assert Path(options["userknownhostsfile"]).parent == config.parent


def test_the_private_key_is_ours_alone_and_all_machines_of_a_worker_have_the_same(
    vm: Machine, vm_factory: MachineFactory, with_sshd: Template
) -> None:
    first, second = (_identity(one.ssh_config()) for one in (vm, vm_factory(template=with_sshd)))

    assert first == second
    state = first.lstat()
    assert stat.S_IMODE(state.st_mode) == 0o600
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert state.st_uid == os.getuid()


def _identity(config: Path) -> Path:
    (line,) = (line for line in config.read_text().splitlines() if "IdentityFile" in line)
    return Path(line.split('"')[1])


def test_asked_again_it_is_the_same_and_the_guest_has_the_key_once(vm: Machine) -> None:
    vm.run("mkdir -p /root/.ssh && printf '# no end of line' > /root/.ssh/authorized_keys")
    first = vm.ssh_config()
    text = first.read_text()

    assert vm.ssh_config() == first
    assert first.read_text() == text
    comment, key = vm.read_text("/root/.ssh/authorized_keys").splitlines()
    assert comment == "# no end of line"
    assert key.startswith("ssh-ed25519 ")


def test_another_user_is_let_in_by_name(vm: Machine) -> None:
    vm.run("echo user:x:1000:1000::/home/user:/bin/sh >> /etc/passwd", check=True)
    vm.run("mkdir /home/user && chown 1000:1000 /home/user", check=True)

    done = ssh(vm.ssh_config(user="user"), "target", "id -u; stat -c %u:%a .ssh/authorized_keys")

    assert (done.returncode, done.stdout) == (0, "1000\n1000:600\n"), done.stderr


def test_a_user_who_is_not_there_is_an_error(vm: Machine) -> None:
    with pytest.raises(OSError, match="who"):
        vm.ssh_config(user="who")


def test_a_guest_that_is_not_the_one_is_refused(vm: Machine) -> None:
    config = vm.ssh_config()
    assert ssh(config, "target", "true").returncode == 0

    # Somebody else's key, at the same port.
    vm.run("rm /etc/ssh/ssh_host_*", check=True)
    key = "/etc/ssh/ssh_host_ed25519_key"
    vm.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    vm.run("pid=$(cat /run/sshd.pid) && rm /run/sshd.pid && kill -HUP $pid", check=True)
    vm.wait_until("test -s /run/sshd.pid")

    done = ssh(config, "target", "true")
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr
    assert ssh(vm.ssh_config(), "target", "true").returncode == 0


def test_twins_have_one_host_key_unless_new_ones_are_asked_for(
    vm_factory: MachineFactory, with_sshd: Template
) -> None:
    one, other = vm_factory(count=2, template=with_sshd, name="twin")
    configs = [one.ssh_config(), other.ssh_config()]
    assert _host_key(configs[0]) == _host_key(configs[1])

    configs[1] = other.ssh_config(new_host_keys=True)

    assert _host_key(configs[0]) != _host_key(configs[1])
    for vm, config in zip((one, other), configs, strict=True):
        done = ssh(config, vm.name, "hostname")
        assert (done.returncode, done.stdout) == (0, f"{vm.name}\n"), done.stderr


def _host_key(config: Path) -> str:
    (line,) = (config.parent / "ssh_known_hosts").read_text().splitlines()
    return line.split(" ", 1)[1]


@contextmanager
def session(config: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """An ssh that is connected, and would be for long."""
    opened = subprocess.Popen(
        ["ssh", "-F", config, name, "echo there; sleep 1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert opened.stdout is not None
        assert opened.stdout.readline() == "there\n"
        yield opened
    finally:
        opened.kill()
        opened.communicate()


@pytest.mark.parametrize("way", ["powered off", "ended"])
def test_a_session_ends_when_its_machine_does(vm: Machine, way: str) -> None:
    with session(vm.ssh_config(), "target") as opened:
        if way == "powered off":
            vm.power_cut()
        else:
            vm._engine.run(vm._controller.close())

        assert opened.wait(timeout=10) == 255


def test_a_guest_on_a_network_is_reached_over_it(
    vm_templates: TemplateBuilder, vm_factory: MachineFactory
) -> None:
    tree = sshd_tree()

    def setup(vm: Machine) -> None:
        start_sshd(vm, tree)

    template = vm_templates.build(
        setup=setup, inputs=[tree], name="with sshd on a network", network="lan"
    )
    one, other = vm_factory(count=2, template=template, name="node", network="lan")

    for vm in (one, other):
        done = ssh(vm.ssh_config(), vm.name, "echo $SSH_CONNECTION; hostname")
        assert done.returncode == 0, done.stderr
        connection, name = done.stdout.splitlines()
        assert name == vm.name
        assert connection.split()[2] in {vm.ip, "127.0.0.1"}  # in the tier bare the latter
    with session(one.ssh_config(), one.name) as opened:
        one.power_cut()
        assert opened.wait(timeout=10) == 255


def test_a_forward_to_another_port_is_another_one(vm: Machine) -> None:
    vm.popen(["/usr/sbin/sshd", "-D", "-p", "2222", "-o", "PidFile=/run/other.pid"])

    done = ssh(vm.ssh_config(port=2222), "target", "echo $SSH_CONNECTION")

    assert done.stdout.split()[-1] == "2222", done.stderr


def test_testinfra_s_own_ssh_backend_takes_it(vm: Machine) -> None:
    host = get_host("ssh://target", ssh_config=str(vm.ssh_config()))

    assert host.check_output("hostname") == "target"


def test_what_the_guide_shows_works(vm: Machine) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "ssh.md").read_text()
    shown = re.search(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert shown
    names: dict[str, Any] = {}
    exec(compile(shown[1], "docs/ssh.md", "exec"), names)

    assert names["uptime_by_ssh"](vm) > 0


async def test_an_async_machine_has_it_too(
    async_vm_factory: AsyncMachineFactory, with_sshd: Template
) -> None:
    vm: AsyncMachine = await async_vm_factory(template=with_sshd, name="awaited")

    done = ssh(await vm.ssh_config(), "awaited", "uname -s")

    assert (done.returncode, done.stdout) == (0, "Linux\n"), done.stderr


# What can't be


def test_an_image_without_sshd_is_an_error_that_says_so(vm_module: Machine) -> None:
    with pytest.raises(RequestInvalid, match="has no sshd: there is none in its image mini"):
        vm_module.ssh_config()


def test_an_sshd_that_does_not_run_is_an_error_that_says_so(vm: Machine) -> None:
    vm.run("kill $(cat /run/sshd.pid)", check=True)
    vm.wait_until("! pidof sshd")

    with pytest.raises(TimedOut, match="an sshd that listens on port 22"):
        vm.ssh_config(timeout=0.5)


def test_an_sshd_without_a_host_key_is_an_error_that_says_so(vm: Machine) -> None:
    vm.run("rm /etc/ssh/ssh_host_*", check=True)

    with pytest.raises(RequestInvalid, match="no host key"):
        vm.ssh_config()


def test_a_machine_that_is_off_is_an_error(vm: Machine) -> None:
    vm.power_cut()

    with pytest.raises(RequestInvalid, match="powered off"):
        vm.ssh_config()


def test_a_host_without_ssh_keygen_is_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(HostUnfit, match="VMS-SSH-KEYGEN"):
        worker_key(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_many_who_want_the_first_key_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(max_workers=8) as threads:
        keys = set(threads.map(worker_key, [tmp_path] * 8))

    assert len(keys) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ssh"]
