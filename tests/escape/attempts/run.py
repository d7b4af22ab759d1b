"""The runner: makes every attempt in a process of its own, and says what came of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from tests.escape.attempts import (
    descriptors,
    files,
    image,
    ipc,
    kernel,
    namespaces,
    network,
    privileges,
    processes,
    resources,
)
from tests.escape.attempts.table import ATTEMPTS, RESULTS, Attempt, Refused, Targets

SUBJECTS = (
    files,
    image,
    descriptors,
    network,
    processes,
    ipc,
    namespaces,
    privileges,
    kernel,
    resources,
)

# An attempt that hangs is neither refused nor has it got out.
_ATTEMPT_S = 20


def main(form: str) -> None:
    """Make the attempts in the order of the table; one JSON object for each goes to stdout."""
    targets = Targets.parse(form)
    harmless_only = not targets.image.startswith("/proc/self/fd/")
    for attempt in ATTEMPTS.values():
        if not (attempt.harmful and harmless_only):
            result = {"attempt": attempt.name, **_in_a_child(attempt, targets)}
            os.write(1, json.dumps(result).encode() + b"\n")


def _in_a_child(attempt: Attempt, targets: Targets) -> dict[str, str]:
    results, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(results)
        os.dup2(told, RESULTS)
        os.close(told)
        signal.alarm(_ATTEMPT_S)
        answer = json.dumps(_tried(attempt, targets)).encode()
        os.write(RESULTS, answer[:4000])
        os._exit(0)
    os.close(told)
    answer = b"".join(iter(lambda: os.read(results, 4096), b""))
    os.close(results)
    _, status = os.waitpid(child, 0)
    if answer:
        form: dict[str, str] = json.loads(answer)
        return form
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    verdict = "refused" if number in (signal.SIGKILL, signal.SIGSYS) else "broken"
    return {"verdict": verdict, "detail": signal.Signals(number).name if number else str(status)}


def _tried(attempt: Attempt, targets: Targets) -> dict[str, str]:
    try:
        got = attempt.run(targets)
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, str(error.errno))
        return {"verdict": "refused", "detail": f"{code}: {error}"[:500]}
    except Refused as error:
        return {"verdict": "refused", "detail": str(error)[:500]}
    except BaseException:  # noqa: BLE001 - what is wrong with the attempt is told, whatever it is
        return {"verdict": "broken", "detail": traceback.format_exc()[-2000:]}
    return {"verdict": "gets out", "detail": got[:500]}


def start() -> None:
    """What the zip file runs: a word says as what, the rest is for that."""
    word, *rest = sys.argv[1:]
    if word == "attempts":
        main(*rest)
        return
    from tests.escape.attempts import others

    others.ROLES[word](Path(rest[0]), *rest[1:])
