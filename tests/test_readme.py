"""What the documentation tells a person to type is accepted by the commands it names, and its links lead somewhere."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import start
from finetune import clean_captions_and_tags, prepare_buckets_latents
from finetune.merge_captions_to_metadata import command_line as captions_parser
from finetune.merge_dd_tags_to_metadata import command_line as tags_parser
from library.generation.plan import raise_refusals, read_prompts
from library.options.dataset_config import load_dataset_config
from library.options.errors import UsageError
from library.options.groups.generation import PromptOptions
from library.options.metadata_tools import merge_request
from library.options.parse import parse
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    SdxlGenImgOptions,
    SdxlTrainControlNetLLLiteOptions,
    SdxlTrainControlNetOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    SdxlTrainTextualInversionOptions,
)
from tools import bench_start, canny, resize_images_to_resolution, show_metadata
from tools.bench import BenchScriptOptions, check
from tools.bench_dataset import command_line as bench_dataset_parser
from tools.convert_sdxl import command_line as convert_parser
from tools.convert_sdxl import output_layout

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "toy"))

import compare_bases  # noqa: E402
import evaluate  # noqa: E402
import follow_outlines  # noqa: E402
import learn_word  # noqa: E402
import make  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/photos/SOURCES.md"]
"""Pages whose commands and links are tested."""
ESSENTIALS = ["--pretrained_model_name_or_path", __file__, "--output_dir", "out", "--network_module", "networks.lora"]
"""What every training command names; any file stands in for a checkpoint, which is not opened here."""
LAUNCHERS = (["accelerate", "launch"], ["torchrun"], ["python3"], ["python"])


def fenced(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Every command of every page that starts one of our scripts, as (page, words)."""
    found = []
    for page in PAGES:
        for block in fenced(page, "bash"):
            lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
            found += [(page.name, words) for words in lines if any(word.endswith(".py") for word in words)]
    return found


def accept_bench(arguments: Sequence[str]) -> None:
    check(parse(BenchScriptOptions, arguments))


def accept_command(words: Sequence[str]) -> None:
    ACCEPT[words[0]](list(words[1:]))


ACCEPT: dict[str, Callable[[list[str]], object]] = {
    "start.py": start.read_command_line,
    "sdxl_train.py": lambda arguments: parse(SdxlTrainOptions, arguments),
    "sdxl_train_network.py": lambda arguments: parse(SdxlTrainNetworkOptions, arguments),
    "sdxl_train_textual_inversion.py": lambda arguments: parse(SdxlTrainTextualInversionOptions, arguments),
    "sdxl_train_control_net.py": lambda arguments: parse(SdxlTrainControlNetOptions, arguments),
    "sdxl_train_control_net_lllite.py": lambda arguments: parse(SdxlTrainControlNetLLLiteOptions, arguments),
    "sdxl_gen_img.py": lambda arguments: parse(SdxlGenImgOptions, arguments),
    "finetune/clean_captions_and_tags.py": clean_captions_and_tags.read_command_line,
    "finetune/merge_captions_to_metadata.py": lambda arguments: merge_request(captions_parser().parse_args(arguments)),
    "finetune/merge_dd_tags_to_metadata.py": lambda arguments: merge_request(tags_parser().parse_args(arguments)),
    "finetune/prepare_buckets_latents.py": prepare_buckets_latents.read_command_line,
    "tools/bench.py": accept_bench,
    "tools/cache_latents.py": lambda arguments: parse(CacheLatentsOptions, arguments),
    "tools/cache_text_encoder_outputs.py": lambda arguments: parse(CacheTextEncoderOutputsOptions, arguments),
    "tools/bench_start.py": lambda arguments: accept_command(bench_start.command_line().parse_args(arguments).command),
    "tools/bench_dataset.py": lambda arguments: bench_dataset_parser().parse_args(arguments),
    "tools/canny.py": canny.read_command_line,
    "tools/convert_sdxl.py": lambda arguments: output_layout(convert_parser().parse_args(arguments)),
    "tools/forecast_table.py": lambda arguments: [json.loads((ROOT / path).read_text())["rows"] for path in arguments],
    "tools/resize_images_to_resolution.py": resize_images_to_resolution.read_command_line,
    "tools/show_metadata.py": lambda arguments: show_metadata.command_line().parse_args(arguments),
    "examples/toy/compare_bases.py": lambda arguments: compare_bases.command_line().parse_args(arguments),
    "examples/toy/evaluate.py": lambda arguments: evaluate.command_line().parse_args(arguments),
    "examples/toy/follow_outlines.py": lambda arguments: follow_outlines.command_line().parse_args(arguments),
    "examples/toy/learn_word.py": lambda arguments: learn_word.command_line().parse_args(arguments),
    "examples/toy/make.py": lambda arguments: make.command_line().parse_args(arguments),
}


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
def test_the_commands_of_the_documentation_are_accepted(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--num_processes" in words:
        monkeypatch.setenv("WORLD_SIZE", words[words.index("--num_processes") + 1])  # as the launcher does
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert any(words[: len(launcher)] == launcher for launcher in LAUNCHERS)
    assert (ROOT / words[script]).exists()
    problems = problems_of(words[script], words[script + 1 :])
    assert [problem for problem in problems if "there is no f" not in problem.lower() and "pip install" not in problem] == []


def problems_of(script: str, arguments: list[str]) -> tuple[str, ...]:
    """What a command complains about; the reader's own files are not here."""
    try:
        ACCEPT[script](arguments)
    except UsageError as error:
        return error.problems
    return ()


def test_the_readme_shows_set_up_training_and_drawing() -> None:
    shown = {word for page, words in commands() if page == "README.md" for word in words if word.endswith(".py")}
    assert shown == {"start.py", "sdxl_train.py", "sdxl_train_network.py", "sdxl_gen_img.py"}


def test_a_mistyped_option_in_the_readme_would_be_noticed() -> None:
    _, words = next((page, words) for page, words in commands() if "sdxl_train_network.py" in words)
    arguments = words[words.index("sdxl_train_network.py") + 1 :]
    with pytest.raises(UsageError, match="network_dim"):
        parse(SdxlTrainNetworkOptions, [word.replace("--network_dim", "--network_dimm") for word in arguments])


@pytest.mark.parametrize("source", ["README.md", "examples/photos/dataset.toml"])
def test_the_dataset_files_shown_are_accepted(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = fenced(ROOT / source, "toml")[0] if source.endswith(".md") else (ROOT / source).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("dataset.toml").write_text(text, encoding="utf-8")
    for folder in re.findall(r'image_dir = "(.*)"', text):
        Path(folder).mkdir(parents=True)
    options = parse(SdxlTrainNetworkOptions, [*ESSENTIALS, "--dataset_config", "dataset.toml"])
    config = load_dataset_config(options.dataset, options.caption, options.image, options.cache)
    assert len(config.sections) == 1


def test_the_training_configuration_of_the_demo_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = parse(SdxlTrainNetworkOptions, [*ESSENTIALS[:4], "--config_file", "examples/toy/training.toml", "--strict_config"])
    assert options.network.network_module == "networks.lora"
    config = load_dataset_config(options.dataset, options.caption, options.image, options.cache)
    assert config.sections[0].subsets[0].num_repeats == 1


def test_the_prompts_of_the_demo_can_be_drawn() -> None:
    prompts = read_prompts(PromptOptions(from_file=str(ROOT / "examples/toy/prompts.txt")))
    raise_refusals(prompts)
    assert len(prompts) == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
