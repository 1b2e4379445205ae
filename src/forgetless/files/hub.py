"""Importance files and adapters on the Hugging Face Hub, the way transformers users know:
push_to_hub, from_pretrained, save_pretrained.

    OWNER/NAME/importance.safetensors     the file, with the folders of this machine taken out of
                                          its provenance
    OWNER/NAME/README.md                  the model card (report/cards.py)

Wherever forgetless takes an importance file it takes a file, a folder of `save_pretrained` or a Hub
name. They are tried in this order, so what exists locally is never looked up.

    importance.push_to_hub("me/llama-importance", private=True)
    importance = Importance.from_pretrained("me/llama-importance")
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.errors import OptionError

logger = logging.getLogger("forgetless")
# A name that a Hub repository can have, with or without its owner.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# What the names of files end in: a name that ends so is never looked up on the Hub.
LOCAL_ENDINGS = (".safetensors", ".jsonl", ".json", ".csv", ".parquet", ".txt")
# The folders in a path, also of one behind 'sciq=' or a comma.
FOLDERS = re.compile(r"(^|[=,])(?:[~/]|[A-Za-z]:\\)[^,=]*[/\\]")
# The files of a repository.
IMPORTANCE_FILE, CARD = "importance.safetensors", "README.md"


def hub_name(name: Any) -> str | None:
    """`name` where it can be that of a Hub repository and is nothing local; None otherwise."""
    text = str(name or "")
    local = text.lower().endswith(LOCAL_ENDINGS) or Path(text).exists()
    return text if _can_be_repository(text) and not local else None


def _can_be_repository(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and ".." not in name and "--" not in name


def shareable(value: Any) -> Any:
    """A value without the folders of this machine: '/home/me/wiki.jsonl' -> 'wiki.jsonl'; mappings
    and lists all through.
    """
    if isinstance(value, Mapping):
        return {key: shareable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return FOLDERS.sub(r"\1", value.rstrip("/") if value.startswith(("/", "~")) else value)


def importance_path(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The importance file that `name` means: a file, a folder that holds one, or a Hub repository,
    which is downloaded into the cache.

    A name that can only be a path (it ends as a file does, is absolute, or has more than one slash)
    is never looked up. Raises ValueError where nothing is.
    """
    text, path = str(name), Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, text)
    local = path.exists() or text.lower().endswith(LOCAL_ENDINGS)
    if local or "/" not in text or not HUB_NAME.fullmatch(text):
        return path  # a file; where it is missing, reading it says what to do
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                text,
                IMPORTANCE_FILE,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except (OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        mode = " (offline mode is on: HF_HUB_OFFLINE)" if offline else ""
        raise ValueError(
            f"'{text}' is no file here, and cannot be had from the Hub{mode}: "
            f"{_first_line(error)}; expected a repository with {IMPORTANCE_FILE}, made by "
            "Importance.push_to_hub or forgetless record --push-to-hub. For a private one: hf "
            "auth login"
        ) from error


def _in_folder(folder: Path, name: str) -> Path:
    """The importance file in a folder of `save_pretrained`."""
    if (folder / IMPORTANCE_FILE).is_file():
        return folder / IMPORTANCE_FILE
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise ValueError(
        f"'{name}' is a folder without {IMPORTANCE_FILE} (found "
        f"{', '.join(others) or 'no .safetensors file'}); give the file itself, or a folder of "
        "Importance.save_pretrained"
    )


def ready(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """The full name of the repository, made where it is not there: before long work, so that a
    wrong name or a missing login is known at once.

    Raises OptionError for what cannot be a name, ValueError where the Hub refuses.
    """
    if not _can_be_repository(repo_id):
        raise OptionError(
            f"'{repo_id}' cannot be the name of a Hub repository; expected NAME or OWNER/NAME of "
            "letters, digits, '-', '_' and '.'"
        )
    from huggingface_hub import HfApi

    try:
        return str(
            HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the Hub does not let us write to '{repo_id}': {_first_line(error)}; log in with hf "
            "auth login, or give a token that may write"
        ) from error


def push_folder(
    folder: str | Path,
    repo: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with forgetless",
    create_pr: bool = False,
    advice: str | None = None,
) -> str:
    """Upload a folder in one commit; returns its address.

    Raises ValueError with the command that tries again, or other `advice`.
    """
    from huggingface_hub import HfApi

    advice = advice or f"what was to be uploaded is whole: hf upload {repo} {folder}"
    try:
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr or None,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"uploading to '{repo}' failed: {_first_line(error)}; {advice}") from error
    address = str(getattr(commit, "commit_url", commit))
    logger.info("pushed to %s", address)
    return address


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = (line for line in str(error).strip().splitlines() if line.strip())
    return next(lines, type(error).__name__)
