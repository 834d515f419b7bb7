"""A timm folder goes to the Hugging Face Hub."""

import os
import re
import sys
import tempfile
from pathlib import Path

from pipeline.models.timm_folder import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from pipeline.settings.command_line import CommandFailed

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
THIS_FOLDER = "local-dir:PATH_OF_THIS_FOLDER"  # as the model card says it


def check_can_push(repo: str) -> None:
    """Raises ValueError, before anything is made, for a name that is none or without a token."""
    if not REPO.fullmatch(repo):
        raise ValueError(f"--push_to_hub {repo!r} must be OWNER/NAME.")
    if not os.environ.get("HF_TOKEN"):
        raise ValueError("--push_to_hub needs a token that may write: set the environment variable HF_TOKEN.")


def push_to_hub(folder: Path, repo: str, private: bool) -> str:
    """Makes the repository if there is none, uploads the folder's three files in one commit, returns the commit's address.

    The token is that of HF_TOKEN and goes nowhere but to the Hub (HF_ENDPOINT). Raises CommandFailed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=os.environ["HF_TOKEN"], library_name="timm")
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, README_FILE) if (folder / name).is_file()}
        if README_FILE in files:
            card = files[README_FILE].read_text(encoding="utf-8").replace(THIS_FOLDER, f"hf-hub:{repo}")
            files[README_FILE] = Path(scratch) / README_FILE
            files[README_FILE].write_text(card, encoding="utf-8")
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.create_commit(repo, additions, commit_message="Add the model")
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandFailed(
                f"Could not upload to {repo!r} on {api.endpoint}: {' '.join(str(error).split())} "
                f"The checked folder is in {folder}."
            ) from error
    return str(commit.commit_url)
