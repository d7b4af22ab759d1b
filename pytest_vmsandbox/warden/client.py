"""The client: our end of a warden's line, and the processes that it launched for us."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, RequestInvalid, TimedOut
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.peer_process import pid_of
from pytest_vmsandbox.host.way import render_start
from pytest_vmsandbox.linux import OwnedFd, ProcessIdentity
from pytest_vmsandbox.linux.packets import received_packets
from pytest_vmsandbox.linux.process_identity import read_boot_id
from pytest_vmsandbox.warden.bundle import BOOTSTRAP, open_bundle
from pytest_vmsandbox.warden.requests import DESCRIPTORS_AT_MOST, PACKET_BYTES, Launch, Who
from pytest_vmsandbox.warden.steps import render_step

# What a warden may take to start, to answer, and to end, in seconds, on the slowest of hosts.
START_S = 30.0
ANSWER_S = 30.0
END_S = 10.0

# How often a full line is tried again, in seconds.
RETRY_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a warden says of itself: the uid of VMMs, and what they may use.

    `owner_uid`: as whom commands run, which is ourselves, but in the tier qemu-vm. `kvm`: VMMs may
    open /dev/kvm. `groups`: the directories in which control groups are
    made, `limits` what they limit ("memory", "pids").
    """

    uid: int
    owner_uid: int
    kvm: bool
    groups: tuple[str, ...]
    limits: tuple[str, ...]


class JailedProcess:
    """A process behind walls. It ends with the warden, at the latest.

    `number` is its pid as the warden counts, `pid` as we do (0 when it had ended before anybody
    could look); `pidfd` is ours until `close`.
    """

    def __init__(self, warden: Warden, number: int, pidfd: OwnedFd, *, uid: int) -> None:
        self._warden = warden
        self._returncode: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.number = number
        self.pidfd = pidfd
        self.identity = _identify(pidfd)
        self.pid = self.identity.pid
        self.uid = uid

    async def wait(self) -> int:
        """Its exit status once it has ended; negative for a signal, -9 if the warden died."""
        return await asyncio.shield(self._returncode)

    def kill(self) -> None:
        """End it at once (SIGKILL); harmless when it has ended already."""
        self._warden.tell(self.number, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM); harmless when it has ended already."""
        self._warden.tell(self.number, signal.SIGTERM)

    async def connect(self, name: str) -> socket.socket:
        """A connected, non-blocking socket to the one called `name` in its room.

        Whose it is has to be verified. FileNotFoundError or ConnectionRefusedError: nobody
        listens there yet. ProcessLookupError: it has ended.
        """
        _, descriptors = await self._warden.ask(
            {"request": "connect", "process": self.number, "socket": name}
        )
        (descriptor,) = descriptors
        sock = socket.socket(fileno=descriptor)
        sock.settimeout(0)
        return sock

    async def open_file(self, name: str) -> IO[bytes]:
        """The file called `name` in its room, open for reading."""
        _, descriptors = await self._warden.ask(
            {"request": "open_file", "process": self.number, "file": name}
        )
        (descriptor,) = descriptors
        return os.fdopen(descriptor, "rb")

    def ended(self, returncode: int) -> None:
        """Note how it ended; only the first word counts."""
        if not self._returncode.done():
            self._returncode.set_result(returncode)

    def close(self) -> None:
        """Give the pidfd back."""
        self.pidfd.close()


class Warden:
    """A warden that runs, and what is waited for from it; `open_warden` makes it."""

    def __init__(self, line: socket.socket, child: subprocess.Popen[bytes], log: Path) -> None:
        self._line = line
        self._child = child
        self._log = log
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._greeted: asyncio.Future[Greeting] = asyncio.get_running_loop().create_future()
        self._processes: dict[int, JailedProcess] = {}
        self._early: dict[int, int] = {}  # who ended before whoever launched it was called
        self._abandoned: set[int] = set()
        self._over = False
        asyncio.get_running_loop().add_reader(line, self._readable)

    @property
    def pid(self) -> int:
        """The pid of the process that was started: the warden's outer half, or sudo."""
        return self._child.pid

    @property
    def over(self) -> bool:
        """Whether it has ended, by itself or because it was closed."""
        return self._over

    @property
    def greeting(self) -> Greeting:
        """What it said of itself when it had started."""
        return self._greeted.result()

    async def greeted(self, *, deadline: Deadline) -> None:
        """Return once it is ready."""
        try:
            async with asyncio.timeout(deadline.timeout_s):
                await asyncio.shield(self._greeted)
        except TimeoutError:
            raise deadline.timed_out("the warden's greeting", self.last_words) from None

    @asynccontextmanager
    async def launch(
        self, order: Launch, descriptors: Sequence[int]
    ) -> AsyncIterator[JailedProcess]:
        """Start a process; leaving the context kills it and waits for its end.

        `descriptors` stay the caller's. OSError, with the errno of what failed, where it can't
        be started; RequestInvalid where the warden refuses; nothing of it is left then.
        """
        form = asdict(replace(order, steps=()))
        form["steps"] = [render_step(step) for step in order.steps]
        answer, received = await self.ask({"request": "launch", **form}, descriptors)
        try:
            process = self._adopt(answer["process"], received, who=order.who)
        except BaseException:
            self._give_up(answer, received)
            raise
        try:
            yield process
        finally:
            # The end of a process must not be skipped because our own task was cancelled.
            await asyncio.shield(self._end(process))

    async def ask(
        self, form: Mapping[str, object], descriptors: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """The warden's answer, and descriptors that are the caller's now."""
        self._numbers += 1
        number = self._numbers
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._send(json.dumps({"number": number, **form}).encode(), descriptors)
                told, received = await answer
        except BaseException as error:
            # We may have been cancelled after the answer came, and before we were called.
            if answer.done() and not answer.cancelled() and not answer.exception():
                self._give_up(*answer.result())
            if isinstance(error, TimeoutError):
                raise TimedOut("the warden's answer", ANSWER_S, self.last_words) from None
            raise
        finally:
            del self._waiting[number]
        if "refused" in told:
            raise _refusal(told)
        return told, received

    def tell(self, process: int, number: signal.Signals) -> None:
        """Send a signal; nobody waits for the answer, and a process that has ended is none."""
        form = {"number": 0, "request": "signal", "process": process, "signal": int(number)}
        try:
            self._line.send(json.dumps(form).encode())
        except BlockingIOError:  # it has much to read, and reads it
            asyncio.get_running_loop().call_later(RETRY_S, self.tell, process, number)
        except OSError:
            return  # it has ended, and all that it launched

    async def close(self) -> None:
        """End it, and all that it launched, and wait for that."""
        asyncio.get_running_loop().remove_reader(self._line)
        self._line.close()
        self._lose()
        try:
            await asyncio.to_thread(self._child.wait, END_S)
        except subprocess.TimeoutExpired:
            # sudo's belongs to root, and ends with its child
            with suppress(PermissionError, subprocess.TimeoutExpired):
                self._child.kill()
                await asyncio.to_thread(self._child.wait, END_S)
            raise TimedOut("the end of the warden", END_S, self.last_words) from None

    # What comes in

    async def _send(self, packet: bytes, descriptors: Sequence[int]) -> None:
        if len(packet) > PACKET_BYTES:
            raise RequestInvalid(
                f"the request has {len(packet)} bytes, more than {PACKET_BYTES}",
                "shorten the command's arguments and environment",
            )
        if len(descriptors) > DESCRIPTORS_AT_MOST:
            raise RequestInvalid(
                f"the request has {len(descriptors)} descriptors, more than {DESCRIPTORS_AT_MOST}"
            )
        while True:
            if self._over:
                raise ConnectionError(errno.EPIPE, f"the warden has ended: {self.last_words}")
            try:
                socket.send_fds(self._line, [packet], list(descriptors))
            except BlockingIOError:
                await asyncio.sleep(RETRY_S)
            except ConnectionError as error:
                raise ConnectionError(
                    errno.EPIPE, f"the warden has ended: {self.last_words}"
                ) from error
            else:
                return

    def _readable(self) -> None:
        for packet, descriptors in received_packets(
            self._line, bytes_at_most=PACKET_BYTES, descriptors_at_most=4
        ):
            if not packet:
                asyncio.get_running_loop().remove_reader(self._line)
                self._lose()
                return
            self._take(json.loads(packet), descriptors)

    def _take(self, form: dict[str, Any], descriptors: list[int]) -> None:
        match form:
            case {"ended": number, "returncode": returncode}:
                if process := self._processes.get(number):
                    process.ended(returncode)
                elif number in self._abandoned:
                    self._abandoned.remove(number)
                else:
                    self._early[number] = returncode
            case {"number": number} if waiting := self._waiting.get(number):
                if not waiting.done():
                    waiting.set_result((form, descriptors))
                    return
            case {"uid": _, "owner_uid": _, "kvm": _, "groups": _, "limits": _}:
                lists = {name: tuple(form[name]) for name in ("groups", "limits")}
                self._greeted.set_result(Greeting(**{**form, **lists}))
        self._give_up(form, descriptors)

    def _give_up(self, form: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Undo what was done for somebody who does not wait for it any more."""
        for descriptor in descriptors:
            os.close(descriptor)
        number = form.get("process")
        if number is not None and self._early.pop(number, None) is None:
            self._abandoned.add(number)
            self.tell(number, signal.SIGKILL)

    def _adopt(self, number: int, descriptors: Sequence[int], *, who: Who) -> JailedProcess:
        """What was launched, as an object that is told of its end."""
        # We may hold no more, and the kernel has dropped it (recvmsg(2), MSG_CTRUNC).
        if not descriptors:
            raise OSError(errno.EMFILE, "the process's descriptor could not be taken")
        (pidfd,) = descriptors
        uid = self.greeting.uid if who is Who.VMM else self.greeting.owner_uid
        process = JailedProcess(self, number, OwnedFd(pidfd), uid=uid)
        self._processes[number] = process
        if number in self._early:
            process.ended(self._early.pop(number))
        elif self._over:
            process.ended(-signal.SIGKILL)
        return process

    def _lose(self) -> None:
        """The warden is gone, and the kernel ended with it what it had launched."""
        if self._over:
            return
        self._over = True
        gone = ConnectionError(errno.EPIPE, f"the warden has ended: {self.last_words}")
        awaited: list[asyncio.Future[Any]] = [*self._waiting.values(), self._greeted]
        for future in awaited:
            if not future.done():
                future.set_exception(gone)
                future.exception()  # it may be that nobody waits any more
        for process in self._processes.values():
            process.ended(-signal.SIGKILL)

    async def _end(self, process: JailedProcess) -> None:
        process.kill()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            raise TimedOut(f"the end of process {process.pid}", END_S, self.last_words) from None
        finally:
            del self._processes[process.number]
            process.close()

    @property
    def last_words(self) -> str:
        """The end of what it printed, which is why it ended, if it said so."""
        try:
            return self._log.read_text(errors="backslashreplace")[-2000:].strip()
        except OSError:
            return ""


@asynccontextmanager
async def open_warden(tier: Tier, *, log: Path) -> AsyncIterator[Warden]:
    """A warden, started in the way of the tier; leaving ends it with all that it launched.

    What it prints goes to `log`. Raises HostUnfit, with what it printed, where it does not come
    up; nothing is left then. Call it in a thread that lives as long: the kernel ends the warden
    with the thread that started it (PR_SET_PDEATHSIG, prctl(2)).
    """
    deadline = Deadline.after(seconds=START_S)
    try:
        warden = _start(tier, log=log)
    except OSError as error:
        raise _unfit(tier, error) from error
    try:
        try:
            await warden.greeted(deadline=deadline)
        except (OSError, TimedOut) as error:
            raise _unfit(tier, error) from error
        yield warden
    finally:
        await asyncio.shield(warden.close())


def _start(tier: Tier, *, log: Path) -> Warden:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as undo, theirs, log.open("ab") as output:
        undo.enter_context(ours)
        with OwnedFd(open_bundle()) as bundle:
            socket.send_fds(ours, [b"\0"], [bundle])
        child = subprocess.Popen(
            render_start(tier, "-c", BOOTSTRAP, str(log)),
            stdin=theirs.fileno(),
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env=_environment(),
        )
        ours.settimeout(0)
        warden = Warden(ours, child, log)
        undo.pop_all()
        return warden


def _environment() -> dict[str, str]:
    """What a Python needs to start; sudo adds its own words.

    The rest of ours may hold secrets, and what sudo once said of somebody else.
    """
    # A Python that is a shared library may be found by the second alone (pyenv, hosted runners).
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {"PATH": os.defpath, **kept, "LC_ALL": "C.UTF-8"}


def _unfit(tier: Tier, error: Exception) -> HostUnfit:
    return HostUnfit(
        f"VMS-WARDEN-{tier.upper()}",
        f"a warden in the tier {tier}",
        str(error),
        "vmsandbox doctor says what is missing; --vm-tier=bare does without walls",
    )


def _identify(pidfd: OwnedFd) -> ProcessIdentity:
    try:
        return ProcessIdentity.of(pid_of(int(pidfd)))
    # ValueError: its pid is -1, it was reaped already. PermissionError: /proc hides it from us.
    except (ProcessLookupError, ValueError, PermissionError):
        return ProcessIdentity(boot_id=read_boot_id(), pid=0, start_ticks=0)


def _refusal(told: Mapping[str, Any]) -> Exception:
    if told["errno"] is None:
        return RequestInvalid(told["refused"])
    return OSError(told["errno"], told["refused"])
