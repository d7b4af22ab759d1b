"""Launch: a process behind walls, from fork to exec.

The warden forks a stage, which enters new namespaces; the warden gives it the one user that is
mapped there; it becomes that user and forks the process itself, pid 1 of a pid namespace of its
own. From there on everything happens with the rights of that user and in those namespaces.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux.at import AtLocation
from pytest_vmsandbox.linux.capabilities import Capabilities
from pytest_vmsandbox.linux.clone import CloneFlags
from pytest_vmsandbox.linux.id_maps import write_identity_maps
from pytest_vmsandbox.linux.keyring import join_session_keyring
from pytest_vmsandbox.linux.mount_tree import (
    MountAttrFlags,
    OpenTreeFlags,
    mount_setattr,
    open_tree,
)
from pytest_vmsandbox.linux.namespaces import unshare
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.packets import receive_packet
from pytest_vmsandbox.linux.pidfd import pidfd_open, pidfd_send_signal, pidfd_wait_exit
from pytest_vmsandbox.linux.prctl import PrctlOption, prctl, prctl_set_no_new_privs
from pytest_vmsandbox.linux.privileges import drop_all_capabilities
from pytest_vmsandbox.linux.seccomp import deny_system_calls, prepare_to_deny_system_calls
from pytest_vmsandbox.warden.requests import Launch, Limits, Network, Who
from pytest_vmsandbox.warden.view import View

# From fork to exec lie some milliseconds; what takes this long never ends.
LAUNCH_S = 15.0

_GO = b"go"
_SENTENCE_AT_MOST = 500  # so that any form goes into one packet

_NAMESPACES = (
    CloneFlags.CLONE_NEWUSER
    | CloneFlags.CLONE_NEWNS
    | CloneFlags.CLONE_NEWPID
    | CloneFlags.CLONE_NEWIPC
    | CloneFlags.CLONE_NEWUTS
    | CloneFlags.CLONE_NEWCGROUP
)
# What all in the user namespace of a jail may have together. The kernel counts it for their user
# outside as well, who would run out of it (user_namespaces(7), inotify(7)).
_NAMESPACE_LIMITS = {
    Who.VMM: {
        "max_user_namespaces": 0,
        "max_inotify_instances": 8,
        "max_inotify_watches": 64,
    },
    Who.OWNER: {"max_user_namespaces": 0},
}

# What may be done to a network namespace by whoever it was made for, there and nowhere else.
_KEPT = {Network.WIRES: Capabilities.CAP_NET_ADMIN | Capabilities.CAP_NET_RAW}

_USER_LIMITS = "/proc/sys/user"

# The same for what is limited by process: signals that wait, and bytes of message queues.
_VMM_LIMITS = {
    resource.RLIMIT_SIGPENDING: 1024,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_RTPRIO: 0,
    resource.RLIMIT_NICE: 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """As whom a process runs; `groups` are set where we may set them, None where we may not."""

    uid: int
    gid: int
    groups: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A process that was started: our child, `pid` as we number it, and its open room."""

    pid: int
    pidfd: OwnedFd
    room: OwnedFd | None


class LaunchFailed(Exception):
    """The process could not be started; nothing of it is left."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence


def launch(
    order: Launch, descriptors: Sequence[int], *, user: User, confine: Callable[[], None]
) -> Launched:
    """Start it as `user`; it calls `confine` first of all, to go into a control group.

    We must be pid 1 of a pid namespace, so that the process becomes our child. Returns once the
    program itself runs; raises LaunchFailed, and then nothing of it is left.
    """
    prepare_to_deny_system_calls()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(LAUNCH_S)
    with ours:
        stage = os.fork()
        if stage == 0:
            ours.close()
            _Stage(order, descriptors, user=user, confine=confine, line=theirs).run()
        theirs.close()
        try:
            _receive(ours)
            write_identity_maps(
                stage, uid=user.uid, gid=user.gid, deny_setgroups=user.groups is None
            )
            ours.send(_GO)
            return _attend(ours)
        except OSError as error:
            raise LaunchFailed(error.errno or errno.EIO, sentence_of(error)) from error
        finally:
            _end(stage)


def sentence_of(error: BaseException) -> str:
    """What went wrong, without the errno, which is told beside it."""
    if isinstance(error, OSError) and error.strerror:
        path = "" if error.filename is None else f": {error.filename!r}"
        return f"{error.strerror}{path}"[:_SENTENCE_AT_MOST]
    return (str(error) or repr(error))[:_SENTENCE_AT_MOST]


def _attend(line: socket.socket) -> Launched:
    """Follow what the stage and its child tell until the program runs and both are silent."""
    with ExitStack() as undo:
        pid, pidfd, room = 0, None, None
        while told := _receive(line):
            form, descriptors = told
            if descriptors:
                room = undo.enter_context(OwnedFd(descriptors[0]))
            if "pid" in form:
                pid = form["pid"]
                pidfd = undo.enter_context(pidfd_open(pid))
                undo.callback(_kill, pidfd)
                line.send(_GO)
        if pidfd is None:
            raise LaunchFailed(errno.ESRCH, "it ended before it began")
        undo.pop_all()
        return Launched(pid=pid, pidfd=pidfd, room=room)


def _receive(line: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """What is told next, and what came with it; None once all have let go of the other end.

    Raises LaunchFailed where an error is told.
    """
    packet, descriptors, _ = receive_packet(line, bytes_at_most=8192, descriptors_at_most=1)
    if not packet:
        return None
    form: dict[str, Any] = json.loads(packet)
    if "error" in form:
        raise LaunchFailed(form["error"], form["sentence"])
    return form, descriptors


def _kill(pidfd: OwnedFd) -> None:
    """End it for certain: whoever is still in a control group keeps it from being removed."""
    pidfd_send_signal(pidfd, signal.SIGKILL)
    pidfd_wait_exit(pidfd, deadline=Deadline.after(seconds=LAUNCH_S))


def _end(stage: int) -> None:
    """Reap the stage, which has ended, or must."""
    with pidfd_open(stage) as pidfd:
        pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitpid(stage, 0)


class _Stage:
    """The forked half: it never returns to the warden's code."""

    def __init__(
        self,
        order: Launch,
        descriptors: Sequence[int],
        *,
        user: User,
        confine: Callable[[], None],
        line: socket.socket,
    ) -> None:
        self._order = order
        self._descriptors = descriptors
        self._user = user
        self._confine = confine
        self._line = line

    def run(self) -> NoReturn:
        """Do all of it, and tell what went wrong."""
        try:
            self._unshare()
            child = os.fork()
            if child:
                self._tell({"pid": child})
            else:
                self._become()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the warden is told
            code = error.errno if isinstance(error, OSError) else None
            self._tell({"error": code or errno.EIO, "sentence": sentence_of(error)})
        finally:
            os._exit(0)  # also where nobody is left to be told: we must not become a second warden

    def _tell(self, form: dict[str, object], descriptors: Sequence[int] = ()) -> None:
        with whatever_is_in_flight():
            socket.send_fds(self._line, [json.dumps(form).encode()], descriptors)

    def _wait_to_go(self) -> None:
        if self._line.recv(len(_GO)) != _GO:
            raise OSError(errno.ECANCELED, "nobody waits for this process any more")

    def _unshare(self) -> None:
        signal.set_wakeup_fd(-1)  # the warden's, for its own children
        self._let_go()
        self._confine()
        user = self._user
        if user.groups is not None:
            os.setgroups(user.groups)
        shared = self._order.network is Network.HOST
        unshare(_NAMESPACES | (0 if shared else CloneFlags.CLONE_NEWNET))
        self._tell({})
        self._wait_to_go()  # our user is mapped
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)

    def _let_go(self) -> None:
        """Close what is the warden's: its line, and what it holds of others; its log stays open.

        A source of the view may be called /proc/self/fd/N.
        """
        kept = sorted({1, 2, *self._descriptors, self._line.fileno()})
        for below, above in pairwise([-1, *kept, os.sysconf("SC_OPEN_MAX")]):
            os.closerange(below + 1, above)

    def _become(self) -> None:
        """Build the view, put up the walls, and turn into the program."""
        order = self._order
        self._wait_to_go()  # the warden holds us
        os.setsid()
        socket.sethostname(order.name)
        view = View()
        for step in order.steps:
            view.perform(step)
        self._descriptors = [*self._descriptors[:3], *self._readable_files()]
        if order.room is not None:
            with view.open(order.room) as room:
                self._tell({"room": True}, [room])
        _limit_namespace(_NAMESPACE_LIMITS[order.who])
        view.enter()
        os.chdir(order.cwd)
        os.umask(0o077 if order.who is Who.VMM else 0o022)
        self._place_descriptors()
        with suppress(OSError):  # a kernel without keys, or a quota; a VMM may not ask for them
            join_session_keyring()
        _limit(order.limits, others=_VMM_LIMITS if order.who is Who.VMM else {})
        drop_all_capabilities(but=_KEPT.get(order.network, Capabilities(0)))
        prctl_set_no_new_privs()
        if order.who is Who.VMM:
            deny_system_calls()
        _heed_signals()
        if order.who is Who.OWNER:
            _be_init_for_a_child()
        os.execve(order.argv[0], order.argv, dict(order.env))  # noqa: S606 - by path, no shell

    def _readable_files(self) -> list[int]:
        given = self._descriptors[3:]
        return [
            descriptor if path is None else _only_readable(descriptor, path)
            for descriptor, path in zip(given, self._order.files, strict=True)
        ]

    def _place_descriptors(self) -> None:
        """Give the descriptors their numbers; of ours only the line is left, until exec."""
        aside = [*self._descriptors, self._line.detach()]
        aside = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(aside)) for fd in aside]
        last = len(aside) - 1
        for number, descriptor in enumerate(aside):
            os.dup2(descriptor, number, inheritable=number < last)
        self._line = socket.socket(fileno=last)
        os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))


def _only_readable(descriptor: int, path: str) -> int:
    """A descriptor of the same file through which, and from which, it can't be written.

    Whoever owns a file may open it anew for writing through /proc/self/fd, so it is opened
    through a mount of its own that is read-only. Where the path is out of our reach, the file must
    be somebody else's: then it is enough that others may read it, and not write it.
    """
    try:
        mount = open_tree(path, OpenTreeFlags.OPEN_TREE_CLONE)
    except (PermissionError, FileNotFoundError):
        link = f"/proc/self/fd/{descriptor}"
        is_ours = os.fstat(descriptor).st_uid == os.getuid()  # we could change its mode
        if is_ours or not os.access(link, os.R_OK) or os.access(link, os.W_OK):
            sentence = "others must be able to read it, not to write it"
            raise OSError(errno.EACCES, sentence, path) from None
        return descriptor
    with mount:
        if not os.path.samestat(os.fstat(mount), os.fstat(descriptor)):
            raise OSError(errno.ESTALE, "it is not the file that was handed over", path)
        mount_setattr(AtLocation(mount), attr_set=MountAttrFlags.MOUNT_ATTR_RDONLY)
        # O_NONBLOCK: nobody is waited for where it is a pipe, or leased (fcntl(2)).
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(AtLocation(mount).fspath(), flags)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None


@contextmanager
def whatever_is_in_flight() -> Iterator[None]:
    """Be able to send descriptors, as far as our hard limit of open files goes.

    Who may open fewer files than its user has descriptors in flight, and any process of that user
    may have sent them, a VMM too, can't send any (unix(7), ETOOMANYREFS).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _limit_namespace(most: Mapping[str, int]) -> None:
    for name, amount in most.items():
        with (
            suppress(FileNotFoundError),  # a kernel built without what is limited
            open(f"{_USER_LIMITS}/{name}", "w", encoding="ascii") as limit,  # noqa: PTH123
        ):
            limit.write(str(amount))


def _limit(limits: Limits, *, others: Mapping[int, int]) -> None:
    wanted = {
        **others,
        # 1, not 0: that alone keeps the kernel from handing a dump to a helper of the host's, which
        # would run as root (core(5), "Piping core dumps"; fs/coredump.c).
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_AS: limits.address_bytes,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
    }
    for kind, most in wanted.items():
        if most is not None:
            _, hard = resource.getrlimit(kind)
            least = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (least, least))


def _heed_signals() -> None:
    """Neither ignore nor block any: Python does, and whoever started pytest (nohup, `&`)."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with suppress(OSError):  # those that the C library keeps for itself
            signal.signal(number, signal.SIG_DFL)


def _be_init_for_a_child() -> None:
    """Return in a child; here, as pid 1, reap until it ends, and end as it did.

    A command must not be pid 1 itself: the kernel keeps from pid 1 every signal that it has no
    handler for, its own included (pid_namespaces(7)).
    """
    child = os.fork()
    if child == 0:
        return
    # What we hold of the warden is none of the command's business: /proc/1/mem, environ.
    prctl(PrctlOption.PR_SET_DUMPABLE, 0)
    os.closerange(0, 1024)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
