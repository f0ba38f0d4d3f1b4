"""Teach SDXL a new word, and leave the model as it is (textual inversion).

    # a word of four vectors that begins as "girl", from pictures whose captions have the word mychar in them
    accelerate launch sdxl_train_textual_inversion.py --pretrained_model_name_or_path sdxl.safetensors --dataset_config data.toml \\
        --output_dir out --output_name mychar --save_model_as safetensors --token_string mychar --init_word girl \\
        --num_vectors_per_token 4 --cache_latents --mixed_precision bf16 --optimizer_type AdamW8bit --learning_rate 1e-4 \\
        --max_train_steps 1600 --save_every_n_steps 400 --seed 42

    # without captions: sentences about an object, or about a style, are made around the word
        --use_object_template

    # continue exactly where a run stopped (Ctrl+C saves, and prints the command that continues)
        --resume out/mychar-step00000400-state

The saved file's name is a word of prompts: sdxl_gen_img.py --textual_inversion_embeddings out/mychar.safetensors.
docs/textual_inversion.md explains each step, docs/options.md every option.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from library.dataset.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from library.generation.request import ImageRequest
from library.options.console import set_up_logging
from library.options.dataset_config import DatasetConfig
from library.options.entry import run_script
from library.options.parse import parse
from library.options.scripts import SdxlTrainTextualInversionOptions
from library.training.inputs import dataset_definition, input_problems, sample_requests


def main(argv: Sequence[str]) -> None:
    """Check everything that can be checked without loading anything, then train."""
    options = parse(SdxlTrainTextualInversionOptions, argv, problems)
    options = named_after_the_word(options)
    set_up_logging(options.console)
    data = with_templates(options, dataset_definition(options))
    train(options, data, sample_requests(options, data.sections[0].resolution))


def problems(options: SdxlTrainTextualInversionOptions) -> list[str]:
    """Say what is wrong with what the options name, the files included that are called after the word."""
    return input_problems(named_after_the_word(options), trains_network=False)


def named_after_the_word(options: SdxlTrainTextualInversionOptions) -> SdxlTrainTextualInversionOptions:
    """Return the options with files named after the word, where no name was given."""
    word = options.word.token_string or ""
    if options.output.output_name or not options.output.is_plain(word):
        return options
    return replace(options, output=options.output.model_copy(update={"output_name": word}))


def with_templates(options: SdxlTrainTextualInversionOptions, data: DatasetConfig) -> DatasetConfig:
    """Return the data with sentences around the word in place of captions, where they were asked for."""
    word = options.word
    if not (word.use_object_template or word.use_style_template):
        return data
    sentences = OBJECT_TEMPLATES if word.use_object_template else STYLE_TEMPLATES
    return data.with_templates(tuple(sentence.format(word.token_string) for sentence in sentences))


def train(options: SdxlTrainTextualInversionOptions, data: DatasetConfig, requests: Sequence[ImageRequest]) -> None:
    """Train the word. Torch is loaded here, after everything cheap was checked."""
    from library.models.new_words import NewWord
    from library.models.sdxl.family import SdxlFamily
    from library.training.recipe import run_recipe
    from library.training.words_recipe import WordRecipe, open_with_word

    word = NewWord(options.word.token_string or "", options.word.num_vectors_per_token)

    open_family = partial(open_with_word, SdxlFamily.open, word)
    run_recipe(WordRecipe(options), open_family, options, data, requests)


if __name__ == "__main__":
    run_script(main)
