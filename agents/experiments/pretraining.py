"""The training of the tokenizer and of the base policy, for ``vartext pretrain``."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # a borrowed machine may have torch alone
    SummaryWriter = None  # type: ignore[assignment, misc]

from agents import policies
from agents.experiments import run_file
from agents.experiments.options import clear_errors
from agents.policies.base import Policy
from agents.policies.var_text import VARTextPolicy
from agents.sampling import Decoding, draw
from var_env.faults import Faults
from var_env.scenes import MAX_PROMPT_BYTES, Scene, World, render
from var_env.schedule import ScaleSchedule
from var_env.tokenizers import Tokenizer, load_tokenizer
from var_env.tokenizers.base import VisualTokenizer, from_unit, to_unit
from var_env.tokenizers.bits import BitTokenizer, bit_entropies
from var_env.tokenizers.raster import RasterTokenizer
from var_env.weights import load_config_and_weights
from var_env.worlds import SMALL, make_world, named_world

if TYPE_CHECKING:
    from agents.policies.qwen import QwenPolicy


COMMON, SHARES = ("world", "schedule", "seed", "batch"), ("decay", "swap", "drop_prompt")
STEPS = ("policy_steps", "policy_lr", "optimizer")
OF_STAGE = {  # options that make a stage's run what it is
    "tokenizer": (*COMMON, "vocab_size", "bits", "tokenizer_steps", "tokenizer_lr"),
    "policy": (*COMMON, "policy", "width", "layers", "heads", "start", "blocks_of", *STEPS, "faults", *SHARES),
}
FIXED = (
    "world",
    "schedule",
    "vocab_size",
    "bits",
    "policy",
    "width",
    "layers",
    "heads",
    "start",
    "blocks_of",
    "optimizer",
)


class SceneStream(torch.utils.data.IterableDataset):
    """Batches of training scenes as their prompts ask for them, and images, which may show planted faults instead.

    Batch i is drawn from ``(seed, i)`` alone, so a resumed run draws the same.
    """

    def __init__(self, batch: int, seed: int, start: int, faults: Faults, world: World) -> None:
        self.batch, self.seed, self.start, self.faults, self.world = batch, seed, start, faults, world
        faults.check_world(self.world)

    def __iter__(self) -> Iterator[tuple[list[Scene], Tensor]]:
        i = self.start
        while True:
            rng = np.random.default_rng([self.seed, i])
            scenes = [self.world.sample(rng) for _ in range(self.batch)]
            shown = [self.faults.shown(scene, self.world, rng) for scene in scenes]
            yield scenes, torch.from_numpy(np.stack([render(scene) for scene in shown]))
            i += 1


def text_weight(images: Tensor, scenes: list[Scene], weight: float, cells: bool) -> Tensor:
    """Loss weights ``(B, 1, S, S)``: `weight` on pixels that are not the ground's colour, else 1.

    With `cells`, on all pixels of the words' boxes. With the ink alone it costs little to draw too much of it, and of
    small glyphs an F becomes an E, and a P an R.
    """
    if cells:
        text = torch.zeros(images.shape[:3], dtype=torch.bool, device=images.device)  # (B, S, S)
        for row, scene in zip(text, scenes, strict=True):
            for x0, y0, x1, y1 in scene.boxes:
                row[y0:y1, x0:x1] = True
    else:
        ground = torch.tensor([scene.ground for scene in scenes], dtype=torch.uint8, device=images.device)
        text = (images != ground[:, None, None, :]).any(-1)  # (B, S, S)
    return 1 + (weight - 1) * text.float().unsqueeze(1)


class EmaCodebook:
    """The codebook as a running mean of the vectors that each code won; codes that win nothing are set anew."""

    def __init__(self, tokenizer: Tokenizer, decay: float = 0.99) -> None:
        self.tokenizer, self.codebook, self.decay = tokenizer, tokenizer.codebook, decay
        self.count = torch.ones(len(self.codebook), device=self.codebook.device)
        self.total = self.codebook.clone()
        self.tensors = {"count": self.count, "total": self.total}

    def penalty(self, vectors: Tensor) -> Tensor:
        """Nothing: the codes follow the vectors by themselves."""
        return vectors.new_zeros(())

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor) -> None:
        """`vectors` ``(N, C)`` and the codes they fell on ``(N, 1)``."""
        codes = codes.squeeze(1)
        self.count.lerp_(torch.bincount(codes, minlength=len(self.codebook)).float(), 1 - self.decay)
        total = torch.zeros_like(self.total).index_add_(0, codes, vectors)
        self.total.lerp_(total, 1 - self.decay)
        dead = self.count < 0.02
        fresh = vectors[torch.randint(len(vectors), (int(dead.sum()),))]
        self.count[dead], self.total[dead] = 1.0, fresh
        self.codebook.copy_(self.total / self.count.unsqueeze(1))

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """Codes drawn from the residuals of every scale of one batch, each scale quantised by its own mean colour."""
        tokenizer, samples, residual = self.tokenizer, [], features
        for t in range(len(tokenizer.schedule)):
            vector = tokenizer.read(t, residual)
            samples.append(vector.flatten(0, 1))
            residual = residual - tokenizer.spread(t, vector)
        share = tokenizer.vocab_size // len(samples)
        picks = [s[torch.randint(len(s), (share,))] for s in samples[:-1]]
        rest = tokenizer.vocab_size - share * len(picks)
        picks.append(samples[-1][torch.randint(len(samples[-1]), (rest,))])
        self.codebook.copy_(torch.cat(picks))
        self.total.copy_(self.codebook)
        self.count.fill_(1.0)

    def report(self) -> dict[str, Tensor]:
        return {"used_codes": (self.count > 0.1).sum()}


class BitUse:
    """What bits need in place of a codebook: to be used. The entropy regularisation of BSQ."""

    def __init__(self, weight: float = 0.1, sharpness: float = 10.0) -> None:
        self.weight, self.sharpness = weight, sharpness
        self.tensors: dict[str, Tensor] = {}
        self.used = torch.zeros(())

    def start(self, features: Tensor) -> None:
        """There is nothing to initialise."""

    def penalty(self, vectors: Tensor) -> Tensor:
        """Of vectors ``(N, D)``: each bit decided, and both of its values equally likely."""
        undecided, used = bit_entropies(vectors, self.sharpness)
        return self.weight * (undecided - used)

    def update(self, vectors: Tensor, codes: Tensor) -> None:
        """`codes` ``(N, D)``: how many bits of information they hold, taken one by one."""
        ones = codes.float().mean(0)
        self.used = (torch.special.entr(ones) + torch.special.entr(1 - ones)).sum() / math.log(2)

    def report(self) -> dict[str, Tensor]:
        return {"used_bits": self.used}


def train_tokenizer(args: argparse.Namespace) -> None:
    """A plain autoencoder first, then quantised, with a codebook initialised from the data."""
    torch.manual_seed(args.seed)
    tokenizer = new_tokenizer(args).to(args.device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(args, "tokenizer", tokenizer, [optimizer])
    book = EmaCodebook(tokenizer) if isinstance(tokenizer, Tokenizer) else BitUse()
    run.extra = book.tensors
    run.resume()
    warm_up = args.tokenizer_steps // 6  # steps as a plain autoencoder
    for step, (scenes, images) in run.steps(args.tokenizer_steps, args.tokenizer_lr, cosine):
        images = images.to(args.device)
        x = to_unit(images)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            features = tokenizer.features(x)
        features = features.float()
        canvas, residual = tokenizer.blank(len(x)), features
        vectors, codes, penalty = [], [], torch.zeros((), device=args.device)
        if step >= warm_up:
            for t in range(len(tokenizer.schedule)):
                vector = tokenizer.read(t, residual)  # (B, n_t, C)
                if step == warm_up and t == 0:
                    book.start(residual)
                grid = tokenizer.nearest(vector)
                vectors.append(vector.flatten(0, 1))
                codes.append(grid.flatten(0, 1))
                part = tokenizer.contribution(t, grid)
                canvas, residual = canvas + part, residual - part.detach()
            commitment = F.mse_loss(features, canvas.detach())
            smoothing = F.mse_loss(canvas, features.detach())  # trains phi
            quantised = features + (canvas - features).detach()
            penalty = book.penalty(torch.cat(vectors))
        else:
            commitment = features.square().mean() * 0.01  # keeps the features' size bounded before there is a codebook
            smoothing = torch.zeros((), device=args.device)
            quantised = features
        with torch.autocast(args.device, dtype=torch.bfloat16):
            image = tokenizer.decoder(quantised)
        weight = text_weight(images, scenes, 5.0, named_world(args.world).weigh_cells)
        error = (weight * (image.float() - x).square()).mean() / weight.mean()
        (error + 0.25 * commitment + smoothing + penalty).backward()
        run.take_step()
        if step >= warm_up:
            book.update(torch.cat(vectors), torch.cat(codes))
        run.log(step, error=error, commitment=commitment, smoothing=smoothing, **book.report())
        if run.is_time_for_images(step):
            run.image(step, torch.cat([images[:8], from_unit(image.detach())[:8]]))
    steps_of(tokenizer, args).save(args.out / "tokenizer.safetensors")


def new_tokenizer(args: argparse.Namespace) -> Tokenizer | BitTokenizer:
    """Random weights; for a raster, one scale of as many tokens as the finest scale has."""
    schedule, world = named_world(args.world).schedule, None if args.world == SMALL else args.world
    if args.bits:
        return BitTokenizer(schedule, args.bits, world=world)
    if args.schedule == "raster":
        schedule = ScaleSchedule([schedule.canvas], schedule.patch)
    return Tokenizer(schedule, args.vocab_size, world=world)


def steps_of(tokenizer: Tokenizer | BitTokenizer, args: argparse.Namespace) -> VisualTokenizer:
    """What the environment takes: scales are steps, or the tokens of the only one."""
    return RasterTokenizer(tokenizer) if isinstance(tokenizer, Tokenizer) and args.schedule == "raster" else tokenizer


def train_policy(args: argparse.Namespace) -> None:
    """Teacher forcing on the tokenizer's grids, a few of the written codes swapped, the prompt dropped at times."""
    torch.manual_seed(args.seed)
    with clear_errors():
        tokenizer: Any = load_tokenizer(args.out / "tokenizer.safetensors").to(args.device)  # one of train_tokenizer's
        check_tokenizer(args, tokenizer)
        policy = new_policy(args, tokenizer).to(args.device)
    run = Run(args, "policy", policy, optimizers_of(policy, args.optimizer))
    run.resume()
    forward = torch.compile(policy.from_features) if args.compile else policy.from_features
    schedule, steps = tokenizer.schedule, range(len(tokenizer.schedule))
    bands = [(name, sum(schedule.sizes[t] for t in band)) for name, band in schedule.bands]
    shape = functools.partial(plateau, decay=args.decay)
    for step, (scenes, images) in run.steps(args.policy_steps, args.policy_lr, shape):
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + step)
        with torch.no_grad(), torch.autocast(args.device, dtype=torch.bfloat16):
            encoded = tokenizer.features(to_unit(images.to(args.device))).float()
        # Swapped codes teach a policy to correct itself. At the end they would only blur what it is sure of.
        written, labels = tokenizer.quantise(encoded, args.swap * shape(step, args.policy_steps), generator)
        cond: Any = policy.encode_prompts([scene.prompt for scene in scenes])
        if args.drop_prompt:
            dropped = torch.rand(len(scenes), 1, generator=generator, device=args.device) < args.drop_prompt
            pairs = zip(policy.null_cond(cond), cond, strict=True)
            cond = type(cond)(*(torch.where(dropped, null, part) for null, part in pairs))
        features = torch.cat(tokenizer.read_all(written, steps[-1], len(scenes)), dim=1)
        logits = forward(cond, features, steps)  # (B, L, D, V)
        loss = F.cross_entropy(logits.flatten(0, 2), torch.cat(labels, dim=1).flatten(), reduction="none")
        loss = loss.view(len(scenes), schedule.total_tokens, -1).sum(2)  # (B, L), nats a token
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        run.take_step()
        per_band = loss.detach().mean(0).split([tokens for _, tokens in bands])
        run.log(
            step,
            loss=loss.mean(),
            gradient_norm=norm,
            **{f"scale/{name}": part.mean() for (name, _), part in zip(bands, per_band, strict=True)},
        )
        if run.is_time_for_images(step):
            held_out = make_world(args.world, "val")
            shown = [held_out.sample(np.random.default_rng(i)) for i in range(8)]
            run.image(step, sample_images(policy, [s.prompt for s in shown], generator))
    policy.save(args.out / "policy.safetensors")


def check_tokenizer(args: argparse.Namespace, tokenizer: VisualTokenizer) -> None:
    """``ValueError`` when the tokenizer in ``--out`` is for another world than ``--world``."""
    world = tokenizer.world or SMALL
    if world != args.world:
        raise ValueError(
            f"--world {args.world}: the tokenizer in {args.out} is of the world {world!r}: give --world {world}, or "
            "another --out"
        )


def new_policy(args: argparse.Namespace, tokenizer: VisualTokenizer) -> VARTextPolicy | QwenPolicy:
    """Random weights, those of ``--start``, or a part of those of ``--blocks-of``."""
    if args.start is not None:
        start = policies.load_policy(args.start, tokenizer)
        if isinstance(start, VARTextPolicy) and args.drop_prompt > 0:
            start.config["null_prompt"] = True  # from now on
        return start  # type: ignore[return-value]
    if args.policy == "qwen":
        from agents.policies.qwen import QwenPolicy

        return QwenPolicy.small(tokenizer, args.width, args.layers, args.heads)
    policy = VARTextPolicy(tokenizer, args.width, args.layers, args.heads, null_prompt=args.drop_prompt > 0)
    if args.blocks_of is not None:
        take_blocks(policy, args.blocks_of)
    return policy


def take_blocks(policy: VARTextPolicy, path: str) -> None:
    """Give a policy the text encoder and the blocks of another one of its size, on any tokenizer.

    Args:
        path: the file, or a shipped policy's name.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is of another size.
    """
    file = (
        Path(policies.__file__).parent / "assets" / f"{path}.safetensors"
        if path in policies.SHIPPED and not Path(path).is_file()
        else Path(path)
    )
    config, weights = load_config_and_weights(file, policies.MAKER)
    for name, value in ({"prompt_bytes": MAX_PROMPT_BYTES} | config).items():  # an earlier file has no prompt_bytes
        if name in ("width", "layers", "heads", "prompt_bytes") and value != policy.config[name]:
            raise ValueError(
                f"--blocks-of {path}: its {name} is {value}, and that of the new policy {policy.config[name]}"
            )
    blocks = {name: weight for name, weight in weights.items() if name.startswith(("text.", "blocks.", "norm."))}
    policy.load_state_dict(blocks, strict=False)


@torch.no_grad()
def sample_images(policy: Policy, prompts: list[str], generator: torch.Generator) -> Tensor:
    """One image a prompt, uint8 ``(B, S, S, 3)``, drawn from the policy's own distribution."""
    tokenizer = policy.tokenizer
    cache, canvas, grid = policy.begin(policy.encode_prompts(prompts)), tokenizer.blank(len(prompts)), None
    for t in range(len(tokenizer.schedule)):
        logits, cache = policy.step(cache, t, tokenizer.read(t, canvas), grid)
        grid = draw(logits, None, Decoding(), generator).tokens
        canvas = tokenizer.write(t, canvas, grid)
    return tokenizer.decode(canvas)


def cosine(step: int, total: int) -> float:
    """A linear warm-up over 2 % of the steps, and half a cosine down to 5 %."""
    return min(1.0, 50 * step / total) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2)


def plateau(step: int, total: int, decay: float) -> float:
    """A warm-up over 64 steps, then flat, then down to 2 % over the last share `decay`. A checkpoint of the flat part
    can go on to any later end, by another ``--policy-steps`` (warm-up-stable-decay; Hu et al., arXiv 2404.06395)."""
    return min(1.0, step / 64) * min(1.0, 0.02 + 0.98 * (1 - step / total) / decay)


def optimizers_of(policy: Policy, name: str) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon (Jordan et al., 2024) for the matrices of the blocks and AdamW for the others.

    Muon's step is scaled to the size that AdamW's has (Liu et al., arXiv 2502.16982), so both take one learning rate.

    Raises:
        ValueError: "muon", and this torch does not have it, or the policy does not name its blocks.
    """
    groups = decay_groups(policy)
    if name == "adamw":
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"--optimizer muon needs torch 2.9 or later, and this is {torch.__version__}: take adamw")
    layers = tuple(policy.sharded_layers)  # the transformer's blocks, by the names of their classes
    blocks = [module for module in policy.modules() if type(module).__name__ in layers]
    if not blocks:
        raise ValueError(f"--optimizer muon: {type(policy).__name__} names no blocks (sharded_layers): take adamw")
    matrices = {id(p): p for block in blocks for p in block.parameters() if p.ndim == 2}
    others = [{**group, "params": [p for p in group["params"] if id(p) not in matrices]} for group in groups]
    return [
        torch.optim.Muon(matrices.values(), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), fused=True),
    ]


def decay_groups(policy: Policy) -> list[dict]:
    """Weight decay for the matrices and none for biases, norms and embeddings. The temperatures are not trained."""
    embeddings = ("text.byte.weight", "model.decoder.embed_tokens.weight")
    matrices = [p for name, p in policy.named_parameters() if p.ndim == 2 and name not in embeddings]
    chosen, left_out = {id(p) for p in matrices}, policy.temperature_parameters
    others = [p for name, p in policy.named_parameters() if id(p) not in chosen and name not in left_out]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


class Run:
    """What both stages share: the step loop with its schedule, checkpoints, logs and images."""

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.args, self.name, self.module, self.optimizers = args, name, module, optimizers
        self.path = args.out / f"{name}.checkpoint.pt"
        self.first, self.seen = 0, 0
        self.settings = {name: run_file.plain("", getattr(args, name, None)) for name in OF_STAGE[self.name]}
        self.batch = args.batch or {"tokenizer": 64, "policy": 32}[name]
        self.extra: dict[str, Tensor] = {}  # more tensors to checkpoint
        self.sums: dict[str, Tensor] = {}
        args.out.mkdir(parents=True, exist_ok=True)
        self.writer: SummaryWriter | None = None
        if SummaryWriter is not None:
            self.writer = SummaryWriter(str(args.out / "tensorboard" / name))

    def resume(self) -> None:
        if self.path.is_file():
            saved = torch.load(self.path, map_location=self.args.device, weights_only=True)
            for name in [name for name in FIXED if name in self.settings]:
                was = saved.get("settings", {}).get(name, self.settings[name])
                if was != self.settings[name]:
                    told = run_file.told(name, self.settings[name], was)
                    sys.exit(f"error: {told}: {self.path} goes on as it began, with that or with another --out")
            self.module.load_state_dict(saved["module"])
            states = saved.get("optimizers") or [saved["optimizer"]]  # earlier versions had one
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
            for name, tensor in self.extra.items():
                tensor.copy_(saved["extra"][name])
            self.first, self.seen = saved["step"], saved["seen"]
            was = saved.get("settings", {})  # earlier versions did not keep them
            for name in [name for name in was if was[name] != self.settings[name]]:
                told = run_file.told(name, self.settings[name], was[name])
                print(f"{self.name}: {told}: it is another run from here on", flush=True)
            print(f"{self.name}: going on from step {self.first} ({self.seen} images seen)", flush=True)

    def save(self, step: int) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "extra": self.extra,
            "step": step,
            "seen": self.seen,
            "settings": self.settings,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def steps(self, total: int, peak: float, shape: Callable[[int, int], float]) -> Iterator[tuple[int, Any]]:
        """Numbered batches, with the learning rate set to `peak` times `shape(step, total)`."""
        args = self.args
        entry = named_world(args.world)
        faults = args.faults if self.name == "policy" else entry.faults()  # a tokenizer has no prompt to deviate from
        scenes = SceneStream(self.batch, args.seed, self.first, faults, make_world(args.world))
        stream = torch.utils.data.DataLoader(scenes, batch_size=None, num_workers=args.workers)
        self.clock = time.monotonic()
        for step, batch in zip(range(self.first, total), stream, strict=False):
            for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
                group["lr"] = peak * shape(step, total)
            yield step, batch
            self.seen += self.batch
            if (step + 1) % args.save_every == 0 or step + 1 == total:
                self.save(step + 1)

    def take_step(self) -> None:
        """Move the weights along their gradients, and clear these."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def log(self, step: int, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        if (step + 1) % self.args.log_every:
            return
        means = {name: float(total) / self.args.log_every for name, total in self.sums.items()}
        self.sums.clear()
        rate = self.args.log_every * self.batch / (time.monotonic() - self.clock)
        self.clock = time.monotonic()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"{self.name} {step + 1}  {rate:.0f} images/s  {shown}", flush=True)
        if self.writer:
            for name, value in means.items():
                self.writer.add_scalar(f"{self.name}/{name}", value, self.seen)
            self.writer.add_scalar(f"{self.name}/images_per_second", rate, self.seen)

    def is_time_for_images(self, step: int) -> bool:
        return self.writer is not None and (step + 1) % self.args.image_every == 0

    def image(self, step: int, images: Tensor) -> None:
        assert self.writer is not None
        self.writer.add_images(f"{self.name}/samples", images.cpu(), self.seen, dataformats="NHWC")


def export(args: argparse.Namespace) -> None:
    """Copy the trained weights into the packages, in bf16: half the size, and OCR sees no difference."""
    tokenizer = load_tokenizer(args.out / "tokenizer.safetensors")
    if not isinstance(tokenizer, Tokenizer | RasterTokenizer):
        raise SystemExit(f"the packages have no place for a {type(tokenizer).__name__}: use its file where it is")
    policy = policies.load_policy(args.out / "policy.safetensors", tokenizer)
    if not isinstance(policy, VARTextPolicy):
        raise SystemExit(f"the packages have no place for a {type(policy).__name__}: use its file where it is")
    # Cross-entropy on images of swapped codes leaves a policy a little less sure than what it draws has to be.
    policy.set_temperature(args.temperature)
    entry = named_world(args.world)
    if args.schedule == "raster" and args.world != SMALL:
        raise SystemExit(
            f"the packages have no place for a raster of the world {args.world!r}: use its files where they are"
        )
    names = {"scales": (entry.tokenizer, entry.policy), "raster": ("raster_tokenizer.safetensors", "raster")}
    file, name = names[args.schedule]
    root, shipped, weights = (
        Path(__file__).parents[2],
        f"var_env/assets/{file}",
        f"agents/policies/assets/{name}.safetensors",
    )
    tokenizer.save(root / shipped, half=True)
    policy.save(root / weights, half=True)
    print(f"wrote {shipped} and {weights}")
    print(f"check them with: vartext evaluate --gates --tokenizer {shipped} --policy {weights}")


def run(args: argparse.Namespace) -> int:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    {"tokenizer": train_tokenizer, "policy": train_policy, "export": export}[args.stage](args)
    return 0
