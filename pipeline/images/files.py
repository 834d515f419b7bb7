"""Lists the image files below a folder: which files are images, their order, and what is not used."""

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
# Formats of Pillow that start with a signature. The others accept arbitrary bytes or cannot be decoded.
SIGNED_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP")
# Endings of files that are never opened to check whether they are images.
OTHER = frozenset(
    "txt md rst csv tsv json jsonl ndjson yaml yml toml xml html htm css js py ipynb log ini cfg zip gz bz2 xz tar tgz 7z rar "
    "parquet arrow feather npy npz mat h5 hdf5 pkl pickle pt pth safetensors onnx pdf doc docx xls xlsx mp4 avi mov mkv webm "
    "mp3 wav svg eps db sqlite lock part tmp bak".split()
)
SILENT_NAMES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))  # of operating systems; ignored without a note
JUNK_FOLDERS = frozenset(
    ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "#recycle", "#snapshot", "@recycle",
     "@recently-snapshot", "__pycache__")
)  # fmt: skip
MAX_FAILURES = 32  # unrecognized files of an unknown ending, after which files with this ending are not opened
MAX_NAMED = 6  # names listed in a note


class LeftOut:
    """What a listing does not use: files by ending, system folders, and links to folders that are listed anyway."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.junk: list[str] = []
        self.links: list[str] = []
        self.recognized: Counter[str] = Counter()  # images with an unknown ending that Pillow recognized
        self.failures: Counter[str] = Counter()

    def notes(self) -> list[str]:
        """One message for each kind of unused entry."""
        notes = []
        if self.files:
            ranked = sorted(self.files.items(), key=lambda kind: (-kind[1], kind[0]))
            kinds = [f"{count:,} {ending or 'without an ending'}" for ending, count in ranked]
            notes.append(f"Not used, because they are not images: {first_of(kinds)}.")
        if self.junk:
            notes.append(f"Skipped system folders: {first_of(self.junk)}.")
        if self.links:
            notes.append(f"Skipped links to folders of the dataset itself: {first_of(self.links)}.")
        return notes


def first_of(names: Sequence[str]) -> str:
    """The names as a list; of many names, the first few and the number of the others."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


class FolderWalk:
    """Lists images below a root. Ignores hidden files and folders, and reads each folder once, even if links point to it.

    Does not follow a link to a parent folder, or to a folder that the listing of the root includes anyway.
    """

    def __init__(self, root: str | Path, left_out: LeftOut | None = None):
        self.root, self.left_out = os.fspath(root), left_out or LeftOut()
        self.real_root = os.path.realpath(root)
        self.linked: set[str] = set()  # real paths of followed links
        self.folders: dict[str, list[str]] = {}  # the names of the subfolders of each listed folder

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
        """Like images, for a folder. real: its path without links."""
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
        """The path of a folder without links; None if it is not used. parent: the path of its parent without links."""
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
        """Whether the target of a link is a parent of the link, or is below the root, where it is listed anyway."""
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
    """Whether a file is an image, by its ending or, if that is unknown, by its first bytes.

    Counts other files in left_out, except for SILENT_NAMES and .txt.
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
    """Whether Pillow recognizes the file as an image. Does not decode its pixels."""
    from PIL import Image

    try:
        with Image.open(path, formats=known_formats()):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The SIGNED_FORMATS that this build of Pillow supports."""
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
