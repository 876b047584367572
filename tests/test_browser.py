"""What people open in a browser, opened in headless Chromium: text is there, images have a size, the console is silent.

`make test-browser` runs it. A page of another part joins as a test function that takes the `page_at` fixture.
"""

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.logger import Image as LoggedImage
from test_html_report import out
from test_playground_web import address, slow

from agents.experiments import html_report
from agents.logs import open_logger

__all__ = ["address", "out", "slow"]  # fixtures
pytestmark = pytest.mark.browser
WIDTHS = (1600, 400)


@pytest.fixture
def report(out):
    """The address of a report of two agents."""
    return html_report.write(out).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report(width, scheme, report, page_at, looked_at):
    page = page_at(width, color_scheme=scheme)
    page.goto(report)
    looked_at(page, "small", "grpo", "Curves", "The same prompts")
    assert page.locator(".plot .main-svg").count() >= 2 * 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # what is wider scrolls in its own box
    for plot in page.locator(".plot").all():  # drawn at the width that its place has
        drawn, place = (of.bounding_box()["width"] for of in (plot.locator(".main-svg").first, plot))
        assert drawn == pytest.approx(place, abs=1)
    plots = page.locator('[data-plots="curves"] .plot').first
    before = plots.locator(".xtitle").text_content()
    page.select_option("#axis", "seconds")
    assert before == "images decoded (reward calls)"
    assert plots.locator(".xtitle").text_content() == "seconds of sampling, scoring and updating"
    lines = plots.locator("path.js-line").count()
    page.locator("#agents label", has_text="grpo").click()
    assert plots.locator("path.js-line").count() == lines // 2
    assert page.locator('.tile[data-agent="grpo"]:visible').count() == 0
    tile = page.locator('.tile[data-agent="vmr+mp"]').first
    assert tile.locator(".boxes").is_visible() and not tile.locator(".mask").is_visible()
    page.check("#masks")
    assert tile.locator(".mask").is_visible()
    left = "element => element.getBoundingClientRect().left - element.parentElement.getBoundingClientRect().left"
    assert tile.locator("img").evaluate(left) < -100  # the last frame
    page.locator("#frame").fill("0")
    assert tile.locator("img").evaluate(left) == pytest.approx(0, abs=1)  # px
    assert not tile.locator(".boxes").is_visible() and page.locator("#frame-name").text_content() == "1x1"
    page.locator(".growth summary").first.click()
    strip = page.locator('.strip[data-agent="vmr+mp"] img').first
    strip.wait_for()
    assert strip.bounding_box()["width"] == 2 * 92 and page.locator(".strip .names span").first.is_visible()
    looked_at(page)


def test_hovering_tells_the_numbers(report, page_at):
    page = page_at(1600)
    page.goto(report)
    plot = page.locator('[data-plots="intervals"] .plot').first
    point = plot.locator(".point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] - 50, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=10)
    told = plot.locator(".hovertext")
    told.wait_for()
    assert "0.350 [" in told.text_content()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_playground(width, address, page_at, looked_at):
    page = page_at(width)
    page.goto(address)
    looked_at(page, "VARText playground", "Draw")
    page.get_by_role("button", name="Draw", exact=True).click()
    looked_at(page, "4x4", "Reward", "Redraw from 4x4 on")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    """The address of a TensorBoard that shows a run of each kind of entry."""
    from tensorboard import program

    folder = tmp_path_factory.mktemp("events")
    with closing(open_logger(folder / "grpo" / "seed0", ["tensorboard"])) as logger:
        for step in range(3):
            logger.record("rollout/reward", 0.1 * step)
            logger.record("samples/images", LoggedImage(np.full((64, 64, 3), 128, np.uint8), "HWC"))
            logger.record("samples/read", "| prompt | read |\n|---|---|\n| AB | A8 |")
            logger.dump(step)
        logger.record("test/reward", 0.5)
        logger.record("hparams", HParam({"learning_rate": 1e-4, "agent": "grpo"}, {"test/reward": 0.5}))
        logger.dump(3)
    board = program.TensorBoard()
    board.configure(argv=[sys.argv[0], "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    return board.launch()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("tab", "words"),
    [
        ("timeseries", ["rollout/reward"]),
        ("scalars", ["rollout"]),
        ("images", ["samples/images"]),
        ("text", ["samples/read", "A8"]),
        ("hparams", ["learning_rate", "grpo"]),
    ],
)
def test_tensorboard(tab, words, width, tensorboard, page_at, looked_at):
    page = page_at(width)
    page.goto(f"{tensorboard}#{tab}")
    looked_at(page, *words)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_documentation(width, page_at, looked_at):
    """From its file, as `make docs` leaves it: nothing is asked of a network, and the search finds something."""
    start = Path(__file__).parents[1] / "build" / "site" / "index.html"
    if not start.is_file():
        pytest.skip("`make docs` builds the site")
    page, asked = page_at(width), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(start.as_uri())
    looked_at(page, "Start in five minutes", "make compare")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == WIDTHS[0]:  # on a narrow page it is behind a button
        page.fill("input[name=query]", "temperature")
        looked_at(page, "matching documents")
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
