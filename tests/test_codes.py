"""8-bit state: every code within its bound, the mean right, each of many steps exact, on every backend."""

import copy

import pytest
import torch
from codes import BIASED, WRONG, WrongCodes, assert_codes, same_in_each_element
from contract import Exact, assert_contract, exact, same_values
from controls import STEP_CONTROLS, leaving, must_fail
from exact import clip_coefficient, norm
from neighbours import assert_neighbour
from targets import INTERPRETER, REFERENCE, interpreted, over, over_kernels
from training import ADAM, ADAMW, SGD, Model, at_offset, make_grads, set_grads

import trainops
from trainops import reference_codes as specification
from trainops.reference_codes import CODE_OF, SIGNED, UNSIGNED, decode, encode

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = ((), (0,), (31,), (33, 31), (1025,), (130, 65))  # the last one has several chunks on every backend
CODES = {"signed": SIGNED, "unsigned": UNSIGNED}
NEAR, FAR = 1 << 19, 1 << 20  # in place of random bits: to nearest; one more than the largest

# Optimizer, dtype, settings.
CASES = {
    "AdamW float32": (ADAMW, FLOAT32, {"state_dtype": "int8"}),
    "AdamW split": (ADAMW, BFLOAT16, {"state_dtype": "int8", "master": "split", "amsgrad": True}),
    "AdamW float16": (ADAMW, FLOAT16, {"state_dtype": ("int8", BFLOAT16), "master": "float32", "eps": 1e-6}),
    "AdamW, second": (ADAMW, BFLOAT16, {"state_dtype": (BFLOAT16, "int8")}),
    "AdamW, stochastic": (ADAMW, BFLOAT16, {"state_dtype": "int8", "stochastic_rounding": True}),
    "Adam": (ADAM, BFLOAT16, {"state_dtype": "int8", "weight_decay": 0.1, "max_grad_norm": 0.5}),
    "SGD": (SGD, BFLOAT16, {"state_dtype": "int8", "momentum": 0.9, "nesterov": True}),
}


def random_bits(numel, seed=0):
    return torch.randint(0, FAR, (numel,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def numbers(code, seed=0, spread=4.0, numel=3201):
    """Of very different magnitude, within blocks and from block to block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * (spread * torch.randn(numel, generator=generator)).exp()
    x *= (
        (20 * torch.randn(-(-numel // 32), generator=generator))
        .exp()
        .repeat_interleave(32)[:numel]
        .clamp(1e-30, 1e30)
    )
    x[::7] = 0
    x[64:96] = 0
    return x if code.is_signed else x.abs()


def name_of(code):
    return "exp_avg" if code.is_signed else "exp_avg_sq"


# Codes


@over("code", CODES)
def test_every_code_is_within_its_bound(code):
    for seed in range(5):
        x = numbers(code, seed)
        for random in (random_bits(x.numel(), seed), NEAR, 0, FAR - 1):
            true = Exact(exact(x), 0 * exact(x))
            assert_codes(decode(encode(x, code, random), code), true, name_of(code), f"{seed}")


@over("code", CODES)
def test_values_are_bfloat16_and_stay_when_they_are_encoded_again(code):
    for seed in range(5):
        x = numbers(code, seed)
        x[5], x[40], x[200] = torch.inf, torch.nan, 3.4e38
        values = decode(encode(x, code, random_bits(x.numel(), seed)), code)
        assert same_values(values.bfloat16().float(), values)
        for random in (random_bits(x.numel(), seed + 9), NEAR, 0, FAR - 1):
            assert same_values(decode(encode(values, code, random), code), values)


@over("code", CODES)
def test_infinities_and_nan_leave_their_block_alone(code):
    x = numbers(code)
    clean = x.clone()
    clean[32:35] = 0
    x[32], x[33] = torch.inf, torch.nan
    x[34] = -torch.inf if code.is_signed else torch.inf
    found, expected = (decode(encode(y, code, NEAR), code) for y in (x, clean))
    assert torch.equal(found[[32, 34]], x[[32, 34]])
    assert found[33].isnan()
    found[32:35] = 0
    assert torch.equal(found, expected)


@over("code", CODES)
def test_the_mean_of_codes_is_right(code):
    numel = 1 << 16
    for value in (1.0, 1.01, 0.77, 0.1, 3e-4, *((2.0**-15.3, 1e-6) if code.is_signed else ())):
        x = torch.full((numel,), value)
        x[::32] = 1.7
        values = decode(encode(x, code, random_bits(numel)), code).double().view(-1, 32)[:, 1:]
        deviation = values.std() / values.numel() ** 0.5
        assert abs(values.mean() - float(torch.tensor(value))) <= 4 * deviation, value


def test_a_second_moment_is_zero_only_where_it_is():
    x = torch.tensor([1.0, 1e-30, 1e-40, 0.0])
    for random in (0, FAR - 1):
        assert (decode(encode(x, UNSIGNED, random), UNSIGNED) == 0).tolist() == [False, False, False, True]


# Steps


def moments_of(optimizer):
    """Of each parameter, as the state dict has them."""
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [state.get(i, {}) for i in range(len(optimizer.param_groups[0]["params"]))]


def make(target, rule, dtype, shapes=SHAPES, average=FLOAT32, offset=0, **options):
    """A model, whose parameters begin so many elements into aligned memory, and its optimizer."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=generator).to(target.device, dtype) for shape in shapes]
    model = Model([at_offset(x, offset) for x in drawn])
    if average is not None:
        options["ema"] = trainops.EMA(model, 0.9, dtype=average, backend=target.backend)
    return model, rule.ours(model.parameters(), lr=0.01, backend=target.backend, **options)


def check_steps(target, rule, dtype, steps=6, shapes=SHAPES, **options):
    """Each step is exact from what was stored before it."""
    model, optimizer = make(target, rule, dtype, shapes, **options)
    group = optimizer.param_groups[0]
    settings = {name: group[name] for name in rule.settings}
    torch.manual_seed(1)
    for i, grads in enumerate(make_grads(shapes, dtype, "cpu", steps)):
        for x in grads:
            x.view(-1)[1::5] = 0  # which second moments stay
        set_grads(model.params, [x.to(target.device) for x in grads])
        coefficient = clip_coefficient(norm([exact(x) for x in grads]), optimizer.max_grad_norm)
        stored = moments_of(optimizer)
        weights = [exact(optimizer.float32_weight(p)) for p in model.params]
        optimizer.step()
        rows = zip(model.params, weights, grads, stored, moments_of(optimizer), strict=True)
        for p, weight, grad, before, after in rows:
            moments = [exact(before[x]) if x in before else 0 * weight for x in rule.states]
            true = rule.step(weight, exact(grad), *moments, i + 1, coefficient=coefficient, **settings)
            assert_weight = assert_neighbour if optimizer.stochastic_rounding else assert_contract
            assert_weight(optimizer.float32_weight(p).detach(), true.pop("param"), what=f"step {i}")
            for name, result in true.items():
                if f"{name}_codes" in optimizer.state[p]:
                    assert_codes(after[name], result, name, f"{name}, step {i}")
                else:
                    assert_contract(after[name], result, what=f"{name}, step {i}")


@interpreted(lambda case, **_: case == CASES["AdamW split"])
@over("case", CASES)
def test_every_step_is_exact(target, case):
    rule, dtype, options = case
    check_steps(target, rule, dtype, 2 if target == INTERPRETER else 6, **options)


def test_a_hundred_steps_are_exact(target):
    if target != INTERPRETER:
        check_steps(target, ADAMW, BFLOAT16, 100, ((33, 31),), master="split", state_dtype="int8", max_grad_norm=1.0)


@over("wrong", WRONG)
def test_wrong_codes_are_noticed(wrong):
    must_fail(lambda: WrongCodes(wrong), check_steps, REFERENCE, ADAMW, FLOAT32, state_dtype="int8")


@over("control", STEP_CONTROLS)
def test_wrong_steps_are_noticed(control):
    must_fail(control, check_steps, REFERENCE, ADAMW, FLOAT32, state_dtype="int8", max_grad_norm=1.0, amsgrad=True)


@over("column", {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"})
def test_moments_that_stand_still_are_noticed(column):
    must_fail(lambda: leaving(slice(None), column), check_steps, REFERENCE, ADAMW, FLOAT32, state_dtype="int8")


def check_mean(target, steps=60, numel=1 << 14):
    """Gradients of 1, then of 1.1: moments approach their squares, in the mean as they should."""
    p = torch.nn.Parameter(torch.zeros(numel, device=target.device))
    optimizer = trainops.AdamW([p], lr=0.0, betas=(0.99, 0.999), state_dtype="int8", backend=target.backend)
    first = second = 0.0
    for i in range(steps):
        grad = 1.0 if i == 0 else 1.1
        p.grad = torch.full_like(p, grad)
        optimizer.step()
        first, second = 0.99 * first + 0.01 * grad, 0.999 * second + 0.001 * grad**2
    (found,) = moments_of(optimizer)
    for name, true in (("exp_avg", first), ("exp_avg_sq", second)):
        values = found[name].double()
        assert values.std() > 0.01 * true, "all elements were rounded alike"
        assert abs(values.mean() - true) < 5 * values.std() / numel**0.5, name


def test_the_mean_of_moments_is_right(target):
    check_mean(target, *((6, 1 << 12) if target == INTERPRETER else ()))


@over("wrong", {**BIASED, "same_in_each_element": same_in_each_element})
def test_a_wrong_mean_is_noticed(wrong):
    must_fail(lambda: WrongCodes(wrong), check_mean, REFERENCE)


# The same bits


@over_kernels
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_backends_have_the_same_codes(target, dtype):
    """The arithmetic of SGD is the same to the last bit; so then are codes, those of odd values among them."""
    found = []
    for backend in (REFERENCE, target):
        model, optimizer = make(
            backend, SGD, dtype, average=None, momentum=0.5, state_dtype="int8", seed=7, master=None
        )
        for i, grads in enumerate(make_grads(SHAPES, dtype, "cpu", 3)):
            generator = torch.Generator().manual_seed(i)
            grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in grads]
            if i == 1:
                for x in (grads[3].view(-1), grads[4]):
                    x[40], x[41], x[42], x[43], x[64:96] = torch.inf, torch.nan, -torch.inf, 1e-9, 1e-44
                    x[700], x[701], x[702:708] = 3e38, 1e33, 1e34
                    x[800:832], x[832:864] = torch.inf, torch.nan  # whole blocks, and all neighbours of one
                    x[864:896], x[870] = -torch.inf, torch.nan
            set_grads(model.params, [x.to(backend.device) for x in grads])
            optimizer.step()
        found.append([(p.detach(), optimizer.state[p]["momentum_buffer_codes"]) for p in model.params])
    for (p, codes), (true, its) in zip(*found, strict=True):
        assert same_values(p.cpu(), true)
        assert torch.equal(codes.cpu(), its)


@over_kernels
def test_backends_have_the_same_codes_of_second_moments(target):
    """SGD has first moments alone. Second ones depend on gradients, and on other halves of the same random words."""
    found = []
    for backend in (REFERENCE, target):
        model, optimizer = make(backend, ADAMW, FLOAT32, average=None, state_dtype=(FLOAT32, "int8"), seed=7)
        torch.manual_seed(1)
        for grads in make_grads(SHAPES, FLOAT32, "cpu", 2):
            odd = (torch.inf, torch.nan, 1e-9, 1e-25)
            for x, value in (
                (grads[3].view(-1)[40:44], odd),
                (grads[4][64:96], 0.0),
                (grads[4][96:128], torch.inf),
                (grads[4][128:160], torch.nan),
                (grads[4][170:174], 1e-9),  # small ones among finite ones
            ):
                x.copy_(torch.tensor(value))
            set_grads(model.params, [x.to(backend.device) for x in grads])
            optimizer.step()
        found.append([optimizer.state[p]["exp_avg_sq_codes"] for p in model.params])
    for codes, its in zip(*found, strict=True):
        assert torch.equal(its.cpu(), codes)


@over_kernels
def test_backends_have_the_same_codes_just_below_the_smallest(target):
    """Blocks have one such element each, which random bits may have made a one before kernels look at it again."""
    grad = torch.ones(1 << 13)
    grad[::33] = 1.0625 * 2.0**-15
    found = []
    for backend in (REFERENCE, target):
        p = torch.nn.Parameter(torch.zeros(grad.shape, device=backend.device))
        optimizer = trainops.SGD([p], momentum=0.5, state_dtype="int8", seed=7, backend=backend.backend)
        p.grad = grad.to(backend.device)
        optimizer.step()
        found.append(optimizer.state[p]["momentum_buffer_codes"].cpu())
    assert torch.equal(*found)
    assert found[0][: len(grad) : 33].unique().tolist() == [0, 1]


def test_seeds_steps_and_places_matter(target):
    def codes(seed=0, place=0, step=0):
        params = [torch.nn.Parameter(torch.zeros(999, device=target.device)) for _ in range(place + 1)]
        optimizer = trainops.SGD(params, momentum=0.5, state_dtype="int8", seed=seed, backend=target.backend)
        optimizer.init_state()
        optimizer.state[params[-1]]["step"].fill_(step)
        params[-1].grad = torch.full_like(params[-1], 1.07)
        optimizer.step()
        return optimizer.state[params[-1]]["momentum_buffer_codes"]

    assert torch.equal(codes(), codes())
    for other in (codes(seed=1), codes(place=1), codes(step=1)):
        assert 0.3 < (codes() != other).double().mean() < 0.6


def test_the_kernels_know_which_code_a_state_has():
    from trainops import core

    if not core.available:
        pytest.skip("no compiled core")
    kinds = {name: "signed_codes" if code.is_signed else "unsigned_codes" for name, code in CODE_OF.items()}
    columns = [column for schema in core.schemas.values() for column in schema.columns]
    assert {column.name: column.codes for column in columns if column.codes} == kinds


def test_sizes():
    for numel in range(200):
        assert specification.new_codes(torch.empty(numel)).numel() == numel + -(-numel // 32)
        assert decode(specification.new_codes(torch.empty(numel)), SIGNED).numel() == numel
