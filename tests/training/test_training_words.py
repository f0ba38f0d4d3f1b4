"""What the vectors of a new word begin as."""

from pathlib import Path

import pytest
import torch

from library.models.family import ModelSource
from library.models.new_words import NewWord
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UserError
from library.options.groups.textual_inversion import TextualInversionOptions
from library.training.words_recipe import first_vectors


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_checkpoint))).with_words([NewWord("mychar", 2)])


@pytest.fixture(scope="module")
def encoders(family: SdxlFamily) -> list[torch.nn.Module]:
    return family.load_text_encoders(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "meant"), [("cat", "cat cat"), ("red cat", "red cat"), (None, "something something"), (" ", "something something")]
)
def test_a_word_begins_as_the_words_that_are_named(family: SdxlFamily, encoders: list, given: str | None, meant: str) -> None:
    begun = first_vectors(family, encoders, TextualInversionOptions(init_word=given, num_vectors_per_token=2))
    for vectors, expected in zip(begun, family.word_vectors(meant, encoders), strict=True):
        assert torch.equal(vectors, expected)


def test_a_word_that_begins_as_itself_begins_as_its_letters(family: SdxlFamily, encoders: list, tiny_checkpoint: Path) -> None:
    plain = SdxlFamily.open(ModelSource(str(tiny_checkpoint))).word_vectors("mychar", encoders)
    begun = first_vectors(family, encoders, TextualInversionOptions(init_word="MyChar", num_vectors_per_token=2))
    assert all(torch.equal(vectors, expected[:2]) for vectors, expected in zip(begun, plain, strict=True))


def test_a_beginning_without_any_token_is_refused(family: SdxlFamily, encoders: list) -> None:
    with pytest.raises(UserError, match=r"has no token in the vocabulary\. Give a word that the model knows"):
        first_vectors(family, encoders, TextualInversionOptions(init_word="\x00", num_vectors_per_token=2))
