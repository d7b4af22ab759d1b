"""The cache of templates: whole or not there, in use or not, and nobody else's."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmsandbox import RequestInvalid, TimedOut
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.machine.templates.cache import Kept, TemplateCache
from pytest_vmsandbox.machine.templates.locks import changing
from pytest_vmsandbox.machine.templates.memory_file import MEMORY, PAGES
from pytest_vmsandbox.machine.templates.shelf import MARK, NAME
from pytest_vmsandbox.machine.templates.template import (
    CONSOLE,
    MANIFEST,
    STATE,
    Recipe,
    TemplateDamaged,
    check_template,
    read_manifest,
)
from tests.machine.templates.handmade import (
    MEMORY_BYTES,
    PAGE,
    RECIPE,
    content_of,
    frozen_by_hand,
    publish,
    recipe_called,
    with_changes,
)

MOMENTS = int(os.environ.get("VMSANDBOX_MOMENTS", "12"))
SEED = int(os.environ.get("VMSANDBOX_SEED") or random.SystemRandom().randrange(1 << 32))
FLIPS = 60
CHECKOUT = Path(__file__).resolve().parents[3]

# At both ends, and zeros where there was something.
CHANGES = {0: b"new", 3 * PAGE: bytes(2 * PAGE), MEMORY_BYTES - 5: b"end"}

FILES = (MEMORY, PAGES, STATE, CONSOLE, MANIFEST)


@pytest.fixture
def cache(tmp_path: Path) -> TemplateCache:
    return TemplateCache(tmp_path)


@pytest.fixture
def place(cache: TemplateCache) -> Path:
    """The directory of a template that nobody uses."""
    publish(cache, frozen_by_hand(1)).close()
    (one,) = cache.shelved()
    return one.directory


def loads_as(cache: TemplateCache, recipe: Recipe = RECIPE) -> bytes | None:
    """The memory of what is loaded; None where nothing is."""
    kept = cache.load(recipe, room=cache.directory.parent)
    if kept is None:
        return None
    with closing(kept):
        assert kept.frozen.memory.sealed
        return content_of(kept.frozen)


def used(cache: TemplateCache, recipe: Recipe = RECIPE) -> Kept:
    """The template, in use until it is closed."""
    kept = cache.load(recipe, room=cache.directory.parent)
    assert kept is not None
    return kept


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# What is loaded is what was published


def test_what_was_published_is_loaded_to_the_last_byte(cache: TemplateCache) -> None:
    made = frozen_by_hand(1)
    with closing(publish(cache, made)), closing(used(cache)) as kept:
        assert content_of(kept.frozen) == content_of(made)
        assert kept.frozen.read_state() == made.read_state()
        assert kept.frozen.nonce == made.nonce
        assert kept.frozen.memory.sealed


def test_nothing_is_loaded_where_nothing_is_and_nothing_is_made(tmp_path: Path) -> None:
    assert TemplateCache(tmp_path / "nowhere").load(RECIPE, room=tmp_path) is None
    assert TemplateCache(tmp_path / "nowhere").shelved() == []
    assert names_in(tmp_path) == set()


def test_files_can_be_read_by_us_alone_and_written_by_nobody(place: Path) -> None:
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert place.stat().st_mode & 0o777 == 0o700
    assert {(place / name).stat().st_mode & 0o777 for name in FILES} == {0o400}


def test_pages_of_zeros_take_no_room(place: Path) -> None:
    assert (place / MEMORY).stat().st_size == MEMORY_BYTES
    assert (place / MEMORY).stat().st_blocks * 512 < MEMORY_BYTES / 2


# A damaged one is noticed


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_never_loaded(cache: TemplateCache, place: Path, name: str) -> None:
    right, dice = loads_as(cache), random.Random(f"{SEED} {name}")
    path = place / name
    path.chmod(0o600)
    whole = path.read_bytes()
    # Of what is small every byte; of the memory those that are in it, and some of the others.
    held = [at for at, byte in enumerate(whole) if byte] if name == MEMORY else range(len(whole))
    noticed = 0
    for at in [*dice.sample(held, min(FLIPS, len(held))), *dice.sample(range(len(whole)), 20)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)

        loaded = loads_as(cache)

        assert loaded in (None, right), (SEED, at)
        noticed += loaded is None
    assert noticed >= FLIPS / 2, SEED


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0.0, 0.3, 0.99, 1.01])
def test_a_file_of_another_length_is_noticed(
    cache: TemplateCache, place: Path, name: str, length: float
) -> None:
    path = place / name
    path.chmod(0o600)
    old = path.stat().st_size
    os.truncate(path, max(old + 1, int(old * length)) if length > 1 else int(old * length))

    assert loads_as(cache) is None
    with pytest.raises(TemplateDamaged):
        check_template(cache.chain_of(place))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "directory", "garbage", "dangling link", "empty list"])
def test_what_is_no_template_is_noticed(
    cache: TemplateCache, place: Path, name: str, how: str
) -> None:
    path = place / name
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how == "garbage":
        path.write_bytes(random.Random(SEED).randbytes(2000))
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "empty list":
        path.write_bytes(b"[]")

    assert loads_as(cache) is None
    assert not cache.in_use(place)


def test_a_manifest_of_json_without_end_is_noticed(cache: TemplateCache, place: Path) -> None:
    (place / MANIFEST).unlink()
    (place / MANIFEST).write_text("[" * 100_000)

    assert loads_as(cache) is None


def test_a_damaged_one_is_replaced_by_whoever_makes_it_anew(
    cache: TemplateCache, place: Path
) -> None:
    (place / STATE).unlink()

    publish(cache, frozen_by_hand(2)).close()

    with closing(frozen_by_hand(2)) as expected:
        assert loads_as(cache) == content_of(expected)
    assert names_in(cache.directory) == {place.name, ".lock", MARK}


def test_one_of_another_vmm_under_our_name_is_not_ours(cache: TemplateCache, place: Path) -> None:
    newer = Recipe(title="by hand", parts={**RECIPE.parts, "vmm": "qemu 10.0.2"})
    place.rename(place.with_name(newer.digest[:32]))

    assert loads_as(cache, newer) is None
    assert loads_as(cache) is None


def test_a_manifest_that_claims_another_vmm_is_noticed(cache: TemplateCache, place: Path) -> None:
    (place / MANIFEST).chmod(0o600)
    text = (place / MANIFEST).read_text()
    assert "7.2.1" in text
    (place / MANIFEST).write_text(text.replace("7.2.1", "7.2.2"))

    assert loads_as(cache) is None


# A template on a template


@pytest.fixture
def layers(cache: TemplateCache) -> tuple[Path, Path]:
    """The directories of a base and of one that stands on it; nobody uses them."""
    with closing(publish(cache, frozen_by_hand(1))) as base:
        later = with_changes(base.frozen, CHANGES)
        publish(cache, later, recipe=recipe_called("layer"), base=base).close()
    return (
        cache.directory / RECIPE.digest[:32],
        cache.directory / recipe_called("layer").digest[:32],
    )


def test_a_layer_is_loaded_to_the_last_byte(
    cache: TemplateCache, layers: tuple[Path, Path]
) -> None:
    with closing(frozen_by_hand(1)) as base, closing(with_changes(base, CHANGES)) as later:
        assert loads_as(cache, recipe_called("layer")) == content_of(later)
        assert content_of(later) != content_of(base)


def test_a_layer_holds_only_the_pages_that_differ(layers: tuple[Path, Path]) -> None:
    base, layer = layers

    assert len((layer / PAGES).read_bytes()) <= 3 * 8
    assert (
        (layer / MEMORY).stat().st_blocks * 512 <= 4 * PAGE < (base / MEMORY).stat().st_blocks * 512
    )


@pytest.mark.parametrize("name", FILES)
def test_a_layer_on_a_damaged_base_is_not_loaded(
    cache: TemplateCache, layers: tuple[Path, Path], name: str
) -> None:
    path = layers[0] / name
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-3])

    # State and console of its base are nothing to a layer, which has its own.
    assert (loads_as(cache, recipe_called("layer")) is None) is (name not in (STATE, CONSOLE))


def test_a_layer_is_of_no_use_on_another_making_of_its_base(
    cache: TemplateCache, layers: tuple[Path, Path]
) -> None:
    (layers[0] / MEMORY).unlink()
    publish(cache, frozen_by_hand(99)).close()

    assert loads_as(cache) is not None
    assert loads_as(cache, recipe_called("layer")) is None
    with pytest.raises(TemplateDamaged, match="there no more"):
        check_template(cache.chain_of(layers[1]))


def test_a_layer_whose_base_is_gone_is_not_loaded(
    cache: TemplateCache, layers: tuple[Path, Path]
) -> None:
    shutil.rmtree(layers[0])

    assert loads_as(cache, recipe_called("layer")) is None


def test_a_layer_that_stands_on_itself_is_not_loaded(
    cache: TemplateCache, layers: tuple[Path, Path]
) -> None:
    shutil.rmtree(layers[0])
    shutil.copytree(layers[1], layers[0])

    assert loads_as(cache, recipe_called("layer")) is None


def test_a_base_is_not_removed_while_one_stands_on_it(
    cache: TemplateCache, layers: tuple[Path, Path]
) -> None:
    base, layer = layers

    assert not cache.remove(base)
    assert cache.remove(layer)
    assert cache.remove(base)
    assert names_in(cache.directory) == {".lock", MARK}


def test_a_layer_in_use_keeps_its_base(cache: TemplateCache, layers: tuple[Path, Path]) -> None:
    with closing(used(cache, recipe_called("layer"))):
        assert [cache.in_use(one) for one in layers] == [True, True]
        assert not any(map(cache.remove, layers))
    assert [cache.in_use(one) for one in layers] == [False, False]


# In use, and the limit


def test_what_is_in_use_is_not_removed_and_afterwards_it_is(
    cache: TemplateCache, place: Path
) -> None:
    with closing(used(cache)):
        assert not cache.remove(place)
        assert place.is_dir()

    assert cache.remove(place)
    assert names_in(cache.directory) == {".lock", MARK}


def test_what_a_killed_process_used_is_in_use_no_more(cache: TemplateCache, place: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.machine.templates.handmade import RECIPE, TemplateCache\n"
        "kept = TemplateCache(Path(sys.argv[1])).load(RECIPE, room=Path()); "
        "print('in use', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, cache.directory.parent],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"in use\n"
        assert cache.in_use(place)
        user.kill()
        user.wait()

        assert not cache.in_use(place)


def test_the_oldest_unused_goes_first_when_there_is_too_much(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    roomy = TemplateCache(tmp_path)
    for age, name in enumerate(names):
        publish(roomy, frozen_by_hand(age), recipe=recipe_called(name)).close()
        place = roomy.directory / recipe_called(name).digest[:32]
        os.utime(place / MANIFEST, (1000 + age, 1000 + age))
    used(roomy, recipe_called("a")).close()  # which makes it the newest
    limit = sum(one.bytes for one in roomy.shelved())

    with closing(used(roomy, recipe_called("b"))):
        place = roomy.directory / recipe_called("b").digest[:32]
        os.utime(place / MANIFEST, (1, 1))
        small = TemplateCache(tmp_path, limit_bytes=limit)
        publish(small, frozen_by_hand(9), recipe=recipe_called("e")).close()

        left = {one.manifest.title for one in small.shelved() if one.manifest}
        assert left == {"a", "b", "d", "e"}


def test_the_one_just_made_stays_though_it_alone_is_too_much(tmp_path: Path) -> None:
    cache = TemplateCache(tmp_path, limit_bytes=1)
    publish(cache, frozen_by_hand(1), recipe=recipe_called("older")).close()
    publish(cache, frozen_by_hand(1)).close()

    assert [one.manifest and one.manifest.title for one in cache.shelved()] == ["by hand"]


# Makers


def test_of_two_who_want_the_same_one_the_second_waits(cache: TemplateCache) -> None:
    order: list[str] = []

    async def make(name: str) -> None:
        deadline = Deadline.after(seconds=20)
        async with cache.making(
            RECIPE, deadline=deadline, on_wait=lambda _: order.append(f"{name} waits")
        ):
            order.append(f"{name} in")
            await asyncio.sleep(0.2)
            order.append(f"{name} out")

    async def both() -> None:
        await asyncio.gather(make("one"), make("other"))

    asyncio.run(both())

    first, second = sorted(("one", "other"), key=lambda name: order.index(f"{name} in"))
    assert order == [
        *(f"{first} in", f"{second} waits", f"{first} out"),
        *(f"{second} in", f"{second} out"),
    ]
    assert names_in(cache.directory) == {".lock", MARK}


def test_who_waits_is_told_now_and_then_and_can_give_up(
    cache: TemplateCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_vmsandbox.machine.templates.cache._TELL_S", 0.1)
    told: list[float] = []
    never = Deadline.after(seconds=None)

    async def wait() -> None:
        async with cache.making(RECIPE, deadline=never, on_wait=told.append):
            pytest.fail("there were two")

    async def both() -> None:
        async with cache.making(RECIPE, deadline=never):
            waiting = asyncio.create_task(wait())
            async with asyncio.timeout(60):
                while len(told) < 3:
                    await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(both())

    assert told == sorted(told)
    assert told[-1] >= 0.2
    assert names_in(cache.directory) == {".lock", MARK}


def test_who_has_to_wait_for_the_cache_holds_up_nobody(cache: TemplateCache, place: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def change() -> None:
        with changing(cache.directory):
            entered.set()
            leave.wait(60)

    async def make() -> None:
        async with cache.making(RECIPE, deadline=Deadline.after(seconds=60)):
            pass

    async def both() -> None:
        making = asyncio.create_task(make())
        await asyncio.sleep(0.3)  # which would not end before the other one had left
        assert not making.done()
        leave.set()
        await making

    changer = threading.Thread(target=change)
    changer.start()
    assert entered.wait(60)
    began = time.monotonic()
    asyncio.run(both())
    changer.join()

    assert time.monotonic() - began < 50


def test_who_was_forked_meanwhile_keeps_nobody_out(cache: TemplateCache, place: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from pytest_vmsandbox.machine.templates.locks import changing\n"
        "with changing(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        sys.stdin.read()\n"
        "        os._exit(0)\n"
        "print('left', flush=True)\n"
        "os.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, cache.directory],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"left\n"
        began = time.monotonic()
        with changing(cache.directory):
            took_s = time.monotonic() - began
        parent.communicate()

    assert took_s < 5


def test_a_host_without_descriptors_left_is_no_damage(cache: TemplateCache, place: Path) -> None:
    right = loads_as(cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[bytes | None] = []
    for spare in range(1, 14):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            with open("/dev/null", "rb") as free:  # noqa: PTH123 - the lowest that is free
                resource.setrlimit(resource.RLIMIT_NOFILE, (free.fileno() + spare, hard))
            outcomes.append(loads_as(cache))
        except OSError as error:
            outcomes.append(str(error.errno).encode())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert set(outcomes) <= {right, str(errno.EMFILE).encode()}
    assert len(set(outcomes)) == 2


def test_what_is_compared_is_in_use_meanwhile(cache: TemplateCache, place: Path) -> None:
    (place / CONSOLE).unlink()
    os.mkfifo(place / CONSOLE)
    told: list[BaseException] = []

    def check() -> None:
        try:
            cache.check(place, every_byte=True)
        except TemplateDamaged as damaged:
            told.append(damaged)

    checking = threading.Thread(target=check)
    checking.start()
    with (place / CONSOLE).open("wb"):  # as soon as somebody reads it
        assert cache.in_use(place)
        assert not cache.remove(place)
    checking.join(20)

    assert "its console" in str(told[0])
    assert cache.remove(place)
    with pytest.raises(FileNotFoundError):
        cache.check(place, every_byte=True)


def test_who_waits_too_long_is_told_so(cache: TemplateCache) -> None:
    async def wait() -> None:
        async with (
            cache.making(RECIPE, deadline=Deadline.after(seconds=5)),
            cache.making(RECIPE, deadline=Deadline.after(seconds=0.2)),
        ):
            pytest.fail("there were two")

    with pytest.raises(TimedOut, match=RECIPE.digest[:32]):
        asyncio.run(wait())


def test_whoever_fails_leaves_nothing(cache: TemplateCache) -> None:
    def fail(directory: Path) -> None:
        (directory / MEMORY).write_bytes(b"half")
        raise OSError("no")

    async def make() -> None:
        async with cache.making(RECIPE, deadline=Deadline.after(seconds=5)) as making:
            with closing(frozen_by_hand(1)) as frozen:
                making.publish(fail, frozen)  # type: ignore[arg-type]

    with pytest.raises(OSError, match="no"):
        asyncio.run(make())

    assert names_in(cache.directory) == {".lock", MARK}


def test_a_builder_killed_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    with closing(frozen_by_hand(7)) as expected:
        whole = content_of(expected)
    for number in range(MOMENTS):
        place = tmp_path / str(number)
        with _builder(place, seed=7) as builder:
            time.sleep(dice.uniform(0, 0.02))
            builder.kill()
            builder.wait()
        cache = TemplateCache(place)

        loaded = loads_as(cache)
        assert loaded in (None, whole), SEED
        # Whoever comes next can make it, or another one, and then nothing else is there.
        if number % 2 and loaded is None:
            publish(cache, frozen_by_hand(7)).close()
            assert loads_as(cache) == whole
        else:
            publish(cache, frozen_by_hand(8), recipe=recipe_called("next")).close()
        assert all(not name.startswith((".new", ".old")) for name in names_in(cache.directory))
        for one in cache.shelved():
            check_template(cache.chain_of(one.directory))


def _builder(place: Path, *, seed: int) -> subprocess.Popen[bytes]:
    """A process that is about to make a template there."""
    builder = subprocess.Popen(
        [sys.executable, "-m", "tests.machine.templates.handmade", str(place), str(seed)],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == b"begins\n"
    return builder


@pytest.mark.vm_requires("user_namespaces")
@pytest.mark.parametrize("size", [8, 40, 100, 200])
def test_a_full_disk_is_told_and_leaves_nothing_half_made(tmp_path: Path, size: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.machine.templates.handmade", tmp_path, "1", str(size << 10)],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "begins\nNo space left on device ['.lock', 'CACHEDIR.TAG'] None\n", (
        done.stderr
    )


# Whose it is


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_refused(
    cache: TemplateCache, place: Path, mode: int
) -> None:
    cache.directory.chmod(mode)

    for attempt in _uses(cache):
        with pytest.raises(RequestInvalid, match=f"mode {mode:04o}"):
            attempt()


@pytest.mark.parametrize("name", ["", *FILES])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_a_template_that_others_may_write_is_made_anew(
    cache: TemplateCache, place: Path, name: str, bits: int
) -> None:
    (place / name).chmod((place / name).stat().st_mode | bits)

    assert loads_as(cache) is None
    publish(cache, frozen_by_hand(1)).close()
    assert loads_as(cache) is not None


@pytest.mark.parametrize("name", FILES)
def test_a_template_that_is_made_of_links_is_made_anew(
    cache: TemplateCache, place: Path, tmp_path: Path, name: str
) -> None:
    (place / name).rename(tmp_path / "elsewhere")
    (place / name).symlink_to(tmp_path / "elsewhere")

    assert loads_as(cache) is None
    publish(cache, frozen_by_hand(1)).close()
    assert loads_as(cache) is not None
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="VMS-TEST-ROOT: only root gives files away")
@pytest.mark.parametrize("name", ["", *FILES])
def test_a_template_of_somebody_else_is_made_anew(
    cache: TemplateCache, place: Path, name: str
) -> None:
    os.chown(place / name, 12345, 12345)

    assert loads_as(cache) is None
    publish(cache, frozen_by_hand(1)).close()
    assert loads_as(cache) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="VMS-TEST-ROOT: only root gives files away")
def test_a_directory_of_somebody_else_is_refused(cache: TemplateCache, place: Path) -> None:
    os.chown(cache.directory, 12345, 12345)

    for attempt in _uses(cache):
        with pytest.raises(RequestInvalid, match="belongs to uid 12345"):
            attempt()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("")

    with pytest.raises((RequestInvalid, OSError)):
        TemplateCache(tmp_path).load(RECIPE, room=tmp_path)


def _uses(cache: TemplateCache) -> Iterator[Callable[[], object]]:
    yield lambda: cache.load(RECIPE, room=cache.directory.parent)
    yield cache.shelved
    yield lambda: publish(cache, frozen_by_hand(1))


def test_a_manifest_says_what_it_was_made_of(place: Path) -> None:
    manifest = read_manifest(place)

    assert manifest.parts == RECIPE.parts
    assert (manifest.title, manifest.base) == ("by hand", None)
    assert manifest.digest.startswith(place.name)
