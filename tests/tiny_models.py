"""Small checkpoints of the real classes: random weights, small vocabularies, saved as the public ones are."""

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    SwinConfig,
)

from rewards import hps

WORDS = ["cat", "dog", "red", "wall", "yes", "no", "does", "this", "image", "show", "the", "a", "sign", "with", "text"]
QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def randomise(model, std):
    """Weights larger than at birth, so that inputs make a difference."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def bert_tokenizer(folder):
    """Whole words, then letters. The marks and the full stop have BERT's numbers, which Grounding DINO relies on."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [f"[unused{i}]" for i in range(1100)]
    vocabulary[0], vocabulary[100:103] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]"]
    vocabulary[1012], vocabulary[1029] = ".", "?"
    vocabulary[200 : 200 + len(WORDS)] = WORDS
    pieces = [*letters, *(f"##{letter}" for letter in letters), '"', ","]
    pieces = [piece for piece in pieces if piece not in WORDS]
    vocabulary[300 : 300 + len(pieces)] = pieces
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return BertTokenizer.from_pretrained(folder)


def save_tiny_git(folder):
    """GIT: 32-pixel images, questions of 24 tokens at most."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GitConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        **vision,
        vocab_size=1100,
        max_position_embeddings=24,
        bos_token_id=101,
        eos_token_id=102,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        randomise(GitForCausalLM(config), 0.3).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(images, bert_tokenizer(folder)).save_pretrained(folder)
    return folder


def save_tiny_grounding_dino(folder):
    """Grounding DINO with 10 queries and a text of 32 tokens at most, for images of 64 pixels."""
    swin = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4, out_indices=[1, 2, 3]
    )
    bert = BertConfig(vocab_size=1100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        num_queries=10,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_text_len=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        randomise(GroundingDinoForObjectDetection(config), 0.15).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, bert_tokenizer(folder)).save_pretrained(folder)
    return folder


def save_tiny_hps(folder):
    """HPSv3: HPSv3.safetensors with the first release's names, and in `base` what is Qwen2-VL's. Returns both."""
    base = folder / "base"
    base.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([hps.AFTER_IMAGE], vocab_size=500, min_frequency=2, show_progress=False)
    bpe.save_model(str(base))
    tokenizer = Qwen2Tokenizer.from_pretrained(base)
    tokenizer.add_tokens(QWEN_MARKS, special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    ids = dict(zip(QWEN_MARKS, tokenizer.convert_tokens_to_ids(QWEN_MARKS), strict=True))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 600,  # more than the tokenizer has, as in the public model
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]},
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    config.save_pretrained(base)
    Qwen2VLImageProcessor().save_pretrained(base)
    config.text_config.vocab_size = len(tokenizer) + 1  # and <|Reward|>
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(Qwen2VLForConditionalGeneration(config), 0.2)
        head = torch.nn.Sequential(
            torch.nn.Linear(32, 1024),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.05),
            torch.nn.Linear(1024, 16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 2),
        )
        randomise(head, 0.1)
    weights = {f"rm_head.{key}": weight for key, weight in head.state_dict().items()}
    for key, weight in model.state_dict().items():
        weights[key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = weight.clone()
    save_file(weights, folder / hps.WEIGHTS)
    return folder, base
