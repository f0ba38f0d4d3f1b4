"""The loss of every image, compared with that of the others at the same timesteps."""

import copy
import csv
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.dataset.batch import Batch
from library.training.loss_ledger import ImageLoss, LossLedger, LossTable, outliers, outliers_sentence, read_ledger
from tests.training.fake_run import FakeRun, dataset


def table(*uses: tuple[str, float, float]) -> LossTable:
    made = LossTable()
    for use in uses:
        made.add(*use)
    return made


def relative(made: LossTable) -> dict[str, float]:
    return {each.image: each.relative for each in made.images()}


def test_an_image_is_no_worse_for_being_drawn_at_a_timestep_where_all_losses_are_high() -> None:
    made = table(("a", 1.0, 10), ("b", 1.0, 20), ("a", 0.1, 900), ("b", 0.1, 910), ("unlucky", 1.0, 30), ("lucky", 0.1, 920))
    assert relative(made) == pytest.approx({"a": 1.0, "b": 1.0, "unlucky": 1.0, "lucky": 1.0})
    made.add("bad", 0.4, 930)
    found = relative(made)
    assert found["bad"] == pytest.approx(0.4 / ((0.1 * 3 + 0.4) / 4))
    assert found["lucky"] < 1 and found["unlucky"] == pytest.approx(1.0)


def test_what_two_processes_saw_is_what_one_would_have_seen() -> None:
    uses = [(f"{n % 70}.png", 0.1 + n % 7, float(n * 37 % 1000)) for n in range(300)]
    whole, first, second = table(*uses), table(*uses[::2]), table(*uses[1::2])
    first.merge(second)
    assert relative(first) == pytest.approx(relative(whole))
    assert len(relative(whole)) == 70


def test_a_loss_that_is_no_number_and_the_last_timestep_do_no_harm() -> None:
    made = table(("a", float("nan"), 5), ("b", 2.0, 1000), ("a", 2.0, 999))
    assert {each.image: (each.uses, each.relative) for each in made.images()} == {"a": (1, 1.0), "b": (1, 1.0)}


def ledger(path: Path, others: list[LossTable] | None = None, *, writes: bool = True, continues: bool = False) -> LossLedger:
    return LossLedger(path, lambda own: [*copy.deepcopy(own), *(others or [])], writes=writes, continues=continues)


def images() -> list[Batch]:
    """Make five images, drawn at one timestep, of which one is nothing like the others."""
    weights = torch.full((1,), 0.5)
    batches = [replace(b, image_keys=[f"{n}.png"], loss_weights=weights, draw_seeds=[5]) for n, b in enumerate(dataset(5))]
    assert batches[3].latents is not None
    batches[3] = replace(batches[3], latents=batches[3].latents * 30)
    return batches


def trained(path: Path, *, continues: bool = False) -> FakeRun:
    run = FakeRun(images(), updates=10, lr=1e-4)
    observer = ledger(path, continues=continues)
    run.run.observers = [observer]
    run.accelerator.unwrap_model(run.run.step).observe = observer.observe
    run.train()
    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_counts_every_use_without_weights_and_names_the_odd_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "net-losses.csv"
    run = trained(path)
    written = rows(path)
    assert [row["uses"] for row in written] == ["2"] * 5
    assert written[0]["image"] == "3.png"
    assert [row["relative_loss"] for row in written] == sorted((row["relative_loss"] for row in written), key=float, reverse=True)
    total = sum(float(row["loss"]) * 2 for row in written)
    assert total == pytest.approx(sum(run.losses) / 0.5, rel=1e-4)
    assert "in 2 uses: 3.png" in caplog.text and ": 2.png" not in caplog.text
    trained(path, continues=True)
    assert [row["uses"] for row in rows(path)] == ["4"] * 5
    trained(path)
    assert [row["uses"] for row in rows(path)] == ["2"] * 5


def test_training_is_the_same_with_a_ledger(tmp_path: Path) -> None:
    with_ledger = trained(tmp_path / "net-losses.csv").weights()
    without = FakeRun(images(), updates=10, lr=1e-4)
    without.train()
    assert all(torch.equal(with_ledger[name], tensor) for name, tensor in without.weights().items())


def test_the_main_process_writes_for_all_and_again_when_the_run_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    main = ledger(path, [table(("theirs", 1.0, 5))])
    batch = replace(dataset(1)[0], image_keys=["ours"])
    main.observe(batch, torch.tensor([7]), torch.tensor([3.0]))
    main.after_epoch(None)  # type: ignore[arg-type]
    assert {row["image"]: row["relative_loss"] for row in rows(path)} == {"ours": "1.5", "theirs": "0.5"}
    main.observe(batch, torch.tensor([8]), torch.tensor([2.0]))
    main.stopped()
    assert {row["image"]: row["uses"] for row in rows(path)} == {"ours": "2", "theirs": "1"}
    path.unlink()
    ledger(path, writes=False).after_epoch(None)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_file_that_cannot_be_read_or_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "losses.csv").write_text("image,uses\na,many\n", encoding="utf-8")
    assert read_ledger(tmp_path / "losses.csv") == []
    ledger(tmp_path / "losses.csv" / "below a file").write()
    assert "could not be written" in caplog.text


def test_only_what_stands_out_far_and_was_seen_often_is_told() -> None:
    usual = [ImageLoss(f"{n}", 10, 10 + n / 10, 10) for n in range(20)]
    assert outliers(usual) == [] == outliers([])
    assert outliers_sentence(usual, Path("losses.csv")) == "No image has a loss that stands out. All of them are in losses.csv."
    odd = [ImageLoss(f"odd {n}", 10, 90 - n, 10) for n in range(12)]
    rare = ImageLoss("rare", 1, 9, 1)
    assert outliers([*usual * 5, rare, *odd]) == odd
    lines = outliers_sentence([*usual * 5, *odd], Path("losses.csv")).splitlines()
    assert lines[1] == "  9.00 × in 10 uses: odd 0"
    assert (len(lines), lines[-1]) == (12, "  and 2 more")
