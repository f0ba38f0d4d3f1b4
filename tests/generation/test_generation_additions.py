"""Learned words and control networks while drawing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import CPU, difference, load_components

from library.dataset.formats import IMAGE_EXTENSIONS
from library.generation.additions import ControlFile, guide_images, planned_controls, planned_words, with_guide_images
from library.generation.controls import Controls, read_guide
from library.generation.pipeline import Pipeline
from library.generation.request import ImageRequest
from library.models.new_words import NewWord
from library.options.errors import UsageError, UserError
from library.options.groups.generation import GenNetworkOptions
from networks.control_net_lllite import ControlNetLLLite, Widths

REQUEST = ImageRequest("a cat", "a dog", width=64, height=64, steps=4, cfg_scale=4.0, seed=3, sampler="euler")


@pytest.fixture(scope="module")
def control_file(family, components, tmp_path_factory):
    """An LLLite whose modules do something."""
    network = ControlNetLLLite(components.denoiser, Widths(8, 4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    path = tmp_path_factory.mktemp("control") / "outline.safetensors"
    network.save_weights(str(path), None, None)
    return str(path)


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guides")
    for number, colour in enumerate(["black", "white", "red"]):
        Image.new("RGB", (80, 64), colour).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def controlled(family, control_file):
    components = load_components(family)
    controls = Controls.attach([ControlFile(control_file), ControlFile(control_file, 0.5)], components.denoiser, torch.float32, CPU)
    return Pipeline(family, components, device=CPU, controls=controls)


def test_each_network_follows_its_own_image_in_a_batch_as_alone(controlled, pipeline, guides):
    black, white = str(guides / "0.png"), str(guides / "1.png")
    requests = [replace(REQUEST, guides=pair) for pair in ((black, white), (white, black), (black, black))]
    together = controlled.draw(requests)
    for request, picture in zip(requests, together, strict=True):
        assert difference(controlled.draw([request])[0], picture) < 0.5
    assert difference(together[0], together[1]) > 1, "which network sees which image matters"
    assert difference(together[0], pipeline.draw([REQUEST])[0]) > 1


def test_a_network_acts_in_its_share_of_the_steps_and_with_its_strength(family, control_file, controlled, pipeline, guides):
    request = replace(REQUEST, guides=(str(guides / "1.png"),) * 2)
    controls = controlled.controls
    controls._files = [ControlFile(control_file, 2.0, 0.25), ControlFile(control_file, 0.0)]
    strengths = []
    for step in range(4):
        controls.before_step(step, 4)
        strengths.append(next(iter(controls._networks[0].adapters.values())).multiplier)
    assert strengths == [2.0, 2.0, 0.0, 0.0]
    controls._files = [ControlFile(control_file, 0.0), ControlFile(control_file, 0.0)]
    assert difference(controlled.draw([request])[0], pipeline.draw([REQUEST])[0]) == 0
    controls._files = [ControlFile(control_file), ControlFile(control_file, 0.5)]


def options(**values):
    return GenNetworkOptions(**values)


def test_images_are_handed_out_in_order_over_and_over(guides, control_file):
    given = options(control_net_lllite_models=(control_file,), guide_image_path=(str(guides),))
    assert planned_controls(given) == [ControlFile(control_file)]
    images = guide_images(given)
    names = [request.guides[0][-5] for request in with_guide_images([REQUEST] * 4, images, 1, first=2)]
    assert names == ["2", "0", "1", "2"]
    assert with_guide_images([REQUEST], [], 0) == [REQUEST]


def test_folders_of_guide_images_have_what_folders_of_datasets_have(tmp_path):
    for ending in (*IMAGE_EXTENSIONS, ".txt"):
        (tmp_path / f"a{ending}").touch()
    (tmp_path / ".a.png").touch()
    assert [Path(file).suffix for file in guide_images(options(guide_image_path=(str(tmp_path),)))] == sorted(IMAGE_EXTENSIONS)


def test_numbers_stand_for_networks_by_position(control_file, guides):
    given = options(
        control_net_lllite_models=(control_file,) * 3,
        control_net_multipliers=(0.5, 0.7),
        control_net_ratios=(0.3,),
        guide_image_path=(str(guides),),
    )
    assert planned_controls(given) == [
        ControlFile(control_file, 0.5, 0.3),
        ControlFile(control_file, 0.7),
        ControlFile(control_file),
    ]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"control_net_lllite_models": ("no.safetensors",)}, "no.safetensors: there is no such file"),
        ({"control_net_lllite_models": ("FILE",)}, "needs --guide_image_path"),
        ({"guide_image_path": ("GUIDES",)}, "without --control_net_lllite_models"),
        ({"control_net_lllite_models": ("FILE", "FILE"), "guide_image_path": ("GUIDES",)}, "3 images for 2 networks"),
        ({"control_net_lllite_models": ("FILE",), "guide_image_path": ("FILE",)}, "no image that can be read"),
        ({"control_net_lllite_models": ("FILE",), "guide_image_path": ("nowhere",)}, "nowhere: there is no such file or folder"),
        ({"control_net_multipliers": (1.0,)}, "1 values for 0 networks"),
    ],
)
def test_what_does_not_go_together_is_told(values, told, control_file, guides):
    names = {"FILE": control_file, "GUIDES": str(guides)}
    with pytest.raises(UsageError, match=told):
        planned_controls(options(**{key: tuple(names.get(value, value) for value in given) for key, given in values.items()}))


def test_a_guide_image_is_resized_to_the_picture(guides, tmp_path):
    found = read_guide(str(guides / "2.png"), (64, 96))
    assert found.shape == (3, 96, 64) and found[0].eq(1).all() and found[1:].eq(-1).all()
    broken = tmp_path / "broken.png"
    broken.write_bytes((guides / "2.png").read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be read"):
        read_guide(str(broken), (64, 64))


def test_a_learned_word_means_its_vectors(family, tmp_path):
    """A word with the vectors of two known words draws what those words draw."""
    components = load_components(family)
    tables = [encoder.get_input_embeddings() for encoder in components.text_encoders]
    ids = family.tokenize(["red cat"])["ids1"][0, 0, 1:3]
    path = tmp_path / "redcat.safetensors"
    family.save_word(path, [table.weight[ids] for table in tables], None, None)
    plain = Pipeline(family, components, device=CPU).draw([replace(REQUEST, prompt="a red cat!", negative_prompt="red cat")])
    rows = family.read_word(path)
    taught = family.with_words([NewWord("redcat", len(rows[0]))])
    taught.extend_vocabulary(components.text_encoders, rows)
    drawn = Pipeline(taught, components, device=CPU).draw([replace(REQUEST, prompt="a RedCat!", negative_prompt="redcat")])
    assert np.array_equal(np.asarray(plain[0]), np.asarray(drawn[0]))


def test_words_and_their_files_are_checked(family, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        family.save_word(tmp_path / folder / "word.pt", [torch.zeros(1, 8), torch.zeros(1, 9)], None, None)
    paths = tuple(str(tmp_path / folder / "word.pt") for folder in ("a", "b"))
    with pytest.raises(UsageError, match=r"(?s)no\.pt: there is no such file.*2 files stand for the word word"):
        planned_words(options(textual_inversion_embeddings=(*paths, "no.pt")))
    with pytest.raises(UserError, match=r"its tensors are \[\(1, 8\), \(1, 9\)\]"):
        family.read_word(paths[0])
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}}, tmp_path / "sd1.pt")
    with pytest.raises(UserError, match="no clip_l and no clip_g"):
        family.read_word(tmp_path / "sd1.pt")
    with pytest.raises(UserError, match="'cat' is in the vocabulary"):
        family.with_words([NewWord("cat")])
