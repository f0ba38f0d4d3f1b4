"""`sdxl_train_textual_inversion.py` as a person runs it: the word, its file, resuming, and what is said of mistakes."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

import sdxl_train_textual_inversion
from library.dataset.batch_pictures import TEXTS
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.text_rows import text_body
from library.models.sdxl.tokenizer import open_clip_vocabulary
from library.models.word_files import save_word
from library.options.errors import UsageError
from tests.cli.training_commands import ROOT, assert_same_bits, run_command, weights, write_dataset

SCRIPT = str(ROOT / "sdxl_train_textual_inversion.py")

QUANT = ("--base_quant", "nf4")


def command(checkpoint: Path, dataset: Path, output: Path, *more: object) -> list[str]:
    """Return the arguments of a small run; later ones win over earlier ones."""
    return [
        "--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset), "--output_dir", str(output),
        "--token_string", "mychar", "--init_word", "red cat", "--num_vectors_per_token", "3", "--save_model_as", "safetensors",
        "--learning_rate", "1e-2", "--max_train_steps", "4", "--seed", "11", "--max_data_loader_n_workers", "0",
        "--cache_latents", "--caption_prefix", "mychar,", *map(str, more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), photos, count=3)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, dataset: Path) -> tuple[Path, str]:
    """The output folder, and what was said, of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("out")
    prompts = out / "prompts.txt"
    prompts.write_text("a mychar --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    samples = ("--sample_prompts", prompts, "--sample_every_n_steps", "2")
    more = ("--save_every_n_steps", "2", "--save_state", "--gradient_checkpointing", "--ema_decay", "0.5", *QUANT, *samples)
    done = run_command(command(tiny_checkpoint, dataset, out, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_the_word_is_saved_under_its_name_and_nothing_else_is_trained(whole_run: tuple[Path, str], tiny_checkpoint: Path) -> None:
    out, said = whole_run
    names = ("mychar", "mychar-step00000002", "mychar-step00000004")
    assert {path.stem for path in out.glob("mychar*.safetensors")} == {*names, *(f"{name}-ema" for name in names)}
    assert '--init_word "red cat" is 2 tokens, and the new word has 3 vectors: over and over are used' in said
    family = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    widths = family.sizes.te1.width, family.sizes.te2.width
    learned = weights(out / "mychar.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in learned.items()} == {
        "clip_l": (3, widths[0]), "clip_g": (3, widths[1]),
    }  # fmt: skip
    with safe_open(out / "mychar.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    encoders = family.load_text_encoders(torch.float32, torch.device("cpu"))
    for name, began in zip(("clip_l", "clip_g"), family.word_vectors("red cat red", encoders), strict=True):
        moved = (learned[name] - began).abs()
        assert 0 < moved.max() < 0.1 and moved.amax(dim=1).min() > 0, "each vector moved, none far in four steps of 0.01"
    state = weights(out / "mychar-state" / "model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 3 * sum(widths), "the state holds the new rows alone"
    moments = torch.load(out / "mychar-state" / "optimizer.bin", weights_only=True)["state"]
    assert {tuple(moment["exp_avg"].shape) for moment in moments.values()} == {(3, width) for width in widths}
    assert len(list((out / "sample").glob("*.png"))) == 2


def test_a_resumed_run_ends_at_the_same_bits(
    whole_run: tuple[Path, str], tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    out, _ = whole_run
    state = ("--resume", out / "mychar-step00000002-state", "--gradient_checkpointing", "--ema_decay", "0.5", *QUANT)
    state += ("--blocks_to_swap", "12")
    done = run_command(command(tiny_checkpoint, dataset, tmp_path, *state), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "mychar.safetensors", out / "mychar.safetensors")


def test_going_on_from_a_word_with_templates_and_a_rate_of_its_own(
    whole_run: tuple[Path, str], tiny_checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    out, _ = whole_run
    more = ("--weights", out / "mychar.safetensors", "--use_style_template", "--caption_prefix", "", "--debug_dataset")
    done = run_command(command(tiny_checkpoint, dataset, tmp_path, *more), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "--init_word has no effect beside --weights" in done.stderr
    captions = (tmp_path / "debug_dataset" / TEXTS).read_text(encoding="utf-8")
    assert captions.count("in the style of mychar") == 3
    more = ("--weights", out / "mychar.safetensors", "--max_train_steps", "1", "--learning_rate", "1e-9", "--save_model_as", "pt")
    done = run_command(command(tiny_checkpoint, dataset, tmp_path, *more, "--output_name", "on"), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    again, before = torch.load(tmp_path / "on.pt", weights_only=True), weights(out / "mychar.safetensors")
    assert all(torch.allclose(again[name], before[name], atol=1e-7) for name in before)


def test_diffusers_reads_the_word_for_both_encoders(whole_run: tuple[Path, str], tiny_checkpoint: Path) -> None:
    learned = weights(whole_run[0] / "mychar.safetensors")
    vocabulary, merges = open_clip_vocabulary()
    family = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    for name, encoder in zip(("clip_l", "clip_g"), family.load_text_encoders(torch.float32, torch.device("cpu")), strict=True):
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges))
        pipeline = StableDiffusionXLPipeline(
            vae=None, text_encoder=encoder, text_encoder_2=None, tokenizer=tokenizer, tokenizer_2=None, unet=None, scheduler=None
        )
        pipeline.load_textual_inversion(learned[name], token="mychar", text_encoder=encoder, tokenizer=tokenizer)
        ids = tokenizer("mychar mychar_1 mychar_2", add_special_tokens=False)["input_ids"]
        assert ids == [49408, 49409, 49410]
        table = text_body(encoder).embeddings.token_embedding.weight
        assert torch.equal(table[ids], learned[name])


def test_mistakes_are_told_in_sentences(
    tiny_checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_word(tmp_path / "two.pt", {"clip_l": torch.zeros(2, 8), "clip_g": torch.zeros(2, 8)}, None, None)
    (tmp_path / "taken" / "mychar.safetensors").mkdir(parents=True)
    seen_at_once: list[tuple[tuple[object, ...], str]] = [
        (("--token_string", "two words"), "is not one word"),
        (("--token_string", "my/char"), "--token_string 'my/char' cannot name the files"),
        (("--output_dir", tmp_path / "taken"), "mychar.safetensors is a folder"),
        (("--weights", "nowhere.pt"), "there is no file nowhere.pt"),
        (("--num_vectors_per_token", "76"), "--num_vectors_per_token 76: a caption has room for 75 tokens"),
        (("--learning_rate", "0"), "--learning_rate is 0, so nothing is trained"),
        (("--use_object_template", "--use_style_template"), "exclude each other"),
        (("--cache_text_encoder_outputs",), "--cache_text_encoder_outputs"),
    ]
    monkeypatch.setattr(sdxl_train_textual_inversion, "set_up_logging", lambda console: None)
    for more, told in seen_at_once:
        with pytest.raises(UsageError) as found:
            sdxl_train_textual_inversion.main(command(tiny_checkpoint, dataset, tmp_path / "no", *more))
        assert told in str(found.value), more
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--token_string", "two words"), 2, "is not one word"),
        (("--token_string", "cat"), 1, "'cat' is in the vocabulary of the text encoders"),
        (("--caption_prefix", "another,"), 1, "No caption has the word mychar in it"),
        (("--caption_prefix", "another,", "--debug_dataset"), 1, "No caption has the word mychar in it"),
        (("--weights", tmp_path / "two.pt"), 1, "two.pt holds no word for this model"),
    ]
    for more, status, told in cases:
        done = run_command(command(tiny_checkpoint, dataset, tmp_path / "no", *more), script=SCRIPT)
        assert (done.returncode, told in done.stderr) == (status, True), (more, done.stderr)
        assert "Traceback" not in done.stderr
