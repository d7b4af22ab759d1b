"""`vm.testinfra`: testinfra's own modules, on a real machine, over the agent's line."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from testinfra.host import Host

from pytest_vmsandbox import (
    AsyncMachine,
    ChannelLost,
    GuestPanicked,
    Machine,
    RequestInvalid,
    TimedOut,
)


@pytest.fixture
def host(vm_module: Machine) -> Host:
    return vm_module.testinfra


# Commands


@pytest.mark.parametrize("status", [0, 1, 127, 255])
def test_the_exit_code_is_that_of_the_command(host: Host, status: int) -> None:
    done = host.run(f"exit {status}")

    assert (done.rc, done.succeeded, done.failed) == (status, status == 0, status != 0)


def test_a_signal_is_an_exit_code_as_a_shell_has_it(host: Host) -> None:
    assert host.run("kill -9 $$").rc == 128 + 9


def test_a_program_that_is_not_there_is_the_shell_s_127(host: Host) -> None:
    done = host.run("no-such-program")

    assert done.rc == 127
    assert "not found" in done.stderr


def test_what_is_printed_comes_apart_and_whole(host: Host) -> None:
    done = host.run("echo out; echo err >&2; printf 'no newline'")

    assert (done.stdout, done.stderr) == ("out\nno newline", "err\n")
    assert done.command == b"echo out; echo err >&2; printf 'no newline'"


@pytest.mark.parametrize("word", ["a  b", "$HOME", "it's", "`id`", "a\nb", "-n", "*", "%s", ""])
def test_an_argument_arrives_as_it_is(host: Host, word: str) -> None:
    assert host.run("printf '%%s' %s", word).stdout == word


def test_several_arguments_are_quoted_each(host: Host) -> None:
    assert host.check_output("echo %s and %s", "; exit 3", "$(exit 4)") == (
        "; exit 3 and $(exit 4)"
    )


def test_text_of_any_script_goes_there_and_comes_back(host: Host) -> None:
    done = host.run("echo %s", "žluťoučký 漢字 🐎")

    assert done.stdout == "žluťoučký 漢字 🐎\n"
    assert done.stdout_bytes == "žluťoučký 漢字 🐎\n".encode()


def test_bytes_that_are_no_text_are_given_as_bytes(host: Host) -> None:
    done = host.run("printf '\\377\\000'; printf '\\376' >&2")

    assert (done.stdout_bytes, done.stderr_bytes) == (b"\xff\x00", b"\xfe")
    with pytest.raises(UnicodeDecodeError):
        _ = done.stdout


def test_an_expected_exit_code_is_demanded(host: Host) -> None:
    assert host.run_expect([3, 4], "exit 4").rc == 4
    with pytest.raises(AssertionError, match="Unexpected exit code 5"):
        host.run_expect([3, 4], "exit 5")
    with pytest.raises(AssertionError, match="Unexpected exit code 2"):
        host.run_test("exit 2")


def test_output_is_checked(host: Host) -> None:
    assert host.check_output("echo done") == "done"
    with pytest.raises(AssertionError, match="Unexpected exit code 1"):
        host.check_output("false")


def test_a_command_that_takes_too_long_is_killed_and_named(host: Host) -> None:
    with pytest.raises(TimedOut, match="sleep 4321"):
        host.run("sleep 4321; true", timeout=0.5)

    assert not host.process.filter(args="sleep 4321")


def test_a_command_with_a_nul_is_refused(host: Host) -> None:
    with pytest.raises(RequestInvalid, match="NUL"):
        host.run("echo \0")


# Other users


def test_commands_are_root_s_and_with_sudo_another_user_s(host: Host) -> None:
    assert host.check_output("id -un") == "root"
    with host.sudo("nobody"):
        assert host.check_output("id -un; id -gn") == "nobody\nnogroup"
        assert host.user().name == "nobody"
        assert host.file("/root").exists
        with pytest.raises(RuntimeError, match="Permission denied"):
            host.file("/root").listdir()
    assert host.check_output("id -un") == "root"


def test_arguments_survive_sudo(host: Host) -> None:
    with host.sudo("nobody"):
        assert host.check_output("echo %s", "it's $HOME  `id`") == "it's $HOME  `id`"


def test_sudo_in_sudo_is_the_inner_user_s(host: Host) -> None:
    with host.sudo():
        with host.sudo("nobody"):
            assert host.check_output("id -un") == "nobody"
        assert host.check_output("id -un") == "root"


def test_nobody_can_t_become_root(host: Host) -> None:
    with host.sudo("nobody"), host.sudo():
        assert host.run("id -un").failed


def test_a_user_who_is_not_there_is_a_failed_command_and_never_root_s(host: Host) -> None:
    with host.sudo("who"):
        done = host.run("id -un")

    assert done.failed
    assert (done.stdout, "who" in done.stderr) == ("", True)


def test_the_guest_s_own_sudo_is_used_where_there_is_one(vm_module: Machine) -> None:
    vm_module.write_text("/usr/bin/sudo", '#!/bin/sh\necho "sudo $*"\n', mode=0o755)
    try:
        with vm_module.testinfra.sudo("www"):
            said = vm_module.testinfra.check_output("id -un")
    finally:
        vm_module.run("rm /usr/bin/sudo", check=True)

    assert said == "sudo -u www /bin/sh -c id -un"


# testinfra's modules


def test_a_file_is_as_it_was_made(vm_module: Machine, host: Host) -> None:
    content = "first\nžluť 'quoted' $dollar\n"
    vm_module.write_text("/srv/a file", content)
    vm_module.run(["chmod", "640", "/srv/a file"], check=True)
    vm_module.run(["chown", "nobody:nogroup", "/srv/a file"], check=True)
    vm_module.run(["ln", "-s", "a file", "/srv/link"], check=True)

    file = host.file("/srv/a file")
    assert (file.exists, file.is_file, file.is_directory) == (True, True, False)
    assert (file.user, file.group, file.uid, file.gid) == ("nobody", "nogroup", 65534, 65534)
    assert (file.mode, file.size) == (0o640, len(content.encode()))
    assert (file.content, file.content_string) == (content.encode(), content)
    assert file.sha256sum == hashlib.sha256(content.encode()).hexdigest()
    assert (file.contains("dollar"), file.contains("pound")) == (True, False)
    assert host.file("/srv/link").is_symlink
    assert host.file("/srv/link").linked_to == "/srv/a file"
    assert sorted(host.file("/srv").listdir()) == ["a file", "link"]
    assert not host.file("/srv/nothing").exists


def test_a_file_of_any_bytes_comes_whole(vm_module: Machine, host: Host) -> None:
    content = bytes(range(256)) * 4096
    vm_module.write_bytes("/srv/bytes", content)

    assert host.file("/srv/bytes").content == content


def test_processes_are_found(vm_module: Machine, host: Host) -> None:
    running = vm_module.popen(["sleep", "1234"])
    found = host.process.get(pid=running.pid)

    assert (found.comm, found.args, found.pid) == ("sleep", "sleep 1234", running.pid)
    assert found.ppid == 1
    assert [p.pid for p in host.process.filter(user="root", comm="sleep")] == [running.pid]

    running.kill()
    running.wait(timeout=10)
    assert host.process.filter(comm="sleep") == []
    with pytest.raises(RuntimeError, match="No process found"):
        host.process.get(pid=running.pid)


def test_a_process_is_not_taken_for_another_of_the_same_number(
    vm_module: Machine, host: Host
) -> None:
    running = vm_module.popen(["sleep", "1234"])
    found = host.process.get(pid=running.pid)
    running.kill()
    running.wait(timeout=10)

    with pytest.raises(RuntimeError, match="does not exist any more"):
        _ = found.ppid


def test_there_is_no_package_manager_to_ask(host: Host) -> None:
    with pytest.raises(NotImplementedError, match="no package manager"):
        host.package("busybox")


def test_what_else_the_mini_image_can_tell(vm_module: Machine, host: Host) -> None:
    server = vm_module.popen(["httpd", "-f", "-p", "8080"])
    vm_module.wait_for_port(8080)

    assert host.socket("tcp://8080").is_listening
    assert not host.socket("tcp://8081").is_listening
    assert host.exists("httpd")
    assert not host.exists("nginx")
    assert host.system_info.type == "linux"
    assert host.system_info.distribution == "vmsandbox-mini"
    assert host.user("nobody").uid == 65534
    assert host.mount_point("/proc").filesystem == "proc"
    assert host.sysctl("kernel.ostype") == "Linux"
    assert host.environment()["HOME"] == "/root"
    server.kill()


def test_a_service_is_what_its_script_says(vm_module: Machine, host: Host) -> None:
    # Without systemd testinfra asks service(8), which a guest of scripts can have.
    vm_module.write_text("/usr/sbin/service", '#!/bin/sh\nexec "/etc/init.d/$1" "$2"\n', mode=0o755)
    vm_module.run("mkdir -p /etc/init.d", check=True)
    script = "#!/bin/sh\npidof httpd >/dev/null || exit 3\n"
    vm_module.write_text("/etc/init.d/web", script, mode=0o755)

    assert not host.service("web").is_running
    server = vm_module.popen(["httpd", "-f", "-p", "8082"])
    vm_module.wait_for_port(8082)
    assert host.service("web").is_running

    server.kill()
    server.wait(timeout=10)
    assert not host.service("web").is_running


# The machine behind it


def test_it_is_always_the_same_host_and_says_which(vm_module: Machine) -> None:
    assert vm_module.testinfra is vm_module.testinfra
    assert vm_module.testinfra.backend.get_pytest_id() == f"vmsandbox://{vm_module.name}"
    assert vm_module.testinfra.backend.get_hostname() == vm_module.name


def test_each_machine_is_asked_itself(vm_module: Machine, vm: Machine) -> None:
    vm.write_text("/run/only-here", "")

    assert vm.testinfra.file("/run/only-here").exists
    assert not vm_module.testinfra.file("/run/only-here").exists


def test_a_machine_that_is_off_is_our_error_and_on_again_it_answers(vm: Machine) -> None:
    host = vm.testinfra
    vm.power_cut()
    with pytest.raises(RequestInvalid, match="powered off"):
        host.run("true")
    with pytest.raises(RequestInvalid, match="powered off"):
        _ = host.file("/etc/passwd").exists

    vm.power_on()
    assert host.file("/etc/passwd").exists


def test_a_reboot_is_survived(vm: Machine) -> None:
    host = vm.testinfra
    vm.write_text("/root/mark", "")
    assert host.file("/root/mark").exists

    vm.reboot()
    assert not host.file("/root/mark").exists


@pytest.mark.vm_expect("panic")
def test_a_machine_that_dies_meanwhile_is_our_error_at_once(vm: Machine) -> None:
    with pytest.raises(GuestPanicked, match="sysrq"):
        vm.testinfra.run("echo c > /proc/sysrq-trigger; sleep 1000")
    with pytest.raises(GuestPanicked, match="sysrq"):
        vm.testinfra.run("true")


@pytest.mark.vm_expect("shutdown")
def test_a_guest_that_powers_itself_off_is_our_error(vm: Machine) -> None:
    with pytest.raises(ChannelLost, match="shut itself down"):
        vm.testinfra.run("poweroff -f; sleep 1000")


async def test_an_async_machine_has_it_too_and_its_calls_block(async_vm: AsyncMachine) -> None:
    host = async_vm.testinfra
    assert host.check_output("uname -s") == "Linux"

    beside = await asyncio.gather(
        *(asyncio.to_thread(host.check_output, "sleep 0.2; echo %s", str(n)) for n in range(3)),
        async_vm.run("echo ours"),
    )
    assert [*beside[:3], beside[3].stdout] == ["0", "1", "2", "ours\n"]


# Without the extra


def test_without_testinfra_the_extra_is_named() -> None:
    # As the import system says it of a package that is not there.
    done = _python("""
        import sys
        sys.modules["testinfra"] = None
        from pytest_vmsandbox import Machine
        Machine(None, None).testinfra
    """)

    assert done.returncode == 1
    assert "RequestInvalid: vm.testinfra takes pytest-testinfra, which is not installed" in (
        done.stderr
    )
    assert "hint: pip install 'pytest-vmsandbox[testinfra]'" in done.stderr


def test_whoever_does_not_use_it_does_not_import_it() -> None:
    done = _python("""
        import sys
        import pytest_vmsandbox.machine.async_machine, pytest_vmsandbox.machine.machine
        import pytest_vmsandbox.plugin.fixtures
        print([name for name in sys.modules if name.split(".")[0] == "testinfra"])
    """)

    assert (done.stdout, done.stderr) == ("[]\n", "")


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
