"""Uploads a timm folder to the Hugging Face Hub."""

import os
import re
import sys
import tempfile
from pathlib import Path

from pipeline.models.timm_folder import CONFIG_FILE, README_FILE, WEIGHTS_FILE
from pipeline.settings.command_line import CommandFailed

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
THIS_FOLDER = "local-dir:PATH_OF_THIS_FOLDER"  # placeholder in the model card


def check_can_push(repo: str) -> None:
    """Raises ValueError for an invalid repository name or a missing token."""
    if not REPO.fullmatch(repo):
        raise ValueError(f"--push_to_hub {repo!r} must be OWNER/NAME.")
    if not os.environ.get("HF_TOKEN"):
        raise ValueError("--push_to_hub requires a token with write access: set the environment variable HF_TOKEN.")


def push_to_hub(folder: Path, repo: str, private: bool) -> str:
    """Creates the repository if it does not exist, uploads the folder's files in one commit and returns the commit's URL.

    The token of HF_TOKEN is sent to the Hub (HF_ENDPOINT) only. Raises CommandFailed if the upload fails.
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
            if private and not api.model_info(repo).private:  # an existing repository keeps its visibility
                raise ValueError("It exists and is public, but --private is set. Make it private or choose another name.")
            commit = api.create_commit(repo, additions, commit_message="Add the model")
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandFailed(
                f"Could not upload to {repo!r} on {api.endpoint}: {' '.join(str(error).split())} "
                f"The exported folder is {folder}."
            ) from error
    return str(commit.commit_url)
