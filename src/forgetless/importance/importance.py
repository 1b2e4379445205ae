"""Importance: how much each element of each base weight matters to general ability, with where it
came from.

Keyed by the name of the base weight, always (out, in), so one record per base model serves any
adapter on those weights and full fine-tuning.

    importance = Importance.load("llama.importance.safetensors")
    importance["model.layers.0.self_attn.q_proj.weight"].dense()   # (out, in) f32
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from forgetless.errors import FileError, nearest, printable
from forgetless.files.atomic import write_text
from forgetless.files.hub import (
    CARD,
    IMPORTANCE_FILE,
    importance_path,
    push_folder,
    ready,
    shareable,
)
from forgetless.files.lock import only_writer
from forgetless.files.outputs import check_new_file, local_paths
from forgetless.files.room import free_memory
from forgetless.files.untrusted import JsonObject
from forgetless.importance import file
from forgetless.importance.calibration import Calibration
from forgetless.importance.describe import describe
from forgetless.importance.energy_errors import energy_errors
from forgetless.importance.entries import Entry, tier_of
from forgetless.importance.info import EnergyErrors
from forgetless.importance.kept_answers import KeptAnswers
from forgetless.importance.tiers import converted, parse_tier
from forgetless.report.cards import extended
from forgetless.report.importance_card import importance_card

logger = logging.getLogger("forgetless")
# Tiers that have the same energy, to the precision of their codes: a few per cent.
BY_ELEMENT = {"f32", "bf16", "u8", "u4"}
# Bytes of memory that an element takes while it is converted: f32 before and after.
BYTES_TO_CONVERT = 8


@dataclass(frozen=True)
class Importance:
    """Base weight name -> entry, optionally the adapter at the end of recording, and where all of
    it came from.

    `anchors` maps names to (A, B) with U* = B @ A: (r, in) and (out, r), the scale folded into B.
    `info` is plain data as stored in the file. `calibration` says what a unit of this energy costs;
    it goes where the energy changes. `answers` are what the base says, to be held to beside it.
    """

    entries: Mapping[str, Entry]
    anchors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    info: JsonObject = field(default_factory=dict)
    calibration: Calibration | None = None
    answers: KeptAnswers | None = None

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise KeyError(
                f"no importance for '{name}' ({len(self.entries)} weights); "
                f"{nearest(name, self.entries)}"
            )
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"<Importance: {self.in_words()}, of {len(self)} weights>"

    def in_words(self) -> str:
        """'kronecker importance (kronecker:64) of gpt2, from model.importance.safetensors'."""
        estimator = self.info.get("estimator", "unnamed")
        words = f"{estimator} importance ({self.tier})"
        if base := self.info.get("model", {}).get("name"):
            words += f" of {base}"
        if path := self.info.get("path"):
            words += f", from {path}"
        return printable(words)

    @property
    def tier(self) -> str:
        return tier_of(self.entries)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each weight's importance; taken from the file where it holds them."""
        stored = self.info.get("norms", {})
        return {
            name: float(stored[name]) if name in stored else entry.norm()
            for name, entry in self.entries.items()
        }

    def to_tier(self, tier: str) -> Importance:
        """The same importance in another form (see `forgetless.importance.tiers`): f32, bf16, u8,
        u4, factored, factored:4, kronecker:16.

        What it does to the energy of each weight (importance/energy_errors.py) goes into `info`,
        for `forgetless inspect`. Raises OptionError for an unknown tier, ValueError where this
        importance cannot be brought there.
        """
        entries = converted(self.entries, tier)
        errors = {name: energy_errors(self.entries[name], entry) for name, entry in entries.items()}
        info = dict(self.info)
        if "norms" in info:
            info["norms"] = {name: entry.norm() for name, entry in entries.items()}
        info["energy_error"] = dataclasses.asdict(EnergyErrors(self.tier, errors))
        info["tier"] = tier
        same_energy = tier == self.tier or {self.tier, tier} <= BY_ELEMENT
        calibration = self.calibration if same_energy else None
        if calibration is not self.calibration:
            logger.warning(
                "the calibration was measured with tier %s, and is left out of tier %s: record "
                "with --tier %s --calibrate",
                self.tier,
                tier,
                tier,
            )
        return Importance(entries, self.anchors, info, calibration, self.answers)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a temporary name first, then renamed."""
        file.save(self._stored(), path)

    @staticmethod
    def load(path: str | Path) -> Importance:
        """Read an importance file.

        Raises ValueError when it is missing, foreign, truncated or holds non-finite values.
        """
        return Importance(**vars(file.load(path)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `importance.safetensors` and a model card into a folder, as they go to the Hub;
        paths of this machine are left out.
        """
        save_pretrained(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload importance",
        create_pr: bool = False,
    ) -> str:
        """Upload file and card to a Hub repository, made where it is not there; returns the
        address. Raises ValueError where the Hub refuses.
        """
        return push_importance(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Importance:
        """Read importance from a file, a folder of `save_pretrained` or a Hub repository; what
        exists locally comes first. Raises ValueError as `load`.
        """
        return Importance.load(
            importance_path(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    def describe(self) -> str:
        """A table for people: where it came from, norms and a histogram per weight."""
        return describe(self._stored())

    def _stored(self) -> file.Stored:
        return file.Stored(**vars(self))


def save_pretrained(importance: Importance, folder: str | Path, *, repo: str | None = None) -> Path:
    """Write file and card into `folder`, as they go to the Hub; what else a card there says is
    kept. Returns the file's path.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(
            f"'{folder}' is a file; expected a folder for {IMPORTANCE_FILE} and {CARD} "
            "(Importance.save writes a single file)"
        )
    info = shareable({key: value for key, value in importance.info.items() if key != "path"})
    shared = dataclasses.replace(importance, info=info)
    shared.save(folder / IMPORTANCE_FILE)
    elements = sum(entry.shape[0] * entry.shape[1] for entry in importance.entries.values())
    size = (folder / IMPORTANCE_FILE).stat().st_size
    card = folder / CARD
    existing = card.read_text(encoding="utf-8") if card.is_file() else ""
    about = importance_card(
        importance.info,
        tier=importance.tier,
        weights=len(importance),
        elements=elements,
        size=size,
        calibration=importance.calibration.describe() if importance.calibration else None,
        repo=repo,
    )
    write_text(card, extended(existing, *about))
    return folder / IMPORTANCE_FILE


def push_importance(
    importance: Importance,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload importance",
    create_pr: bool = False,
) -> str:
    """Upload file and card; returns the address of the commit."""
    repo = ready(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(importance, folder, repo=repo)
        return push_folder(
            folder,
            repo,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            advice=f"save_pretrained(FOLDER), then hf upload {repo} FOLDER",
        )


def describe_file(path: str | Path) -> str:
    """`describe` of the file that `path` means (files/hub.py), with its size."""
    path = importance_path(path)
    importance = Importance.load(path)
    size = Path(path).stat().st_size / 2**20
    return f"file         {path} ({size:.2f} MiB)\n" + importance.describe()


def convert(path: str | Path, tier: str, out: str | Path) -> Importance:
    """The importance of the file that `path` means (files/hub.py) in another tier.

    It is written to `out`. Raises OptionError or ValueError before anything is written.
    """
    path = importance_path(path)
    check_new_file(out, file.is_importance, local_paths({str(path): ""}))
    with only_writer(out, folder=False):
        return _in_tier(path, tier, out)


def _in_tier(path: Path, tier: str, out: str | Path) -> Importance:
    importance = Importance.load(path)
    elements = sum(math.prod(entry.shape) for entry in importance.entries.values())
    needed, free = BYTES_TO_CONVERT * elements, free_memory()
    if parse_tier(tier)[0] != "kronecker" and free is not None and needed > free:
        raise FileError(
            f"{path} stands for {elements:.3g} elements, which take about {needed / 2**20:.0f} "
            f"MiB in tier {tier}, found {free / 2**20:.0f} MiB "
            "free; convert on a larger machine"
        )
    changed = importance.to_tier(tier)
    changed.save(out)
    before, after = Path(path).stat().st_size, Path(out).stat().st_size
    logger.info(
        "wrote %s: %d weights, tier %s, %.2f MiB (%s: %.2f MiB)",
        out,
        len(changed),
        changed.tier,
        after / 2**20,
        importance.tier,
        before / 2**20,
    )
    return changed
