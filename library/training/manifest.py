"""What a run was, in one file beside its output: enough to judge it and to repeat it.

`NAME-run.json` is written when training begins and once more when the run is over. A resumed run keeps what the runs before it
wrote, as `earlier_runs`.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from library.files.atomic import atomic_write_text
from library.options.disclosure import command_without_secrets, options_without_secrets
from library.options.errors import UserError
from library.training.environment import hardware, installed_versions, source_is_changed, source_revision
from library.training.events import RunEnd, plain
from library.training.full_tensors import full_size
from library.training.identity import Identity
from library.training.position import Position
from library.training.saving import Saved
from library.training.setting import Setting, Trained

log = logging.getLogger(__name__)

MANIFEST_VERSION = 1
"""Goes up when a field changes its meaning or goes away."""


class Manifest:
    """The observer that writes the manifest; only the main process has one.

    Args:
        path: of the file.
        facts: see `run_facts`.
        continues: whether a run before this one is continued, whose manifest is kept.
        memory: asked at the end what the run needed on its device.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, continues: bool, memory: Callable[[], Any] = lambda: None) -> None:
        self._path = path
        self._memory = memory
        self._content = {
            "version": MANIFEST_VERSION,
            **facts,
            "saved": [],
            "memory": None,
            "end": None,
            "earlier_runs": _earlier_runs(path) if continues else [],
        }
        self._step = 0

    def before_training(self, position: Position) -> None:
        """Write what is known."""
        self._step = position.update
        self._write()

    def after_update(self, position: Position) -> None:
        """Remember how far the run has come."""
        self._step = position.update

    def after_epoch(self, position: Position) -> None:
        """Nothing is written while the run goes on."""

    def after_training(self, position: Position) -> None:
        """The end is written when everything is closed, see `ended`."""

    def saved(self, saved: Saved) -> None:
        """Remember a file that is complete on disk."""
        self._content["saved"].append({"step": saved.position.update, "what": saved.what, "path": str(saved.path)})

    def ended(self, end: RunEnd) -> None:
        """Write how the run ended, and what memory it needed."""
        self._content["memory"] = self._memory()
        self._content["end"] = {
            "outcome": end.outcome,
            "message": end.message,
            "step": self._step,
            "seconds": end.seconds,
            "at": _now(),
        }
        self._write()

    def _write(self) -> None:
        try:
            atomic_write_text(self._path, json.dumps(plain(self._content), indent=2, ensure_ascii=False) + "\n")
        except (OSError, UserError) as error:  # no reason to lose a run
            log.warning("%s could not be written (%s); the run goes on without it.", self._path, error)


def run_facts(setting: Setting, trained: Trained, start: Position, identity: Identity) -> dict[str, Any]:
    """Collect what describes a run.

    Args:
        setting: of the run.
        trained: what is trained.
        start: where it starts.
        identity: what states say of the run.
    """
    options, length = setting.options, setting.length
    described = zip(trained.descriptions, trained.groups, strict=True)
    return {
        "script": options.script,
        "arguments": command_without_secrets(type(options), sys.argv[1:]),
        "working_folder": str(Path.cwd()),
        "started_at": datetime.fromtimestamp(setting.started_at, UTC).isoformat(timespec="seconds"),
        "resumed_from": options.state.resume,
        "start": {"step": start.update, "epoch": start.epoch, "batch": start.batch},
        "length": {
            "steps": length.total_updates,
            "epochs": length.num_epochs,
            "batches_per_epoch": setting.batches_per_epoch,
            "processes": setting.accelerator.num_processes,
        },
        "seeds": {"seed": setting.seed, "validation_seed": options.validation.validation_seed},
        "dataset": {
            "digest": hashlib.blake2b(json.dumps(identity["data"], sort_keys=True).encode(), digest_size=16).hexdigest(),
            "parts": identity["data"],
            "images": setting.dataset.num_images,
            "uses_per_epoch": setting.dataset.num_uses,
            "held_out": len(setting.dataset.held_out),
        },
        "models": identity["models"],
        "trained": [
            {
                "part": part,
                "parameters": sum(map(full_size, group["params"])),
                "learning_rate": group.get("lr"),
            }
            for part, group in described
        ],
        "options": options_without_secrets(options),
        "suite": {"revision": source_revision(), "has_changes": source_is_changed()},
        "packages": installed_versions(),
        "hardware": hardware(setting.accelerator.device),
    }


def _earlier_runs(path: Path) -> list[Any]:
    """Return what a manifest says, as the last of the runs it continues; nothing where there is none that can be read."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return [*before.pop("earlier_runs"), before]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
