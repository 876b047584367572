"""A small CLIP checkpoint of the real classes: random weights, a vocabulary of letters, images of 32 pixels."""

import json
from string import ascii_lowercase

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

MAX_TOKENS = 20


def save_tiny_clip(folder):
    """Writes model, tokenizer and image processor into a folder, and returns it."""
    letters = [*ascii_lowercase, '"']
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>", "<|startoftext|>"]
    vocabulary.append("<|endoftext|>")  # the last one, as in the real vocabulary
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    end = len(vocabulary) - 1
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config={**small, **ends, "max_position_embeddings": MAX_TOKENS},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=4,  # few, so that cosines of either sign occur
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)  # larger than at birth, so that inputs make a difference
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder
