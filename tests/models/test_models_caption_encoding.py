"""Captions whose brackets are weights, against the hidden states of the same words without brackets."""

from pathlib import Path

import pytest
import torch

from library.models.caption_encoding import encode_captions
from library.models.family import ModelSource, TextCond
from library.models.prompt_weights import PromptStyle, has_weights
from library.models.sdxl.family import SdxlFamily

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[75, 150])
def family(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_checkpoint), max_token_length=request.param))


def encode(family: SdxlFamily, captions: list[str], *, weighted: bool) -> TextCond:
    style = PromptStyle.of_training(family.source.max_token_length) if weighted else None
    return encode_captions(family, captions, family.load_text_encoders(torch.float32, CPU), CPU, style)


@torch.no_grad()
def test_brackets_multiply_the_hidden_states_of_their_tokens_and_nothing_else(family: SdxlFamily) -> None:
    weighted = encode(family, ["a (red cat:1.5) and [dog]", "plain"], weighted=True)
    plain = encode(family, ["a red cat and dog", "plain"], weighted=False)
    factors = torch.ones(2, plain["hidden1"].shape[1], 1)
    factors[0, 1:6, 0] = torch.tensor([1, 1.5, 1.5, 1, 1 / 1.1])  # after the begin token: a, red, cat, and, dog
    for name in ("hidden1", "hidden2"):
        torch.testing.assert_close(weighted[name], plain[name] * factors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted["pool2"], plain["pool2"])


@torch.no_grad()
def test_captions_without_brackets_are_encoded_as_they_always_were(family: SdxlFamily) -> None:
    captions = ["a cat, a dog", "", "long, " * 200]
    weighted, plain = encode(family, captions, weighted=True), encode(family, captions, weighted=False)
    assert all(torch.equal(weighted[name], plain[name]) for name in plain)


@torch.no_grad()
def test_without_the_option_brackets_are_text(family: SdxlFamily) -> None:
    bracketed, plain = (encode(family, [text], weighted=False)["hidden1"] for text in ("(cat:1.5)", "cat"))
    assert not torch.allclose(bracketed, plain)


def test_gradients_reach_the_encoders_through_weights(family: SdxlFamily) -> None:
    encoders = [encoder.requires_grad_(True) for encoder in family.load_text_encoders(torch.float32, CPU)]
    cond = encode_captions(family, ["(cat:2)"], encoders, CPU, PromptStyle.of_training(family.source.max_token_length))
    sum(value.sum() for value in cond.values()).backward()
    assert all(
        any(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters()) for encoder in encoders
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a cat", False), ("", False), ("(cat)", True), ("a [cat]", True), (r"a \(cat\)", True), ("a cat)", False), ("a:b", False)],
)
def test_a_caption_is_weighted_if_brackets_make_it_another(text: str, expected: bool) -> None:
    assert has_weights(text) is expected


@torch.no_grad()
def test_a_caption_that_is_cut_is_told_once(family: SdxlFamily, caplog: pytest.LogCaptureFixture) -> None:
    caption = f"(told once {family.source.max_token_length}), " * 100
    for _ in range(3):
        encode(family, [caption], weighted=True)
    assert len([record for record in caplog.records if "are not used" in record.getMessage()]) == 1
