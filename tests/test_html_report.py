"""report.html and what it is made of: the gallery that a run keeps, and folders that cannot be read."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_agent, tiny_policy

from agents import GRPO, PANW, VMR, Decoding, MaskPropagation, evaluate
from agents.experiments import gallery, html_report, report, stored_results
from agents.experiments.cells import METRICS
from agents.experiments.output import write_json, write_results
from var_env import ScaleSchedule, VARTextVectorEnv

PROMPTS = ['A sign that says "AB"', 'A "<script>" & "CD"', '"EF" above "GH"']
AXES = ("images", "tokens", "updates", "seconds")


def result(agent, seed, reward, stopped_at=None):
    rewards = [reward, reward, reward + 0.3]
    return {
        "agent": agent,
        "seed": seed,
        "stopped_at": stopped_at,
        "metrics": {metric: [reward, reward - 0.1, reward + 0.1] for metric in METRICS},
        "prompts": dict.fromkeys(METRICS, rewards) | {"prompt": PROMPTS, "read": [[]] * 3},
    }


def progress(folder, points=3, scale=1.0):
    """A progress.csv as a run writes it: rows of evaluations, and rows of training."""
    folder.mkdir(parents=True)
    names = [f"eval/{axis}" for axis in AXES] + ["eval/reward", "repair/letter"]
    names += [f"budget/{axis}" for axis in AXES] + ["rollout/reward"]
    lines = [",".join(names)]
    for i in range(points):
        lines.append(",".join(map(str, [64 * i, 640 * i, i, scale * i, 0.1 * i * scale, 0.2])) + "," * 5)
        lines.append("," * 6 + ",".join(map(str, [64 * i, 640 * i, i, scale * i, 0.3])))
    (folder / "progress.csv").write_text("\n".join(lines) + "\n")


def images(folder, masks=False, frames=("1x1", "2x2")):
    """A gallery of three prompts, the colour of a frame telling its row and column."""
    rows = np.zeros((3, 8, len(frames), 8, 3), np.uint8)
    rows[..., 0] = 80 * np.arange(3)[:, None, None, None]
    rows[..., 1] = 100 * np.arange(len(frames))[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.reshape(24, -1, 3)).save(folder / "gallery.png")
    entries = [{"prompt": prompt, "read": ["AB"], "reward": 0.5, "boxes": [[0, 0, 0.5, 0.25]]} for prompt in PROMPTS]
    for entry in entries if masks else []:
        entry["masks"] = [[[1.0]], [[1.0, 0.0], [0.0, 0.0]]]
    write_json(folder / "gallery.json", {"frames": list(frames), "prompts": entries})


@pytest.fixture
def out(tmp_path):
    """A comparison of two agents with two seeds, its runs' files beside it."""
    folder = tmp_path / "small"
    runs = [result(agent, seed, 0.2 + 0.1 * seed) for agent in ("grpo", "vmr+mp") for seed in range(2)]
    for run in runs:
        progress(folder / run["agent"] / f"seed{run['seed']}", scale=1.0 + run["seed"])
        images(folder / run["agent"] / f"seed{run['seed']}", masks="mp" in run["agent"])
    images(folder / "base")
    text = [
        "# small",
        "About.",
        "| Metric | Mean |\n| - | - |\n| reward | 0.3 |",
        "## Settings",
        "- a: <b>",
        "![x](x.png)",
    ]
    write_results(folder, text, settings={}, base=result("base", None, 0.1), runs=runs)
    return folder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class TestPage:
    def test_it_holds_all_and_asks_the_network_for_nothing(self, out):
        path = html_report.write(out)
        page = path.read_text()
        assert path == out / "report.html" and len(page) < 10_000_000
        own = page.replace(page[page.index("plotly.js") - 500 : page.rindex("<script>")], "")
        assert not re.search(r'(src|href)="(?!data:)', own) and "@import" not in own
        assert page.count('<figure class="tile"') == 3 * 3 and page.count('<svg class="mask"') == 3
        assert "<h1>small</h1>" in page and "<td>0.3</td>" in page
        assert "A &#34;&lt;script&gt;&#34; &amp; &#34;CD&#34;" in page and "a: &lt;b&gt;" in page and "x.png" not in own
        assert "no curves to draw" not in page and "no gallery" not in page

    def test_the_numbers_are_those_of_the_files(self, out):
        data = data_of(html_report.page(out))
        assert [agent["name"] for agent in data["agents"]] == ["base", "grpo", "vmr+mp"]
        grpo = data["agents"][1]
        assert grpo["seeds"][1]["curves"]["eval"]["reward"] == {
            "images": [0, 64, 128],
            "tokens": [0, 640, 1280],
            "updates": [0, 1, 2],
            "seconds": [0, 2, 4],
            "y": [0, 0.2, 0.4],
        }
        mean = grpo["mean"]["eval"]["reward"]
        assert mean["seconds"] == pytest.approx([0, 1.5, 3]) and mean["y"] == pytest.approx([0, 0.15, 0.3])
        assert grpo["mean"]["repair"].keys() == {"letter"} and "word_accuracy" not in grpo["mean"]["eval"]
        value, low, high = data["intervals"]["reward"]["grpo"]
        assert value == pytest.approx(0.35) and low <= value <= high
        assert data["intervals"]["reward"]["base"] == pytest.approx([0.1, 0, 0.2])

    def test_a_run_that_was_stopped_is_in_no_mean(self, out):
        content = json.loads((out / "results.json").read_text())
        content["runs"][1]["stopped_at"] = 64
        write_json(out / "results.json", content)
        data = data_of(html_report.page(out))
        grpo = data["agents"][1]
        assert [run["stopped"] for run in grpo["seeds"]] == [None, 64]
        assert grpo["mean"]["eval"]["reward"]["y"] == pytest.approx([0, 0.1, 0.2])
        assert data["intervals"]["reward"]["grpo"][0] == pytest.approx(0.3)

    def test_without_the_runs_own_files(self, out, tmp_path):
        alone = tmp_path / "alone"
        alone.mkdir()
        for name in ("results.json", "results.md"):
            (out / name).rename(alone / name)
        Image.new("RGB", (8, 8)).save(alone / "curves.png")
        page = html_report.page(alone)
        assert "no curves to draw" in page and "no gallery" in page and 'alt="curves.png"' in page

    def test_tables_that_come_later_stand_at_the_top(self):
        lead, sections = html_report.split_text("# A\n\nAbout.\n\n## m\n\n| a |\n| - |\n\n## Settings\n\n- a: 1\n")
        assert lead.endswith("| - |\n") and [title for title, _ in sections] == ["Settings"]
        assert html_report.split_text("# A\n\n## B\n\nno table\n")[1] == [("B", "\nno table\n")]

    def test_images_of_other_prompts_and_missing_ones_are_told(self, out):
        (out / "grpo" / "seed0" / "gallery.png").unlink()  # the other seed stands in
        content = json.loads((out / "base" / "gallery.json").read_text())
        shown, _, note = html_report.gallery(out, result("base", None, 0.1), [result("grpo", 0, 0.2)])
        assert [tile["agent"] for tile in shown[0]["tiles"]] == ["base"] and "No images of grpo" in note
        runs = [result("grpo", seed, 0.2) for seed in range(2)]
        shown, _frames, note = html_report.gallery(out, result("base", None, 0.1), runs)
        assert [tile["agent"] for tile in shown[0]["tiles"]] == ["base", "grpo"] and note == ""
        content["prompts"][0]["prompt"] = "another"
        write_json(out / "base" / "gallery.json", content)
        assert "No images of grpo" in html_report.gallery(out, result("base", None, 0.1), runs)[2]

    def test_images_that_would_not_fit_are_left_out(self, out, monkeypatch):
        monkeypatch.setattr(html_report, "IMAGES", 1)
        shown, _, note = html_report.gallery(out, result("base", None, 0.1), [])
        assert len(shown) == 1 and note == "1 of 3 prompts, as more would not fit."

    @pytest.mark.parametrize("count", [1, 6, 7, 30])
    def test_every_agent_has_a_colour_of_its_own(self, count):
        colours = html_report.palette(count)
        assert len({*colours}) == count and all(re.fullmatch("#[0-9A-Fa-f]{6}", colour) for colour in colours)


def test_a_curve_is_thinned_to_its_ends():
    rows = [{**dict.fromkeys(AXES, f"{i}"), "y": f"{i}"} for i in range(5000)]
    curve = stored_results.curve(rows, {axis: axis for axis in AXES}, "y", smooth=False)
    assert len(curve["y"]) == stored_results.POINTS and (curve["y"][0], curve["y"][-1]) == (0, 4999)


class TestBadFolders:
    """Each with one line that names it and tells what to do."""

    def refused(self, folder):
        with pytest.raises(SystemExit) as end:
            report.main([str(folder)])
        message = str(end.value)
        assert message.startswith("error: ") and "\n" not in message
        assert not (folder / "report.html").exists()
        return message

    def test_missing_or_empty(self, tmp_path):
        assert f"no folder at {tmp_path / 'none'}: give the --out of" in self.refused(tmp_path / "none")
        (tmp_path / "empty").mkdir()
        assert "empty has no results.json: give the --out of" in self.refused(tmp_path / "empty")

    def test_half_written(self, out):
        (out / "results.md").unlink()
        assert "is half written, it has no results.md: the command that made it" in self.refused(out)
        whole = (out / "results.json").read_text()
        (out / "results.json").write_text(whole[:100])
        assert "results.json cannot be read (" in self.refused(out)
        (out / "results.json").unlink()
        (out / "grpo" / "seed0" / "config.json").write_text("{}")
        assert "is half written, it has runs and no results.json" in self.refused(out)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda content: content.update(format=99), "has format 99, and this version reads 1"),
            (lambda content: content.pop("base"), "has no base, so another version wrote it"),
            (lambda content: content["runs"][1].pop("metrics"), "has no metrics of a run, so another version wrote it"),
            (lambda content: content.update(runs="none"), "has no runs, so another version wrote it"),
        ],
    )
    def test_of_another_version(self, change, message, out):
        content = json.loads((out / "results.json").read_text())
        change(content)
        write_json(out / "results.json", content)
        assert message in self.refused(out)

    def test_files_of_a_run_that_are_damaged(self, out):
        path = out / "grpo" / "seed0" / "progress.csv"
        before = path.read_text()
        path.write_text(before.replace("64,640", "64,many"))
        assert "grpo/seed0/progress.csv cannot be read (could not convert" in self.refused(out)
        path.write_text(before + "128,12")  # as a run that is being written leaves it
        assert report.main([str(out)]) == 0
        (out / "report.html").unlink()
        for name in ("gallery.json", "gallery.png"):
            damaged = out / "base" / name
            whole = damaged.read_bytes()
            damaged.write_bytes(whole[: len(whole) // 2])
            assert "base/gallery.json or its .png cannot be read" in self.refused(out)
            damaged.write_bytes(whole)
        images(out / "base", frames=("1x1", "2x2", "3x3"))
        content = json.loads((out / "base" / "gallery.json").read_text())
        write_json(out / "base" / "gallery.json", content | {"frames": ["1x1"]})
        assert "are not 3 rows of 1 images" in self.refused(out)


class TestGallery:
    def test_what_a_run_keeps(self, parts, tmp_path):
        policy, envs = tiny_policy(parts["tokenizer"]), VARTextVectorEnv(2, **parts)
        found = evaluate(policy, envs, 5, Decoding(), keep_grids=3)
        gallery.save(tmp_path, found, parts["tokenizer"])
        content = json.loads((tmp_path / "gallery.json").read_text())
        assert content["frames"] == ["1x1", "2x2", "4x4"]
        assert [entry["prompt"] for entry in content["prompts"]] == [scene.prompt for scene in found.scenes[:3]]
        assert content["prompts"][0]["boxes"] == [[0, 0, 0.125, 0.125]] and "masks" not in content["prompts"][0]
        sheet = np.asarray(Image.open(tmp_path / "gallery.png")).reshape(3, 64, 3, 64, 3).swapaxes(1, 2)
        np.testing.assert_array_equal(sheet[:, -1], found.images[:3])
        canvas = parts["tokenizer"].write(0, parts["tokenizer"].blank(3), found.grids[0])
        np.testing.assert_array_equal(sheet[:, 0], parts["tokenizer"].decode(canvas))

    def test_keeping_grids_changes_nothing(self, parts):
        policy, envs = tiny_policy(parts["tokenizer"]), VARTextVectorEnv(2, **parts)
        state = torch.get_rng_state()
        plain, kept = (evaluate(policy, envs, 3, best_of=2, keep_grids=keep) for keep in (0, 2))
        np.testing.assert_array_equal(plain.images, kept.images)
        assert [tuple(grid.shape) for grid in kept.grids] == [(2, 1, 1), (2, 4, 1), (2, 16, 1)]
        assert all(len(grid) == 0 for grid in plain.grids)
        assert torch.equal(torch.get_rng_state(), state)
        canvas = parts["tokenizer"].blank(2)
        for t, grid in enumerate(kept.grids):  # of the image that was chosen among the two
            canvas = parts["tokenizer"].write(t, canvas, grid)
        np.testing.assert_array_equal(parts["tokenizer"].decode(canvas), kept.images[:2])
        with pytest.raises(ValueError, match="keep_grids"):
            evaluate(policy, envs, 3, keep_grids=-1)

    def test_masks_are_those_of_the_wrapper(self, parts, tmp_path):
        agent = PANW(MaskPropagation(tiny_agent(parts, VMR), soft=True))
        mask = gallery.mask_of(agent)
        assert isinstance(mask, MaskPropagation) and gallery.mask_of(tiny_agent(parts, GRPO)) is None
        found = evaluate(agent.unwrapped.policy, VARTextVectorEnv(2, **parts), 2, keep_grids=2)
        gallery.save(tmp_path, found, parts["tokenizer"], mask)
        masks = json.loads((tmp_path / "gallery.json").read_text())["prompts"][1]["masks"]
        assert [len(rows) for rows in masks] == [1, 2, 4]
        assert masks[2][0] == [0.25, 0, 0, 0] and masks[1] == [[0.06, 0], [0, 0]]  # a box of 8 x 8 in cells of 16 x 16

    def test_rows_of_a_raster_and_long_schedules(self):
        raster = gallery.frames_of(ScaleSchedule.raster((40, 40)))
        assert len(raster) == gallery.FRAMES and next(iter(raster)) == "row 1" and list(raster.values())[-1] == 1599
        assert list(gallery.frames_of(ScaleSchedule([(1, 1), (2, 2)]))) == ["1x1", "2x2"]
