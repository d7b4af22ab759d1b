"""Whose code something is: our own package comes with the recipe, wherever in it a module lies."""

from __future__ import annotations

import json

import pytest

from pytest_vmsandbox.machine.templates.code_origin import Origin, origin_of, origin_of_file
from tests.people import CHECKOUT


@pytest.mark.parametrize("place", ["__init__.py", "errors.py", "machine/templates/layer.py"])
def test_all_of_our_package_counts_by_its_name_alone(place: str) -> None:
    assert origin_of_file(CHECKOUT / "pytest_vmsandbox" / place) is Origin.PYTHON


def test_what_lies_beside_our_package_is_the_users_own() -> None:
    assert origin_of_file(__file__) is Origin.OWN
    assert origin_of(test_what_lies_beside_our_package_is_the_users_own) is Origin.OWN


def test_installed_packages_and_python_itself_are_told_apart() -> None:
    assert origin_of(json.dumps) is Origin.PYTHON
    assert origin_of_file(pytest.__file__) is Origin.INSTALLED
    assert origin_of(len) is Origin.PYTHON
