"""Mount flags and the words for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.linux import MountFlags

SPEAKABLE = [
    flag
    for flag in MountFlags
    if not flag & (MountFlags.PROPAGATION | MountFlags.KERNEL_ONLY | MountFlags.POSIXACL)
]
SPREADING = [flag for flag in MountFlags if flag & MountFlags.PROPAGATION]

flags_with_words = st.builds(
    lambda plain, spread: MountFlags(sum(plain) | spread),
    st.sets(st.sampled_from(SPEAKABLE)),
    st.sampled_from([MountFlags(0), *SPREADING]),
)
words = st.sampled_from(
    [
        "ro",
        "rw",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "noexec",
        "sync",
        "async",
        "remount",
        "mand",
        "nomand",
        "dirsync",
        "symfollow",
        "nosymfollow",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "bind",
        "rbind",
        "move",
        "rec",
        "silent",
        "loud",
        "unbindable",
        "private",
        "slave",
        "shared",
        "runbindable",
        "rprivate",
        "rslave",
        "rshared",
        "relatime",
        "norelatime",
        "iversion",
        "noiversion",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
    ]
)


@given(flags_with_words)
def test_what_tostr_says_fromstr_reads_back(flags: MountFlags) -> None:
    assert MountFlags.fromstr(flags.tostr()) == flags


@given(st.lists(words))
def test_a_list_of_words_means_the_same_after_a_round_trip(said: list[str]) -> None:
    flags = MountFlags.fromstr(",".join(said))

    assert MountFlags.fromstr(flags.tostr()) == flags
    assert (flags & MountFlags.PROPAGATION).bit_count() <= 1


@given(flags_with_words, st.lists(words))
def test_change_goes_from_left_to_right(flags: MountFlags, said: list[str]) -> None:
    one_by_one = flags
    for word in said:
        one_by_one = one_by_one.change(word)

    assert flags.change(",".join(said)) == one_by_one


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("", MountFlags(0)),
        ("ro", MountFlags.RDONLY),
        ("rw", MountFlags(0)),
        ("ro,rw", MountFlags(0)),
        ("rw,ro", MountFlags.RDONLY),
        ("ro,nosuid,nodev,noexec", MountFlags(1 | 2 | 4 | 8)),
        ("nosuid,suid", MountFlags(0)),
        ("nodev,dev", MountFlags(0)),
        ("noexec,exec", MountFlags(0)),
        ("noatime,nodiratime", MountFlags.NOATIME | MountFlags.NODIRATIME),
        ("noatime,atime", MountFlags(0)),
        ("nodiratime,diratime", MountFlags(0)),
        ("nosymfollow", MountFlags.NOSYMFOLLOW),
        ("nosymfollow,symfollow", MountFlags(0)),
        ("sync,dirsync", MountFlags.SYNCHRONOUS | MountFlags.DIRSYNC),
        ("sync,async", MountFlags(0)),
        ("silent", MountFlags.SILENT),
        ("silent,loud", MountFlags(0)),
        ("mand", MountFlags.MANDLOCK),
        ("mand,nomand", MountFlags(0)),
        ("relatime", MountFlags.RELATIME),
        ("relatime,norelatime", MountFlags(0)),
        ("iversion", MountFlags.I_VERSION),
        ("strictatime", MountFlags.STRICTATIME),
        ("lazytime", MountFlags.LAZYTIME),
        ("lazytime,nolazytime", MountFlags(0)),
        ("remount,bind,ro", MountFlags.REMOUNT | MountFlags.BIND | MountFlags.RDONLY),
        ("move", MountFlags.MOVE),
        ("rec", MountFlags.REC),
        ("rbind", MountFlags.BIND | MountFlags.REC),
        ("private", MountFlags.PRIVATE),
        ("rprivate", MountFlags.PRIVATE | MountFlags.REC),
        ("rslave", MountFlags.SLAVE | MountFlags.REC),
        ("runbindable", MountFlags.UNBINDABLE | MountFlags.REC),
        ("shared,private", MountFlags.PRIVATE),
        ("private,slave,unbindable,shared", MountFlags.SHARED),
    ],
)
def test_words_mean_these_flags(text: str, flags: MountFlags) -> None:
    assert MountFlags.fromstr(text) == flags


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (MountFlags(0), ""),
        (MountFlags.BIND | MountFlags.REC, "rbind"),
        (MountFlags.NOEXEC | MountFlags.RDONLY | MountFlags.NOSUID, "ro,nosuid,noexec"),
        (MountFlags.PRIVATE | MountFlags.REC, "rprivate"),
        (MountFlags.BIND | MountFlags.REC | MountFlags.SLAVE, "rbind,slave"),
        (MountFlags.BIND | MountFlags.REC | MountFlags.MOVE, "rbind,move"),
        (MountFlags.REC | MountFlags.REMOUNT, "remount,rec"),
    ],
)
def test_flags_are_said_in_the_usual_words_and_the_kernels_order(
    flags: MountFlags, text: str
) -> None:
    assert flags.tostr() == text


@pytest.mark.parametrize(
    "word",
    [
        "foo",
        "noro",
        "norw",
        "nosync",
        "nodirsync",
        "noremount",
        "nobind",
        "norbind",
        "nomove",
        "norec",
        "nosilent",
        "noshared",
        "noprivate",
        "nonosuid",
        "RO",
        "defaults",
        "MS_RDONLY",
        *(" ro", "ro ", "ro,", ",ro", "ro,,rw", "ro\n", "ro nosuid", "\0"),
    ],
)
def test_a_word_that_the_kernel_has_not_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"^not a mount option of the kernel: '"):
        MountFlags.fromstr(word)


@pytest.mark.parametrize(
    "flags",
    [
        MountFlags.PRIVATE | MountFlags.SHARED,
        MountFlags.PRIVATE | MountFlags.SLAVE | MountFlags.REC,
        MountFlags.POSIXACL,
        MountFlags.KERNMOUNT,
        MountFlags.NOUSER | MountFlags.RDONLY,
        MountFlags(1 << 40),
        MountFlags(0x200),
    ],
)
def test_flags_without_words_are_not_said(flags: MountFlags) -> None:
    with pytest.raises(ValueError, match=f"^no mount options say {int(flags):#x}$"):
        flags.tostr()


def test_a_change_leaves_the_other_flags_alone() -> None:
    before = MountFlags.NOSUID | MountFlags.RDONLY | MountFlags.SHARED

    assert before.change("rw,slave,noexec") == (
        MountFlags.NOSUID | MountFlags.SLAVE | MountFlags.NOEXEC
    )
    assert before.change("") == before
