"""HPSv3 (Ma et al., arXiv 2508.03789): which images of a prompt people prefer, by Qwen2-VL with a regression head.

The checkpoint is one file, HPSv3.safetensors: the weights of Qwen2-VL-7B under the names of its first release
(``visual.``, ``model.``, ``lm_head.``) and of the head (``rm_head.``). Configuration, tokenizer and image processor are
those of Qwen2-VL-7B-Instruct, with one token more, ``<|Reward|>``. The head reads the state at that token and gives the
mean and the logarithm of the deviation of a normal distribution of the image's quality; the score is the mean.
Checked against the authors' description and program at github.com/MizzenAI/HPSv3 (MIT licence).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards import hub
from rewards.base import HasWords, RewardOutput

WEIGHTS = "HPSv3.safetensors"
BASE_FILES = "config.json, the tokenizer's files and preprocessor_config.json of Qwen2-VL"
REWARD_TOKEN = "<|Reward|>"
CELL = 28  # pixels a side that become one token: patches of 14, merged two by two
PIXELS = 256 * CELL**2  # every image is brought to about this size, and to sides that are multiples of 28

# What the model was trained to read, to the letter: Qwen2-VL's conversation around the authors' instruction, which is
# part of the checkpoint's format and keeps its slips and its blanks at the ends of lines.
BEFORE_IMAGE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
IMAGE_TOKEN = "<|image_pad|>"
AFTER_IMAGE = (
    "<|vision_end|>\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret"
    ", with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition,"
    " atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and "
    "balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject without"
    " contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image."
    " The generated content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
    "<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class HPSv3Reward(hub.ModelReward):
    """HPSv3's score of each image for its scene's prompt: the mean that the regression head gives.

    Scores are real numbers without bounds, higher for better images; the loss of the paper makes a difference of
    scores the log odds of a preference. Part: sigma, the deviation that the head gives, positive. Words are not read:
    an image's `words` and `regions` are empty.

    As in the authors' program, all tokens, the image's too, stand at the positions 0, 1, 2, ... on Qwen2-VL's three
    axes, and images are brought to about 448 x 448 pixels, enlarged if need be. In bfloat16 the model takes about
    16 GB; the head computes in float32.

    Args:
        model: the checkpoint's name on the Hugging Face hub, or a folder that holds its HPSv3.safetensors.
        base: the name or the folder of the Qwen2-VL with configuration, tokenizer and image processor.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, float16, or auto, which is the authors' bfloat16 off the CPU and float32 on it.
        batch_size: images at a time. Changes the result by rounding only.
    """

    name = "hps"

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
    ) -> None:
        super().__init__(model, device, dtype, batch_size)
        self.base = str(base)

    def load(self) -> HPSv3:
        return load_hps(self.model, self.base, self.device, self.dtype)

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes, each with a prompt that holds no token of the format."""
        super().check_scenes(scenes, count)
        for index, prompt in enumerate(hub.prompts_of(scenes)):
            if "<|" in prompt:
                raise ValueError(f"the prompt of scene {index} holds '<|', which starts the model's marks: {prompt!r}")

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        loaded = self.load()
        prompts = hub.prompts_of(scenes)
        rows = [read_out(loaded, images[rows], prompts[rows]) for rows in self.batches(len(images))]
        means, logs = np.concatenate(rows).T
        return RewardOutput(means, parts={"sigma": np.exp(logs)})


class HPSv3(NamedTuple):
    """The loaded parts of the model."""

    backbone: Any  # Qwen2-VL without its language head
    head: Any  # in float32
    tokenizer: Any
    image_processor: Any


def read_out(hps: HPSv3, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float32]:
    """What the head gives for each image and its prompt, (B, 2): the mean and the logarithm of the deviation."""
    import torch

    height, width = target_size(*images.shape[1:3])
    resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in hub.pil_images(images)]
    pixels = hps.image_processor(images=resized, do_resize=False, return_tensors="pt")
    cells = height * width // CELL**2
    texts = [BEFORE_IMAGE + IMAGE_TOKEN * cells + AFTER_IMAGE.replace("{prompt}", prompt) for prompt in prompts]
    device, tokenizer = hps.backbone.device, hps.tokenizer
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device)
    # What stands behind the reward token, padding included, cannot change its state: attention is causal.
    positions = torch.arange(inputs.input_ids.shape[1], device=device).expand(3, *inputs.input_ids.shape)  # (3, B, L)
    with torch.inference_mode():
        states = hps.backbone(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=positions,
            pixel_values=pixels.pixel_values.to(device, hps.backbone.dtype),
            image_grid_thw=pixels.image_grid_thw.to(device),
            use_cache=False,
        ).last_hidden_state  # (B, L, D)
        at_token = inputs.input_ids == tokenizer.convert_tokens_to_ids(REWARD_TOKEN)  # true once a row
        return hps.head(states[at_token].float()).cpu().numpy()


def target_size(height: int, width: int) -> tuple[int, int]:
    """The sides, multiples of 28, that bring an image to about 256 cells of 28 x 28 pixels at its own shape."""
    sides = [max(round(side / CELL), 1) * CELL for side in (height, width)]
    if math.prod(sides) > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        sides = [max(math.floor(side / shrink / CELL), 1) * CELL for side in (height, width)]
    elif math.prod(sides) < PIXELS:
        stretch = math.sqrt(PIXELS / (height * width))
        sides = [math.ceil(side * stretch / CELL) * CELL for side in (height, width)]
    return sides[0], sides[1]


def load_hps(name: str, base: str, device: str = "auto", dtype: str = "auto") -> HPSv3:
    """The model, one object a process for the same arguments. OSError when it cannot be had or is not whole."""
    device, dtype = hub.place(device, dtype)
    with hub.LOADING:
        return _load(name, base, device, dtype)


@functools.cache
def _load(name: str, base: str, device: str, dtype: str) -> HPSv3:
    import torch
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLModel

    with hub.explained("HPSv3", name, WEIGHTS):
        weights = load_file(Path(name) / WEIGHTS if Path(name).is_dir() else hf_hub_download(name, WEIGHTS))
    with hub.explained("Qwen2-VL", base, BASE_FILES):
        config = AutoConfig.from_pretrained(base)
        if config.model_type != "qwen2_vl":
            raise ValueError(f"its configuration is that of {config.model_type}, not of qwen2_vl")
        tokenizer = AutoTokenizer.from_pretrained(base)
        image_processor = AutoImageProcessor.from_pretrained(base)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    config.text_config.vocab_size = len(tokenizer)

    with torch.device("meta"):  # takes no memory and no random numbers
        head = torch.nn.Sequential(
            torch.nn.Linear(config.text_config.hidden_size, 1024),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.05),
            torch.nn.Linear(1024, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 2),
        )
    of_head = {key.removeprefix("rm_head."): weights.pop(key) for key in list(weights) if key.startswith("rm_head.")}
    of_backbone = {backbone_key(key): weight for key, weight in weights.items() if not key.startswith("lm_head.")}
    hub.check_whole("HPSv3", name, {f"rm_head.{key}" for key in head.state_dict().keys() - of_head.keys()})
    with hub.explained("HPSv3", name, f"{WEIGHTS}, made from the Qwen2-VL that `base` names, here {base!r}"):
        head.load_state_dict(of_head, assign=True)
        loaded: Any = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=of_backbone, output_loading_info=True
        )
    backbone, report = loaded
    hub.check_whole("HPSv3", name, report["missing_keys"])
    return HPSv3(
        backbone.to(device, getattr(torch, dtype)).eval(),
        head.to(device, torch.float32).eval(),
        tokenizer,
        image_processor,
    )


def backbone_key(key: str) -> str:
    """Today's name of a weight of Qwen2-VL without its language head, from the name of the first release or today's."""
    if key.startswith(("model.visual.", "model.language_model.")):
        return key.removeprefix("model.")
    return key.replace("model.", "language_model.", 1) if key.startswith("model.") else key
