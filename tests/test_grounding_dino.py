"""Grounding DINO as a detector and as a reward, on a small checkpoint of the real classes with random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_grounding_dino
from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

import rewards
from rewards.detection import Detection
from rewards.grounding_dino import GroundingDINODetector, intersection_over_union

LABELS = [["cat", "Red dog"], ["wall"], [], ["sign", "text", "red cat"]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_grounding_dino(tmp_path_factory.mktemp("dino")))


@pytest.fixture(scope="module")
def images():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3), dtype=np.uint8)
    return coarse.repeat(6, axis=1).repeat(6, axis=2)  # 48 x 72 pixels


def naive(folder, image, labels):
    """All queries of one image: the best label, its score and the box, from the processor's own text."""
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    processor = GroundingDinoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.fromarray(image), text=[labels], return_tensors="pt")
    tokens, stop = inputs.input_ids[0].tolist(), processor.tokenizer.convert_tokens_to_ids(".")
    spans, start = [], 1
    for _ in labels:
        end = tokens.index(stop, start)
        spans.append(range(start, end))
        start = end + 1
    with torch.no_grad():
        output = model(**inputs)
    found = []
    for logits, (x, y, w, h) in zip(output.logits[0], output.pred_boxes[0].tolist(), strict=True):
        scores = [float(np.mean([logits[i].sigmoid() for i in span])) for span in spans]
        box = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 1) * [72, 48, 72, 48]
        found.append((labels[int(np.argmax(scores))], max(scores), box))
    return sorted(found, key=lambda row: -row[1])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_one_image_at_a_time(checkpoint, images, batch_size):
    detector = GroundingDINODetector(checkpoint, threshold=0, overlap=1, device="cpu", batch_size=batch_size)
    found = detector.detect(images, LABELS)
    assert found[2] == []
    for image, labels, detections in zip(images, LABELS, found, strict=True):
        if labels:
            expected = naive(checkpoint, image, labels)
            assert [row.label for row in detections] == [label for label, _, _ in expected]
            np.testing.assert_allclose([row.score for row in detections], [s for _, s, _ in expected], atol=1e-4)
            np.testing.assert_allclose([row.box for row in detections], [box for *_, box in expected], atol=1e-2)
    assert len({row.label for row in found[0] + found[3]}) > 2


def test_threshold_and_doubles(checkpoint, images):
    everything = GroundingDINODetector(checkpoint, threshold=0, overlap=1, device="cpu").detect(images, LABELS)
    some = GroundingDINODetector(checkpoint, threshold=0.4, overlap=1, device="cpu").detect(images, LABELS)
    assert some == [[row for row in rows if row.score >= 0.4] for rows in everything] != everything
    apart = GroundingDINODetector(checkpoint, threshold=0, overlap=0, device="cpu").detect(images, LABELS)
    assert sum(map(len, apart)) < sum(map(len, everything))
    for rows, left in zip(everything, apart, strict=True):
        assert rows[:1] == left[:1]  # the best stays
        for row in rows:  # and each other, unless it overlaps a better one that stayed
            rivals = [kept for kept in left if kept.label == row.label and kept.score >= row.score and kept != row]
            assert (row in left) != any(intersection_over_union(row.box, kept.box) > 0 for kept in rivals)


def test_intersection_over_union():
    assert intersection_over_union((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert intersection_over_union((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)
    assert (
        intersection_over_union((0, 0, 4, 4), (4, 0, 6, 4)) == 0 == intersection_over_union((1, 1, 1, 1), (1, 1, 1, 1))
    )


def test_half_precision(checkpoint, images):
    detector = GroundingDINODetector(checkpoint, threshold=0, device="cpu", dtype="bfloat16")
    assert all(np.isfinite(row.score) for rows in detector.detect(images, LABELS) for row in rows)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["cat"]], "got 1 lists of labels for 2 images"),
        (["cat", "dog"], "the labels of image 0 must be a list of strings, got 'cat'"),
        ([["cat"], ["a. b"]], r"the labels of image 1 hold 'a\. b'; a label is a name"),
        ([["cat"], [" "]], "the labels of image 1 hold ' '"),
        ([["cat"], [3]], "the labels of image 1 hold 3"),
        (
            [["cat"], ["wall"] * 3 + [f"dog {'cat ' * i}" for i in range(9)]],
            "labels take .* tokens and the model reads 32",
        ),
    ],
)
def test_bad_labels(checkpoint, images, labels, message):
    with pytest.raises(ValueError, match=message):
        GroundingDINODetector(checkpoint, device="cpu").detect(images[:2], labels)


def test_bad_options():
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got 1.5"):
        GroundingDINODetector(threshold=1.5)
    with pytest.raises(ValueError, match=r"overlap must lie in \[0, 1\], got -1"):
        GroundingDINODetector(overlap=-1)
    with pytest.raises(ValueError, match="the reward's labels are empty"):
        rewards.make("grounding_dino", labels=[])


class TestReward:
    def test_the_share_of_objects_found(self, checkpoint, images):
        scenes = [SimpleNamespace(objects=labels or ["dog"]) for labels in LABELS]
        options = {"model": checkpoint, "threshold": 0.4, "device": "cpu"}
        output = rewards.make("grounding_dino", **options)(images, scenes)
        found = GroundingDINODetector(**options).detect(images, [scene.objects for scene in scenes])
        for score, regions, rows, scene in zip(output.scores, output.regions, found, scenes, strict=True):
            there = [label for label in scene.objects if any(row.label == label for row in rows)]
            assert score == pytest.approx(len(there) / len(scene.objects))
            np.testing.assert_array_equal(regions, np.array([row.box for row in rows], np.float32).reshape(-1, 4))
        assert len(set(output.scores.tolist())) > 1
        same = rewards.make("grounding_dino", labels=["cat", "Red dog"], **options)(images[:1], [SimpleNamespace()])
        assert same.scores[0] == output.scores[0]

    def test_by_hand(self):
        """Whatever the detector is: an object found twice counts once."""
        reward = rewards.make("grounding_dino", labels=["cat", "dog"])
        cat, dog = Detection("cat", 0.9, (0, 0, 8, 8)), Detection("dog", 0.5, (8, 8, 16, 16))
        reward.detector = SimpleNamespace(detect=lambda images, labels: [[cat, cat], [dog, cat], []])
        output = reward(np.zeros((3, 16, 16, 3), np.uint8), [SimpleNamespace()] * 3)
        np.testing.assert_array_equal(output.scores, np.float32([0.5, 1, 0]))
        assert [len(boxes) for boxes in output.regions] == [2, 2, 0]
