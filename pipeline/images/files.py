"""Image files below a folder: which files count as images, in which order they are listed, and what is left out."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jpe", ".jfif",
    ".apng", ".avif", ".jp2", ".j2k", ".jpf", ".jpx", ".dib", ".tga", ".mpo", ".qoi",
)  # fmt: skip
KNOWN = frozenset(EXTENSIONS)
# Formats of Pillow with a signature at their start; others would accept arbitrary bytes, or cannot be decoded.
SIGNED_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP")
# Endings of other files: these are not opened to find out what they are.
OTHER = frozenset(
    "txt md rst csv tsv json jsonl ndjson yaml yml toml xml html htm css js py ipynb log ini cfg zip gz bz2 xz tar tgz 7z rar "
    "parquet arrow feather npy npz mat h5 hdf5 pkl pickle pt pth safetensors onnx pdf doc docx xls xlsx mp4 avi mov mkv webm "
    "mp3 wav svg eps db sqlite lock part tmp bak".split()
)
SILENT_NAMES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))  # systems leave them, as they do hidden files
JUNK_FOLDERS = frozenset(
    ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "#recycle", "#snapshot", "@recycle",
     "@recently-snapshot", "__pycache__")
)  # fmt: skip
MAX_FAILURES = 32  # files of one unknown ending that Pillow does not recognize before the ending counts as no image
MAX_NAMED = 6  # kinds or paths in a note


class LeftOut:
    """What a listing does not use: files by ending, folders that systems make, and links that lead back into the set."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.junk: list[str] = []
        self.links: list[str] = []
        self.recognized: Counter[str] = Counter()  # files by unknown ending that Pillow recognized when they were opened
        self.failures: Counter[str] = Counter()

    def notes(self) -> list[str]:
        """A sentence for each kind of thing that is left out."""
        notes = []
        if self.files:
            ranked = sorted(self.files.items(), key=lambda kind: (-kind[1], kind[0]))
            kinds = [f"{count:,} {ending or 'without an ending'}" for ending, count in ranked]
            notes.append(f"Not used, because they are not images: {first_of(kinds)}.")
        if self.junk:
            notes.append(f"Skipped folders that the system made: {first_of(self.junk)}.")
        if self.links:
            notes.append(f"Links to folders of the set itself are not followed: {first_of(self.links)}.")
        return notes


def first_of(names: Sequence[str]) -> str:
    """The names, or the first few of many and the number of the others."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


class FolderWalk:
    """Lists images below a root. Hidden files and folders are ignored; each folder is read once, whatever links lead to it.

    A link is not followed if it leads to a folder around it, or to one that the listing of the root reaches anyway.
    """

    def __init__(self, root: str | Path, left_out: LeftOut | None = None):
        self.root, self.left_out = os.fspath(root), left_out or LeftOut()
        self.real_root = os.path.realpath(root)
        self.linked: set[str] = set()  # real paths of followed links
        self.folders: dict[str, list[str]] = {}  # for each folder that was listed the names of those in it

    def subfolders(self) -> list[str]:
        """The names of the folders in the root, sorted. Raises ValueError if it cannot be read."""
        entries = [entry for entry in visible_entries(self.root) if is_folder(entry)]
        return [entry.name for entry in entries if self.enter(entry, self.real_root) is not None]

    def images(self, name: str = "") -> list[str]:
        """The paths of all images below the root, or below one of its subfolders, recursively, sorted by name.

        Raises ValueError for a folder that cannot be read.
        """
        folder = os.path.join(self.root, name) if name else self.root
        return self.images_in(folder, os.path.realpath(folder))

    def images_in(self, folder: str, real: str) -> list[str]:
        """real: the folder's path without links."""
        paths: list[str] = []
        self.folders[folder] = []
        for entry in visible_entries(folder):
            if is_folder(entry):
                inner = self.enter(entry, real)
                if inner is not None:
                    self.folders[folder].append(entry.name)
                    paths += self.images_in(entry.path, inner)
            elif is_image(entry.path, self.left_out):
                paths.append(entry.path)
        return paths

    def images_beside(self) -> list[str]:
        """The paths of the images in the root itself."""
        entries = [entry for entry in visible_entries(self.root) if not is_folder(entry)]
        return [entry.path for entry in entries if is_image(entry.path, self.left_out)]

    def enter(self, entry: os.DirEntry[str], parent: str) -> str | None:
        """The path of a folder without links; None if it is left out. parent: that of the folder that holds it."""
        if entry.name.lower() in JUNK_FOLDERS:
            self.left_out.junk.append(entry.path)
            return None
        if not entry.is_symlink():
            real = os.path.join(parent, entry.name)
            again = real in self.linked
        else:
            real = os.path.realpath(entry.path)
            again = self.leads_back(real, parent) or any(is_within(real, target) for target in self.linked)
            self.linked.add(real)
        if again:
            self.left_out.links.append(entry.path)
            return None
        return real

    def leads_back(self, target: str, parent: str) -> bool:
        """Whether a link's target lies around the link, or below the root, where it is listed anyway."""
        if is_within(parent, target) or is_within(self.real_root, target):
            return True
        below = os.path.relpath(target, self.real_root).split(os.sep)
        hidden = any(part.startswith(".") or part.lower() in JUNK_FOLDERS for part in below)
        return is_within(target, self.real_root) and not hidden


def is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that cannot be read
        return False


def is_image(path: str, left_out: LeftOut) -> bool:
    """Whether a file is an image: by its ending or, where that is unknown, by what Pillow makes of its first bytes.

    What is none is counted in left_out, except for files that systems leave and .txt.
    """
    name = path.rpartition(os.sep)[2]
    _, dot, ending = name.rpartition(".")
    ending = f".{ending.lower()}" if dot else ""
    if ending in KNOWN:
        return True
    if ending == ".txt" or name.lower() in SILENT_NAMES:
        return False
    is_tried = not ending or left_out.recognized[ending] or left_out.failures[ending] < MAX_FAILURES
    if ending[1:] not in OTHER and is_tried:
        if os.path.isfile(path) and is_recognized(path):
            left_out.recognized[ending] += 1
            return True
        left_out.failures[ending] += 1
    left_out.files[ending] += 1
    return False


def is_recognized(path: str) -> bool:
    """Whether Pillow recognizes the file as an image; its pixels are not decoded."""
    from PIL import Image

    try:
        with Image.open(path, formats=known_formats()):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of SIGNED_FORMATS that this build of Pillow reads."""
    from PIL import Image

    Image.init()
    return tuple(name for name in SIGNED_FORMATS if name in Image.OPEN)


def visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, sorted by name. Raises ValueError for a folder that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"Cannot read the folder {folder}: {error.strerror}. Change its permissions, or move it elsewhere."
        ) from error
