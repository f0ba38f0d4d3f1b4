"""Set before torch is imported anywhere: threads, no network, Ctrl+C; and the fixtures that every room of tests shares."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Every xdist worker is a process of its own: without a share each would start one thread per core and they would fight.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait in a busy loop stall where another program shares the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs, and so some continuous integration, with Ctrl+C ignored; commands would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402  (the environment above must be set before a plugin imports torch)
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("steady", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # not where only tests without it were asked for

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder scripts are run from."""
    return ROOT


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all xdist workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_tmp: Path) -> Path:
    """A tiny SDXL checkpoint with random weights, made once per run by the command a person would use; do not write to it."""
    path = shared_tmp / "tiny_sdxl.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            made = subprocess.run(
                [sys.executable, "tools/make_tiny_sdxl.py", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert made.returncode == 0, made.stderr
    return path


@pytest.fixture(scope="session")
def photos() -> Path:
    """Twelve photographs, JPEG and PNG, portrait and landscape, each with a caption in a .txt file; do not write there."""
    return ROOT / "examples" / "photos" / "images"
