"""Small stand-ins for the shipped parts, for tests that are not about images that can be read."""

import os
import shutil

import numpy as np
import pytest
import torch

from rewards.base import Reward, RewardOutput
from rewards.components import Component
from var_env import ScaleSchedule, Tokenizer

# The files that take longest. Processes that share the tests begin with them, or one would end long after the others.
LONGEST = ("processes", "examples", "going_on", "ray", "ablate", "wheel", "service")
PAGE_MS = 120_000  # that a page may take, on a machine with much else to do

if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core: one thread for each, and for those that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))


class Brightness(Reward):
    """Scores the mean brightness of the image, whose parts are its halves, and claims to have read a fixed word; counts
    its calls."""

    name = "brightness"

    def __init__(self):
        self.calls = 0

    def score(self, images, scenes):
        self.calls += 1
        mean = images.mean((1, 2, 3)).astype(np.float32) / 255
        box = np.array([[0, 0, 8, 8]], np.float32)
        count = len(images)
        halves = [[self.half(image, i) for i in range(2)] for image in images]
        return RewardOutput(mean, {"mean": mean}, [["SEEN"]] * count, [[0.5]] * count, [box] * count, components=halves)

    @staticmethod
    def half(image, i):
        """The upper or the lower one."""
        middle, side = len(image) // 2, image.shape[1]
        rows = slice(i * middle, (i + 1) * middle)
        place = np.array([[0, rows.start, side, rows.stop]], np.float32)
        return Component("half", (i,), image[rows].mean() / 255 / 2, place)


@pytest.fixture
def schedule():
    return ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)  # 64 px, 21 tokens


@pytest.fixture
def tokenizer(schedule):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).eval().requires_grad_(False)


@pytest.fixture
def reward():
    return Brightness()


@pytest.fixture
def parts(tokenizer, reward):
    """Keyword arguments of an environment with the small tokenizer and the toy reward."""
    return {"tokenizer": tokenizer, "reward": reward}


@pytest.fixture(scope="module")  # not longer: while it is open, asyncio cannot be used in this process
def chromium():
    """A headless Chromium of the system, ``$CHROMIUM`` or the first that is found; the test is skipped without one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'vartext[browser]'")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium, or give its path as CHROMIUM")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page_at(chromium):
    """``page_at(width)`` is an empty page; what its console says of errors fails the test in the end."""
    pages, errors = [], []

    def open_page(width, **options):
        page = chromium.new_page(viewport={"width": width, "height": 1000}, **options)
        page.set_default_timeout(PAGE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []


@pytest.fixture
def looked_at():
    """``looked_at(page, *words)`` waits until a page shows the words, and checks that its images have a size."""

    def look(page, *words):
        for word in words:
            page.get_by_text(word).filter(visible=True).first.wait_for()
        for image in page.locator("img:visible").all():
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth * image.naturalHeight)") > 0
            box = image.bounding_box()
            assert box["width"] > 0 and box["height"] > 0

    return look
