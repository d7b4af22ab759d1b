"""A migration stream of QEMU, split while it comes: the guest's memory here, all else there.

QEMU's own loader takes what is left of it: it waits for no page, and what it is not sent stays as
it is. The format: migration/savevm.c and migration/ram.c of QEMU, as of 4.0 for what is read here;
10.0 began to say, in a command of its own, that all that follows is the last. Sans I/O. Whatever is
not known is refused, so that no machine is ever taken for another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence

from pytest_vmsandbox.errors import VmSandboxError

PAGE = 4096

# Large enough that a call is worth its while; it holds every record whole.
_CAPACITY = 1 << 20
# What a machine's devices, firmware and display may take; a megabyte or two is usual.
_STATE_MAX = 64 << 20
_DESCRIPTION_MAX = 4 << 20

_MAGIC = b"QEVM\0\0\0\3"
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _DESCRIPTION, _CONFIGURATION = range(8)
_COMMAND = 0x08
_SWITCHOVER_START = 11  # the command of the kind; it carries nothing
_FOOTER = 0x7E
_RAM_VERSION = 4

_ZERO, _SIZES, _DATA, _LAST, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_FLAGS = PAGE - 1

_BE64 = struct.Struct(">Q")

Needs = Generator[None, None, None]
"""A part of the parser: it stops wherever it needs more bytes."""


class StreamRefused(VmSandboxError):
    """QEMU's migration stream is not one that can be split; nothing was made of it."""

    def __str__(self) -> str:
        return f"QEMU's migration stream: {super().__str__()}"


class StreamSplitter:
    """Takes a stream through `room` and `filled`; `finish` gives it without the pages of a block.

    The RAM block called `block` is `size` bytes long; its pages that are not zero go to `write`
    (offset, pieces that follow each other), which must have taken them when it returns. The stream
    is one that was made with the capability x-ignore-shared.
    """

    def __init__(
        self, *, block: str, size: int, write: Callable[[int, Sequence[memoryview]], None]
    ) -> None:
        self._name, self._size, self._write = block.encode(), size, write
        self._buffer = bytearray(_CAPACITY)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._state = bytearray()
        self._blocks: dict[bytes, int] = {}
        self._block: bytes | None = None  # the one that the last page was of
        self._next = 0  # the first page of ours that has never come
        self._over = False
        self._parser = self._parse()
        next(self._parser)

    def room(self) -> memoryview:
        """Where to put the bytes that come next; never empty."""
        left = self._end - self._start
        self._view[:left] = self._view[self._start : self._end]
        self._start, self._end = 0, left
        return self._view[left:]

    def filled(self, count: int) -> None:
        """`count` bytes have been put into `room()`; StreamRefused where they can't be."""
        self._end += count
        next(self._parser)

    def finish(self) -> bytes:
        """The stream without the block's pages, once all of it has come; else StreamRefused."""
        if not self._over or self._start != self._end:
            raise StreamRefused(f"it ends too early, after {self._seen()}")
        _require_end(self._state)
        return bytes(self._state)

    # The stream, from its beginning to its end

    def _parse(self) -> Needs:
        if (yield from self._keep(len(_MAGIC))) != _MAGIC:
            raise StreamRefused("it does not begin as version 3 does")
        kind = yield from self._byte()
        if kind == _CONFIGURATION:
            kind = yield from self._configuration()
        if kind != _START:
            raise StreamRefused(f"a section of kind {kind:#x} where that of the memory begins")
        section = yield from self._memory_begins()
        yield from self._parts(section)
        if self._next != self._size:
            raise StreamRefused(f"of {self._size} bytes of memory only {self._next} came")
        kind = yield from self._byte()
        if kind != _FULL:
            raise StreamRefused(f"a section of kind {kind:#x} where that of a device begins")
        self._over = True
        while True:
            yield from self._keep(self._end - self._start)
            yield

    def _parts(self, section: int) -> Needs:
        """All parts of the memory's section, to the one that ends it."""
        kind = _START
        switching = False
        while kind != _END:
            kind = yield from self._byte()
            if kind == _COMMAND and not switching:
                yield from self._switchover()
                switching = True
                continue
            if kind not in (_PART, _END):
                raise StreamRefused(f"a section of kind {kind:#x} between those of the memory")
            if (yield from self._number()) != section:
                raise StreamRefused("a part of a section that never began")
            yield from self._pages()
            yield from self._footer(section)

    def _switchover(self) -> Needs:
        """The one command that a stream has, and that only where the migration is told of it."""
        command, length = (yield from self._short()), (yield from self._short())
        if (command, length) != (_SWITCHOVER_START, 0):
            raise StreamRefused(f"a command {command} with {length} bytes")

    def _configuration(self) -> Generator[None, None, int]:
        """The machine's type and what both sides must agree in; the kind of the next section."""
        yield from self._keep((yield from self._number(at_most=256)))
        while (kind := (yield from self._byte())) == _SUBSECTION:
            name = yield from self._text()
            yield from self._number()  # its version
            match name:
                case b"configuration/capabilities":
                    for _ in range((yield from self._number(at_most=256))):
                        yield from self._text()
                case b"configuration/uuid":
                    yield from self._keep(16)
                case _:
                    raise StreamRefused(f"a configuration with {name!r}")
        return kind

    def _memory_begins(self) -> Generator[None, None, int]:
        """The section's number; from here on the blocks and their sizes are known."""
        section = yield from self._number()
        name = yield from self._text()
        instance, version = (yield from self._number()), (yield from self._number())
        if (name, instance, version) != (b"ram", 0, _RAM_VERSION):
            raise StreamRefused(f"a section {name!r} {instance} of version {version} comes first")
        total = yield from self._long()
        if total & _FLAGS != _SIZES:
            raise StreamRefused(f"flags {total & _FLAGS:#x} where the sizes of memory are told")
        left = total - _SIZES
        while left > 0:
            name, size = (yield from self._text()), (yield from self._long())
            yield from self._long()  # where the guest has it
            if not 0 < size <= left or size % PAGE or name in self._blocks:
                raise StreamRefused(f"a block {name!r} of {size} bytes")
            self._blocks[name] = size
            left -= size
        if self._blocks.get(self._name) != self._size:
            raise StreamRefused(
                f"no block {self._name!r} of {self._size} bytes among {self._blocks}"
            )
        if (yield from self._long()) != _LAST:
            raise StreamRefused("more about the sizes of memory than is known")
        yield from self._footer(section)
        return section

    def _pages(self) -> Needs:
        """The pages of one part, up to the word that ends it."""
        while True:
            if self._block == self._name:
                self._take_run()
            yield from self._have(8)
            (word,) = _BE64.unpack_from(self._buffer, self._start)
            flags, offset = word & _FLAGS, word & ~_FLAGS
            if word == _LAST:
                yield from self._keep(8)
                return
            kind = flags & ~_SAME_BLOCK
            if kind not in (_ZERO, _DATA):
                raise StreamRefused(f"a page with flags {flags:#x}")
            head = 8
            if not flags & _SAME_BLOCK:
                yield from self._have(9)
                head = 9 + self._buffer[self._start + 8]
                yield from self._have(head)
                self._block = bytes(self._view[self._start + 9 : self._start + head])
            if offset >= self._blocks.get(self._block or b"", 0):
                raise StreamRefused(f"a page at {offset:#x} of {self._block!r}")
            length = head + (PAGE if kind == _DATA else 1)
            yield from self._have(length)
            page = self._view[self._start + head : self._start + length]
            if kind == _ZERO and page[0]:
                raise StreamRefused(f"a page all of {page[0]:#x}")
            if self._block == self._name:
                self._take_page(offset, page)
                self._start += length
            else:
                yield from self._keep(length)

    def _take_page(self, offset: int, page: memoryview) -> None:
        """One page of ours, wherever it is: one may come again when a device has written to it."""
        if offset > self._next:
            raise StreamRefused(f"a page at {offset:#x} while that at {self._next:#x} is missing")
        if len(page) == PAGE:
            self._write(offset, (page,))
        elif offset < self._next:
            self._write(offset, (memoryview(bytes(PAGE)),))
        if offset == self._next:
            self._next += PAGE

    def _take_run(self) -> None:
        """Pages of ours as they mostly come: whole in the buffer, and one after the other."""
        buffer, view, unpack = self._buffer, self._view, _BE64.unpack_from
        start, after = self._start, self._next
        last = self._end - 8 - PAGE
        run: list[memoryview] = []
        while start <= last and after < self._size:
            (word,) = unpack(buffer, start)
            word -= after
            if word == _ZERO | _SAME_BLOCK and not buffer[start + 8]:
                if run:
                    self._write(after - len(run) * PAGE, run)
                    run = []
                start += 9
            elif word == _DATA | _SAME_BLOCK:
                run.append(view[start + 8 : start + 8 + PAGE])
                start += 8 + PAGE
            else:
                break
            after += PAGE
        if run:
            self._write(after - len(run) * PAGE, run)
        self._start, self._next = start, after

    # What it is made of

    def _have(self, count: int) -> Needs:
        while self._end - self._start < count:
            yield

    def _keep(self, count: int) -> Generator[None, None, bytes]:
        """The next bytes, which stay in the stream."""
        if len(self._state) + count > _STATE_MAX:
            raise StreamRefused(f"more than {_STATE_MAX} bytes beside the memory")
        yield from self._have(count)
        taken = bytes(self._view[self._start : self._start + count])
        self._start += count
        self._state += taken
        return taken

    def _byte(self) -> Generator[None, None, int]:
        return (yield from self._keep(1))[0]

    def _short(self) -> Generator[None, None, int]:
        return int.from_bytes((yield from self._keep(2)))

    def _number(self, *, at_most: int = 0xFFFFFFFF) -> Generator[None, None, int]:
        number = int.from_bytes((yield from self._keep(4)))
        if number > at_most:
            raise StreamRefused(f"{number} where at most {at_most} is known")
        return number

    def _long(self) -> Generator[None, None, int]:
        return int.from_bytes((yield from self._keep(8)))

    def _text(self) -> Generator[None, None, bytes]:
        return (yield from self._keep((yield from self._byte())))

    def _footer(self, section: int) -> Needs:
        if (yield from self._byte()) != _FOOTER or (yield from self._number()) != section:
            raise StreamRefused("a section of the memory that does not end as it should")

    def _seen(self) -> str:
        return f"{len(self._state)} bytes and {self._next} of {self._size} bytes of memory"


def _require_end(state: bytearray) -> None:
    """What QEMU puts behind the devices, their description (JSON), is as long as it says."""
    mark = bytes((_EOF, _DESCRIPTION))
    found = len(state)
    while (found := state.rfind(mark, max(0, len(state) - _DESCRIPTION_MAX), found)) >= 0:
        text = found + len(mark) + 4
        if int.from_bytes(state[text - 4 : text]) == len(state) - text and state[-1:] == b"}":
            return
    raise StreamRefused("it has no end")
