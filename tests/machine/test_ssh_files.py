"""What is written for ssh, and what is believed of a guest's keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox.machine.ssh_files import (
    SshRoute,
    parse_public_keys,
    render_configuration,
    render_known_hosts,
)

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1ldfLDIHOfXW2OTqIkUWOqk2PnkDyHI6gKyjTqsbkX"


def test_keys_are_read_without_their_comments() -> None:
    other = KEY.replace("ssh-ed25519", "ecdsa-sha2-nistp256") + "=="

    assert parse_public_keys(f"{KEY} root@guest\n{other}\n") == [KEY, other]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "sshd: no hostkeys available -- exiting.",
        "ssh-ed25519",
        "ssh-ed25519 not*base64*at*all*",
        f"@cert-authority * {KEY}",
        f"somebody.else {KEY}",
        f"\x0b{KEY}",
    ],
)
def test_a_line_that_is_no_key_is_not_believed(line: str) -> None:
    assert parse_public_keys(f"{line}\n{KEY}\n") == [KEY]


def test_keys_are_known_by_the_alias_alone() -> None:
    assert render_known_hosts("r1-main-m1", [KEY, KEY]) == f"r1-main-m1 {KEY}\n" * 2


def test_paths_are_what_they_are_to_ssh() -> None:
    place = Path("/tmp/a %h b")
    text = render_configuration(
        SshRoute(
            name="vm1",
            alias="r1-main-m1",
            port=40022,
            user="root",
            identity=place / "key",
            known_hosts=place / "known",
        )
    )

    assert text.startswith("Host vm1\n    HostName 127.0.0.1\n    Port 40022\n")
    assert '    IdentityFile "/tmp/a %%h b/key"\n' in text
    assert '    UserKnownHostsFile "/tmp/a %%h b/known"\n' in text
