"""What becomes of 8-bit state: checkpoints of ours and of others, shards, layouts, bad input, and its size."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from contract import same_bits
from process_groups import forks, on_ranks
from targets import REFERENCE, interpreted, over_kernels
from test_state_dtype import make, train

import trainops
from trainops.reference_codes import CODE_OF, SIGNED, decode, decoded, encoded

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def exported(optimizer):
    return list(optimizer.state_dict()["state"].values())


def assert_goes_on_alike(ours, theirs):
    """Both optimizers, with their models, take the same steps, bit for bit."""
    train(*ours, seed=2)
    train(*theirs, seed=2)
    for p, x in zip(ours[0].params, theirs[0].params, strict=True):
        assert same_bits(p.detach(), x.detach())
    for its, others in zip(exported(ours[1]), exported(theirs[1]), strict=True):
        assert all(same_bits(its[name], others[name]) for name in its)


@interpreted(lambda how, master: (how, master) in [("saved", "split"), ("deepcopy", None)])
@pytest.mark.parametrize("how", ["state_dict", "saved", "pickle", "deepcopy"])
@pytest.mark.parametrize("master", ["split", None])
def test_training_goes_on_bit_for_bit(target, how, master):
    options = {"state_dtype": "int8", "average": None, "master": master, "amsgrad": True}
    whole, (model, resumed) = (make(target, BFLOAT16, seed=0, **options) for _ in range(2))
    train(*whole)
    train(model, resumed)
    if how in ("state_dict", "saved"):
        checkpoint = copy.deepcopy((model.state_dict(), resumed.state_dict()))
        if how == "saved":
            file = io.BytesIO()
            torch.save(checkpoint, file)
            checkpoint = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        model, resumed = make(target, BFLOAT16, seed=5, **options)
        model.load_state_dict(checkpoint[0])
        resumed.load_state_dict(checkpoint[1])
    else:
        change = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        model, resumed = change((model, resumed))
    assert_goes_on_alike((model, resumed), whole)


def test_state_dicts_have_moments_that_others_know():
    model, optimizer = make(REFERENCE, BFLOAT16, state_dtype="int8", seed=0, average=None)
    train(model, optimizer)
    live = copy.deepcopy({p: dict(its) for p, its in optimizer.state.items()})
    for p, its in zip(model.params, exported(optimizer), strict=True):
        assert set(its) == {"step", "exp_avg", "exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq"):
            assert (its[name].dtype, its[name].shape) == (BFLOAT16, p.shape)
            codes = optimizer.state[p][f"{name}_codes"]
            assert torch.equal(its[name].float(), decoded(codes, CODE_OF[name], p))
        assert set(optimizer.state[p]) == {"step", "exp_avg_codes", "exp_avg_sq_codes"}
    assert all(torch.equal(x, optimizer.state[p][name]) for p in model.params for name, x in live_of(live, p))
    other, torchs = make(REFERENCE, FLOAT32, cls=torch.optim.AdamW)
    torchs.load_state_dict(optimizer.state_dict())
    for p, its in zip(other.params, exported(optimizer), strict=True):
        assert all(torch.equal(torchs.state[p][name], its[name].float()) for name in ("exp_avg", "exp_avg_sq"))
    train(other, torchs)


def live_of(live, p):
    """By the place of a parameter: copies have other identities."""
    (found,) = [its for key, its in live.items() if key.shape == p.shape]
    return found.items()


@pytest.mark.parametrize("state_dtype", ["int8", ("int8", FLOAT32), (BFLOAT16, "int8")], ids=str)
@pytest.mark.parametrize("first", [None, FLOAT32, BFLOAT16, "int8"], ids=str)
def test_loading_converts_the_moments(first, state_dtype):
    """From torch's AdamW and from any ``state_dtype``, within half a code, and from 8 bits without a loss."""
    if first is None:
        theirs = train(*make(REFERENCE, FLOAT32, cls=torch.optim.AdamW, amsgrad=True))
    else:
        theirs = train(*make(REFERENCE, BFLOAT16, state_dtype=first, amsgrad=True))
    model, ours = make(REFERENCE, BFLOAT16, state_dtype=state_dtype)
    for _ in range(2):  # before there is a state, and after
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for p, its, loaded in zip(model.params, exported(ours), exported(theirs), strict=True):
            for name in MOMENTS:
                if f"{name}_codes" not in ours.state[p]:
                    assert same_bits(its[name], loaded[name].to(its[name].dtype))
                    continue
                x = loaded[name].float()
                assert torch.equal(ours.state[p][f"{name}_codes"], encoded(x, CODE_OF[name], p))
                largest = max(x.abs().view(-1).tolist(), default=0.0)
                assert ((its[name] - x).abs() <= x.abs() / 16 + largest * 2.0**-14).all()
                if first == "int8":
                    assert torch.equal(its[name].float(), x)
        train(model, ours, steps=1)


def test_eight_bits_load_into_any_other():
    theirs = train(*make(REFERENCE, BFLOAT16, state_dtype="int8"))
    for state_dtype in (None, FLOAT32, BFLOAT16, (FLOAT32, "int8")):
        model, ours = make(REFERENCE, BFLOAT16, state_dtype=state_dtype)
        ours.load_state_dict(theirs.state_dict())
        for its, loaded in zip(exported(ours), exported(theirs), strict=True):
            assert all(torch.equal(its[name].float(), loaded[name].float()) for name in MOMENTS[:2])
        train(model, ours)


def test_a_seed_is_saved():
    model, optimizer = make(REFERENCE, BFLOAT16, state_dtype="int8", seed=0, average=None)
    optimizer = trainops.AdamW(model.parameters(), state_dtype="int8", seed=7)
    other = trainops.AdamW(model.parameters(), state_dtype="int8")
    assert (optimizer.seed, other.seed) == (7, 0)
    other.load_state_dict(optimizer.state_dict())
    assert other.seed == 7
    torchs = torch.optim.AdamW(model.parameters())
    other.load_state_dict(torchs.state_dict())
    assert other.seed == 7


def test_other_layouts_have_the_same_rule(target):
    """Blocks follow memory; rows that kernels cannot take as they are have copies that do."""

    def params(dense):
        x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(target.device)
        return [
            torch.nn.Parameter(x.to(memory_format=torch.channels_last)),
            torch.nn.Parameter(x.clone() if dense else torch.stack((x, x), -1)[..., 0]),
        ]

    found = []
    for dense in (True, False):
        both = params(dense)
        optimizer = trainops.AdamW(both, state_dtype="int8", backend=target.backend)
        for _ in range(3):
            for p in both:
                p.grad = p.detach().contiguous() * 0.1
            optimizer.step()
        found.append([x for p in both for x in (p.detach().contiguous(), *optimizer.state[p].values())])
        first = exported(optimizer)[0]["exp_avg"].permute(0, 2, 3, 1).reshape(-1)
        assert torch.equal(decode(optimizer.state[both[0]]["exp_avg_codes"], SIGNED), first.float())
    assert all(map(torch.equal, *found))


def test_lost_updates_of_eight_bits():
    model, optimizer = make(REFERENCE, BFLOAT16, state_dtype="int8", average=None)
    train(model, optimizer)
    assert optimizer.lost_updates().shape == (len(model.params),)


# Shards


def on_each_rank(rank, backend):
    """A shard that begins with a block has the bits of the whole; one that does not has blocks of its own."""
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    tensors = importlib.import_module("torch.distributed.tensor")
    of_state = importlib.import_module("torch.distributed.checkpoint.state_dict")
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (2,))

    def network(width):
        torch.manual_seed(0)
        return torch.nn.Linear(width, 6)  # 3 rows on each rank; so its bias

    def optimizer_of(model):
        return trainops.AdamW(
            model.parameters(), lr=0.01, state_dtype="int8", seed=3, max_grad_norm=1e9, backend=backend
        )

    def steps(model, optimizer, place):
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = place(torch.randn(p.shape, generator=generator), p)
            optimizer.step()

    for width in (32, 33):
        whole = network(width)
        steps(whole, optimizer := optimizer_of(whole), lambda grad, p: grad)
        model = network(width)
        fully_shard(model, mesh=mesh)
        sharded = optimizer_of(model)
        place = lambda grad, p: tensors.distribute_tensor(grad, mesh, p.placements)  # noqa: E731
        steps(model, sharded, place)
        weight, true = model.weight.full_tensor(), whole.weight.detach()
        assert torch.equal(weight, true) if width == 32 else torch.allclose(weight, true, atol=3e-3)
        mine = sharded.state[model.weight]["exp_avg_codes"]
        if width == 32:
            shared = optimizer.state[whole.weight]["exp_avg_codes"]
            assert torch.equal(mine, torch.cat((shared[96 * rank :][:96], shared[192 + 3 * rank :][:3])))
        else:
            assert mine.numel() == 99 + 4  # three rows of 33, in blocks that begin with the shard

        # Checkpoints have moments, which DCP shards as it shards all else.
        state = copy.deepcopy(of_state.get_optimizer_state_dict(model, sharded))
        moments = state["state"]["weight"]
        assert moments["exp_avg"].dtype == torch.bfloat16
        assert not [key for key in moments if "codes" in key]
        again = network(width)
        fully_shard(again, mesh=mesh)
        again.load_state_dict(model.state_dict())
        other = optimizer_of(again)
        of_state.set_optimizer_state_dict(again, other, state)
        steps(model, sharded, place)
        steps(again, other, place)
        assert torch.equal(again.weight.full_tensor(), model.weight.full_tensor())
        full = of_state.get_optimizer_state_dict(
            again, other, options=of_state.StateDictOptions(full_state_dict=True, cpu_offload=False)
        )
        assert full["state"]["weight"]["exp_avg"].shape == (6, width)
        alone = network(width)
        single = optimizer_of(alone)
        single.load_state_dict(
            {**single.state_dict(), "state": {0: full["state"]["weight"], 1: full["state"]["bias"]}}
        )


@forks
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_shards(tmp_path, backend):
    if not trainops.backends()[backend].available:
        pytest.skip(f"no backend {backend}")
    on_ranks(2, tmp_path, on_each_rank, backend)


# Size


def test_bytes_per_parameter():
    p = torch.nn.Parameter(torch.randn(1000, 1000).bfloat16())
    optimizer = trainops.AdamW([p], master="split", state_dtype="int8")
    p.grad = torch.randn(1000, 1000).bfloat16()
    optimizer.step()
    kept = [p, p.grad, *optimizer.state[p].values()]
    assert sum(x.nbytes for x in kept) / p.numel() <= 8.3


# Bad input


def test_float64_is_refused():
    wide = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    narrow = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r'state_dtype="int8" is for float32 and 16 bits, but .* is float64'):
        trainops.AdamW([narrow, wide], state_dtype=(FLOAT32, "int8"))
    optimizer = trainops.AdamW([narrow], state_dtype="int8")
    with pytest.raises(ValueError, match="is float64"):
        optimizer.add_param_group({"params": [wide]})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_have_become_others_are_refused(target):
    p = torch.nn.Parameter(torch.ones(64, device=target.device))
    optimizer = trainops.AdamW([p], state_dtype="int8", backend=target.backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    codes = {name: x.clone() for name, x in optimizer.state[p].items()}
    for wrong, message in ((p.detach().double(), "has become"), (p.detach()[:33].clone(), "do not fit")):
        old, p.data, p.grad = p.data, wrong, torch.ones_like(wrong)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        p.grad = None
        p.data = old
    assert all(torch.equal(x, optimizer.state[p][name]) for name, x in codes.items())
    assert (optimizer.state[p]["step"] == 1).all()


def test_codes_are_not_loaded_as_moments():
    model, optimizer = make(REFERENCE, BFLOAT16, state_dtype="int8", average=None)
    train(model, optimizer)
    own = optimizer.state_dict()
    raw = {**own, "state": {i: dict(its) for i, its in enumerate(optimizer.state.values())}}
    with pytest.raises(ValueError, match="has no exp_avg, exp_avg_sq"):
        optimizer.load_state_dict(raw)


def test_a_seed_needs_something_that_is_random():
    with pytest.raises(ValueError, match="seed is of no use"):
        trainops.AdamW([torch.nn.Parameter(torch.ones(3))], state_dtype=BFLOAT16, seed=3)


@over_kernels
def test_steps_have_random_bits_of_their_own(target):
    """Step counts come from the device: two calls of one table round otherwise."""
    p = torch.nn.Parameter(torch.zeros(999, device=target.device))
    optimizer = trainops.SGD([p], lr=0.0, momentum=0.0, state_dtype="int8", backend=target.backend)
    optimizer.param_groups[0]["momentum"] = 1e-9
    found = []
    for _ in range(2):
        p.grad = torch.full_like(p, 1.07)
        optimizer.step()
        found.append(optimizer.state[p]["momentum_buffer_codes"].clone())
    assert not torch.equal(*found)
