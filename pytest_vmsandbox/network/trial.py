"""The trial: whether there can be taps here, found out by making one."""

from __future__ import annotations

from contextlib import ExitStack

from pytest_vmsandbox.linux.link_notices import LinkNotices
from pytest_vmsandbox.linux.rtnetlink import RouteSocket
from pytest_vmsandbox.linux.tun import open_tap
from pytest_vmsandbox.network.cable import add_bridge, add_port
from pytest_vmsandbox.network.own_address import take_all, take_nothing
from pytest_vmsandbox.network.wire_kind import WireKind

_BRIDGE, _TAP = "trialbridge", "trialtap"


def decide_kind(wish: str, *, walled: bool) -> tuple[WireKind, str]:
    """Which kind of wires it is to be, and why it is not taps, where it is not.

    `wish` is one of WISHES; sockets are always to be had, so that is what it is where taps are
    wished for in vain.
    """
    if wish == WireKind.SOCKET:
        return WireKind.SOCKET, "sockets are wished for"
    if not walled:
        return WireKind.SOCKET, "without walls there is no network namespace for them"
    try:
        _try_tap()
    except OSError as error:
        return WireKind.SOCKET, str(error)
    return WireKind.TAP, ""


def _try_tap() -> None:
    """Make all that there will be, and remove it; OSError says what could not be done."""
    with LinkNotices(), RouteSocket() as route, ExitStack() as undo:
        undo.enter_context(open_tap(_TAP, offloads=True))
        add_bridge(route, _BRIDGE, learns=True)
        undo.callback(route.delete, _BRIDGE)
        add_port(route, _TAP, _BRIDGE)
        undo.callback(take_all, route, _BRIDGE, None)
        take_nothing(route, _BRIDGE)
