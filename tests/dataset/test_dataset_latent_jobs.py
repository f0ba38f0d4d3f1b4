"""What is to be encoded, held in a few numbers an image."""

import tracemalloc

import pytest
from dataset_samples import FakeFamily, config, section, subset
from made_up_folder import made_up

from library.dataset import dataset as dataset_module
from library.dataset.cached import LatentFiles
from library.dataset.dataset import Dataset
from library.dataset.index import build_index
from library.dataset.latent_jobs import LatentJobs

COUNT = 500


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Images, wanted at two sizes; the second size twice."""
    open_folder = made_up({"many": [(128 + number % 100, 128) for number in range(COUNT)]})
    monkeypatch.setattr(
        dataset_module,
        "build_index",
        lambda settings, findings, seed: build_index(settings, findings, seed=seed, open_folder=open_folder),
    )
    sizes = ((128, 128), (64, 64), (64, 64))
    return Dataset(config(*(section(subset("many"), resolution=size, enable_bucket=True) for size in sizes)), 1)


def test_a_job_is_built_when_it_is_asked_for(many: Dataset) -> None:
    files = LatentFiles(FakeFamily.latent_cache, FakeFamily.latent_channels, FakeFamily.latent_stride)
    tracemalloc.start()
    jobs = LatentJobs.of_dataset(many).in_files(files)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(jobs) == 2 * COUNT  # what two datasets want alike is encoded once
    assert held / COUNT < 600  # of all three uses, the numbers of those that share a job included
    shares = [jobs.share(process, 2) for process in range(2)]
    paths = [{files.path(job.item) for job in share} for share in shares]
    assert paths[0].isdisjoint(paths[1])
    assert sum(map(len, shares)) == len(jobs)
    first, second = jobs[0], jobs[COUNT]
    assert (jobs.suffix(first), jobs.suffix(second)) == (
        "",
        "_{1}x{0}".format(*(side // 8 for side in second.item.geometry.bucket)),
    )
    assert [item.section for item in second.items] == [1, 2]
    assert [job.item.number for job in jobs.only([5, 7])] == [5, 7]
