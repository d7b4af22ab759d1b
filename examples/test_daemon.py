"""A network daemon under test: started, awaited, asked, and restarted with its machine."""

from __future__ import annotations

from pytest_vmsandbox import AsyncMachine, AsyncMachineFactory, Machine


def test_a_web_server_answers(vm: Machine) -> None:
    vm.write_text("/srv/index.html", "it works\n")
    server = vm.popen(["httpd", "-f", "-p", "80", "-h", "/srv"])
    vm.wait_for_port(80)

    assert vm.run("wget -qO- http://127.0.0.1/").stdout == "it works\n"

    server.terminate()
    assert server.wait(timeout=10) < 0


async def test_a_server_is_followed_line_by_line(async_vm: AsyncMachine) -> None:
    server = await async_vm.popen('while read line; do echo "got $line"; done')
    assert server.stdin is not None

    await server.stdin.write("one\n")
    first = await server.stdout.readline()
    await server.stdin.write("two\n")
    second = await server.stdout.readline()
    await server.stdin.close()

    assert (first, second) == ("got one\n", "got two\n")
    assert await server.wait(timeout=10) == 0


async def test_several_machines_boot_side_by_side(async_vm_factory: AsyncMachineFactory) -> None:
    one, other = await async_vm_factory(count=2, name="node")

    await one.write_text("/root/only-here", "")

    assert (await one.run("hostname")).stdout == "node-1\n"
    assert (await other.run("test -e /root/only-here")).returncode == 1
