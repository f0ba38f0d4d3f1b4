"""What `--resume` and the upload options say about the Hugging Face hub; nothing here asks the hub itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.options.effects import without_effect
from library.options.errors import UserError, problems_of
from library.options.groups.hub import HubOptions
from library.options.groups.state import StateFileOptions

REPO_TYPES = ("model", "dataset", "space")
_VISIBILITIES = ("public", "private")
_OF_UPLOADS = (
    "huggingface_repo_type",
    "huggingface_path_in_repo",
    "huggingface_repo_visibility",
    "save_state_to_huggingface",
    "async_upload",
)


@dataclass(frozen=True)
class HubFolder:
    """A folder in a repository."""

    repo_id: str
    path: str
    revision: str | None = None
    """A branch, tag or commit; None is the main branch."""
    repo_type: str = "model"

    @classmethod
    def of(cls, text: str) -> "HubFolder":
        """Read `user/repo/path[:revision[:type]]`.

        Raises:
            UserError: the text has another form.
        """
        place, _, rest = text.partition(":")
        revision, _, repo_type = rest.partition(":")
        owner, _, name_and_path = place.partition("/")
        name, _, path = name_and_path.partition("/")
        if not (owner and name and path.strip("/")) or (repo_type or "model") not in REPO_TYPES:
            raise UserError(
                f"--resume {text} is not a folder on the hub: with --resume_from_huggingface it has the form "
                f"user/repo/path or user/repo/path:revision:type, with one of the types {', '.join(REPO_TYPES)}."
            )
        _check_repo_id("--resume", f"{owner}/{name}")
        return cls(f"{owner}/{name}", path.strip("/"), revision or None, repo_type or "model")


def is_on_hub(state: StateFileOptions, hub: HubOptions) -> bool:
    """Say whether `--resume` names a folder on the hub; a folder of that name on this machine is taken first."""
    return hub.resume_from_huggingface and state.resume is not None and not Path(state.resume).is_dir()


def hub_problems(state: StateFileOptions, hub: HubOptions) -> Iterator[str]:
    """Yield what keeps a run from being resumed from the hub or uploaded to it."""
    if hub.resume_from_huggingface and state.resume is None:
        yield "--resume_from_huggingface needs --resume user/repo/path, the folder on the hub."
    if state.resume is not None and is_on_hub(state, hub):
        yield from problems_of(lambda: HubFolder.of(state.resume or ""))
    elif state.resume is not None and not Path(state.resume).is_dir():
        yield f"--resume: there is no folder {state.resume}."
    if hub.huggingface_repo_type not in (None, *REPO_TYPES):
        yield f"--huggingface_repo_type {hub.huggingface_repo_type} is none of {', '.join(REPO_TYPES)}."
    if hub.huggingface_repo_visibility not in (None, *_VISIBILITIES):
        yield f"--huggingface_repo_visibility {hub.huggingface_repo_visibility} is none of {', '.join(_VISIBILITIES)}."
    if hub.huggingface_repo_id is not None:
        yield from problems_of(lambda: _check_upload(hub.huggingface_repo_id or "", hub.huggingface_token))


def hub_notes(state: StateFileOptions, hub: HubOptions) -> Iterator[str]:
    """Yield what is odd about uploads."""
    given = [f"--{name}" for name in _OF_UPLOADS if getattr(hub, name)]
    if given and hub.huggingface_repo_id is None:
        yield f"Nothing is uploaded without --huggingface_repo_id: {without_effect(given)}."
    elif hub.save_state_to_huggingface and not (state.save_state or state.save_state_on_train_end):
        yield "--save_state_to_huggingface uploads no states: none are saved without --save_state or --save_state_on_train_end."


def _check_upload(repo_id: str, token: str | None) -> None:
    _check_repo_id("--huggingface_repo_id", repo_id)
    from huggingface_hub import get_token

    if not (token or get_token()):
        raise UserError(
            "--huggingface_repo_id needs a token that may write there: log in once with `hf auth login`, set HF_TOKEN, or give "
            "--huggingface_token."
        )


def _check_repo_id(option: str, repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError  # takes a tenth of a second
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        fits = "/" in repo_id
    except HFValidationError:
        fits = False
    if not fits:
        raise UserError(
            f"{option}: {repo_id} is not a repository on the hub. Repositories are called user/name, in letters, digits, dots, "
            "hyphens and underscores."
        )
