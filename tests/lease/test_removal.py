"""Guarded removal of trees of every shape."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease.place import open_place
from pytest_vmsandbox.lease.removal import remove_tree
from tests.precious import ODD_NAMES, make_run_directory

DEPTH = 3000


def _remove(path: Path) -> None:
    with open_place(path) as place:
        remove_tree(place)


def _open_descriptors() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def test_files_of_every_kind_go(base: Path) -> None:
    run = make_run_directory(base)
    os.mkfifo(run / "fifo")
    (run / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "socket"))
    for name in ODD_NAMES:
        (run / "m1" / name / name).mkdir(parents=True)

    _remove(run)

    assert not run.exists()


def test_a_tree_deeper_than_paths_are_long_goes(base: Path) -> None:
    run = make_run_directory(base)
    folder = os.open(run, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=folder)
        deeper = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = deeper
    os.close(os.open("file", os.O_CREAT, dir_fd=folder))
    os.close(folder)

    _remove(run)

    assert not run.exists()


def test_a_folder_that_was_closed_to_us_goes(base: Path) -> None:
    run = make_run_directory(base)
    for mode in (0o000, 0o500, 0o300):
        closed = run / f"closed-{mode:o}"
        closed.mkdir()
        (closed / "file").touch()
        closed.chmod(mode)

    _remove(run)

    assert not run.exists()


def test_no_descriptor_stays_open(base: Path) -> None:
    before = _open_descriptors()

    _remove(make_run_directory(base))

    assert _open_descriptors() == before


def test_several_removers_do_not_hurt_each_other(base: Path) -> None:
    run = make_run_directory(base)
    for number in range(200):
        (run / f"d{number}" / "sub").mkdir(parents=True)
        (run / f"d{number}" / "file").touch()
    errors: list[Exception] = []

    def remove() -> None:
        try:
            with open_place(run) as place:
                ready.wait()
                remove_tree(place)
        except (TeardownRefused, OSError) as error:
            errors.append(error)

    ready = threading.Barrier(4)
    removers = [threading.Thread(target=remove) for _ in range(4)]
    for remover in removers:
        remover.start()
    for remover in removers:
        remover.join()

    assert errors == []
    assert not run.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="making a file immutable needs root")
def test_what_resists_stays_and_is_named_with_its_marker(base: Path) -> None:
    run = make_run_directory(base)
    resisting = run / "m1" / "resisting file"
    resisting.touch()
    made = subprocess.run(["chattr", "+i", resisting], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"chattr: {made.stderr.strip()}")
    try:
        with pytest.raises(TeardownRefused, match="resisting file") as refused:
            _remove(run)
    finally:
        subprocess.run(["chattr", "-i", resisting], check=True)

    assert refused.value.inspect == f"ls -ld -- '{resisting}'"
    assert sorted(found.name for found in run.rglob("*")) == [
        ".vmsandbox-run",
        "m1",
        "resisting file",
    ]
    _remove(run)
    assert not run.exists()
