"""Image files below a folder: which endings count, and in which order they are listed."""

from __future__ import annotations

import os
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def images_below(folder: str | Path) -> list[str]:
    """The paths of all images below a folder, recursively, sorted by name; hidden files and folders are left out."""
    paths: list[str] = []
    for entry in visible_entries(folder):
        if entry.is_dir():
            paths += images_below(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            paths.append(entry.path)
    return paths


def visible_entries(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
