"""What a machine boots from: images built from the distribution's packages, or brought along."""

from pytest_vmsandbox.image.cache import ensure_image, list_images, remove_image
from pytest_vmsandbox.image.image import Image, open_image, verify_image
from pytest_vmsandbox.image.progress import Progress, SilentProgress
from pytest_vmsandbox.image.recipe import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Image",
    "Progress",
    "Recipe",
    "SilentProgress",
    "ensure_image",
    "list_images",
    "open_image",
    "remove_image",
    "verify_image",
]
