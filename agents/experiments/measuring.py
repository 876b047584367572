"""The metrics of a policy on held-out prompts, for ``vartext evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from agents import Decoding, evaluate, held_out_scenes
from agents.evaluation import bootstrap_interval
from agents.experiments.cells import METRICS
from agents.experiments.figures import save_strip
from agents.experiments.gates import BATCH, gate_table, measure_gates
from agents.experiments.loading import load_policy, make_env
from agents.experiments.options import (
    clear_errors,
    decoding_from,
)
from agents.experiments.output import table, write_json
from agents.experiments.tables import measure, with_interval
from agents.policies.base import Policy
from agents.policies.var_text import VARTextPolicy
from rewards import CLIPScore
from rewards.cvtg import CLIP_PREFIX, word_metrics
from rewards.ocr_edit import edit_counts
from var_env import Scene
from var_env.prompts import PromptScene, PromptWorld

ALL_METRICS = METRICS | {"clip": "CLIPScore", "ocr_accuracy": "OCR accuracy"}
BY_WORDS = ("reward", "word_accuracy", "ned", "clip", "ocr_accuracy")
BY_REGIONS = {"word_accuracy": "Word Accuracy", "ned": "NED", "clip": "CLIPScore"}
INTERVAL_FROM = 10  # prompts; a bootstrap over fewer makes intervals too narrow
NO_CLIP = "CLIPScore is left out: for it, add --clip openai/clip-vit-base-patch32, or a folder that holds a CLIP model"


def take_temperatures(policy: Policy, path: str) -> None:
    """Give a policy the learned temperatures of another one on the same tokenizer."""
    if not isinstance(policy, VARTextPolicy):
        raise ValueError(f"--temperatures-of needs a VARTextPolicy, and this is a {type(policy).__name__}")
    other = VARTextPolicy.load(None if path == "base" else path, policy.tokenizer)
    policy.sharpness.data.copy_(other.sharpness)


def measure_by_words(scenes: Sequence[Scene], prompts: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """For each number of target words: how many ``prompts`` have it, and mean and interval of their ``metrics``."""
    counts = np.array([len(scene.words) for scene in scenes])
    scores = {metric: np.array(prompts[metric]) for metric in ALL_METRICS if metric in prompts}
    return {
        count: {
            "prompts": int((counts == count).sum()),
            "metrics": {metric: bootstrap_interval(values[counts == count]) for metric, values in scores.items()},
        }
        for count in np.unique(counts).tolist()
    }


def table_by_words(by_words: Mapping[int, Mapping[str, Any]]) -> str:
    """One line for each number of target words."""
    shown = [metric for metric in BY_WORDS if all(metric in line["metrics"] for line in by_words.values())]
    rows = []
    for count, line in by_words.items():
        values = [line["metrics"][metric] for metric in shown]
        cells = [with_interval(v) if line["prompts"] >= INTERVAL_FROM else f"{v[0]:.3f}" for v in values]
        rows.append([str(count), str(line["prompts"]), *cells])
    return table(["Words", "Prompts", *(ALL_METRICS[metric] for metric in shown)], rows)


def ocr_accuracy(scene: Scene, read: Sequence[str]) -> float:
    """Flow-GRPO's OCR accuracy of one image, in [0, 1]."""
    edits, length = edit_counts(scene.words, read, "flow_grpo")
    return max(1 - edits / length, 0.0)


def measure_by_regions(scenes: Sequence[PromptScene], prompts: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """CVTG-2K's metrics of the prompts of each number of regions, and under "average" those of all."""
    counts = np.array([scene.regions for scene in scenes])
    groups = {str(count): np.flatnonzero(counts == count).tolist() for count in np.unique(counts)}
    lines = {}
    for name, rows in (groups | {"average": list(range(len(scenes)))}).items():
        words = word_metrics([scenes[i].words for i in rows], [prompts["read"][i] for i in rows])
        clip = {"clip": float(np.mean([prompts["clip"][i] for i in rows]))} if "clip" in prompts else {}
        lines[name] = {"prompts": len(rows), **words, **clip}
    return lines


def table_by_regions(lines: Mapping[str, Mapping[str, float]]) -> str:
    """One line for each number of regions, and one for the average."""
    shown = [metric for metric in BY_REGIONS if metric in lines["average"]]
    rows = [
        [name, str(line["prompts"]), str(line["words"]), *(f"{line[metric]:.4f}" for metric in shown)]
        for name, line in lines.items()
    ]
    return table(["Regions", "Prompts", "Words", *(BY_REGIONS[metric] for metric in shown)], rows)


def run(args: argparse.Namespace) -> int:
    with clear_errors():
        policy = load_policy(args)
        if args.temperatures_of:
            take_temperatures(policy, args.temperatures_of)
        env = make_env(
            policy,
            split=args.split,
            regions=args.regions,
            prompts=args.prompts_from,
            reward=args.reward,
            reward_kwargs=args.reward_kwargs,
        )
        layout = env.world.layout if isinstance(env.world, PromptWorld) else None
        scenes = held_out_scenes(env.world, args.prompts, args.seed, args.split)
        decoding = decoding_from(args, Decoding())
        clip = CLIPScore(args.clip, args.device) if args.clip else None
        if clip:
            clip.load()  # before the images are drawn, should it be missing
    settings = {name: str(value) for name, value in vars(args).items()}
    if args.gates:
        gates, evaluation = measure_gates(policy, env, scenes, args.seed)
        written = {"settings": settings, "gates": [gate.to_dict() for gate in gates], **measure(evaluation)}
        write_json(args.out / "evaluation.json", written)
        save_strip(args.out / "samples.png", evaluation)
        print(gate_table(f"Gate, {len(scenes)} held-out prompts", gates))
        print(f"{args.out}: evaluation.json, samples.png")
        return int(not all(gate.met for gate in gates))
    evaluation = evaluate(policy, env, scenes, decoding, args.seed, BATCH, args.best_of)
    measured = measure(evaluation)
    if clip:
        prefix = CLIP_PREFIX if layout == "cvtg" else ""
        scores = clip(evaluation.images, [replace(scene, prompt=prefix + scene.prompt) for scene in scenes]).scores
        measured["prompts"]["clip"] = [round(float(score), 6) for score in scores]
        measured["metrics"]["clip"] = bootstrap_interval(scores)
    if layout == "list":
        accuracy = [ocr_accuracy(*pair) for pair in zip(scenes, evaluation.words_read, strict=True)]
        measured["prompts"]["ocr_accuracy"] = [round(value, 6) for value in accuracy]
        measured["metrics"]["ocr_accuracy"] = bootstrap_interval(accuracy)
    measured["by_words"] = measure_by_words(scenes, measured["prompts"])
    second = table_by_words(measured["by_words"])
    if layout == "cvtg":
        measured["by_regions"] = measure_by_regions(cast("list[PromptScene]", scenes), measured["prompts"])
        second = table_by_regions(measured["by_regions"])
    write_json(args.out / "evaluation.json", {"settings": settings, **measured})
    save_strip(args.out / "samples.png", evaluation)
    rows = [[ALL_METRICS[metric], with_interval(value)] for metric, value in measured["metrics"].items()]
    print(table([f"{args.policy or 'base'}, {len(scenes)} {args.split} prompts", "Mean [95 % interval]"], rows))
    print(f"\n{second}\n")
    if not clip:
        print(NO_CLIP)
    print(f"{args.out}: evaluation.json, samples.png")
    return 0
