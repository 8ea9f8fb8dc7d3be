"""Whether something is attached to a hook point, and what passes through it."""

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


def is_attached(hook: nn.Module) -> bool:
    """Whether anything is attached to a hook point: a hook of any kind, or a module in its place.

    Hooks registered for every module at once (`register_module_forward_hook`) do not count.
    """
    return (
        type(hook) is not HookPoint
        or "forward" in hook.__dict__
        or bool(hook._forward_hooks or hook._forward_pre_hooks)
        or bool(hook._backward_hooks or hook._backward_pre_hooks)
    )


def through(hook: nn.Module, value: Tensor) -> tuple[bool, Tensor]:
    """Pass a copy of `value` through `hook`; say whether the result can differ from `value`.

    A copy, because hooks write in place, and what they wrote must not change the clean value.
    Outside autograd an untouched copy means that the hook only looked.
    """
    given = value.clone()
    version = None if given.is_inference() else given._version
    new = hook(given)
    if version is None:
        untouched = new is given and torch.equal(given, value)
    else:
        untouched = new is given and given._version == version
    return (torch.is_grad_enabled() and new.requires_grad) or not untouched, new
