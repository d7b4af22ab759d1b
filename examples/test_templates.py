"""A service that is started once, and runs in every machine from its first moment on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox import AsyncMachine, Machine, MachineFactory, Template, TemplateBuilder


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    (directory / "index.html").write_text("it works\n")
    return directory


@pytest.fixture(scope="session")
def web(vm_templates: TemplateBuilder, site: Path) -> Template:
    def setup(vm: Machine) -> None:
        vm.push(site, "/srv")
        vm.popen(["httpd", "-f", "-p", "80", "-h", "/srv"])
        vm.wait_for_port(80)

    return vm_templates.build(setup=setup, inputs=[site], name="web")


@pytest.fixture(scope="session")
def shop(vm_templates: TemplateBuilder, web: Template) -> Template:
    async def setup(vm: AsyncMachine) -> None:
        await vm.write_text("/srv/cart", "empty\n")

    return vm_templates.build(base=web, setup=setup, name="shop")


def test_it_answers_in_each_machine_from_the_start(
    vm_factory: MachineFactory, web: Template
) -> None:
    for vm in vm_factory(count=2, template=web):
        assert vm.run("wget -qO- http://127.0.0.1/").stdout == "it works\n"


@pytest.mark.vm(template="shop")
@pytest.mark.usefixtures("shop")
def test_what_one_changes_no_other_sees(vm: Machine) -> None:
    assert vm.run("wget -qO- http://127.0.0.1/cart").stdout == "empty\n"

    vm.write_text("/srv/cart", "a book\n")

    assert vm.run("wget -qO- http://127.0.0.1/cart").stdout == "a book\n"


@pytest.mark.vm(template="shop")
@pytest.mark.usefixtures("shop")
async def test_it_is_empty_again(async_vm: AsyncMachine) -> None:
    answer = await async_vm.run("wget -qO- http://127.0.0.1/cart")

    assert answer.stdout == "empty\n"
