import torch
from transformer_lens.hook_points import HookPoint

from auto_circuit.model_utils.sparse_autoencoders.hook_attachment import is_attached, through


def test_attached_or_not() -> None:
    hook = HookPoint()
    assert not is_attached(hook)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        assert not is_attached(hook)  # a hook on every module is not on this one
    finally:
        handle.remove()
    hook.add_hook(lambda x, hook: None, dir="bwd")
    assert is_attached(hook)
    hook.remove_hooks("bwd")
    assert not is_attached(hook)
    hook.forward = lambda x: x
    assert is_attached(hook) and is_attached(torch.nn.Identity())


def test_whether_a_hook_changed_something() -> None:
    value, hook = torch.ones(3), HookPoint()
    assert not through(hook, value)[0]
    hook.add_hook(lambda x, hook: x.mul_(2))
    changed, new = through(hook, value)
    assert changed and new.tolist() == [2, 2, 2] and value.tolist() == [1, 1, 1]
    assert through(HookPoint(), value.requires_grad_())[0]  # its gradient may be wanted
