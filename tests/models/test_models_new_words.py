"""Words beside the vocabulary, against transformers' own way of adding tokens."""

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from library.models.new_words import ExtendedEmbedding, NewWord, mentions
from library.models.sdxl.tokenizer import load_bpe, open_clip_vocabulary

WORDS = [NewWord("mychar", 3), NewWord("b-5")]
FIRST = 49408


@pytest.fixture(scope="module")
def extended():
    return load_bpe().with_words(WORDS)


@pytest.fixture(scope="module")
def reference():
    vocabulary, merges = open_clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges))
    tokenizer.add_tokens(["mychar", "mychar1", "mychar2", "b-5"])
    return tokenizer


@pytest.mark.parametrize("text", ["a photo of mychar", "mychar,b-5", "(mychar) sits. mychar", "nothing new", "  b-5!  "])
def test_ids_are_those_of_added_tokens_with_every_vector_in_its_place(extended, reference, text):
    spelled = text.replace("mychar", "mychar mychar1 mychar2")
    assert extended.encode(text) == reference(spelled, add_special_tokens=False)["input_ids"]
    assert extended.count([text]) == [len(extended.encode(text))]


def test_a_vector_can_be_named_alone_and_longer_words_mean_what_they_meant(extended):
    assert extended.encode("MyChar2") == [FIRST + 2]
    assert extended.encode("B-5") == [FIRST + 3]
    assert extended.encode("mycharacter b-52") == load_bpe().encode("mycharacter b-52")


def test_a_word_is_found_however_texts_are_cleaned():
    bpe = load_bpe().with_words([NewWord("ｍｙｃｈａｒ"), NewWord("O’x")])
    assert bpe.encode("a ｍｙｃｈａｒ") == bpe.encode("a mychar") == [*load_bpe().encode("a"), FIRST]
    assert bpe.encode("O’x") == [FIRST + 1]
    assert load_bpe().taken(NewWord("ｃａｔ")) == ["cat"]


def test_words_that_mean_something_already_are_found():
    assert load_bpe().taken(NewWord("cat")) == ["cat"]
    assert load_bpe().taken(NewWord("Mychar", 2)) == []
    assert load_bpe().taken(NewWord("co", 3)) == ["co"]


def test_new_rows_stand_behind_the_table_and_alone_get_gradients():
    table = nn.Embedding(5, 3).requires_grad_(False)
    rows = torch.randn(2, 3)
    embedding = ExtendedEmbedding(table, rows)
    embedding.rows.requires_grad_(True)
    ids = torch.tensor([[0, 5, 4], [6, 6, 1]])
    expected = torch.cat([table.weight, rows])[ids]
    found = embedding(ids)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert embedding.rows.grad.tolist() == [[1.0] * 3, [2.0] * 3]
    assert table.weight.grad is None


@pytest.mark.parametrize(
    ("text", "is_there"),
    [("a Mychar", True), ("mychar, red", True), ("(mychar:1.2)", True), ("mycharacter", False), ("my char", False), ("", False)],
)
def test_a_word_stands_in_a_text_only_as_a_word_of_its_own(text, is_there):
    assert mentions(text, "myChar") == is_there
