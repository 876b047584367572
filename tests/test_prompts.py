"""Prompt files in the layouts of CVTG-2K and of Flow-GRPO's lists, the environment on them, and the scripts."""

import json
import shutil
from importlib import import_module

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from tiny import tiny_policy
from tiny_clip import save_tiny_clip

from agents.evaluation import held_out_scenes
from agents.experiments import measuring
from rewards import CLIPScore
from rewards.cvtg import word_metrics
from rewards.ocr_edit import OCREditReward
from var_env import VARTextEnv, VARTextVectorEnv, World
from var_env.prompts import FILE_PROMPT_BYTES, PromptScene, PromptWorld
from var_env.scenes import MAX_PROMPT_BYTES, TARGET_REGIONS, scene_from_prompt, split_of

SIZES = {2: 4, 3: 6, 4: 6, 5: 4}  # prompts of each number of regions and folder; the paper's profile


def cvtg_entry(index, regions, style=""):
    carriers = [f"sign {k}" for k in range(regions)]
    sentences = [f"a {carrier}{style} reads 'Text {index} No{k}'" for k, carrier in enumerate(carriers)]
    return {
        "index": index,
        "prompt": f"In a town's square, {', '.join(sentences)}.",
        "carrier_list": carriers,
        "sentence_list": sentences,
    }


def write_cvtg(folder):
    """A small CVTG-2K: both folders, files with and without annotations."""
    for kind, style in (("CVTG", ""), ("CVTG-Style", " in bold red")):
        (folder / kind).mkdir(parents=True)
        for regions, count in SIZES.items():
            entries = [cvtg_entry(index, regions, style) for index in range(count)]
            (folder / kind / f"{regions}.json").write_text(json.dumps({"data_list": entries}))
            combined = {str(entry["index"]): entry["prompt"] for entry in entries}
            (folder / kind / f"{regions}_combined.json").write_text(json.dumps(combined))
    return folder


def lines(name, count):
    return [f'A photo of the {name} poster {i}, with "Big {name.upper()} {i}" in ink' for i in range(count)]


def write_lists(folder, train=60, test=5):
    """Flow-GRPO's folder."""
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(lines("train", train)))
    (folder / "test.txt").write_text("\n".join(lines("test", test)) + "\n\n")
    return folder


@pytest.fixture
def cvtg(tmp_path):
    return write_cvtg(tmp_path / "CVTG-2K")


@pytest.fixture
def lists(tmp_path):
    return write_lists(tmp_path / "ocr")


class TestCVTG:
    def test_scenes(self, cvtg):
        world = PromptWorld(cvtg, size=256, split="test")
        assert world.layout == "cvtg" and len(world.scenes) == 2 * sum(SIZES.values())
        first = PromptWorld(cvtg / "CVTG" / "2.json", size=256, split="test").scenes[1]
        assert first == PromptScene(
            cvtg_entry(1, 2)["prompt"], ("Text", "1", "No0", "Text", "1", "No1"), size=256, regions=2
        )
        assert first in world.scenes and first.boxes == ()  # the prompt as it stands there, single quotes and all

    def test_the_profile_is_that_of_the_files(self, cvtg):
        assert PromptWorld(cvtg, split="test").regions == pytest.approx(TARGET_REGIONS)

    def test_regions_are_the_carriers(self, tmp_path):
        entry = cvtg_entry(0, 2) | {"prompt": "doors say 'Men' and 'Women', a sign says 'Exit Here'"}
        (tmp_path / "2.json").write_text(json.dumps({"data_list": [entry]}))
        (scene,) = PromptWorld(tmp_path / "2.json", split="test").scenes
        assert scene.regions == 2 and scene.words == ("Men", "Women", "Exit", "Here")

    def test_a_benchmark_is_not_trained_on(self, cvtg):
        with pytest.raises(ValueError, match=r"no prompts of the split 'train': choose one that it has, test"):
            PromptWorld(cvtg)

    @pytest.mark.parametrize("inside", ["CVTG-2K.zip", ""])
    def test_zip(self, cvtg, tmp_path, inside):
        """As on the hub: a folder with the zip alone."""
        (tmp_path / "hub").mkdir()
        shutil.make_archive(tmp_path / "hub" / "CVTG-2K", "zip", tmp_path, "CVTG-2K")
        world = PromptWorld(tmp_path / "hub" / inside, split="test")
        assert world.scenes == PromptWorld(cvtg, split="test").scenes


class TestLists:
    def test_splits_by_name_and_val_from_train(self, lists):
        splits = {split: PromptWorld(lists, split=split).scenes for split in ("train", "val", "test")}
        prompts = {split: [scene.prompt for scene in scenes] for split, scenes in splits.items()}
        assert prompts["test"] == lines("test", 5)
        assert prompts["val"] == [prompt for prompt in lines("train", 60) if split_of(prompt) == "val"] != []
        assert sorted(prompts["train"] + prompts["val"]) == sorted(lines("train", 60))
        assert splits["test"][0].words == ("Big", "TEST", "0") and splits["test"][0].regions == 1

    def test_val_of_its_own(self, lists):
        (lists / "val.txt").write_text("\n".join(lines("val", 3)))
        assert [scene.prompt for scene in PromptWorld(lists, split="val").scenes] == lines("val", 3)
        assert len(PromptWorld(lists).scenes) == 60

    def test_another_name_is_divided_by_hash(self, tmp_path):
        (tmp_path / "mine.txt").write_text("\n".join(lines("own", 200)))
        parts = {split: PromptWorld(tmp_path / "mine.txt", split=split).scenes for split in ("train", "val", "test")}
        assert all(split_of(scene.prompt) == split for split, scenes in parts.items() for scene in scenes)
        assert sum(map(len, parts.values())) == 200 and len(parts["train"]) > 120

    @pytest.mark.parametrize(
        ("name", "form"),
        [
            ("train_ocr_tag.json", lambda entries: "\n".join(map(json.dumps, entries))),
            ("train.json", json.dumps),
            ("train_one.jsonl", lambda entries: json.dumps(entries[0])),
        ],
    )
    def test_json(self, tmp_path, name, form):
        entries = [{"prompt": prompt, "tag": "ocr"} for prompt in lines("json", 3)]
        (tmp_path / name).write_text(form(entries))
        scenes = [s for split in PromptWorld(tmp_path / name, split="train")._splits.values() for s in split]
        assert {scene.prompt for scene in scenes} == set(lines("json", 1 if "one" in name else 3))

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
    @pytest.mark.parametrize("ending", ["\n", "\r\n"])
    @pytest.mark.parametrize("bom", ["", "\ufeff"])
    def test_lines_end_at_line_feeds_alone(self, tmp_path, separator, ending, bom):
        prompts = [f'a {separator} "B{separator}C"', 'a "D"']
        as_json = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
        for name, rows in (("test.txt", prompts), ("test.jsonl", as_json)):
            (tmp_path / name).write_bytes((bom + ending.join(rows) + ending).encode())
            scenes = PromptWorld(tmp_path / name, split="test").scenes
            assert [scene.prompt for scene in scenes] == prompts[-len(rows) :]

    def test_double_quotes_come_first(self, tmp_path):
        (tmp_path / "test.txt").write_text('''The dog's bowl 'Rex' says "Good Boy" and "No"''')
        (scene,) = PromptWorld(tmp_path, split="test").scenes
        assert scene.words == ("Good", "Boy", "No") and scene.regions == 2


class TestWorldOfPrompts:
    def test_same_seed_same_scenes(self, cvtg):
        def draw(seed):
            world, rng = PromptWorld(cvtg, split="test"), np.random.default_rng(seed)
            return [world.sample(rng) for _ in range(20)]

        assert draw(1) == draw(1) != draw(2)

    def test_the_region_filter(self, tmp_path):
        def prompt(i, count):
            return f"image {i} " + " ".join(f'"T{k}"' for k in range(count))

        counts = {1: 50, 2: 9, 3: 8, 4: 7, 5: 6, 7: 3}
        (tmp_path / "train.txt").write_text("\n".join(prompt(i, c) for c, n in counts.items() for i in range(n)))
        everything = PromptWorld(tmp_path / "train.txt")
        assert everything.regions[1] > 0.5 and 7 in everything.regions
        world = PromptWorld(tmp_path / "train.txt", regions="target")
        for count in (1, 2, 3, 4, 5, 7):
            assert abs(world.regions.get(count, 0) - TARGET_REGIONS.get(count, 0)) < 1 / len(world.scenes)
        assert set(world.scenes) < set(everything.scenes)
        assert {scene.regions for scene in PromptWorld(tmp_path / "train.txt", regions={"7": 1.0}).scenes} == {7}

    def test_a_number_of_regions_that_is_missing(self, lists):
        with pytest.raises(ValueError, match="no prompt of the corpus has 2 regions"):
            PromptWorld(lists, regions="target")

    def test_held_out_gives_each_prompt_once(self, lists, cvtg):
        world = PromptWorld(lists)
        drawn = held_out_scenes(world, 3, seed=1)
        assert drawn == held_out_scenes(world, 5, seed=1)[:3] != held_out_scenes(world, 3, seed=2)
        assert sorted(scene.prompt for scene in held_out_scenes(world, 100)) == lines("test", 5)
        assert set(held_out_scenes(world, 100, split="val")).isdisjoint(world.scenes)
        benchmark = PromptWorld(cvtg, split="test", regions={3: 1.0})
        assert {scene.regions for scene in held_out_scenes(benchmark, 100)} == {3}

    def test_hub_name(self, cvtg, monkeypatch, tmp_path):
        import huggingface_hub

        asked = []

        def snapshot_download(name, repo_type, allow_patterns):
            asked.append((name, repo_type))
            if name != "someone/cvtg":
                raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nand more")
            return str(cvtg)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.chdir(tmp_path)
        assert PromptWorld("someone/cvtg", split="test").scenes == PromptWorld(cvtg, split="test").scenes
        remedy = r"cannot load the prompts 'no/one': .*`hf download --repo-type dataset no/one`.*cannot reach the hub"
        with pytest.raises(OSError, match=remedy):
            PromptWorld("no/one")
        for missing in ("no/one.txt", "nothing", "a/b/c", tmp_path / "x.json"):
            with pytest.raises(FileNotFoundError, match=f"no prompts at {missing}"):
                PromptWorld(missing)
        assert asked == [("someone/cvtg", "dataset"), ("no/one", "dataset")]


JSON_LINES = [json.dumps({"prompt": prompt}) for prompt in lines("json", 50)]
GOOD = json.dumps({"data_list": [cvtg_entry(0, 2)]})


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("2.json", "", "2.json holds no prompt"),
            ("2.json", "{", "2.json is neither JSON nor JSON Lines"),
            ("2.json", "3", "2.json holds neither CVTG-2K's data_list nor an array of prompts, but 3"),
            ("2.json", '{"0": "a sign"}', r'2.json has no "data_list": of CVTG-2K give 2.json'),
            ("2.json", '{"data_list": []}', 'the "data_list" of 2.json must be an array of one entry or more'),
            ("2.json", '{"data_list": [{"index": 0}]}', '2.json, entry 0: needs a "prompt"'),
            ("2.json", '{"data_list": ["a \'B\'"]}', '2.json, entry 0: needs a "prompt"'),
            ("2.json", GOOD.replace("carrier", "carried"), '2.json, entry 0: needs a "carrier_list".* got None'),
            ("2.json", GOOD.replace(" '", " "), "2.json, entry 0: the prompt names no word"),
            ("test.txt", "", "test.txt holds no prompt"),
            ("test.txt", 'a "B"\n\na town\'s sign', "test.txt, line 3, entry 1: the prompt names no word"),
            ("test.json", '[{"text": "a"}]', 'test.json, entry 0: needs a "prompt"'),
            ("mine.txt", 'a "B"', "holds no prompts: neither CVTG-2K's 2.json to 5.json, nor lists"),
        ],
    )
    def test_text(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            PromptWorld(tmp_path, split="test")

    def test_bytes(self, tmp_path):
        (tmp_path / "test.txt").write_bytes('a "café"'.encode("latin-1"))
        with pytest.raises(ValueError, match=r"test.txt is no UTF-8 text"):
            PromptWorld(tmp_path)
        (tmp_path / "test.zip").write_bytes(b"PK?")
        with pytest.raises(ValueError, match=r"test.zip is no zip file"):
            PromptWorld(tmp_path / "test.zip")

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            (
                "train.jsonl",
                [*JSON_LINES[:36], "{bad", *JSON_LINES[36:]],
                "train.jsonl, line 37, entry 36: is no JSON, ",
            ),
            ("train.json", [*JSON_LINES[:2], "", "{bad"], "train.json, line 4, entry 2: is no JSON, "),
            ("train.jsonl", ["{bad"], "train.jsonl, line 1, entry 0: is no JSON, "),
            ("train.jsonl", [*JSON_LINES[:2], '{"text": "b"}'], 'train.jsonl, line 3, entry 2: needs a "prompt".*text'),
            ("train.json", ['{"text": "a \\"B\\""}'], 'train.json, entry 0: needs a "prompt".*text'),
            ("train.jsonl", ['{"prompt": "a \\ud800 \\"B\\""}'], "entry 0: character 2 of the prompt .*surrogate"),
            ("train.json", ["[" * 100_000], "neither JSON nor JSON Lines: .*recursion"),
            ("train.txt", ['a "B"', "", 'a 12" "C"'], 'train.txt, line 3, entry 1: a " right after a digit'),
        ],
    )
    def test_where(self, tmp_path, name, data, message):
        (tmp_path / name).write_text("\n".join(data))
        with pytest.raises(ValueError, match=message):
            PromptWorld(tmp_path)

    def test_utf_16(self, tmp_path):
        (tmp_path / "train.txt").write_bytes('a "B"'.encode("utf-16"))
        with pytest.raises(ValueError, match=r"train.txt is no UTF-8 text, but UTF-16: save it as UTF-8"):
            PromptWorld(tmp_path)

    def test_too_small_for_a_split(self, tmp_path):
        (tmp_path / "train.txt").write_text("\n".join(lines("small", 3)))
        with pytest.raises(ValueError, match=r"split 'val': .*of its 3 prompts .* a file val.txt"):
            PromptWorld(tmp_path).held_out(2, split="val")

    def test_both_layouts(self, cvtg):
        (cvtg / "train.txt").write_text('a "B"')
        with pytest.raises(ValueError, match=r"holds files of CVTG-2K and lists, such as train\.txt"):
            PromptWorld(cvtg)


class TestEnvironment:
    def test_check_env(self, cvtg, parts):
        env = VARTextEnv(prompts=cvtg, split="test", **parts)
        check_env(env, skip_render_check=True)
        assert env.observation_space["prompt"].shape == (FILE_PROMPT_BYTES,)
        observation, info = env.reset(seed=3)
        assert observation["prompt"].tobytes().rstrip(b"\0").decode() == info["prompt"] == env.scene.prompt
        assert env.scene in env.world.scenes and info["words"] == list(env.scene.words)

    def test_rows_of_the_batch_are_the_single_environments(self, lists, parts):
        envs = VARTextVectorEnv(3, prompts=str(lists), **parts)
        observation, info = envs.reset(seed=7)
        assert observation in envs.observation_space
        env = VARTextEnv(prompts=lists, **parts)
        assert [env.reset(seed=7 + row)[1]["prompt"] for row in range(3)] == info["prompt"]
        assert envs.fork(2).scenes == [scene for scene in envs.scenes for _ in range(2)]

    def test_made_from_json(self, cvtg, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "tokenizer.safetensors")
        options = {
            "prompts": str(cvtg),
            "split": "test",
            "regions": {3: 1.0},
            "tokenizer": str(tmp_path / "tokenizer.safetensors"),
        }
        env = gym.make(EnvSpec.from_json(gym.make("VARText-v0", **options).spec.to_json()))
        assert env.unwrapped.world.regions == {3: 1.0} and env.reset(seed=0)[1]["prompt"].count("sign") == 3

    def test_the_limit_is_the_worlds(self, tmp_path, parts):
        prompt = f'{"a very " * 80}long "PROMPT"'
        (tmp_path / "test.txt").write_text(prompt)
        env = VARTextEnv(prompts=tmp_path, split="test", **parts)
        assert env.observation_space["prompt"].shape == (len(prompt),) == (env.world.max_prompt_bytes,)
        assert env.reset(seed=0)[0] in env.observation_space
        assert env.reset(options={"prompt": prompt})[1]["words"] == ["PROMPT"]
        with pytest.raises(ValueError, match=f"at most {len(prompt)} fit"):
            env.reset(options={"prompt": "!" + prompt})
        with pytest.raises(ValueError, match=f"at most {MAX_PROMPT_BYTES} fit"):
            VARTextEnv(**parts).reset(options={"prompt": prompt})

    def test_world_and_prompts(self, lists, parts):
        with pytest.raises(ValueError, match="give world or prompts, not both"):
            VARTextEnv(world=World(), prompts=lists, **parts)

    def test_single_quotes_in_a_prompt_of_ones_own(self):
        assert scene_from_prompt("The town's sign says 'Don't Walk' and 'GO'").words == ("Don't", "Walk", "GO")


class TestScripts:
    @pytest.fixture
    def script(self):
        return import_module("agents.experiments.evaluate")

    @pytest.fixture
    def options(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "tokenizer.safetensors")
        tiny_policy(tokenizer).save(tmp_path / "policy.safetensors")
        files = ["--policy", tmp_path / "policy.safetensors", "--tokenizer", tmp_path / "tokenizer.safetensors"]
        return [*map(str, files), "--device", "cpu", "--out", str(tmp_path)]

    def test_evaluate_on_the_benchmark(self, script, options, tmp_path, capsys):
        (tmp_path / "data").mkdir()
        entries = [cvtg_entry(index, regions) for regions in (2, 3) for index in range(3)]
        for regions in (2, 3):
            content = {"data_list": [entry for entry in entries if len(entry["carrier_list"]) == regions]}
            (tmp_path / "data" / f"{regions}.json").write_text(json.dumps(content))
        (tmp_path / "clip").mkdir()
        clip = save_tiny_clip(tmp_path / "clip")
        options = [*options, "--prompts-from", str(tmp_path / "data"), "--clip", str(clip)]
        assert script.main(options) == 0
        printed, evaluation = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())
        by_regions, prompts = evaluation["by_regions"], evaluation["prompts"]
        assert sorted(prompts["prompt"]) == sorted(entry["prompt"] for entry in entries)
        assert {name: line["prompts"] for name, line in by_regions.items()} == {"2": 3, "3": 3, "average": 6}
        assert {name: line["words"] for name, line in by_regions.items()} == {"2": 18, "3": 27, "average": 45}
        scenes = PromptWorld(tmp_path / "data", split="test").held_out(6)
        expected = word_metrics([scene.words for scene in scenes], prompts["read"])
        assert {name: by_regions["average"][name] for name in expected} == pytest.approx(expected)
        policy = measuring.load_policy(script.parse(options))
        drawn = measuring.evaluate(policy, measuring.make_env(policy, split="test", prompts=tmp_path / "data"), scenes)
        asked = [scene_from_prompt(f"A photo depicts {scene.prompt}") for scene in scenes]
        scores = CLIPScore(clip, "cpu")(drawn.images, asked).scores
        assert by_regions["average"]["clip"] == pytest.approx(scores.mean(), abs=1e-5)
        header = [cell.strip() for cell in printed.split("| Regions")[1].split("\n")[0].split("|")[1:-1]]
        assert header == ["Prompts", "Words", "Word Accuracy", "NED", "CLIPScore"] and "| average" in printed

    def test_evaluate_on_a_list(self, script, options, lists, tmp_path, capsys):
        assert script.main([*options, "--prompts-from", str(lists), "--prompts", "100"]) == 0
        evaluation = json.loads((tmp_path / "evaluation.json").read_text())
        prompts = evaluation["prompts"]
        assert sorted(prompts["prompt"]) == lines("test", 5) and "OCR accuracy" in capsys.readouterr().out
        reward = OCREditReward(variant="flow_grpo")
        for prompt, read, accuracy in zip(prompts["prompt"], prompts["read"], prompts["ocr_accuracy"], strict=True):
            words = scene_from_prompt(prompt).words
            assert accuracy == pytest.approx(reward.score_words(words, read, [1.0] * len(read))["total"], abs=1e-6)

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--gates"], "leave out --prompts-from"),
            (["--split", "train"], "no prompts of the split 'train'"),
            (["--regions", "9:1"], "no prompt of the corpus has 9 regions"),
        ],
    )
    def test_evaluate_says_what_is_wrong(self, script, options, cvtg, extra, message):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            script.main([*options, "--prompts-from", str(cvtg), *extra])

    def test_a_prompt_that_is_too_long_for_the_policy_shows_at_once(self, script, options, tmp_path):
        (tmp_path / "test.txt").write_text(f'{"a very " * 40}long "PROMPT"')
        with pytest.raises(SystemExit, match=f"error: the prompt has .* at most {MAX_PROMPT_BYTES} fit"):
            script.main([*options, "--prompts-from", str(tmp_path / "test.txt")])

    def test_train_on_a_list(self, options, lists, tmp_path, monkeypatch):
        train = import_module("agents.experiments.train")
        small = ["--images", "8", "--group-size", "2", "--prompts-per-update", "2", "--eval-prompts", "2"]
        out = ["--out", str(tmp_path / "run"), "--prompts-from", str(lists)]
        assert train.main([*options, *small, *out]) == 0
        assert (tmp_path / "run" / "policy.safetensors").is_file()

    def test_compare_takes_the_option(self, lists, options, tmp_path, monkeypatch):
        compare, runs = import_module("agents.experiments.compare"), import_module("agents.experiments.runs")
        comparison = runs.Comparison(compare.parse([*options, "--prompts-from", str(lists)]))
        assert len(comparison.test) == 5 and set(comparison.val) == set(PromptWorld(lists, split="val").scenes)
        assert comparison.config["prompts_from"] == str(lists)
