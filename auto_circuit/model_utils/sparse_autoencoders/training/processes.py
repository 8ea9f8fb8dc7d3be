"""What a training step needs of a process group: means, maxima and gathered values; nothing without one."""

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: torch.device) -> None:
    """Join the process group that `torchrun` describes in the environment, where it does, until the end."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 or not dist.is_available() or dist.is_initialized()
    if alone:
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # Not left after one run: a group cannot be made twice at the address that torchrun gave.
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def n_processes() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return the index of this process among those that train together."""
    return dist.get_rank() if n_processes() > 1 else 0


def total_over(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, without gradients."""
    if n_processes() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes, without gradients."""
    return total_over(value) / n_processes()


def from_first(value: Any) -> Any:
    """Return what the first process has, in all of them."""
    if n_processes() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process."""
    return bool(total_over(torch.tensor(int(flag), device=device)) > 0) if n_processes() > 1 else flag


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of parameters by their means over the processes."""
    processes = n_processes()
    if processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(processes)


def gathered(values: Tensor) -> Tensor:
    """Return the rows of all processes, `[n, …]` each (any `n`), one after another."""
    processes = n_processes()
    if processes == 1:
        return values
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(processes)]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([values, values.new_zeros(longest - len(values), *values.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
