"""The reward of GIT's answers on a small checkpoint of the real classes, with random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_git
from transformers import GitForCausalLM, GitProcessor

import rewards


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_git(tmp_path_factory.mktemp("git")))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)


SCENES = [
    SimpleNamespace(prompt="a red cat", questions=["red cat?", "does this show a wall?", "dog?"]),
    SimpleNamespace(prompt="The red wall"),
    SimpleNamespace(prompt='a sign with the text "run"', questions=()),
    SimpleNamespace(prompt="a dog", questions=("a dog?",)),
]


def naive(folder, image, question):
    """One image and one question, as transformers' documentation asks."""
    model, processor = GitForCausalLM.from_pretrained(folder).eval(), GitProcessor.from_pretrained(folder)
    tokens = [processor.tokenizer.cls_token_id, *processor.tokenizer(question, add_special_tokens=False).input_ids]
    pixels = processor.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0, -1].softmax(0)
    yes, no = chances[processor.tokenizer.convert_tokens_to_ids(["yes", "no"])]
    return float(yes / (yes + no))


def test_equals_one_question_at_a_time(checkpoint, images):
    questions = [
        SCENES[0].questions,
        ["does this image show The red wall?"],
        ['does this image show a sign with the text "run"?'],
        ["a dog?"],
    ]
    expected = [np.mean([naive(checkpoint, images[i], text) for text in asked]) for i, asked in enumerate(questions)]
    for batch_size in (1, 4, 16):
        output = rewards.make("git", model=checkpoint, device="cpu", batch_size=batch_size)(images, SCENES)
        np.testing.assert_allclose(output.scores, expected, atol=1e-5)
    assert output.scores.dtype == np.float32 and output.regions[0].shape == (0, 4)
    assert np.ptp(expected) > 0.1 and min(expected) >= 0 and max(expected) <= 1


def test_the_image_counts(checkpoint, images):
    scores = rewards.make("git", model=checkpoint, device="cpu")(images, [SCENES[3]] * 4).scores
    assert len(set(scores.tolist())) == 4


def test_half_precision_is_near(checkpoint, images):
    make = rewards.make
    scores = [
        make("git", model=checkpoint, device="cpu", dtype=d)(images, SCENES).scores for d in ("float32", "bfloat16")
    ]
    np.testing.assert_allclose(scores[1], scores[0], atol=0.05)


def test_a_question_beyond_the_models_length_is_cut(checkpoint, images):
    long = [SimpleNamespace(prompt="the cat " * 30), SimpleNamespace(prompt="the cat " * 31)]
    scores = rewards.make("git", model=checkpoint, device="cpu")(images[[0, 0]], long).scores
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("questions", ["a cat?", ["a cat?", " "], [3]])
def test_questions_of_another_form(checkpoint, images, questions):
    with pytest.raises(ValueError, match=r"`.questions` of scene 0 must be a sequence of strings, got"):
        rewards.make("git", model=checkpoint)(images[:1], [SimpleNamespace(prompt="a cat", questions=questions)])


def test_weights_that_are_not_all_there(checkpoint, tmp_path):
    model = GitForCausalLM.from_pretrained(checkpoint)
    weights = {name: weight for name, weight in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(OSError, match=r"is not a whole Git checkpoint: it lacks \d weights, such as git\.visual_proj"):
        rewards.make("git", model=tmp_path).load()
