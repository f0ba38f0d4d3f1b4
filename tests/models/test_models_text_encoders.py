"""The text encoders against transformers and open_clip."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.models.sdxl.build import build_part, file_names, part_tensors
from library.models.sdxl.open_clip_names import from_open_clip, to_open_clip
from library.models.sdxl.sizes import SdxlSizes, TextEncoderSizes, text_encoder_sizes
from library.models.sdxl.text_encoders import build_text_encoder
from library.models.sdxl.text_rows import merge_rows
from library.models.weights import Entry, fill

COMPAT = Path(__file__).parents[1] / "compat"
KEYS = json.loads((COMPAT / "sdxl_checkpoint_keys.json").read_text(encoding="utf-8"))["keys"]
TE2_MAP = json.loads((COMPAT / "sdxl_te2_key_map.json").read_text(encoding="utf-8"))
CPU = torch.device("cpu")
TE1 = TextEncoderSizes.by_convention(64, 3, "quick_gelu")
TE2 = TextEncoderSizes.by_convention(128, 3, "gelu", projection_dim=96)


def entry(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), lambda: tensor)


def filled(sizes: TextEncoderSizes, tensors: dict[str, Tensor]) -> nn.Module:
    module = build_text_encoder(sizes)
    return fill(module, {name: entry(t) for name, t in tensors.items()}, file_names(module), torch.float32, CPU)


def ids(rows: int = 3) -> Tensor:
    """Rows of 77 with begin and end tokens at different places, padded as TE2's are."""
    drawn = torch.randint(1, 49000, (rows, 77), generator=torch.Generator().manual_seed(0))
    drawn[:, 0] = 49406
    for row, end in enumerate((1, 40, 76)[:rows]):
        drawn[row, end:] = 0
        drawn[row, end] = 49407
    return drawn


def transformers_config(sizes: TextEncoderSizes) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection_dim=sizes.projection_dim or sizes.width,
        hidden_act=sizes.activation,
        eos_token_id=49407,
        initializer_factor=3.0,
    )


def test_first_encoder_equals_transformers() -> None:
    torch.manual_seed(0)
    theirs = CLIPTextModel(transformers_config(TE1)).eval()
    ours = filled(TE1, part_tensors(theirs))
    with torch.no_grad():
        expected = theirs(ids(), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours(ids()), expected, rtol=1e-5, atol=1e-5)


def test_second_encoder_equals_transformers() -> None:
    torch.manual_seed(0)
    theirs = CLIPTextModelWithProjection(transformers_config(TE2)).eval()
    ours = filled(TE2, part_tensors(theirs))
    with torch.no_grad():
        expected = theirs(ids(), output_hidden_states=True)
        hidden, pooled = ours(ids())
    torch.testing.assert_close(hidden, expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds, rtol=1e-5, atol=1e-5)


def test_second_encoder_equals_open_clip() -> None:
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    theirs = TextTransformer(context_length=77, width=128, heads=2, layers=3, output_dim=96, output_tokens=True).eval()
    part = from_open_clip({name: entry(tensor) for name, tensor in theirs.state_dict().items()})
    ours = filled(TE2, {name: e.read() for name, e in part.items()})
    states: list[Tensor] = []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda _, __, out: states.append(out))
    with torch.no_grad():
        pooled, _ = theirs(ids())
        hidden, ours_pooled = ours(ids())
    torch.testing.assert_close(hidden, states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_pooled, pooled, rtol=1e-4, atol=1e-5)


def test_the_first_end_token_is_pooled_even_where_a_larger_id_follows() -> None:
    torch.manual_seed(0)
    theirs = CLIPTextModelWithProjection(transformers_config(TE2)).eval()
    ours = filled(TE2, part_tensors(theirs))
    one, two = ids(1).clone(), ids(1).clone()
    two[0, 1:] = 49407  # every later position is an end token too
    with torch.no_grad():
        torch.testing.assert_close(ours(one)[1], ours(two)[1], rtol=1e-6, atol=1e-6)


def test_the_first_encoder_does_not_run_its_last_layer() -> None:
    encoder = filled(TE1, part_tensors(CLIPTextModel(transformers_config(TE1))))
    ran: list[int] = []
    body = getattr(encoder, "text_model", encoder)
    for number, layer in enumerate(body.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder(ids())
    assert ran == [0, 1]


@pytest.mark.parametrize("sizes", [TE1, TE2], ids=["te1", "te2"])
def test_gradients_with_checkpointing_equal_those_without(sizes) -> None:
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if sizes.projection_dim else CLIPTextModel
    encoder = filled(sizes, part_tensors(kind(transformers_config(sizes)))).requires_grad_(True)
    plain = gradients(encoder)
    encoder.train().gradient_checkpointing_enable({"use_reentrant": False})
    body = getattr(encoder, "text_model", encoder)
    calls: list[int] = []
    body.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(encoder)
    assert len(calls) == 2, "the forward pass, and again in the backward pass"
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def gradients(encoder: nn.Module) -> dict[str, Tensor]:
    encoder.zero_grad()
    out = encoder(ids())
    sum(tensor.square().mean() for tensor in (out if isinstance(out, tuple) else (out,))).backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def test_bfloat16_weights_and_autocast_both_run() -> None:
    torch.manual_seed(0)
    tensors = part_tensors(CLIPTextModelWithProjection(transformers_config(TE2)))
    exact = filled(TE2, tensors)
    low = filled(TE2, tensors).to(torch.bfloat16)
    with torch.no_grad():
        expected = exact(ids())[1]
        torch.testing.assert_close(low(ids())[1].float(), expected, rtol=0.1, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(exact(ids())[1].float(), expected, rtol=0.1, atol=0.1)


def test_full_size_encoders_have_every_name_and_shape_of_the_released_checkpoint() -> None:
    te1_prefix, te2_prefix = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    te1 = {name: tuple(t.shape) for name, t in part_tensors(build_part("te1", SdxlSizes())).items()}
    assert te1 == {name[len(te1_prefix) :]: tuple(shape) for name, shape in KEYS.items() if name.startswith(te1_prefix)}
    te2 = {name: tuple(t.shape) for name, t in to_open_clip(part_tensors(build_part("te2", SdxlSizes()))).items()}
    released = {name[len(te2_prefix) :]: tuple(shape) for name, shape in KEYS.items() if name.startswith(te2_prefix)}
    assert te2 == {name: shape for name, shape in released.items() if name != "logit_scale"}


def test_open_clip_names_convert_as_the_table_says() -> None:
    prefix = "conditioner.embedders.1.model."
    names = [name[len(prefix) :] for name in KEYS if name.startswith(prefix) and not name.endswith("logit_scale")]
    part = from_open_clip({name: entry(torch.zeros(3, 1)) for name in names})
    split = {hf for parts in TE2_MAP["split"].values() for hf in parts}
    assert part.keys() == set(TE2_MAP["copy"].values()) | set(TE2_MAP["transpose"].values()) | split
    for name, hf in TE2_MAP["copy"].items():
        assert from_open_clip({name: entry(torch.zeros(1))}).keys() == {hf}


def test_open_clip_to_transformers_and_back_keeps_every_value() -> None:
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    original = TextTransformer(context_length=77, vocab_size=500, width=64, heads=1, layers=2, output_dim=32).state_dict()
    part = from_open_clip({name: entry(tensor) for name, tensor in original.items()})
    for name, converted in part.items():
        assert tuple(converted.read().shape) == converted.shape, name
    back = to_open_clip({name: e.read() for name, e in part.items()})
    assert back.keys() == original.keys() - {"attn_mask"}
    for name, tensor in back.items():
        assert torch.equal(tensor, original[name]), name
        assert tensor.is_contiguous(), name


def test_the_other_spelling_of_the_projection_is_not_transposed() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(from_open_clip({"text_projection.weight": entry(matrix)})["text_projection.weight"].read(), matrix)
    assert torch.equal(from_open_clip({"text_projection": entry(matrix)})["text_projection.weight"].read(), matrix.T)


def test_sizes_are_read_back_from_tensor_shapes() -> None:
    for name, sizes in (("te1", TE1), ("te2", TE2)):
        shapes = {key: tuple(t.shape) for key, t in part_tensors(build_text_encoder(sizes)).items()}
        assert text_encoder_sizes(shapes, {}, name, sizes.activation) == sizes
        told = text_encoder_sizes(shapes, {f"arch.{name}.heads": "4", f"arch.{name}.act": "relu"}, name, sizes.activation)
        assert (told.heads, told.activation) == (4, "relu")


def test_rows_of_a_long_prompt_are_joined_without_inner_begin_and_end() -> None:
    states = torch.arange(2 * 3 * 77).reshape(2, 3, 77, 1)
    joined = merge_rows(states)[:, :, 0]
    assert joined.shape == (2, 227)
    rows = states[0, :, :, 0].tolist()
    assert joined[0].tolist() == [rows[0][0], *rows[0][1:76], *rows[1][1:76], *rows[2][1:76], rows[2][76]]
    assert torch.equal(merge_rows(states[:, :1]), states[:, 0])
