"""Views, looked at from outside: what is made for them, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.requests import Who
from pytest_vmsandbox.warden.steps import Access, Bind, Step, Symlink, Tmpfs
