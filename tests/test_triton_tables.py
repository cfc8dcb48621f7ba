"""Tables of the Triton backend: on the device already where nothing changed, others where anything did."""

import pytest
import torch
from contract import same_bits
from triton_fixtures import BFLOAT16, FLOAT16, ROLES, WHOLE, adamw, assert_same, everything, model_of, same_object

import trainops
from trainops.adapters import _device, triton

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_equal_steps_upload_no_table(device, tables, dtype):
    model = model_of([(5,), (0,), (3, 4)], device, dtype)
    optimizer = adamw(model, **WHOLE, ema=trainops.EMA(model, 0.9, backend="triton"))
    for _ in range(4):
        for p in model.params:
            p.grad.normal_()
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
    assert len(tables.rows) == 4
    assert same_object(tables.rows)
    assert same_object(tables.chunks)


def test_tables_are_found_again_when_gradients_alternate(device, tables):
    model = model_of([(5,), (3, 4)], device)
    optimizer = adamw(model)
    buffers = [[p.grad for p in model.params], [torch.ones_like(p) for p in model.params]]
    for i in range(6):
        for p, grad in zip(model.params, buffers[i % 2], strict=True):
            p.grad = grad
        optimizer.step()
    assert len(set(tables.rows)) == 2
    assert same_object(tables.chunks)  # which are the same for other addresses


def moved(x):
    return x.clone()


def transposed(x):
    return x.t()


def in_other_type(x):
    return x.view(BFLOAT16)


CHANGES = {f"{role} moves": ([role], moved) for role in (*ROLES, "step")}
CHANGES |= {f"{role} transposed": ([role], transposed) for role in ROLES}
CHANGES |= {
    "all transposed": (ROLES, transposed),
    "param and grad in another type": (ROLES[:2], in_other_type),
    "all in another type": (ROLES, in_other_type),
    "exp_avg in another type": (["exp_avg"], in_other_type),
    "average in another type": (["average"], in_other_type),
}


@pytest.mark.parametrize(("roles", "change"), CHANGES.values(), ids=CHANGES)
def test_changes_between_steps_are_followed(device, tables, roles, change):
    """Each to other memory, or to other strides or another type of the same memory."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = model_of([(3,), (4, 4)], device, FLOAT16)
        ema = trainops.EMA(model, 0.75, backend=backend)
        optimizer = adamw(model, amsgrad=True, ema=ema, backend=backend, eps=0.01)
        for _ in range(2):
            optimizer.step()
        p, state = model.params[1], optimizer.state[model.params[1]]
        places = {"param": p, "grad": p.grad, "average": ema.module.params[1], **state}
        left = {role: places[role].detach() for role in roles}
        before = {role: x.clone() for role, x in left.items()}
        changed = {role: change(x) for role, x in left.items()}
        if "grad" in roles:
            p.grad = None
        for role, x in changed.items():
            if role in ("param", "average"):
                places[role].data = x
            elif role != "grad":
                state[role] = x
        if "grad" in roles:
            p.grad = changed["grad"]
        for role, x in changed.items():
            assert (x.data_ptr() == left[role].data_ptr()) == (change is not moved)
        optimizer.step()
        if change is moved:
            assert all(same_bits(left[role], before[role]) for role in roles)
        results.append(everything(optimizer))
    # In other strides, all tensors of a row are the same memory.
    assert (tables.rows[-1] == tables.rows[-2]) == (roles is ROLES and change is transposed)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.01)


def test_other_shapes_of_the_same_memory_and_strides_are_followed(device, tables):
    model = model_of([(6, 4)], device)
    (p,) = model.params
    optimizer = adamw(model)
    for _ in range(2):
        optimizer.step()
    state, grad = optimizer.state[p], p.grad
    kept = [p.detach().clone(), *(state[name].clone() for name in ROLES[2:4])]
    p.grad = None
    p.data, p.grad = p.data[:2], grad[:2]
    for name in ROLES[2:4]:
        state[name] = state[name][:2]
    optimizer.step()
    assert tables.rows[-1] != tables.rows[-2] == tables.rows[-3]
    for x, before in zip((p.detach(), *(state[name] for name in ROLES[2:4])), kept, strict=True):
        whole = x.as_strided((6, 4), (4, 1))
        assert same_bits(whole[2:], before[2:])
        assert not same_bits(whole[:2], before[:2])


@pytest.mark.parametrize("role", ROLES[2:])
def test_state_that_shrinks_in_its_place_is_no_longer_taken(device, role):
    """A row's other tensors would be written beyond their ends."""
    model = model_of([(6, 4)], device)
    (p,) = model.params
    ema = trainops.EMA(model, 0.9, backend="triton")
    optimizer = adamw(model, amsgrad=True, ema=ema)
    for _ in range(2):
        optimizer.step()
    if role == "average":
        ema.module.params[0].data = ema.module.params[0].data[:2]
    else:
        optimizer.state[p][role] = optimizer.state[p][role][:2]
    before = p.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        optimizer.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("change", ["maximize", "amsgrad", "grouping", "grad is None", "order"])
def test_changes_of_the_groups_are_followed(device, change):
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = model_of([(5,), (5,), (3,)], device)
        first, second, third = model.params
        groups = [{"params": [first, second], "weight_decay": 0.1}, {"params": [third], "lr": 0.2}]
        optimizer = trainops.AdamW(groups, lr=0.1, backend=backend)
        for _ in range(2):
            optimizer.step()
        if change in ("maximize", "amsgrad"):
            optimizer.param_groups[1][change] = True
        if change == "amsgrad":
            optimizer.state[third]["max_exp_avg_sq"] = torch.ones(3, device=device)
        if change == "grouping":
            optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
        if change == "grad is None":
            second.grad = None
        if change == "order":
            optimizer.param_groups.reverse()
        optimizer.step()
        results.append([*model.params, *(x for p in model.params for x in optimizer.state[p].values())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_an_upload_that_fails_changes_nothing(device, monkeypatch, failing, warm):
    """As for a step that is captured in a CUDA graph, and was not taken before: of rows, chunks or settings."""
    model = model_of([(5,), (3,)], device)
    ema = trainops.EMA(model, 0.9, backend="triton")
    optimizer = adamw(model, **WHOLE, ema=ema)
    for _ in range(2 * warm):
        optimizer.step()
    before = [*[p.detach().clone() for p in model.params], *[x.detach().clone() for x in ema.module.params]]
    before += [x.clone() for state in optimizer.state.values() for x in state.values()]
    steps, calls, upload = ema.step, [], triton.uploaded

    def fail(*args):
        calls.append(args)
        if len(calls) == failing + 1:
            raise RuntimeError("no spare")
        return upload(*args)

    with monkeypatch.context() as patch:
        for module in (triton, _device):
            patch.setattr(module, "uploaded", fail)
        with pytest.raises(RuntimeError, match="no spare"):
            optimizer.step()
    after = [*model.params, *ema.module.params, *(x for state in optimizer.state.values() for x in state.values())]
    assert_same([x.detach() for x in after], before)
    assert (ema.step, optimizer.skipped_steps) == (steps, 0)
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0 * warm + 1}
