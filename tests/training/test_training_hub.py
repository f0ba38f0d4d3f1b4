import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from library.options.checks_hub import HubFolder
from library.options.errors import UserError
from library.options.groups.hub import HubOptions
from library.options.groups.state import StateOptions
from library.training.hub import download_state, open_uploads
from library.training.position import Position
from library.training.resume import saved_place
from library.training.saving import Saved
from tests.training.fake_run import SEED, FakeRun, dataset
from tests.training.hub_server import Hub, serve_hub
from tests.training.test_training_saving import make_saver

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", served.url + template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield served


def options(**more: object) -> HubOptions:
    return HubOptions(huggingface_repo_id="me/it", huggingface_token=TOKEN, **more)


def saved(path: Path, what: str = "model") -> Saved:
    return Saved(path, what, "step", Position())  # type: ignore[arg-type]


@pytest.mark.parametrize("background", [False, True])
def test_a_run_uploads_its_models_and_states_and_another_goes_on_from_there(hub: Hub, tmp_path: Path, background: bool) -> None:
    run = FakeRun(dataset(5), updates=3)
    saver = make_saver(run, tmp_path / "out", save_every_n_steps=2)
    run.run.observers = [saver]
    uploads = open_uploads(options(save_state_to_huggingface=True, huggingface_path_in_repo="runs/one", async_upload=background))
    assert uploads is not None
    saver.after_save.append(uploads.add)
    with uploads:
        run.train()
    names = {name.removeprefix("models/me/it/") for name in hub.files}
    assert {name.removeprefix("runs/one/") for name in names} == {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert hub.files["models/me/it/runs/one/net.pt"] == (tmp_path / "out" / "net.pt").read_bytes()
    assert hub.private == {"models/me/it": True} and hub.tokens == {f"Bearer {TOKEN}"}

    place = saved_place(
        StateOptions(resume="me/it/runs/one/net-step00000002-state:main:model"), HubOptions(resume_from_huggingface=True)
    )
    assert place is not None and place.position == Position(epoch=1, batch=2, update=2) and place.seed == SEED
    assert not (place.folder.parent / "net-state").exists()


def test_a_file_goes_to_the_top_of_a_public_dataset_without_a_path(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "a-state").mkdir()
    uploads = open_uploads(options(huggingface_repo_type="dataset", huggingface_repo_visibility="public"))
    assert uploads is not None
    with uploads:
        uploads.add(saved(tmp_path / "a.pt"))
        uploads.add(saved(tmp_path / "a-state", "state"))
    assert hub.files == {"datasets/me/it/a.pt": b"weights"} and hub.private == {"datasets/me/it": False}


@pytest.mark.parametrize("background", [False, True])
def test_what_fails_is_told_without_the_token_and_tried_again(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, background: bool
) -> None:
    for name in ("one.pt", "two.pt", "gone.pt", "three.pt"):
        (tmp_path / name).write_bytes(name.encode())
    uploads = open_uploads(options(async_upload=background))
    assert uploads is not None
    real = uploads.api.upload_file
    broken = {"one.pt", "gone.pt"}

    def unreliable(*, path_or_fileobj: str, **more: object) -> object:
        if Path(path_or_fileobj).name in broken:
            raise ConnectionError(f"no route with {TOKEN}")
        if path_or_fileobj.endswith("two.pt"):
            broken.clear()
        return real(path_or_fileobj=path_or_fileobj, **more)

    uploads.api.upload_file = unreliable
    caplog.set_level(logging.INFO)
    with uploads:
        uploads.add(saved(tmp_path / "one.pt"))
        uploads.add(saved(tmp_path / "gone.pt"))
        while background and "gone.pt could not" not in caplog.text:
            pass
        (tmp_path / "gone.pt").unlink()
        uploads.add(saved(tmp_path / "two.pt"))
        assert background or "models/me/it/one.pt" in hub.files  # with the next one that succeeds, not at the end only
        uploads.add(saved(tmp_path / "three.pt"))
    assert set(hub.files) == {f"models/me/it/{name}.pt" for name in ("one", "two", "three")}
    assert "one.pt could not be uploaded: no route with (token). It is tried again later." in caplog.text
    assert "gone.pt was removed before it could be uploaded" in caplog.text
    assert TOKEN not in caplog.text


def test_what_never_could_be_uploaded_is_listed_at_the_end_with_commands(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a b.pt").write_bytes(b"weights")
    hub.refuses = 503
    uploads = open_uploads(options(huggingface_path_in_repo="x", huggingface_repo_type="dataset"))
    assert uploads is not None and "The hub cannot be reached" in caplog.text
    with uploads:
        uploads.add(saved(tmp_path / "a b.pt"))
    assert f"hf upload me/it '{tmp_path}/a b.pt' 'x/a b.pt' --repo-type dataset" in caplog.text


def test_a_run_that_is_to_stop_at_once_waits_for_no_upload(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    uploads = open_uploads(options(async_upload=True))
    assert uploads is not None
    uploads.api.upload_file = lambda **_: time.sleep(2)
    with suppress(KeyboardInterrupt), uploads:
        uploads.add(saved(tmp_path / "a.pt"))
        begun = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 1


def test_a_run_that_is_stopped_saves_everything_before_it_uploads(hub: Hub, tmp_path: Path) -> None:
    run = FakeRun(dataset(5), updates=3)
    saver = make_saver(run, tmp_path)
    uploads = open_uploads(options(save_state_to_huggingface=True))
    assert uploads is not None
    uploads.is_stopping = lambda: True
    saver.after_save.append(uploads.add)
    with uploads:
        saver.save_interrupted(Position(update=1))
        assert (tmp_path / "net-step00000001.pt").exists() and not hub.files
    assert {"models/me/it/net-step00000001.pt", "models/me/it/net-step00000001-state/train_state.json"} <= hub.files.keys()


def test_a_hub_that_refuses_is_told_before_training(hub: Hub) -> None:
    hub.refuses = 401
    with pytest.raises(
        UserError, match=r"the hub refuses to write to me/it\. Check the name, and that the token may write"
    ) as told:
        open_uploads(options())
    assert TOKEN not in str(told.value)


def test_a_state_that_is_not_there_is_a_sentence(hub: Hub) -> None:
    hub.files["models/me/it/other.txt"] = b""
    with pytest.raises(UserError, match="the model me/it has no folder runs/none at revision main"):
        download_state("me/it/runs/none:main", None)
    hub.refuses = 404
    with pytest.raises(UserError, match="me/it/x cannot be fetched from the hub"):
        download_state("me/it/x", None)


def test_the_form_of_a_folder_on_the_hub() -> None:
    assert HubFolder.of("me/it/a/b") == HubFolder("me/it", "a/b", None, "model")
    assert HubFolder.of("me/it/a:v1") == HubFolder("me/it", "a", "v1", "model")
    assert HubFolder.of("me/it/a::dataset") == HubFolder("me/it", "a", None, "dataset")
