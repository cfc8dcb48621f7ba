"""Models with tensors that averages stumble over, and what happens to these."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

aten = torch.ops.aten


class Quantised(torch.Tensor):
    """Codes and scales, with the operations that quantised weights have: no arithmetic."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __repr__(self, **_):
        return f"Quantised({self.codes})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (aten.detach.default, aten.alias.default):
            return cls(args[0].codes, args[0].scales)
        if function in (aten.clone.default, aten._to_copy.default):
            return cls(args[0].codes.clone(), args[0].scales.clone())
        raise NotImplementedError(f"{function} is not for {cls.__name__}")


def quantised():
    return Quantised(torch.randint(-9, 9, (3, 4), dtype=torch.int8), torch.ones(3, 1))


def with_buffer(make, **options):
    def build():
        model = nn.Linear(4, 3)
        model.register_buffer("x", make(), **options)
        return model

    return build


def with_frozen(make):
    def build():
        model = nn.Linear(4, 3)
        model.x = nn.Parameter(make(), requires_grad=False)
        return model

    return build


# PyTorch warns once of whoever leaves that open.
torch.sparse.check_sparse_tensor_invariants.enable()


def sparse(factor=1.0):
    return torch.sparse_coo_tensor([[0, 1], [1, 2]], [factor, 2 * factor], (3, 3))


def denser():
    return torch.sparse_coo_tensor([[0, 1, 2], [1, 2, 0]], [1.0, 2.0, 3.0], (3, 3))


def run_once(model):
    model(torch.ones(1, 4))
    return model


def pruned():
    return run_once(prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5))


class Extra(nn.Module):
    """Extra state of any type, and a buffer whose shape is that of what is loaded."""

    def __init__(self, extra=None):
        super().__init__()
        self.linear, self.extra = nn.Linear(4, 3), extra
        self.register_buffer("grows", torch.zeros(2))

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        if state == "bad":
            raise RuntimeError("bad extra state")
        self.extra = state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "grows" in state_dict:
            self.grows = self.grows.new_empty(state_dict[prefix + "grows"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return self.linear(x)


def keep(model):
    pass


def put(make):
    def change(model):
        model.x = make()

    return change


def register(model):
    model.register_buffer("more", torch.ones(2), persistent=False)


def unregister(model):
    del model.x


# A function that makes a model, and what becomes of the model after its first update.
KINDS = {
    "sparse": (with_buffer(sparse), keep),
    "sparse_changes": (with_buffer(sparse), put(denser)),
    "csr": (with_buffer(lambda: sparse().to_sparse_csr()), put(lambda: denser().to_sparse_csr())),
    "float8": (with_buffer(lambda: torch.ones(4).to(torch.float8_e4m3fn)), keep),
    "float8_changes": (with_buffer(lambda: torch.ones(4).to(torch.float8_e4m3fn)), lambda model: model.x.fill_(2)),
    "qint8": (with_buffer(lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.1, 0, torch.qint8)), keep),
    "quantised_buffer": (with_buffer(quantised), put(quantised)),
    "nested": (with_buffer(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), keep),
    "expanded": (with_buffer(lambda: torch.ones(1, 4).expand(3, 4)), put(lambda: torch.zeros(1, 4).expand(3, 4))),
    "expanded_integers": (with_buffer(lambda: torch.arange(4).expand(3, 4)), keep),
    "not_persistent": (with_buffer(lambda: torch.ones(2), persistent=False), lambda model: model.x.add_(1)),
    "none": (with_buffer(lambda: None), keep),
    "none_first": (with_buffer(lambda: None), put(lambda: torch.ones(2))),
    "none_later": (with_buffer(lambda: torch.ones(2)), put(lambda: None)),
    "integers_grow": (with_buffer(lambda: torch.arange(2)), put(lambda: torch.arange(5))),
    "integers_grow_in_place": (with_buffer(lambda: torch.arange(2)), lambda model: model.x.resize_(5).fill_(3)),
    "comes": (lambda: nn.Linear(4, 3), register),
    "goes": (with_buffer(lambda: torch.ones(2)), unregister),
    "extra_bytes": (lambda: Extra(b"ab"), lambda model: setattr(model, "extra", b"abcde")),
    "extra_none": (lambda: Extra(None), lambda model: setattr(model, "extra", torch.ones(3))),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), keep),
    "old_weight_norm": (lambda: run_once(nn.utils.weight_norm(nn.Linear(4, 3))), run_once),
    "old_spectral_norm": (lambda: run_once(nn.utils.spectral_norm(nn.Linear(4, 3))), run_once),
    "pruned": (pruned, run_once),
    "frozen_quantised": (with_frozen(quantised), keep),
    "frozen_int8": (with_frozen(lambda: torch.arange(3, dtype=torch.int8)), keep),
    "frozen_float8": (with_frozen(lambda: torch.ones(3).to(torch.float8_e5m2)), keep),
}
