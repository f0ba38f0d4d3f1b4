"""Weighted and long prompts, against the token ids and embeddings sd-scripts makes with a stand-in encoder."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.models.family import ModelSource
from library.models.prompt_weights import PromptStyle
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.tokenizer import load_bpe
from library.models.sdxl.weighted_text import apply_weights, tokenize_weighted

VALUES = json.loads((Path(__file__).parents[1] / "compat" / "prompt_reference_values.json").read_text(encoding="utf-8"))
GENERATION = [case for case in VALUES["encoding"]["cases"] if "BREAK" not in case["prompt"]]
TRAINING = VALUES["training_sample_encoding"]["cases"]
LONG = "cat, " * 100


class StandIn(nn.Module):
    """h[b, t, c] = sin(0.001 · id + 0.1 · c) + 0.5; pooled: the number of the row's ids, so that rows can be told apart."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(1, 1)
        self.pooled = pooled

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = torch.sin(0.001 * ids[..., None] + 0.1 * torch.arange(8)) + 0.5
        return (hidden, ids.float().sum(1, keepdim=True)) if self.pooled else hidden


ENCODERS = [StandIn(pooled=False), StandIn(pooled=True)]


@pytest.fixture(scope="module")
def family() -> SdxlFamily:
    return SdxlFamily(ModelSource("unused"), None, None)  # type: ignore[arg-type]  # neither file nor sizes are looked at here


@pytest.mark.parametrize("case", GENERATION, ids=lambda case: f"{case['prompt'][:30]} × {case['max_multiples']}")
def test_generation_encodes_as_sd_scripts_does(family, case):
    texts, style = [case["prompt"], case["negative"]], PromptStyle(max_chunks=case["max_multiples"])
    tokens, _ = tokenize_weighted(load_bpe(), texts, style)
    positive, negative = family.encode_prompts(texts, ENCODERS, style)
    for te, ids, hidden in (("te1", "ids1", "hidden1"), ("te2", "ids2", "hidden2")):
        expected = case[te]
        assert tokens[ids].tolist() == [expected["chunks"], expected["neg_chunks"]]
        assert list(positive[hidden].shape) == list(negative[hidden].shape) == expected["embedding_shape"]
        torch.testing.assert_close(positive[hidden][0, :6, :4], torch.tensor(expected["embedding_head"]), atol=2e-6, rtol=0)
        assert positive[hidden].sum().item() == pytest.approx(expected["embedding_sum"], abs=1e-2)
        assert negative[hidden].sum().item() == pytest.approx(expected["neg_embedding_sum"], abs=1e-2)


@pytest.mark.parametrize("case", TRAINING, ids=lambda case: f"{case['prompt'][:30]} {case['max_token_length']}")
def test_previews_encode_as_sd_scripts_does(family, case):
    style = PromptStyle.of_training(case["max_token_length"] or 75)
    tokens, _ = tokenize_weighted(load_bpe(), [case["prompt"]], style)
    cond = family.encode_prompts([case["prompt"]], ENCODERS, style)[0]
    assert tokens["ids1"][0].tolist() == case["te1_chunks"]
    assert tokens["ids2"][0].tolist() == case["te2_chunks"]
    assert list(cond["hidden1"].shape) == list(cond["hidden2"].shape) == case["shape"]
    assert cond["hidden1"].sum().item() == pytest.approx(case["te1_sum"], abs=1e-2)
    assert cond["hidden2"].sum().item() == pytest.approx(case["te2_sum"], abs=1e-2)


def test_an_unweighted_prompt_is_tokenized_as_the_family_does(family):
    tokens, weights = tokenize_weighted(load_bpe(), ["a cat", ""], PromptStyle.of_training())
    assert all(torch.equal(tokens[key], ids) for key, ids in family.tokenize(["a cat", ""]).items())
    assert bool((weights == 1).all())


def test_break_starts_a_new_row_and_every_row_keeps_its_end_token(family):
    tokens, _ = tokenize_weighted(load_bpe(), ["a cat BREAK a dog"], PromptStyle(max_chunks=3))
    assert tokens["ids2"].shape == (1, 2, 77)
    assert tokens["ids2"][0, :, :5].tolist() == [[49406, 320, 2368, 49407, 0], [49406, 320, 1929, 49407, 0]]


def test_the_pooled_vector_is_that_of_the_first_row(family):
    style = PromptStyle(max_chunks=3)
    long, short = family.encode_prompts([LONG, "a"], ENCODERS, style)
    first_row = tokenize_weighted(load_bpe(), [LONG], style)[0]["ids2"][0, 0]
    assert long["pool2"].tolist() == [[first_row.sum().item()]]
    assert long["hidden1"].shape == short["hidden1"].shape == (1, 3 * 77, 8)


def test_a_prompt_that_is_too_long_is_cut_and_told(caplog):
    tokens, _ = tokenize_weighted(load_bpe(), [LONG], PromptStyle(max_chunks=2))
    assert tokens["ids1"].shape == (1, 2, 77)
    assert "longer than 2 × 75 tokens; its last 50 are not used" in caplog.text


def test_weights_keep_the_mean_in_generation_only():
    cond = {"hidden1": torch.rand(1, 4, 3) + 1, "pool2": torch.rand(1, 3)}
    weights = torch.tensor([[1.0, 2.0, 0.5, 1.0]])
    plain = apply_weights(cond, weights, keep_mean=False)
    kept = apply_weights(cond, weights, keep_mean=True)
    torch.testing.assert_close(plain["hidden1"], cond["hidden1"] * weights[..., None])
    torch.testing.assert_close(kept["hidden1"].mean(), cond["hidden1"].mean())
    torch.testing.assert_close(
        kept["hidden1"] / plain["hidden1"], (cond["hidden1"].mean() / plain["hidden1"].mean()).expand(1, 4, 3)
    )
    assert plain["pool2"] is cond["pool2"]


def test_a_mean_that_changes_its_sign_does_not_turn_the_text_round():
    cond = {"hidden1": torch.tensor([[[1.0], [2.0]]])}
    turned = apply_weights(cond, torch.tensor([[1.0, -1.0]]), keep_mean=True)
    assert turned["hidden1"].flatten().tolist() == [1.0, -2.0]
    vanished = apply_weights(cond, torch.tensor([[2.0, -1.0]]), keep_mean=True)
    assert vanished["hidden1"].flatten().tolist() == [2.0, -2.0]


def test_gradients_flow_through_weights():
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    apply_weights({"hidden1": hidden}, torch.tensor([[1.0, 3.0]]), keep_mean=False)["hidden1"].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [1.0, 3.0]
