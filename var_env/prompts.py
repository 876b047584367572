"""Scenes from prompt files of the field: CVTG-2K, and the OCR prompt lists of Flow-GRPO and STAGE.

Two layouts, told apart by what a file holds:

- CVTG-2K (arXiv 2503.23461): ``2.json`` to ``5.json``, by the number of text regions, in the folders ``CVTG`` and
  ``CVTG-Style``. Each is ``{"data_list": [{"index", "prompt", "carrier_list", "sentence_list"}, ...]}`` with a carrier
  and a sentence for each region; the texts stand in single quotes. ``2_combined.json`` and so on, the prompts without
  annotations, are not read. So https://github.com/NJU-PCALab/TextCrafter describes and reads it; the files are
  ``CVTG-2K.zip`` of https://huggingface.co/datasets/dnkdnk/CVTG-2K, which is read as it is.
- Lists: a prompt a line, with the text in double quotes, as Flow-GRPO's ``dataset/ocr/train.txt`` and ``test.txt``
  (https://github.com/yifan123/flow_grpo) and STAGE's ``data/test_ocr.txt``, which is the same file; or a JSON array or
  JSON Lines, in UTF-8, of objects with a ``prompt``, as STAGE's program reads ``data/train_ocr_tag.json``
  (https://github.com/krennic999/STAGE).

A region is a quoted text of one word or several, except that CVTG-2K counts carriers: nine of its 2,000 prompts have a
carrier with two texts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np

from var_env.corpus import count_regions, rows_of_profile
from var_env.scenes import Scene, World, quoted_words, region_profile, split_of

FILE_PROMPT_BYTES = 512  # CVTG-2K's longest prompt has 462 bytes, that of Flow-GRPO's test list 355
LISTS = (".txt", ".json", ".jsonl")
_SPLIT = re.compile(r"(train|val|test)(?![a-z])")  # how the name of a list begins that is of one split
_COMBINED = re.compile(r"\d+_combined")
_LINE_END = re.compile(r"\r\n|\n|\r")  # of a text file; U+2028 and the like are part of a line, as editors have it
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PromptScene(Scene):
    """A scene of a prompt file: the prompt as it stands there, its words in their case, and no layout.

    Attributes:
        regions: the number of text regions that the prompt asks for.
    """

    regions: int = 1


class PromptWorld(World):
    """Draws the prompts of files, each as likely as another.

    Splits: CVTG-2K is a benchmark, and all of it is ``test``. A list whose file name begins with train, val or test is
    of that split; where none begins with val, a tenth of train, by hash, is val. Any other list is divided by hash into
    80 % train, 10 % val and 10 % test. No prompt is in two splits unless the files have it twice.

    Args:
        source: a file, a folder with files named as above or one zip of them, a zip, or the name of a dataset on the
            Hugging Face hub that holds them, such as ``"dnkdnk/CVTG-2K"``.
        size: the image's height and width in pixels.
        split: ``"train"``, ``"val"`` or ``"test"``.
        regions: keep the largest part of the split whose region counts have this profile, see
            :func:`~var_env.corpus.filter_regions`; ``"target"`` is the paper's filter. The default keeps all.

    Attributes:
        scenes: the prompts of the split.
        layout: ``"cvtg"`` or ``"list"``.
        longest: the longest prompt of all splits.
        max_prompt_bytes: 512, or more when ``longest`` has more.

    Raises:
        OSError: no such file, or the hub does not give the dataset.
        ValueError: a file that cannot be read, with its name, the line and the entry; files of both layouts; a split
            or a number of regions that the files do not have.

    Examples:
        >>> world = PromptWorld("dnkdnk/CVTG-2K", size=256, split="test", regions="target")  # doctest: +SKIP
    """

    def __init__(
        self,
        source: str | Path,
        size: int = 64,
        split: str = "train",
        regions: Mapping[Any, float] | str | None = None,
    ) -> None:
        self.source, self.size, self.split = str(source), size, split
        self.layout, self._splits = read_prompts(source, size)
        self._profile = None if regions is None else region_profile(regions)
        self.scenes = self._scenes_of(split)
        counts = Counter(scene.regions for scene in self.scenes)
        self.regions = {count: counts[count] / len(self.scenes) for count in sorted(counts)}
        prompts = (scene.prompt for scenes in self._splits.values() for scene in scenes)
        self.longest = max(prompts, key=lambda prompt: len(prompt.encode()))
        self.max_prompt_bytes = max(FILE_PROMPT_BYTES, len(self.longest.encode()))

    def _scenes_of(self, split: str) -> list[PromptScene]:
        if split not in self._splits:
            names = ", ".join(sorted(self._splits))
            message = f"{self.source} has no prompts of the split {split!r}: choose one that it has, {names}"
            if self.layout == "list":
                count = sum(map(len, self._splits.values()))
                message += (
                    f"; of its {count} prompts a hash put none there, for which some fifty are enough: give more, or a "
                    f"folder that has a file {split}.txt beside train.txt"
                )
            raise ValueError(message)
        scenes = self._splits[split]
        if self._profile is None:
            return scenes
        return [scenes[i] for i in rows_of_profile([scene.regions for scene in scenes], self._profile)]

    def sample(self, rng: np.random.Generator) -> PromptScene:
        """Draw one scene; the same generator state gives the same scene."""
        return self.scenes[int(rng.integers(len(self.scenes)))]

    def held_out(self, count: int, seed: int = 0, split: str = "test") -> list[Scene]:
        """``count`` different scenes of a split in an order drawn from the seed, or all when there are fewer."""
        scenes = self._scenes_of(split)
        order = np.random.default_rng(seed).permutation(len(scenes))[:count]
        return [scenes[i] for i in order]


def read_prompts(source: str | Path, size: int) -> tuple[str, dict[str, list[PromptScene]]]:
    """The layout of a source, ``"cvtg"`` or ``"list"``, and the scenes of its splits. Raises as `PromptWorld`."""
    cvtg: list[PromptScene] = []
    lists: dict[str, list[PromptScene]] = {}
    for name, data in prompt_files(source):
        content = parse(name, data)
        if isinstance(content, dict):
            cvtg += cvtg_scenes(name, content["data_list"], size)
        else:
            lists[name] = list_scenes(name, content, size)
    if cvtg and lists:
        raise ValueError(f"{source} holds files of CVTG-2K and lists, such as {min(lists)}: give one of the two")
    return ("cvtg", {"test": cvtg}) if cvtg else ("list", arrange(lists))


def arrange(lists: Mapping[str, Sequence[PromptScene]]) -> dict[str, list[PromptScene]]:
    """The splits of lists, from their names or by hash; see `PromptWorld`."""
    splits: dict[str, list[PromptScene]] = {}
    for name, scenes in lists.items():
        own = _SPLIT.match(PurePosixPath(name).stem)
        for scene in scenes:
            splits.setdefault(own.group(1) if own else split_of(scene.prompt), []).append(scene)
    if "val" not in splits and "train" in splits:
        val = [scene for scene in splits["train"] if split_of(scene.prompt) == "val"]
        train = [scene for scene in splits["train"] if split_of(scene.prompt) != "val"]
        if val and train:
            splits |= {"train": train, "val": val}
    return splits


# Files ---------------------------------------------------------------------------------------------------------------


def prompt_files(source: str | Path) -> list[tuple[str, bytes]]:
    """Name and content of each file of a source, in the order of the names."""
    path = Path(source)
    if not path.exists():
        path = download(str(source))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_prompt_file(file.as_posix()))
        zips = sorted(path.rglob("*.zip"))
        if files or len(zips) != 1:
            found = [(file.relative_to(path).as_posix(), file.read_bytes()) for file in files]
        else:
            found = unzipped(zips[0])
    else:
        found = unzipped(path) if path.suffix == ".zip" else [(path.name, path.read_bytes())]
    if not found:
        raise ValueError(
            f"{path} holds no prompts: neither CVTG-2K's 2.json to 5.json, nor lists whose names begin with train, val "
            f"or test and end with {', '.join(LISTS)}; a list with another name must be given itself"
        )
    return found


def is_prompt_file(name: str) -> bool:
    """Whether a file of a folder is one of CVTG-2K, by region count, or a list of one split."""
    path = PurePosixPath(name)
    return path.suffix in LISTS and bool(_SPLIT.match(path.stem) or (path.suffix == ".json" and path.stem.isdigit()))


def unzipped(path: Path) -> list[tuple[str, bytes]]:
    try:
        with ZipFile(path) as archive:
            return [
                (name, archive.read(name))
                for name in sorted(archive.namelist(), key=PurePosixPath)
                if is_prompt_file(name)
            ]
    except BadZipFile as error:
        raise ValueError(f"{path} is no zip file: {error}") from error


def download(name: str) -> Path:
    """The folder of a dataset from the Hugging Face hub, or from its cache."""
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix in (*LISTS, ".zip"):
        raise FileNotFoundError(f"no prompts at {name}: give a file, a folder, or OWNER/NAME of a dataset on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{s}" for s in (*LISTS, ".zip")]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"cannot load the prompts {name!r}: there is no such folder, and the Hugging Face hub does not give a "
            f"dataset of that name; fetch it with `hf download --repo-type dataset {name}`, or give a path ({reason})"
        ) from error


# Entries -------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An entry of a list, and where it stands, for messages: ``"train.txt, line 3, entry 1"``."""

    where: str
    value: Any


def parse(name: str, data: bytes) -> dict[str, Any] | list[Entry]:
    """A file of CVTG-2K as its dict, a list as its entries, each a prompt or a dict. Entries count from 0."""
    text = decode(name, data)
    if PurePosixPath(name).suffix not in (".json", ".jsonl"):
        return entries_of_lines(name, _LINE_END.split(text))
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return json_lines(name, text, error)
    if isinstance(content, dict) and "data_list" in content:
        return content
    if _COMBINED.fullmatch(PurePosixPath(name).stem) or (isinstance(content, dict) and all(map(str.isdigit, content))):
        raise ValueError(f'{name} has no "data_list": of CVTG-2K give 2.json and so on, not 2_combined.json')
    if isinstance(content, dict):
        content = [content]  # JSON Lines of one line
    if not isinstance(content, list):
        raise ValueError(f"{name} holds neither CVTG-2K's data_list nor an array of prompts, but {content!r:.80}")
    return [Entry(f"{name}, entry {number}", entry) for number, entry in enumerate(content)]


def decode(name: str, data: bytes) -> str:
    """UTF-8, with a byte order mark or without."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "of another encoding"
        raise ValueError(
            f"{name} is no UTF-8 text, but {kind}: save it as UTF-8 (line {line}, byte {error.start}: {error.reason})"
        ) from error


def entries_of_lines(name: str, lines: Sequence[str]) -> list[Entry]:
    """The lines that are not blank, with their numbers, which count from 1."""
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    return [Entry(f"{name}, line {number}, entry {entry}", line) for entry, (number, line) in enumerate(rows)]


def json_lines(name: str, text: str, error: Exception) -> list[Entry]:
    """The entries of JSON Lines, which end at a line feed and nowhere else: strings may hold U+2028.

    Args:
        error: what is wrong with the text as one JSON value.
    """
    entries = []
    for where, line in entries_of_lines(name, text.split("\n")):
        try:
            entries.append(Entry(where, json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as wrong:
            if not entries and PurePosixPath(name).suffix == ".json":  # no line is JSON: one value was meant
                raise ValueError(f"{name} is neither JSON nor JSON Lines: {error}") from error
            what = (
                f"{wrong.msg} at column {wrong.colno}" if isinstance(wrong, json.JSONDecodeError) else "nested too deep"
            )
            raise ValueError(f"{where}: is no JSON, {what}: {line!r:.80}") from wrong
    return entries


def cvtg_scenes(name: str, entries: Any, size: int) -> list[PromptScene]:
    """The scenes of one of CVTG-2K's files."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'the "data_list" of {name} must be an array of one entry or more, got {entries!r:.80}')
    scenes = []
    for number, entry in enumerate(entries):
        where = f"{name}, entry {number}"
        prompt = prompt_of(where, entry)
        carriers = entry.get("carrier_list")
        if not isinstance(carriers, list) or not carriers:
            raise ValueError(f'{where}: needs a "carrier_list", one a region, got {carriers!r:.80}')
        scenes.append(PromptScene(prompt, words_of(where, prompt), size=size, regions=len(carriers)))
    return scenes


def list_scenes(name: str, entries: Sequence[Entry], size: int) -> list[PromptScene]:
    """The scenes of a list of prompts, or of objects that have one; blank prompts are left out."""
    scenes = []
    for where, entry in entries:
        prompt = entry.strip() if isinstance(entry, str) else prompt_of(where, entry)
        if prompt:
            words = words_of(where, prompt)
            scenes.append(PromptScene(prompt, words, size=size, regions=count_regions(prompt)))
    if not scenes:
        raise ValueError(f"{name} holds no prompt")
    return scenes


def prompt_of(where: str, entry: Any) -> str:
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: needs a "prompt", a string, got {entry!r:.80}')
    return prompt


def words_of(where: str, prompt: str) -> tuple[str, ...]:
    try:
        return quoted_words(prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
