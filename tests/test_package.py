"""The package as a whole: its front door, its errors, its two faces, and its wheel."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import subprocess
import sys
from importlib import import_module

import pytest

import pytest_vmsandbox
from pytest_vmsandbox import (
    AddressesExhausted,
    AsyncMachine,
    BootFailed,
    BridgeLost,
    ChannelLost,
    CommandFailed,
    GuestPanicked,
    HostUnfit,
    Machine,
    MachineFailed,
    NameTaken,
    NetworkFailed,
    OutcomeUnknown,
    RequestInvalid,
    SocketAuthError,
    SwitchDied,
    TapLost,
    TeardownRefused,
    TimedOut,
    VmmDied,
    VmSandboxError,
    errors,
)
from pytest_vmsandbox.errors import Evidence
from pytest_vmsandbox.machine.async_machine import AsyncMachineConsole, AsyncMachineLink
from pytest_vmsandbox.machine.async_process import AsyncProcess
from pytest_vmsandbox.machine.machine import MachineConsole, MachineLink
from pytest_vmsandbox.machine.process import Process
from pytest_vmsandbox.machine.running import BootStalled

EVIDENCE = Evidence(
    console_tail="Kernel panic - not syncing: sysrq triggered crash",
    vmm_stderr="qemu-system-x86_64: terminating on signal 15",
    command_line="qemu-system-x86_64 -name vm1",
    vmm_status="paused",
)

# Each with what a reader must find in it: cause, evidence, next step.
RAISED: list[tuple[VmSandboxError, list[str]]] = [
    (
        HostUnfit("VMS-KVM-DENIED", "a usable /dev/kvm", "open: EACCES", "vmsandbox setup"),
        ["VMS-KVM-DENIED", "a usable /dev/kvm", "found: open: EACCES", "try:   vmsandbox setup"],
    ),
    (RequestInvalid("cpus=0 must be 1 to 255", "cpus=1"), ["cpus=0 must be", "hint: cpus=1"]),
    *(
        (
            kind("vm1", "it ended as it should not", EVIDENCE),
            ["vm1: it ended as it should not", "sysrq", "signal 15", "-name vm1", "paused"],
        )
        for kind in (MachineFailed, BootFailed, GuestPanicked, VmmDied, ChannelLost, BootStalled)
    ),
    (
        CommandFailed("ls /nope", 1, "so far", "No such file"),
        ["'ls /nope' exited with 1", "so far", "No such file"],
    ),
    (CommandFailed(["cat"], -9, b"\xff", b""), ["['cat'] was ended by SIGKILL", r"\xff"]),
    (
        TimedOut("vm1: the end of 'sleep'", 1.5, "QEMU answers QMP: yes"),
        ["the end of 'sleep': not within 1.5 s", "last seen", "QEMU answers QMP: yes"],
    ),
    (
        NameTaken("network 'lan' has a machine 'db' already", "name= tells them apart"),
        ["'lan' has a machine 'db'", "hint: name="],
    ),
    (AddressesExhausted("network 'lan' is full"), ["network 'lan' is full"]),
    *(
        (
            kind("the switch has ended, which carried it", "MemoryError"),
            ["the network: the switch has ended", "it printed", "MemoryError"],
        )
        for kind in (NetworkFailed, BridgeLost, TapLost, SwitchDied)
    ),
    (
        OutcomeUnknown("QMP cont", "the line broke"),
        ["QMP cont", "unknown (the line broke)", "look before you ask again"],
    ),
    (
        SocketAuthError("Socket peer UID mismatch", 0, 1000, {"socket_path": "/run/x.sock"}),
        ["UID mismatch", "socket_path=/run/x.sock", "expected_uid=0", "actual_uid=1000"],
    ),
    (
        TeardownRefused("/run/vmsandbox/r1", "still mounted: /run/vmsandbox/r1/m1", "findmnt"),
        ["/run/vmsandbox/r1 was left in place", "still mounted", "inspect: findmnt"],
    ),
]
_IDS = [type(error).__name__ for error, _ in RAISED]


def _public(kind: type) -> dict[str, object]:
    return {
        name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")
    }


def _same(error: VmSandboxError) -> VmSandboxError:
    """What another process answers."""
    return error


def _raise(error: VmSandboxError) -> None:
    raise error


# Errors


def test_every_error_of_the_tree_is_tried_here() -> None:
    in_tree = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, VmSandboxError)
    }

    assert in_tree - {VmSandboxError} == {type(error) for error, _ in RAISED} - {BootStalled}


@pytest.mark.parametrize(("error", "_"), RAISED, ids=_IDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(error: VmSandboxError, _: list[str], protocol: int) -> None:
    back = pickle.loads(pickle.dumps(error, protocol=protocol))

    assert type(back) is type(error)
    assert (back.args, str(back), vars(back)) == (error.args, str(error), vars(error))


def test_errors_cross_between_processes_as_results_and_as_exceptions() -> None:
    # As xdist does it: a process of its own, started afresh.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for error, _ in RAISED:
            back = pool.apply(_same, (error,))
            with pytest.raises(type(error)) as raised:
                pool.apply(_raise, (error,))

            for other in (back, raised.value):
                assert type(other) is type(error)
                assert (other.args, str(other)) == (error.args, str(error))
        pool.close()
        pool.join()


@pytest.mark.parametrize(("error", "expected"), RAISED, ids=_IDS)
def test_an_error_says_cause_evidence_and_next_step(
    error: VmSandboxError, expected: list[str]
) -> None:
    for part in expected:
        assert part in str(error)


def test_a_timed_out_is_a_timeout_error() -> None:
    assert isinstance(TimedOut("x", 1.0), TimeoutError)


# The front door


def test_every_public_name_can_be_imported_from_where_it_is_said_to_live() -> None:
    for home, names in pytest_vmsandbox._HOMES.items():
        module = import_module(f"pytest_vmsandbox.{home}")
        for name in names:
            assert getattr(pytest_vmsandbox, name) is getattr(module, name)


def test_what_is_public_is_listed_once_and_in_all_three_places() -> None:
    names = [name for names in pytest_vmsandbox._HOMES.values() for name in names]

    assert sorted(names) == sorted(pytest_vmsandbox.__all__) == sorted(dir(pytest_vmsandbox))
    assert len(set(names)) == len(names)


def test_type_checkers_see_the_same_names() -> None:
    source = inspect.getsource(pytest_vmsandbox)
    seen = source.partition("if TYPE_CHECKING:")[2].partition("_HOMES")[0]

    for name in pytest_vmsandbox.__all__:
        assert name in seen.replace(",", " ").split(), name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = pytest_vmsandbox.Nope


def test_importing_the_package_imports_no_room() -> None:
    program = (
        "import sys, pytest_vmsandbox; "
        "print([m for m in sys.modules if m.startswith('pytest_vmsandbox.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"


# Two faces of one machine


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [
        (Machine, AsyncMachine),
        (MachineConsole, AsyncMachineConsole),
        (MachineLink, AsyncMachineLink),
        (Process, AsyncProcess),
    ],
    ids=["machine", "console", "link", "process"],
)
def test_the_two_faces_have_the_same_names(blocking: type, awaited: type) -> None:
    assert sorted(_public(blocking)) == sorted(_public(awaited))


# These wait for nothing, so that there is nothing to await.
AT_ONCE = {"tail", "poll", "ip_on", "ip6_on"}


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [
        (Machine, AsyncMachine),
        (MachineConsole, AsyncMachineConsole),
        (MachineLink, AsyncMachineLink),
        (Process, AsyncProcess),
    ],
    ids=["machine", "console", "link", "process"],
)
def test_the_two_faces_have_the_same_signatures(blocking: type, awaited: type) -> None:
    for name, verb in _public(blocking).items():
        other = _public(awaited)[name]
        assert type(verb) is type(other), name
        if inspect.isfunction(verb) and inspect.isfunction(other):
            assert _parameters(verb) == _parameters(other), name
            assert inspect.getdoc(verb), name
            assert inspect.getdoc(other) == inspect.getdoc(verb), name
            assert not inspect.iscoroutinefunction(verb), name
            assert inspect.iscoroutinefunction(other) is (name not in AT_ONCE), name


def _parameters(verb: object) -> list[inspect.Parameter]:
    assert callable(verb)
    return list(inspect.signature(verb).parameters.values())
