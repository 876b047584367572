"""The processes that train one agent together, one a GPU, as ``accelerate launch`` or ``torchrun`` starts them.

What is learned does not depend on their number, but for rounding, as far as `Agent` can see to it:

- each process draws and learns its share of an update's P prompts, whole groups, from the prompts that one process
  would draw; on a CPU with the same noise, too;
- advantages, and the weights that a loss is a mean by, are made from all processes' rows, so that the sum of all
  processes' losses is the loss of the whole;
- gradients are summed, so that all take the same step, and a seed that is shared keeps permutations the same.

The first process logs and writes. With FSDP, which ``accelerate launch --use_fsdp`` asks for, weights, gradients and
the optimiser's state are sharded: each process holds its part, and gathers a layer's weights while it computes it
(``torch.distributed.fsdp.fully_shard``).

`current` is what this process belongs to; alone, it is one of one, and everything here gives back what it gets.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from agents.policies.base import Policy

BUCKET = 2**24  # numbers that are summed over processes at a time
T = TypeVar("T")


class Processes:
    """This process among those of a run.

    Args:
        rank: which one it is; 0 is the first.
        count: how many there are.
        shards: whether weights are sharded.

    Attributes:
        rank, count, shards: as given.
    """

    def __init__(self, rank: int = 0, count: int = 1, shards: bool = False) -> None:
        self.rank, self.count, self.shards = rank, count, shards
        # Scores and flags go through the CPU, whatever the weights are on.
        self._small = dist.new_group(backend="gloo") if count > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this one logs and writes."""
        return self.rank == 0

    # Shares ----------------------------------------------------------------------------------------------------------

    def share(self, total: int, name: str) -> int:
        """The part of ``total`` that each process has. ``ValueError`` naming it when it does not divide."""
        if total % self.count:
            raise ValueError(
                f"{name}={total} cannot be shared among {self.count} processes: choose a multiple of {self.count}"
            )
        return total // self.count

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, the first process's first; they may differ in number."""
        if self.count == 1:
            return rows
        mine = rows.detach().cpu().contiguous()
        counts = self.row_counts(len(mine))
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self._small)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    def row_counts(self, mine: int) -> list[int]:
        """The number of rows that each process has."""
        if self.count == 1:
            return [mine]
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(counts, torch.tensor([mine]), group=self._small)
        return [int(count) for count in counts]

    def mine(self, everything: Tensor, count: int) -> Tensor:
        """This process's ``count`` rows of what `gather` gave."""
        before = self.rows_before(count)
        return everything[before : before + count]

    def rows_before(self, count: int) -> int:
        """How many rows the processes before this one have, of which this one has ``count``."""
        return sum(self.row_counts(count)[: self.rank])

    def broadcast(self, value: T) -> T:
        """What the first process has."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, group=self._small)
        return found[0]

    # Sums and decisions ----------------------------------------------------------------------------------------------

    def reduce(self, values: Sequence[float], how: str = "sum") -> list[float]:
        """Numbers over all processes, the "sum", "max" or "min" of each."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(found, getattr(dist.ReduceOp, how.upper()), group=self._small)
        return found.tolist()

    def mean(self, total: float, count: int) -> float:
        """The mean of numbers of which each process has the sum and the count."""
        total, counted = self.reduce([total, count])
        return total / max(counted, 1)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process: a decision that all must take alike."""
        return bool(self.reduce([float(flag)], "max")[0])

    def most(self, count: int) -> int:
        """The largest of a number."""
        return int(self.reduce([count], "max")[0])

    # Gradients and weights -------------------------------------------------------------------------------------------

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes, in place. A parameter without one counts as zero."""
        if self.count == 1 or self.shards:  # sharded ones are summed in the backward pass
            return
        bucket: list[nn.Parameter] = []
        for weight in parameters:
            if not weight.requires_grad:
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if bucket and (
                sum(w.numel() for w in bucket) + weight.numel() > BUCKET or weight.grad.dtype != bucket[0].grad.dtype  # type: ignore[union-attr]
            ):
                self._sum(bucket)
                bucket = []
            bucket.append(weight)
        if bucket:
            self._sum(bucket)

    @staticmethod
    def _sum(bucket: Sequence[nn.Parameter]) -> None:
        flat = torch.cat([w.grad.flatten() for w in bucket if w.grad is not None])
        dist.all_reduce(flat)
        for weight, part in zip(bucket, flat.split([w.numel() for w in bucket]), strict=True):
            assert weight.grad is not None
            weight.grad.copy_(part.view_as(weight))

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss whose gradient comes out as the sum over processes: FSDP takes the mean."""
        return loss * self.count if self.shards else loss

    def barrier(self) -> None:
        """Wait for all."""
        if self.count > 1:
            dist.barrier(group=self._small)

    def write(self, module: Any, save: Callable[[], T]) -> T | None:
        """Have the first process save a module. All must call it: sharded weights are gathered from all."""
        if self.is_first:
            return save()
        if self.shards:
            module.state_dict()
        return None

    def shard(self, policy: Policy) -> None:
        """Shard a policy's weights in place, as ``accelerate``'s FSDP settings say. Its ``state_dict`` is whole still.

        Raises:
            ValueError: settings of FSDP's first version.
        """
        from accelerate import FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(policy, FSDPModule):
            return
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise ValueError("sharding needs FSDP's second version: accelerate launch --use_fsdp --fsdp_version 2")
        options: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward, "mesh": self.mesh}
        if plugin.cpu_offload is not None:
            options["offload_policy"] = plugin.cpu_offload
        layers = set(plugin.transformer_cls_names_to_wrap or policy.sharded_layers)
        for module in [child for child in policy.modules() if type(child).__name__ in layers]:
            methods = called(type(module))  # before its class becomes another
            fully_shard(module, **options)
            for name in methods:
                register_fsdp_forward_method(module, name)
        own_name = type(policy).__name__
        fully_shard(policy, **options)
        type(policy).__name__ = own_name  # which its files name
        for name in ("begin", "step", "hidden", "logits"):
            register_fsdp_forward_method(policy, name)
        policy.register_state_dict_post_hook(gather_state)

    @functools.cached_property
    def mesh(self) -> Any:
        """The processes, for FSDP."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (self.count,))


def called(layer: type) -> list[str]:
    """The public methods of a layer's class beside ``forward``, since each may be what a policy calls."""
    return [name for name, part in vars(layer).items() if callable(part) and name[0] != "_" and name != "forward"]


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from all processes if it is sharded."""
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


def whole_state(state: Any) -> Any:
    """A state dict with its sharded tensors whole."""
    return tree_map_only(Tensor, lambda value: whole(value) if hasattr(value, "full_tensor") else value, state)


def gather_state(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A hook of ``state_dict``: whole tensors in place of shards."""
    for name, value in state.items():
        if hasattr(value, "full_tensor"):
            state[name] = whole(value)


def sharded_like(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, sharded as a weight is; one of another shape stays whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


@functools.cache
def current() -> Processes:
    """The processes of this run. The first call joins them, if a launcher started several.

    Raises:
        ImportError: there are several, and accelerate is not installed.
        ValueError: they were started for DeepSpeed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('several processes need accelerate: pip install "vartext[distributed]"') from error
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("agents do not run in DeepSpeed's engine: use FSDP, which shards as ZeRO-3 does (--use_fsdp)")
    state = PartialState(cpu=not torch.cuda.is_available())
    # While Python still runs: groups that are left to the end of the process may abort it ("terminate called").
    atexit.register(state.destroy_process_group)
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return Processes(state.process_index, state.num_processes, shards)
