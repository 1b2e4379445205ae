"""TODO tune.result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from forgetless.files.hub import push_folder

logger = logging.getLogger("forgetless")


def push_result(repo: str, folder: Path, run: dict[str, Any]) -> None:
    """Upload the result, unless it was to keep a budget and is not known to."""
    if run["verdict"] not in (None, "met"):
        logger.warning(
            "the budget is %s: nothing is pushed; where you want it all the same: hf upload %s %s",
            run["verdict"],
            repo,
            folder,
        )
        return
    push_folder(folder, repo, commit_message="Upload with forgetless tune")


def last_logged(log: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(log) if key in entry), None)
