"""What a command behind walls sees, may do, and leaves; as root and as an ordinary user."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.jail.sandbox_config import DEFAULT_PATH
from pytest_vmsandbox.jail.sandbox_plan import TMPFS_MIB
from tests.children import no_child_is_left, remember_children
from tests.jail.conftest import USR, Runner
from tests.people import CHECKOUT, Kind, Person

# Prints the mount points that something could be written to.
WRITABLE_MOUNTS = """
import os
for line in open("/proc/self/mounts"):
    path = line.split()[1].encode().decode("unicode_escape")
    try:
        if not os.statvfs(path).f_flag & os.ST_RDONLY:
            print(path)
    except OSError:
        pass
"""

# Mounts below a root directory, in a mount namespace that this is started in.
NESTED = """
import os, subprocess
from pytest_vmsandbox.jail.sandbox import run_sandbox

def tmpfs(path):
    os.makedirs(path, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)

for path in ("/mnt", "/mnt/data", "/mnt/data/deep", "/mnt/data/w"):
    tmpfs(path)
os.mkdir("/mnt/usr")
for name in ("bin", "lib", "lib64"):
    os.symlink("usr/" + name, "/mnt/" + name)
write = "for d in / /data /data/deep /data/w; do touch $d/x 2>&- && echo $d; done; true"
print(run_sandbox(
    ["sh", "-c", write],
    filesystem_root="/mnt",
    extra_mounts=[("/usr", "/usr", None, "bind")],
    filesystem_writable_paths=["/data/w"],
))
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def python(script: str) -> list[str]:
    return ["/usr/bin/python3", "-I", "-S", "-c", script]


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    remember_children()
    yield
    assert no_child_is_left()


class TestFileSystem:
    def test_nothing_is_writable_on_any_mount(self, somebody: Runner) -> None:
        seen = somebody.says(python(WRITABLE_MOUNTS), filesystem_writable_paths=None)

        assert seen == ""

    def test_only_the_writable_paths_are(self, somebody: Runner, root: Path) -> None:
        seen = somebody.says(
            "for d in / /data /data/new /database /usr; do touch $d/x 2>&- && echo $d; done; true",
            filesystem_root=root,
            filesystem_writable_paths=["/data"],
            extra_mounts=[USR],
        )

        assert seen == "/data\n"
        assert (root / "data/x").stat().st_uid == somebody.uid
        assert not (root / "database/x").exists()

    def test_the_ancestors_of_a_writable_path_are_read_only(
        self, somebody: Runner, root: Path
    ) -> None:
        deep = root / "data/a/b"
        deep.mkdir(parents=True)
        for folder in (deep, deep.parent):
            os.chown(folder, somebody.uid, -1)

        seen = somebody.says(
            "touch /data/a/b/x; touch /data/a/x || mv /data/a/b /data/c || echo kept",
            filesystem_root=root,
            filesystem_writable_paths=["/data/a/b"],
            extra_mounts=[USR],
        )

        assert seen == "kept\n"
        assert names(deep) == ["x"]
        assert names(root / "data") == ["a"]

    def test_everything_is_writable_where_nothing_is_said(
        self, somebody: Runner, root: Path
    ) -> None:
        somebody.says("touch /x /data/x && chmod 0600 /x", filesystem_root=root, extra_mounts=[USR])

        assert (root / "x").stat().st_uid == somebody.uid
        assert stat.S_IMODE((root / "x").stat().st_mode) == 0o600

    def test_a_file_alone_can_be_writable(self, somebody: Runner, root: Path) -> None:
        for name in ("a", "b"):
            (root / name).touch()
            os.chown(root / name, somebody.uid, -1)

        somebody(
            "echo a > /a; echo b > /b",
            filesystem_root=root,
            filesystem_writable_paths=["/a"],
            extra_mounts=[USR],
        )

        assert ((root / "a").read_text(), (root / "b").read_text()) == ("a\n", "")

    def test_a_writable_link_leads_nowhere_but_into_the_root(
        self, somebody: Runner, root: Path, scratch: Path
    ) -> None:
        outside = scratch / "outside"
        inside = root / str(outside).lstrip("/")
        for folder in (outside, inside):
            folder.mkdir(parents=True)
            os.chown(folder, somebody.uid, -1)
        (root / "link").symlink_to(outside)

        somebody.says(
            "touch /link/x",
            filesystem_root=root,
            filesystem_writable_paths=["/link"],
            extra_mounts=[USR],
        )

        assert names(inside) == ["x"]
        assert names(outside) == []

    def test_what_lies_outside_the_root_can_not_be_reached(
        self, somebody: Runner, root: Path
    ) -> None:
        (root / "climb").symlink_to("../../../../../../../etc")
        (root / "name").symlink_to("/etc/passwd")

        seen = somebody(
            "cd ../../..; pwd; cat etc/passwd climb/passwd name /proc/1/root/etc/passwd",
            filesystem_root=root,
            extra_mounts=[USR, ("proc", "/proc", "proc")],
        )

        assert seen[:2] == (1, "/\n")

    def test_a_root_by_a_link_is_the_directory_behind_it(
        self, somebody: Runner, root: Path
    ) -> None:
        link = root.with_name("link")
        link.symlink_to(root)

        assert "database" in somebody.says("ls /", filesystem_root=link, extra_mounts=[USR])

    def test_mounts_below_the_root_are_read_only_too(self, ourselves: Runner) -> None:
        if ourselves.uid != 0:
            pytest.skip("takes root: it mounts, in a namespace of its own")
        done = subprocess.run(
            ["unshare", "--mount", "--propagation=private", sys.executable, "-c", NESTED],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert done.stdout == "(0, b'/data/w\\n', b'')\n", done.stderr

    def test_what_root_owns_of_the_kernel_can_not_be_written(self, somebody: Runner) -> None:
        written = somebody(
            "for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /sys/kernel/uevent_helper "
            "/sys/power/state /dev/new; do (: >> $f) 2>&- && echo $f; done; true"
        )

        assert written == (0, "", "")

    def test_no_mount_of_the_kernels_can_be_written(self, somebody: Runner) -> None:
        writable = somebody.says(python(WRITABLE_MOUNTS)).splitlines()

        assert [path for path in writable if path.startswith(("/proc", "/sys"))] == []
        assert "/dev" not in writable

    def test_the_devices_that_everybody_uses_work(self, somebody: Runner) -> None:
        seen = somebody.says(
            "head -c 4 /dev/zero | wc -c; echo x > /dev/null; head -c 1 /dev/urandom | wc -c"
        )

        assert seen == "4\n1\n"

    def test_no_disk_can_be_opened(self, somebody: Runner) -> None:
        disks = [path for path in Path("/dev").iterdir() if path.is_block_device()]
        if not disks:
            pytest.skip("this host has no block device")

        opened = somebody(f"for d in {' '.join(map(str, disks))}; do : < $d && echo $d; done; true")

        assert opened[1] == ""


class TestExtraMounts:
    def test_a_tmpfs_is_empty_private_limited_and_gone_afterwards(
        self, somebody: Runner, root: Path
    ) -> None:
        again = {"filesystem_root": root, "extra_mounts": [USR, (None, "/shm", "tmpfs")]}

        first = somebody.says(
            "ls -A /shm; touch /shm/x; df -m --output=size /shm | tail -1", **again
        )
        second = somebody.says("ls -A /shm", **again)

        assert first.split() == [str(TMPFS_MIB)]
        assert second == ""
        assert not (root / "shm").exists()

    def test_a_tmpfs_takes_no_more_than_its_size(self, somebody: Runner) -> None:
        code, _, err = somebody(
            f"dd if=/dev/zero of=/mnt/x bs=1M count={TMPFS_MIB + 1}",
            extra_mounts=[(None, "/mnt", "tmpfs")],
        )

        assert code == 1
        assert "No space left" in err

    def test_a_bound_directory_and_a_bound_file_show_the_source(
        self, somebody: Runner, root: Path, scratch: Path
    ) -> None:
        source = scratch / "source"
        source.mkdir()
        (source / "file").write_text("text\n")
        mounts = [
            USR,
            (source, "/mnt/deep/dir", None, "bind"),
            (source / "file", "/data/f", None, "bind"),
        ]

        seen = somebody.says(
            "cat /mnt/deep/dir/file /data/f", filesystem_root=root, extra_mounts=mounts
        )

        assert seen == "text\ntext\n"
        assert not (root / "mnt").exists()
        assert names(root / "data") == []

    @pytest.mark.parametrize(
        ("writable", "written"),
        [("all", "/data/t\n/data/b\n"), (["/data/b"], "/data/b\n"), (["/database"], "")],
    )
    def test_they_are_subject_to_the_writable_paths(
        self, somebody: Runner, root: Path, scratch: Path, writable: Any, written: str
    ) -> None:
        source = scratch / "source"
        source.mkdir()
        os.chown(source, somebody.uid, -1)

        seen = somebody.says(
            "for d in /data/t /data/b; do touch $d/x 2>&- && echo $d; done; true",
            filesystem_root=root,
            filesystem_writable_paths=writable,
            extra_mounts=[USR, (None, "/data/t", "tmpfs"), (source, "/data/b", None, "bind")],
        )

        assert seen == written
        assert names(source) == (["x"] if "/data/b" in written else [])

    def test_remount_ro_makes_a_mount_or_a_mere_directory_read_only(
        self, somebody: Runner, root: Path
    ) -> None:
        seen = somebody.says(
            "for d in / /data /database /shm; do touch $d/x 2>&- && echo $d; done; true",
            filesystem_root=root,
            extra_mounts=[
                USR,
                (None, "/shm", "tmpfs"),
                (None, "/shm", None, "remount,ro"),
                (None, "/data", None, "remount,ro"),
            ],
        )

        assert seen == "/\n/database\n"

    def test_remount_ro_of_the_root_leaves_what_is_mounted_later_writable(
        self, somebody: Runner, root: Path
    ) -> None:
        seen = somebody.says(
            "for d in / /data /shm; do touch $d/x 2>&- && echo $d; done; true",
            filesystem_root=root,
            extra_mounts=[USR, (None, "/", None, "remount,ro"), (None, "/shm", "tmpfs")],
        )

        assert seen == "/shm\n"

    def test_where_no_mount_point_can_be_made_it_says_so(
        self, somebody: Runner, root: Path
    ) -> None:
        if somebody.uid == 0:
            pytest.skip("root may write everywhere")
        (root / "closed").mkdir()
        (root / "closed").chmod(0o555)
        options = {**in_root(root), "extra_mounts": [USR, (None, "/closed/x", "tmpfs")]}

        with pytest.raises(
            (RequestInvalid, AssertionError), match=r"/closed/x .* Permission denied"
        ):
            somebody("true", **options)

    def test_proc_shows_the_commands_own_processes_and_can_not_be_written(
        self, somebody: Runner, root: Path
    ) -> None:
        seen = somebody.says(
            "cd /proc; ls -d [0-9]* | wc -w; (: > self/comm) 2>&- || echo kept",
            filesystem_root=root,
            extra_mounts=[USR, ("proc", "/proc", "proc", "")],
        )

        assert int(seen.split()[0]) < 6
        assert seen.endswith("kept\n")

    def test_the_hosts_proc_shows_no_process_of_the_host(self, somebody: Runner) -> None:
        seen = somebody.says("cd /proc; ls -d [0-9]*")

        assert str(os.getpid()) not in seen.split()
        assert len(seen.split()) < 6

    def test_no_trick_leads_a_mount_point_outside(
        self, somebody: Runner, root: Path, scratch: Path
    ) -> None:
        outside = scratch / "outside"
        outside.mkdir(mode=0o777)
        outside.chmod(0o777)
        (root / "out").symlink_to("../outside")
        (root / "away").symlink_to(outside)
        before = names(scratch)

        seen = somebody.says(
            "touch outside/y/t outside/z/t && echo inside",
            filesystem_root=root,
            extra_mounts=[
                USR,
                (None, "/../outside/y", "tmpfs"),
                (None, "/../../../../outside/z", "tmpfs"),
            ],
        )
        for trick in ("/out/x", "/away/x"):
            mounts = [USR, (None, trick, "tmpfs")]
            with pytest.raises((RequestInvalid, AssertionError), match="leads nowhere"):
                somebody(["true"], filesystem_root=root, extra_mounts=mounts)

        assert seen == "inside\n"
        assert names(outside) == []
        assert names(scratch) == before
        assert not (root / "outside").exists()

    def test_mount_points_are_gone_also_where_the_program_is_not_there(
        self, ourselves: Runner, scratch: Path
    ) -> None:
        mounts = [(None, "/a/b", "tmpfs"), (None, "/c", "tmpfs")]

        with pytest.raises(FileNotFoundError):
            ourselves(["/nowhere"], filesystem_root=scratch, extra_mounts=mounts)

        assert names(scratch) == []

    def test_a_path_that_is_not_there_can_not_be_made_writable_or_read_only(
        self, ourselves: Runner, scratch: Path
    ) -> None:
        with pytest.raises(RequestInvalid, match="'/data' is not there"):
            ourselves("true", filesystem_root=scratch, filesystem_writable_paths=["/data"])
        with pytest.raises(RequestInvalid, match="'/data' is not there"):
            ourselves(
                "true", filesystem_root=scratch, extra_mounts=[(None, "/data", None, "remount,ro")]
            )


class TestSurroundings:
    def test_the_environment_is_a_path_and_nothing_else(
        self, somebody: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SECRET", "1")

        assert somebody.says(["env"]) == f"PATH={DEFAULT_PATH}\n"
        assert somebody.says(["/usr/bin/env"], env={"A": "b c"}) == "A=b c\n"
        assert somebody.says(["env"], env={}) == ""

    def test_it_begins_where_it_is_told(self, somebody: Runner, root: Path) -> None:
        assert somebody.says("pwd") == "/\n"
        assert somebody.says(["pwd"], cwd="/data/../database", **in_root(root)) == "/database\n"

    def test_it_runs_as_ourselves_without_any_privilege(self, somebody: Runner) -> None:
        status = somebody.says("id -u; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")

        uid, *lines = status.splitlines()
        values = dict(line.split(":\t") for line in lines)
        assert int(uid) == somebody.uid
        assert values["NoNewPrivs"] == "1"
        assert {int(value, 16) for name, value in values.items() if name.startswith("Cap")} == {0}

    def test_it_has_no_way_to_more_namespaces_or_mounts(self, somebody: Runner) -> None:
        for attempt in (
            "unshare --user true",
            "unshare --mount true",
            "mount -t tmpfs none /mnt",
            "mount -o remount,rw /proc",
            "umount /proc",
            "chroot / true",
        ):
            assert not somebody.succeeds(attempt), attempt

    def test_a_set_user_id_program_gains_nothing(
        self, people: dict[Kind, Person], somebody: Runner, scratch: Path
    ) -> None:
        other = people[Kind.SUDO_TO_ALL]
        program = scratch / "id"
        program.write_bytes(Path("/usr/bin/id").read_bytes())
        os.chown(program, other.uid, -1)
        program.chmod(0o4755)

        directly = people[Kind.ORDINARY].python(
            "import json, subprocess, sys\n"
            "print(json.dumps(subprocess.check_output([sys.argv[1], '-u'], text=True)))",
            program,
        )
        seen = somebody.says([str(program), "-u"])

        assert directly == f"{other.uid}\n"
        assert seen == f"{somebody.uid}\n"

    def test_an_isolated_network_has_a_loopback_that_is_down(self, somebody: Runner) -> None:
        seen = somebody.says("ip -o link", network="isolated")

        (line,) = seen.splitlines()
        assert "lo: <LOOPBACK>" in line

    def test_an_undefined_network_is_the_hosts(self, somebody: Runner) -> None:
        own = str(Path("/proc/self/ns/net").readlink())

        assert somebody.says(["readlink", "/proc/self/ns/net"]) == f"{own}\n"
        assert somebody.says(["readlink", "/proc/self/ns/net"], network="isolated") != f"{own}\n"

    @pytest.mark.parametrize("mounts", ["isolated", "undefined"])
    def test_it_sees_no_namespace_of_the_host_but_the_network(
        self, somebody: Runner, mounts: str
    ) -> None:
        kinds = ("user", "mnt", "pid", "ipc", "uts", "cgroup")

        seen = somebody.says(f"cd /proc/self/ns; readlink {' '.join(kinds)}", mounts=mounts)

        host = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in kinds]
        assert not set(seen.split()) & set(host)

    def test_a_relative_program_is_looked_for_in_its_directory(
        self, somebody: Runner, root: Path
    ) -> None:
        (root / "data/program").write_text("#!/bin/sh\necho $0 $1\n")
        (root / "data/program").chmod(0o755)
        options = {**in_root(root), "cwd": "/data"}

        seen = [
            somebody.says(["./program", "a"], **options),
            somebody.says(["program", "a"], env={"PATH": "/bin:/data"}, **options),
            somebody.says(["program", "a"], env={"PATH": ":/bin"}, **options),
        ]

        assert seen == ["/data/program a\n"] * 3


def in_root(root: Path) -> dict[str, Any]:
    return {"filesystem_root": root, "extra_mounts": [USR]}
