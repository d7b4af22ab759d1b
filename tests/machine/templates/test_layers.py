"""Templates that tests prepare: what a setup made of a machine is there in each one out of it."""

from __future__ import annotations

import secrets
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox import (
    AsyncMachine,
    ChannelLost,
    CommandFailed,
    Disk,
    Machine,
    MachineFactory,
    RequestInvalid,
    Template,
    TemplateBuilder,
)
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.templates.builder import Setup
from pytest_vmsandbox.machine.templates.memory_file import MEMORY, PAGES
from pytest_vmsandbox.machine.templates.shelf import MARK, NAME
from pytest_vmsandbox.machine.templates.template import read_manifest
from pytest_vmsandbox.machine.worker import Worker
from tests.machine.templates.preparing import Builder, Restored, names_in, require_made_once

pytestmark = pytest.mark.machine


def test_what_a_setup_did_is_there_in_each_machine_and_stays_apart(
    worker: Worker, builder: Builder
) -> None:
    def setup(vm: Machine) -> None:
        vm.write_text("/root/made", "by the setup\n")

    template = builder.build(setup=setup)

    with Restored(worker, template) as one, Restored(worker, template) as other:
        one.write_text("/root/made", "changed\n")
        assert other.read_text("/root/made") == "by the setup\n"
        assert one.run("hostname").stdout != other.run("hostname").stdout
        assert one.facts.lifecycle == "restored"
    with Restored(worker, "setup") as third:
        assert third.read_text("/root/made") == "by the setup\n"
    assert builder.ended == len(builder.prepared) == 1


def test_a_service_answers_in_each_machine_from_the_start(worker: Worker, builder: Builder) -> None:
    def setup(vm: Machine) -> None:
        vm.write_text("/srv/index.html", "it works\n")
        vm.popen(["httpd", "-f", "-p", "80", "-h", "/srv"])
        vm.wait_for_port(80)

    template = builder.build(setup=setup, name="service")

    for _ in range(3):
        with Restored(worker, template) as vm:
            assert vm.run("wget -qO- http://127.0.0.1/").stdout == "it works\n"


def test_a_process_whose_streams_were_open_runs_on_unheard(
    worker: Worker, builder: Builder
) -> None:
    left = {}

    def setup(vm: Machine) -> None:
        left["chatty"] = vm.popen("while echo chatter; do echo $$ > /run/chatty; done")
        left["reader"] = vm.popen("read line; echo $? > /run/read; sleep 1000")
        vm.wait_until("test -s /run/chatty")
        assert left["chatty"].stdout.readline() == "chatter\n"

    template = builder.build(setup=setup, key="")

    for process in left.values():
        with pytest.raises(ChannelLost):
            process.wait()
    with Restored(worker, template) as vm:
        vm.run('kill -0 "$(cat /run/chatty)"', check=True)
        assert vm.run("test -e /run/read").returncode == 1  # no end of its stdin
        assert vm.run("echo not drowned").stdout == "not drowned\n"


def test_an_async_setup_is_awaited(worker: Worker, builder: Builder) -> None:
    async def setup(vm: AsyncMachine) -> None:
        await vm.write_text("/root/made", "on a loop\n")

    template = builder.build(setup=setup, name="asynchronous")

    with Restored(worker, template) as vm:
        assert vm.read_text("/root/made") == "on a loop\n"


async def test_an_async_test_can_build_one(worker: Worker, builder: Builder) -> None:
    async def setup(vm: AsyncMachine) -> None:
        await vm.write_text("/root/made", "on another loop\n")

    template = builder.build(setup=setup, name="asynchronous from within")

    with Restored(worker, template) as vm:
        assert vm.read_text("/root/made") == "on another loop\n"


def test_a_template_stands_on_a_template(worker: Worker, builder: Builder, cache_dir: Path) -> None:
    def first(vm: Machine) -> None:
        vm.write_text("/root/first", "1\n")

    def second(vm: Machine) -> None:
        assert vm.read_text("/root/first") == "1\n"
        vm.write_text("/root/second", "2\n")

    below = builder.build(setup=first)
    above = builder.build(setup=second, base=below)

    with Restored(worker, above) as vm:
        assert (vm.read_text("/root/first"), vm.read_text("/root/second")) == ("1\n", "2\n")
    with Restored(worker, below) as vm:
        assert vm.run("test -e /root/second").returncode == 1
    places = [cache_dir / NAME / digest[:32] for digest in (below.root, above.digest)]
    taken = [(place / MEMORY).stat().st_blocks * 512 for place in places]
    assert taken[1] < taken[0] / 4
    assert read_manifest(places[1]).base is not None


def test_one_that_reboots_in_its_setup_is_frozen_as_it_is_then(
    worker: Worker, builder: Builder
) -> None:
    def setup(vm: Machine) -> None:
        vm.write_text("/root/lost", "")
        vm.power_cut()
        vm.power_on()
        vm.write_text("/root/kept", "")
        vm.reboot()
        vm.write_text("/root/here", "")

    template = builder.build(setup=setup, name="rebooting")

    with Restored(worker, template) as vm:
        assert vm.run("ls /root").stdout == "here\n"


# What is made once, and when anew


def test_it_is_made_once_and_found_by_the_next_session(
    new_worker: Callable[[str], Worker],
) -> None:
    word = secrets.token_hex(8)

    def setup(vm: Machine) -> None:
        vm.write_text("/root/word", word)

    builders = [Builder(new_worker(name)) for name in ("one", "two")]
    first, again = (builder.build(setup=setup, name="once") for builder in builders)

    assert builders[0].build(setup=setup, name="once") is first
    assert [len(builder.prepared) for builder in builders] == [1, 0]
    assert first.digest == again.digest
    with Restored(builders[1]._worker, again) as vm:
        assert vm.read_text("/root/word") == word


def test_of_two_who_want_it_at_once_one_makes_it(new_worker: Callable[[str], Worker]) -> None:
    word = secrets.token_hex(8)

    def setup(vm: Machine) -> None:
        vm.write_text("/root/word", word)

    builders = [Builder(new_worker(name)) for name in ("one", "two")]

    require_made_once(builders, setup=setup, name="twins")


def test_what_it_closes_over_its_inputs_and_its_key_make_it_another(
    builder: Builder, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_text("one")

    def setup_with(word: str) -> Setup:
        def setup(vm: Machine) -> None:
            vm.write_text("/root/word", word)

        return setup

    digests = [
        builder.build(setup=setup_with("a"), inputs=[source], name="a").digest,
        builder.build(setup=setup_with("b"), inputs=[source], name="b").digest,
        builder.build(setup=setup_with("a"), inputs=[source], key="k", name="k").digest,
    ]
    source.write_text("two")
    digests.append(builder.build(setup=setup_with("a"), inputs=[source], name="c").digest)

    assert len(set(digests)) == 4


# What goes wrong


def test_what_a_setup_raises_goes_on_and_nothing_is_kept(
    worker: Worker, builder: Builder, cache_dir: Path
) -> None:
    def setup(vm: Machine) -> None:
        vm.run("exit 3", check=True)

    before = names_in(cache_dir)
    for _ in range(2):
        with pytest.raises(CommandFailed, match="exited with 3") as raised:
            builder.build(setup=setup, name="failing")
        assert "setup" in [entry.name for entry in raised.traceback]

    assert names_in(cache_dir) - before <= {".lock", MARK} | {
        name for name in names_in(cache_dir) if len(name) == 32
    }
    assert builder.ended == len(builder.prepared) == 2
    assert "failing" not in worker.prepared
    assert not any(map(_is_powered_on, builder.prepared))


def _is_powered_on(machine: MachineController) -> bool:
    return machine._running is not None


def test_one_that_is_off_at_the_end_of_its_setup_can_not_be_frozen(builder: Builder) -> None:
    def setup(vm: Machine) -> None:
        vm.power_cut()

    with pytest.raises(RequestInvalid, match="powered off"):
        builder.build(setup=setup, name="off")


@pytest.mark.parametrize("wishes", [{}, {"setup_network": "nat"}], ids=["alone", "way out"])
def test_one_that_is_paused_at_the_end_of_its_setup_can_not_be_frozen(
    builder: Builder, wishes: dict[str, str]
) -> None:
    def setup(vm: Machine) -> None:
        vm.pause()

    with pytest.raises(RequestInvalid, match=r"is paused(?s:.*)resume it in the setup"):
        builder.build(setup=setup, name=f"paused {len(wishes)}", **wishes)


@pytest.mark.parametrize("verb", ["snapshot", "fork"])
def test_one_that_is_prepared_can_not_be_copied(builder: Builder, verb: str) -> None:
    def setup(vm: Machine) -> None:
        vm.snapshot() if verb == "snapshot" else vm.fork(1)

    with pytest.raises(RequestInvalid, match=r"being prepared(?s:.*)in the test"):
        builder.build(setup=setup, name="copied", key=verb)


def test_a_coroutine_that_nobody_awaits_is_refused(builder: Builder) -> None:
    async def work(vm: AsyncMachine) -> None: ...

    def setup(vm: AsyncMachine) -> object:
        return work(vm)

    with pytest.raises(RequestInvalid, match="async def"):
        builder.build(setup=setup, name="unawaited")  # type: ignore[arg-type]


def test_a_name_is_that_of_one_template(builder: Builder) -> None:
    builder.build(setup=lambda vm: vm.run("true"), name="mine")

    with pytest.raises(RequestInvalid, match="'mine' of something else"):
        builder.build(setup=lambda vm: vm.run("false"), name="mine")


@pytest.mark.parametrize(
    "wishes",
    [
        {"setup": "echo"},
        {"setup": print, "name": ""},
        {"setup": print, "name": "new\nline"},
        {"setup": print, "memory_mib": 1},
        {"setup": print, "lifecycle": "booted"},
        {"setup": print, "template": "x"},
        {"setup": print, "unknown": 1},
        {"setup": print, "inputs": "one path"},
        {"setup": print, "inputs": ["nowhere"]},
    ],
)
def test_what_can_not_be_is_refused(builder: Builder, wishes: dict[str, object]) -> None:
    with pytest.raises(RequestInvalid):
        builder.build(**{"name": "impossible", **wishes})  # type: ignore[arg-type]
    assert builder.prepared == []


def test_a_machine_out_of_it_has_its_shape_or_is_refused(worker: Worker, builder: Builder) -> None:
    def setup(vm: Machine) -> None: ...

    template = builder.build(setup=setup, name="small", memory_mib=96)

    with Restored(worker, template) as vm:
        assert int(vm.run("awk '/MemTotal/ {print $2}' /proc/meminfo").stdout) < 96 << 10
    with pytest.raises(RequestInvalid, match="made of another machine: small, on mini, 96 MiB"):
        Restored(worker, template, memory_mib=160)
    with pytest.raises(RequestInvalid, match="booted"):
        Restored(worker, template, lifecycle="booted")
    with pytest.raises(RequestInvalid, match="made of another machine"):
        builder.build(setup=setup, base=template, name="large", memory_mib=160)


def test_a_template_that_nobody_built_is_named(worker: Worker) -> None:
    with pytest.raises(RequestInvalid, match=r"template='web' has not been built.*\n.*name='web'"):
        Restored(worker, "web")


def test_a_damaged_base_is_made_anew_and_all_that_stood_on_it(
    new_worker: Callable[[str], Worker], cache_dir: Path
) -> None:
    word = secrets.token_hex(8)

    def setup(vm: Machine) -> None:
        vm.write_text("/root/word", word)

    first = Builder(new_worker("one"))
    template = first.build(setup=setup, name="twice")
    _flip_a_bit(cache_dir / NAME / template.root[:32])

    second = Builder(new_worker("two"))
    again = second.build(setup=setup, name="twice")

    assert len(second.prepared) == 1
    for builder, one in ((first, template), (second, again)):
        with Restored(builder._worker, one) as vm:
            assert vm.read_text("/root/word") == word


@pytest.mark.parametrize("what", ["inputs", "setup"])
def test_one_whose_ingredients_change_while_it_is_made_is_for_this_run_only(
    worker: Worker, builder: Builder, cache_dir: Path, tmp_path: Path, *, what: str
) -> None:
    (tmp_path / "input").write_text("before")
    words = ["before"]

    def setup(vm: Machine) -> None:
        vm.write_text("/root/made", (tmp_path / "input").read_text() + words[0])
        if what == "inputs":
            (tmp_path / "input").write_text("after")
        else:
            words[0] = "after"

    template = builder.build(setup=setup, inputs=[tmp_path, tmp_path / "input"], name=what)

    assert any(f"its {what} changed while" in told for told in worker.incidents)
    assert template.digest[:32] not in names_in(cache_dir)
    with Restored(worker, template) as vm:
        assert vm.read_text("/root/made") == "beforebefore"


@pytest.mark.parametrize("what", ["removed", "made anew"])
def test_who_has_read_it_has_its_disks_whatever_becomes_of_it(
    new_worker: Callable[[str], Worker], cache_dir: Path, *, what: str
) -> None:
    disk = "/dev/disk/by-id/virtio-disk0"

    def setup(vm: Machine) -> None:  # each making of it has another word
        vm.run(f"cat /proc/sys/kernel/random/uuid | tee /dev/shm/word >{disk}; sync", check=True)

    def build(name: str) -> tuple[Builder, Template]:
        builder = Builder(new_worker(name))
        wishes = {"name": f"disk {what}", "disks": [Disk(size="8M")], "key": what}
        return builder, builder.build(setup=setup, **wishes)  # type: ignore[arg-type]

    build("maker")
    reader, template = build("reader")
    assert reader.prepared == []
    shutil.rmtree(cache_dir / NAME / template.digest[:32])
    if what == "made anew":
        assert len(build("other")[0].prepared) == 1

    with Restored(reader._worker, template) as vm:
        word = vm.read_text("/dev/shm/word")
        assert vm.run(f"head -c {len(word)} {disk}").stdout == word


def _flip_a_bit(place: Path) -> None:
    (page,) = struct.unpack_from("<I", (place / PAGES).read_bytes())
    memory = place / MEMORY
    memory.chmod(0o600)
    with memory.open("r+b") as file:
        file.seek(page * 4096)
        byte = file.read(1)[0]
        file.seek(page * 4096)
        file.write(bytes([byte ^ 1]))


def test_where_it_can_not_be_kept_it_lives_as_long_as_its_worker(
    new_worker: Callable[[str], Worker], cache_dir: Path
) -> None:
    def setup(vm: Machine) -> None:
        vm.write_text("/root/made", "")

    builder = Builder(new_worker("one"))
    limit = builder._worker.templates._cache
    limit.directory = Path("/proc/1/nowhere")

    template = builder.build(setup=setup, name="not kept")

    assert any("not kept" in told for told in builder._worker.incidents)
    with Restored(builder._worker, template) as vm:
        vm.run("test -e /root/made", check=True)


@pytest.fixture(scope="session")
def prepared(vm_templates: TemplateBuilder) -> Template:
    def setup(vm: Machine) -> None:
        vm.write_text("/root/made", "for all tests\n")

    return vm_templates.build(setup=setup, name="prepared by a fixture")


@pytest.mark.vm(template="prepared by a fixture")
def test_a_mark_names_it(prepared: Template, vm: Machine) -> None:
    assert vm.read_text("/root/made") == "for all tests\n"


def test_the_factory_takes_it(prepared: Template, vm_factory: MachineFactory) -> None:
    one, other = vm_factory(count=2, template=prepared, name="twin")

    assert one.run("hostname; cat /root/made").stdout == "twin-1\nfor all tests\n"
    assert other.run("hostname; cat /root/made").stdout == "twin-2\nfor all tests\n"
