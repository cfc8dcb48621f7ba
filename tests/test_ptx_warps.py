"""The instructions of ``tests/ptx`` that the lanes of a warp run together: reductions, matrices in shared memory."""

import cuda_shim
import numpy as np
import pytest
import torch

if cuda_shim.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from ptx import Machine, build, instructions, translate

HEAD = ".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry warp(.param .u64 in, .param .u64 out) {\n"
HEAD += """.reg .b32 %r<12>; .reg .b64 %a<6>;
mov.u32 %r0, %tid.x; mul.wide.u32 %a2, %r0, 16;
ld.param.u64 %a0, [in]; add.u64 %a0, %a0, %a2;
ld.param.u64 %a1, [out]; add.u64 %a1, %a1, %a2;
"""


@pytest.fixture
def run():
    machine = Machine()

    def run(body, words):
        """Each of 32 lanes has four words, and gives four."""
        build.kernels(f"{HEAD}{body}\nret;\n}}")
        with machine.memory(), machine.schedule(races=True):
            given = torch.from_numpy(np.array(words, np.uint32).reshape(32, 4).view(np.int32)).clone()
            results = torch.zeros(32, 4, dtype=torch.int32)
            machine.run("warp", 1, 32, given, results)
        return results.numpy().view(np.uint32)

    return run


# Reductions

REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum}


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("name", REDUCE)
def test_a_reduction(run, name, kind):
    """The even lanes and the odd ones, each by themselves."""
    values = np.array([0x9E3779B9 * (i + 1) % 2**32 for i in range(32)], np.uint32)
    masks = np.array([0x55555555, 0xAAAAAAAA] * 16, np.uint32)
    body = f"""
    ld.global.v2.u32 {{%r1, %r2}}, [%a0];
    redux.sync.{name}.{kind} %r3, %r1, %r2;
    st.global.u32 [%a1], %r3;"""
    results = run(body, np.stack([values, masks, values, values], axis=1))
    numbers = values.view(np.int32 if kind == "s32" else np.uint32)
    for parity in range(2):
        true = REDUCE[name].reduce(numbers[parity::2], dtype=numbers.dtype)
        assert (results[parity::2, 0] == true.view(np.uint32)).all()


# Matrices: eight rows of eight 16-bit elements, of which each lane holds two.

SHARED = ".shared .align 16 .b8 matrices[512];\nmov.u32 %r1, matrices;\n"
ROW = (
    "shl.b32 %r2, %r0, 4; xor.b32 %r2, %r2, 48; add.u32 %r2, %r2, %r1;\n"  # in another order: lane i knows row i ^ 3
)
OWN = "shl.b32 %r3, %r0, 4; add.u32 %r3, %r3, %r1;\n"
IN_ORDER = [i ^ 3 for i in range(32)]


def parts_of(matrices, transposed):
    """What each lane holds of each matrix: two elements of a row, or of a column, as one word."""
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    halves = np.ascontiguousarray(matrices).reshape(-1, 32, 2)
    return np.ascontiguousarray(halves.view(np.uint32)[:, :, 0].T)


def registers(count):
    return f"{{{', '.join(f'%r{4 + i}' for i in range(count))}}}"


@pytest.mark.parametrize("transposed", ["", ".trans"], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded(run, count, transposed):
    """Each lane has put a row into shared memory."""
    memory = np.arange(1000, 1256, dtype=np.uint16).reshape(32, 8)
    body = f"""{SHARED}{ROW}{OWN}
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%a0];
    st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
    bar.warp.sync 0xffffffff;
    ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {registers(count)}, [%r2];
    st.global.v4.u32 [%a1], {{%r4, %r5, %r6, %r7}};"""
    results = run(body, memory.view(np.uint32))
    true = parts_of(memory[IN_ORDER].reshape(4, 8, 8), transposed)
    assert (results[:, :count] == true[:, :count]).all()


@pytest.mark.parametrize("transposed", ["", ".trans"], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_stored(run, count, transposed):
    matrices = np.arange(1000, 1256, dtype=np.uint16).reshape(4, 8, 8)
    body = f"""{SHARED}{ROW}{OWN}
    st.shared.v4.u32 [%r3], {{%r0, %r0, %r0, %r0}};
    bar.warp.sync 0xffffffff;
    ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%a0];
    stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r2], {registers(count)};
    bar.warp.sync 0xffffffff;
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r3];
    st.global.v4.u32 [%a1], {{%r4, %r5, %r6, %r7}};"""
    results = run(body, parts_of(matrices, transposed))
    stored = results.view(np.uint16)[IN_ORDER].reshape(4, 8, 8)
    assert (stored[:count] == matrices[:count]).all()
    unwritten = stored[count:].reshape(-1, 8).view(np.uint32)[:, 0]
    assert unwritten.tolist() == IN_ORDER[8 * count :]


@pytest.mark.parametrize("barrier", ["bar.warp.sync 0xffffffff;", ""], ids=["barrier", "none"])
def test_matrices_are_ordered_by_barriers_alone(run, barrier):
    body = f"""{SHARED}{ROW}{OWN}
    st.shared.v4.u32 [%r3], {{%r0, %r0, %r0, %r0}};
    {barrier}
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers(4)}, [%r2];"""
    if barrier:
        run(body, range(128))
        return
    with pytest.raises(RuntimeError, match="race in shared memory"):
        run(body, range(128))


def test_a_row_that_is_not_aligned(run):
    body = f"""{SHARED}{OWN}
    add.u32 %r3, %r3, 8;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {{%r0}};"""
    with pytest.raises(RuntimeError, match="a row of a matrix is not aligned"):
        run(body, range(128))


def test_a_wrong_number_of_registers_is_an_error():
    line = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r3];"
    with pytest.raises(instructions.UnknownError, match="number of matrices"):
        translate.translate(f"{HEAD}{line}\nret;\n}}")
