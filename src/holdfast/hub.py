"""Importance files and adapters on the Hugging Face Hub, the way transformers users know: push_to_hub, from_pretrained, save_pretrained.

    OWNER/NAME/importance.safetensors     the file, with the folders of this machine taken out of its provenance
    OWNER/NAME/README.md                  the model card (cards.py)

Wherever holdfast takes an importance file it takes a file, a folder of `save_pretrained` or a Hub name, in this order: what exists locally is never looked up.

    importance.push_to_hub("me/llama-importance", private=True)
    importance = Importance.from_pretrained("me/llama-importance")
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.cards import FILES, HUB_NAME, extended, hub_name, importance_card, run_card, section_of, shareable
from holdfast.importance.container import Importance
from holdfast.options import OptionError
from holdfast.runs import write_text
from holdfast.storage import save

logger = logging.getLogger("holdfast")
FILE, CARD = "importance.safetensors", "README.md"


def importance_path(name: str | Path, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None,
                    local_files_only: bool = False) -> Path:  # fmt: skip
    """The importance file that `name` means: a file, a folder that holds one, or a Hub repository, which is downloaded into the cache.

    A name that can only be a path (it ends as a file does, is absolute, or has more than one slash) is never looked up. Raises ValueError where nothing is.
    """
    text, path = str(name), Path(name).expanduser()
    if path.is_dir():
        if not (path / FILE).is_file():
            found = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))) or "no .safetensors file"
            raise ValueError(f"'{text}' is a folder without {FILE} (found {found}); give the file itself, or a folder of Importance.save_pretrained")
        return path / FILE
    if path.exists() or text.lower().endswith(FILES) or not HUB_NAME.fullmatch(text) or "/" not in text:
        return path  # a file; where it is missing, reading it says what to do
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(text, FILE, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        offline = " (offline mode is on: HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ValueError(f"'{text}' is no file here, and cannot be had from the Hub{offline}: {_first(error)}; expected a repository with {FILE}, made by "
                         "Importance.push_to_hub or holdfast record --push-to-hub. For a private one: hf auth login") from error  # fmt: skip


def save_pretrained(importance: Importance, folder: str | Path, *, repo: str | None = None) -> Path:
    """Write file and card into `folder`, as they go to the Hub; what else a card there says is kept. Returns the file's path."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"'{folder}' is a file; expected a folder for {FILE} and {CARD} (Importance.save writes a single file)")
    info = shareable({key: value for key, value in importance.info.items() if key != "path"})
    shared = Importance(importance.entries, importance.anchors, info, importance.calibration)
    save(shared, folder / FILE)
    elements = sum(entry.shape[0] * entry.shape[1] for entry in importance.entries.values())
    size = (folder / FILE).stat().st_size
    card = folder / CARD
    existing = card.read_text(encoding="utf-8") if card.is_file() else ""
    about = importance_card(importance.info, tier=importance.tier, weights=len(importance), elements=elements, size=size,
                            calibration=importance.calibration.describe() if importance.calibration else None, repo=repo)  # fmt: skip
    write_text(card, extended(existing, *about))
    return folder / FILE


def push_importance(importance: Importance, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None,
                    commit_message: str = "Upload importance", create_pr: bool = False) -> str:  # fmt: skip
    """Upload file and card; returns the address of the commit."""
    repo = ready(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(importance, folder, repo=repo)
        return push_folder(folder, repo, token=token, revision=revision, commit_message=commit_message, create_pr=create_pr,
                           advice=f"save_pretrained(FOLDER), then hf upload {repo} FOLDER")  # fmt: skip


def ready(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """The full name of the repository, made where it is not there: before long work, so that a wrong name or a missing login is known at once.

    Raises OptionError for what cannot be a name, ValueError where the Hub refuses.
    """
    if not HUB_NAME.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise OptionError(f"'{repo_id}' cannot be the name of a Hub repository; expected NAME or OWNER/NAME of letters, digits, '-', '_' and '.'")
    from huggingface_hub import HfApi

    try:
        return str(HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id)
    except (OSError, ValueError) as error:
        raise ValueError(f"the Hub does not let us write to '{repo_id}': {_first(error)}; log in with hf auth login, or give a token that may write") from error


def push_folder(folder: str | Path, repo: str, *, token: str | bool | None = None, revision: str | None = None, commit_message: str = "Upload with holdfast",
                create_pr: bool = False, advice: str | None = None) -> str:  # fmt: skip
    """Upload a folder in one commit; returns its address. Raises ValueError with the command that tries again, or other `advice`."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(
            repo_id=repo, folder_path=str(folder), token=token, revision=revision, commit_message=commit_message, create_pr=create_pr or None
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"uploading to '{repo}' failed: {_first(error)}; {advice or f'what was to be uploaded is whole: hf upload {repo} {folder}'}"
        ) from error
    logger.info("pushed to %s", address := str(getattr(commit, "commit_url", commit)))
    return address


def write_card(folder: str | Path, verb: str, run: Mapping[str, Any], *, what: str = "adapter") -> None:
    """Say in the card of a tuned model what was kept and lost, keeping what PEFT or a person wrote there."""
    card = Path(folder) / CARD
    existing = card.read_text(encoding="utf-8") if card.is_file() else ""
    write_text(card, extended(existing, *run_card(verb, run, what=what)))


def write_merged_card(folder: str | Path, adapter: str | Path, base: str) -> None:
    """What an adapter's card says was kept and lost, in the card of the model that it was merged into; nothing where it does not say."""
    card = Path(adapter) / CARD
    section = section_of(card.read_text(encoding="utf-8")) if card.is_file() else None
    if section:
        front = {"base_model": hub_name(base), "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["holdfast"]}
        write_text(
            Path(folder) / CARD, extended("", front, section.replace("This adapter was made", "This model is its base with an adapter merged in, made", 1))
        )


def _first(error: BaseException) -> str:
    return next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
