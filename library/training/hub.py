"""Models and states on the Hugging Face hub: uploads while a run goes on, and the state that a run is resumed from."""

import glob
import logging
import posixpath
import queue
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from library.options.checks_hub import HubFolder
from library.options.errors import UserError
from library.options.groups.hub import HubOptions
from library.training.saving import Saved

log = logging.getLogger(__name__)

_REFUSALS = frozenset({400, 401, 402, 403, 404})
"""Status codes by which the hub says that asking again is no use."""


@dataclass
class Uploads:
    """Sends what a run saves to a repository; what cannot be sent now is tried again later, and never ends the run.

    Args:
        api: `huggingface_hub.HfApi`.
        repo_id, repo_type: the repository.
        folder: inside it; "" for its top.
        private: whether the repository is made private where it does not exist yet.
        sends_states: whether states are sent, and not models alone.
        in_background: whether training goes on meanwhile.
        token: never shown.
        is_stopping: whether the run was asked to stop; uploads then wait until everything is saved.
    """

    api: Any
    repo_id: str
    repo_type: str
    folder: str
    private: bool
    sends_states: bool
    in_background: bool
    token: str | None
    is_stopping: Callable[[], bool] = lambda: False
    _has_repo: bool = False
    _failed: list[Path] = field(default_factory=list)
    """What is tried again after the next success, and at the end."""
    _queue: "queue.SimpleQueue[Path | None]" = field(default_factory=queue.SimpleQueue)
    _worker: threading.Thread | None = None

    def __enter__(self) -> "Uploads":
        if self.in_background:
            self._worker = threading.Thread(target=self._work, name="upload", daemon=True)
            self._worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for what is still to be sent, unless the run was told to stop at once."""
        if kind is KeyboardInterrupt:
            return
        if self._worker is not None:
            self._queue.put(None)
            if self._worker.is_alive():
                log.info("Waiting for the uploads to %s; Ctrl+C leaves the rest out.", self.repo_id)
            self._worker.join()
        self._failed = [path for path in dict.fromkeys(self._failed) if not self._sent(path)]
        if self._failed:
            commands = "\n".join(f"  {self._command(path)}" for path in self._failed)
            log.error("These were saved, but not uploaded. To do it yourself:\n%s", commands)

    def make_repo(self) -> None:
        """Make the repository where there is none; called before training, so that a wrong token does not come to light in hours.

        Raises:
            UserError: the hub refuses. If it cannot be reached, a warning tells, and the uploads try again.
        """
        try:
            self._create_repo()
        except Exception as error:  # the client's many errors, and those of the network below it
            if getattr(getattr(error, "response", None), "status_code", None) in _REFUSALS:
                raise UserError(
                    f"--huggingface_repo_id: the hub refuses to write to {self.repo_id}. Check the name, and that the token may "
                    f"write there. It says: {self._reason(error)}."
                ) from error
            log.warning("The hub cannot be reached: %s. Training begins; uploads try again.", self._reason(error))

    def _create_repo(self) -> None:
        self.api.create_repo(self.repo_id, repo_type=self.repo_type, private=self.private, exist_ok=True)
        self._has_repo = True

    def add(self, saved: Saved) -> None:
        """Send what was saved, with what could not be sent before."""
        if saved.what == "state" and not self.sends_states:
            return
        if self._worker is not None:
            self._queue.put(saved.path)
        elif self.is_stopping():
            self._failed.append(saved.path)
        else:
            self._send(saved.path)

    def _work(self) -> None:
        while (path := self._queue.get()) is not None:
            self._send(path)

    def _send(self, path: Path) -> None:
        """Send the newest, then, if the hub takes it, what it did not take before."""
        if self._sent(path):
            self._failed = [failed for failed in self._failed if failed != path and not self._sent(failed)]
        elif path not in self._failed:
            self._failed.append(path)

    def _sent(self, path: Path) -> bool:
        if not path.exists():
            log.warning("%s was removed before it could be uploaded", path)
            return True
        place = {"repo_id": self.repo_id, "repo_type": self.repo_type, "path_in_repo": self._path_in_repo(path)}
        try:
            if not self._has_repo:
                self._create_repo()
            if path.is_dir():
                self.api.upload_folder(folder_path=str(path), commit_message=f"Upload {path.name}", **place)
            else:
                self.api.upload_file(path_or_fileobj=str(path), commit_message=f"Upload {path.name}", **place)
        except Exception as error:  # as in `make_repo`
            log.error("%s could not be uploaded: %s. It is tried again later.", path, self._reason(error))
            return False
        log.info("Uploaded %s to %s", path, self.repo_id)
        return True

    def _path_in_repo(self, path: Path) -> str:
        return posixpath.join(self.folder, path.name)

    def _command(self, path: Path) -> str:
        words = ["hf", "upload", self.repo_id, str(path), self._path_in_repo(path)]
        return shlex.join([*words, *([] if self.repo_type == "model" else ["--repo-type", self.repo_type])])

    def _reason(self, error: Exception) -> str:
        return reason_of(error, self.token)


def open_uploads(options: HubOptions) -> Uploads | None:
    """Reach the repository that a run is uploaded to; None where nothing is.

    Raises:
        UserError: the hub refuses.
    """
    if options.huggingface_repo_id is None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # they would be drawn into that of the run
    uploads = Uploads(
        api=HfApi(token=options.huggingface_token, library_name="atelier"),
        repo_id=options.huggingface_repo_id,
        repo_type=options.huggingface_repo_type or "model",
        folder=(options.huggingface_path_in_repo or "").strip("/"),
        private=options.huggingface_repo_visibility != "public",
        sends_states=options.save_state_to_huggingface,
        in_background=options.async_upload,
        token=options.huggingface_token,
    )
    uploads.make_repo()
    return uploads


def download_state(text: str, token: str | None) -> Path:
    """Fetch a state from the hub, or what of it is not on this machine yet; several processes may do so at once.

    Args:
        text: `user/repo/path[:revision[:type]]`.
        token: for repositories that are not public; None takes that of the login.

    Returns:
        The state's folder on this machine.

    Raises:
        UserError: it cannot be reached, or there is no such folder.
    """
    from huggingface_hub import HfApi

    wanted = HubFolder.of(text)
    log.info("Fetching %s from the hub", text)
    try:
        root = HfApi(token=token, library_name="atelier").snapshot_download(
            wanted.repo_id,
            repo_type=wanted.repo_type,
            revision=wanted.revision,
            allow_patterns=f"{glob.escape(wanted.path)}/*",
        )
    except Exception as error:  # as in `make_repo`
        raise UserError(f"--resume: {text} cannot be fetched from the hub: {reason_of(error, token)}.") from error
    folder = Path(root) / wanted.path
    if not folder.is_dir():
        at = f" at revision {wanted.revision}" if wanted.revision else ""
        raise UserError(f"--resume: the {wanted.repo_type} {wanted.repo_id} has no folder {wanted.path}{at}.")
    return folder


def reason_of(error: Exception, token: str | None) -> str:
    """Return what an error says on one line, without the token."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text.replace(token, "(token)") if token else text
