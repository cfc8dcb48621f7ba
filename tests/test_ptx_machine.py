"""The machine that executes PTX: small kernels, each with one fault or with none."""

import copy
import shutil
import subprocess
import threading

import cuda_shim
import numpy as np
import pytest
import torch

if cuda_shim.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from ptx import Machine, build

HEAD = ".version 7.8\n.target sm_90\n.address_size 64\n"
# %x is the address of a tensor, %own the thread's own 4 bytes in it; %id is the thread's number in the grid.
PROLOGUE = """
.shared .align 16 .b8 s[256];
.reg .pred %p<3>; .reg .b16 %h<3>; .reg .b32 %t, %b, %n, %id, %r<6>; .reg .b64 %x, %own, %d<3>;
ld.param.u64 %x, [data];
mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.u32 %id, %b, %n, %t;
mul.wide.u32 %own, %id, 4; add.u64 %own, %x, %own;
"""


def roles(*bodies):
    """Each thread of the grid does something else."""
    parts = [f"setp.ne.u32 %p2, %id, {i}; @%p2 bra not{i};\n{body}\nnot{i}:" for i, body in enumerate(bodies)]
    return "\n".join(parts)


# Thread 0 writes a number and counts; thread 1 counts and reads the number. Whether that is a race, where they are in
# two blocks, and where in one.
WRITES, READS = "st.global.u32 [%x], 7;", "ld.global.u32 %r2, [%x]; st.global.u32 [%x+4], %r2;"
COUNT = "atom{}.global.add.u32 %r1, [%x+{}], 1;".format
RELAXED, OF_BLOCK = COUNT(".relaxed.gpu", 8), COUNT(".relaxed.cta", 8)
MESSAGES = {
    "nothing": (RELAXED, RELAXED, True, True),
    "fences": (f"membar.gl; {RELAXED}", f"{RELAXED} membar.gl;", False, False),
    "new_fences": (f"fence.acq_rel.gpu; {RELAXED}", f"{RELAXED} fence.sc.gpu;", False, False),
    "fence_of_writer": (f"membar.gl; {RELAXED}", RELAXED, True, True),
    "fence_of_reader": (RELAXED, f"{RELAXED} membar.gl;", True, True),
    "late_fence_of_writer": (f"{RELAXED} membar.gl;", f"{RELAXED} membar.gl;", True, True),
    "early_fence_of_reader": (f"membar.gl; {RELAXED}", f"membar.gl; {RELAXED}", True, True),
    "fences_of_blocks": (f"membar.cta; {RELAXED}", f"{RELAXED} membar.cta;", True, False),
    "fence_of_writers_block": (f"fence.acq_rel.cta; {RELAXED}", f"{RELAXED} membar.gl;", True, False),
    "fence_of_readers_block": (f"membar.gl; {RELAXED}", f"{RELAXED} membar.cta;", True, False),
    "release_acquire": (COUNT(".release.gpu", 8), COUNT(".acquire.gpu", 8), False, False),
    "both": (COUNT(".acq_rel.gpu", 8), COUNT(".acq_rel.gpu", 8), False, False),
    "release": (COUNT(".release.gpu", 8), RELAXED, True, True),
    "acquire": (RELAXED, COUNT(".acquire.gpu", 8), True, True),
    "acquire_release": (COUNT(".acquire.gpu", 8), COUNT(".release.gpu", 8), True, True),
    "release_fence": (COUNT(".release.gpu", 8), f"{RELAXED} membar.gl;", False, False),
    "fence_acquire": (f"membar.gl; {RELAXED}", COUNT(".acquire.gpu", 8), False, False),
    "release_acquire_of_blocks": (COUNT(".release.cta", 8), COUNT(".acquire.cta", 8), True, False),
    "atomics_of_blocks": (f"membar.gl; {OF_BLOCK}", f"{OF_BLOCK} membar.gl;", True, False),
    "release_elsewhere": (COUNT(".release.gpu", 16) + RELAXED, COUNT(".acquire.gpu", 8), True, True),
    "acquire_elsewhere": (COUNT(".release.gpu", 8), RELAXED + COUNT(".acquire.gpu", 16), True, True),
    "red_of_writer": ("membar.gl; red.global.add.u32 [%x+8], 1;", f"{RELAXED} membar.gl;", False, False),
    "red_of_reader": (f"membar.gl; {RELAXED}", "red.global.add.u32 [%x+8], 1; membar.gl;", True, True),
}  # fmt: skip
CHAIN = [WRITES + COUNT(".release.gpu", 8), RELAXED, COUNT(".acquire.gpu", 8) + READS]
END = "st.global.u32 [%x+8], 5;" + COUNT(".release.gpu", 16)
ENDED = [CHAIN[0], RELAXED + END, COUNT(".acquire.gpu", 16) + CHAIN[2]]

SHUFFLE = """
ld.global.u32 %r1, [%x]; ld.global.u32 %r2, [%x+4];
shfl.sync.{}.b32 %r3|%p0, %t, %r1, %r2, 0xffffffff;
selp.u32 %r4, 32, 0, %p0; add.u32 %r3, %r3, %r4; st.global.u32 [%own+8], %r3;
"""
FOUR = "setp.ge.u32 %p0, %t, 4; @%p0 bra done;"
OWN_SHARED = "mov.u32 %r0, s; shl.b32 %r1, %t, 2; add.u32 %r0, %r0, %r1; xor.b32 %r2, %r0, 4;"
EXCHANGE = OWN_SHARED + "st.shared.u32 [%r0], %t; {} ld.shared.u32 %r3, [%r2]; st.global.u32 [%own], %r3;"
OWN_BYTE = "cvt.u64.u32 %d0, %id; add.u64 %d0, %x, %d0; cvt.u16.u32 %h0, %id;"

BODIES = {
    "nothing": "",
    "barrier": "setp.lt.u32 %p0, %t, 3; @%p0 bar.sync 0;",
    "two_barriers": "setp.eq.u32 %p0, %t, 0; @%p0 bra other; bar.sync 0; ret;\nother: bar.sync 0;",
    "vote_of_a_block": "setp.eq.u32 %p0, %t, 1; bar.red.popc.u32 %r0, 0, %p0; st.global.u32 [%own], %r0;",
    **{f"message_{name}": roles(WRITES + writer, reader + READS) for name, (writer, reader, *_) in MESSAGES.items()},
    "chain": roles(*CHAIN),
    "ended_chain": roles(*ENDED),
    "count": "atom.global.add.u32 %r0, [%x], 1;",
    "count_and_read": "atom.global.add.u32 %r0, [%x], 1; ld.global.u32 %r1, [%x];",
    "last_one_stores": "atom.global.add.u32 %r0, [%x], 1; setp.eq.u32 %p0, %r0, 7; @%p0 st.global.u32 [%x], 0;",
    "first_one_stores": "atom.global.add.u32 %r0, [%x], 1; setp.eq.u32 %p0, %r0, 0; @%p0 st.global.u32 [%x], 0;",
    **{f"shuffle_{kind}": SHUFFLE.format(kind) for kind in ("up", "down", "bfly", "idx")},
    "shuffle_of_four": FOUR + "shfl.sync.bfly.b32 %r0, %t, 1, 0x1f, 0xf; st.global.u32 [%own], %r0;",
    "shuffle_without_own_lane": "shfl.sync.idx.b32 %r0, %t, 0, 0x1f, 0xf;",
    "shuffle_from_outside": FOUR + "shfl.sync.idx.b32 %r0, %t, 4, 0x1f, 0xf;",
    "shuffle_without_one": "setp.eq.u32 %p0, %t, 3; @%p0 ret; shfl.sync.idx.b32 %r0, %t, 0, 0x1f, 0xf;",
    "vote": "setp.gt.u32 %p1, %t, 1; vote.sync.ballot.b32 %r0, %p1, 0xffffffff; st.global.u32 [%own], %r0;",
    "vote_of_four": FOUR + "setp.gt.u32 %p1, %t, 1; vote.sync.ballot.b32 %r0, %p1, 0xf; st.global.u32 [%own], %r0;",
    "vote_without_own_lane": "setp.gt.u32 %p1, %t, 1; vote.sync.ballot.b32 %r0, %p1, 0xf;",
    "vote_of_two_masks": "min.u32 %r1, %t, 1; mad.lo.u32 %r1, %r1, 16, 15; vote.sync.ballot.b32 %r0, %p1, %r1;",
    "warp_barrier_without_own_lane": "bar.warp.sync 0xf;",
    "exchange": EXCHANGE.format("bar.sync 0;"),
    "exchange_in_a_warp": EXCHANGE.format("bar.warp.sync 0xffffffff;"),
    "exchange_after_a_shuffle": EXCHANGE.format("shfl.sync.idx.b32 %r4, %t, 0, 0x1f, 0xffffffff;"),
    "exchange_after_a_fence": EXCHANGE.format("membar.cta;"),
    "load_16": "ld.global.u32 %r0, [%x]; cvt.u64.u32 %d0, %r0; add.u64 %d0, %x, %d0;"
    "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];",
    "load": "ld.global.s32 %r0, [%x]; cvt.s64.s32 %d0, %r0; add.s64 %d0, %x, %d0; ld.global.u32 %r1, [%d0];",
    "store": "ld.global.s32 %r0, [%x]; cvt.s64.s32 %d0, %r0; add.s64 %d0, %x, %d0; st.u32 [%d0], 3;",
    "store_shared": "ld.global.u32 %r0, [%x]; mov.u32 %r1, s; add.u32 %r1, %r1, %r0;"
    "st.shared.v2.u32 [%r1], {%r0, %r0};",
    "parameter": "ld.param.u32 %r0, [data+4]; st.global.u32 [%x], %r0;",
    "past_the_parameters": "ld.param.u32 %r0, [data+8];",
    "unwritten": "ld.shared.u32 %r0, [s];",
    "half_written": "st.shared.u32 [s], %t; ld.shared.u64 %d0, [s];",
    "written": "st.shared.v2.u32 [s], {%t, %t}; ld.shared.u64 %d0, [s]; st.global.u64 [%x], %d0;",
    "written_by_block_0": "setp.eq.u32 %p0, %b, 0; @%p0 st.shared.u32 [s], %t; ld.shared.u32 %r0, [s];",
    "unwritten_register": "st.global.u32 [%x], %r5;",
    "divide": "ld.global.u32 %r0, [%x]; div.u32 %r1, %id, %r0;",
    "trap": "setp.eq.u32 %p0, %id, 1; @%p0 trap;",
    "add_one": "ld.global.u32 %r0, [%x]; add.u32 %r0, %r0, 1; st.global.u32 [%x], %r0;",
    "tickets": "atom.global.add.u32 %r0, [%x], 1; mul.wide.u32 %d0, %r0, 4; add.u64 %d0, %x, %d0;"
    "st.global.u32 [%d0+4], %b;",
    "same_value": "st.global.u32 [%x], 3;",
    "same_value_of_one": "setp.eq.u32 %p0, %id, 0; @%p0 st.global.u32 [%x], 3;",
    "same_shared_value": "st.shared.u32 [s], 3;",
    "other_shared_value": "st.shared.u32 [s], %t;",
    "same_shared_value_elsewhere": roles("st.shared.u32 [s], 3;", "st.shared.u32 [s], 3;"),
    "write_after_both": "st.shared.u32 [s], 3; bar.warp.sync 0xff;"
    "setp.eq.u32 %p0, %t, 2; @%p0 st.shared.u32 [s], 4;",
    "write_after_one": "st.shared.u32 [s], 3; setp.eq.u32 %p0, %t, 1; @%p0 ret; bar.warp.sync 0xfd;"
    "setp.eq.u32 %p0, %t, 2; @%p0 st.shared.u32 [s], 4;",
    "own_number": "st.global.u32 [%own], %id;",
    "own_bytes": OWN_BYTE + "st.global.u8 [%d0], %h0;",
    "bytes_of_a_vector": roles("st.global.v4.u32 [%x], {%id, %id, %id, %id};", "ld.global.u8 %h0, [%x+13];"),
    "bytes_beside_a_vector": roles("st.global.v4.u32 [%x], {%id, %id, %id, %id};", "ld.global.u8 %h0, [%x+16];"),
    "vector_of_bytes": roles("st.global.u8 [%x+5], 1;", "ld.global.v2.u32 {%r0, %r1}, [%x];"),
    "all_read_and_one_writes": f"ld.global.u64 %d1, [%x]; {OWN_BYTE} bar.sync 0;"
    "setp.eq.u32 %p0, %id, 2; @%p0 st.global.u8 [%d0], %h0;",
    "all_read_while_one_writes": f"ld.global.u64 %d1, [%x]; {OWN_BYTE}"
    "setp.eq.u32 %p0, %id, 2; @%p0 st.global.u8 [%d0], %h0;",
}  # fmt: skip


def program():
    entries = [f".visible .entry {name}(.param .u64 data)\n.maxntid 64\n{{{PROLOGUE}{body}\ndone: ret;\n}}\n"
               for name, body in BODIES.items()]  # fmt: skip
    return HEAD + "".join(entries)


@pytest.fixture(scope="module")
def machine():
    machine = Machine()
    build.kernels(program())
    return machine


def run(machine, name, blocks, threads, contents=(0,) * 64):
    """What the tensor holds afterwards."""
    with machine.memory():
        x = torch.tensor(contents, dtype=torch.int32)
    machine.run(name, blocks, threads, x)
    return x.tolist()


def check(machine, name, blocks, threads, fault=None, **options):
    if fault is None:
        return run(machine, name, blocks, threads, **options)
    with pytest.raises(RuntimeError, match=f"^{name}: .*{fault}"):
        run(machine, name, blocks, threads, **options)
    return None


def check_race(machine, name, blocks, threads, is_race, place="global"):
    """The race is found whoever comes first, and only where it is looked for."""
    results = set()
    for seed in (0, 3, 4):
        with machine.schedule(resident=blocks, seed=seed, races=True):
            results.add(str(check(machine, name, blocks, threads, f"race in {place} memory" if is_race else None)))
    run(machine, name, blocks, threads)
    return results


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas")
def test_the_kernels_are_nvidias_ptx(tmp_path):
    (tmp_path / "kernels.ptx").write_text(program())
    command = ["ptxas", "-arch=sm_90", str(tmp_path / "kernels.ptx"), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


# Barriers and warps


@pytest.mark.parametrize(
    ("name", "threads", "fault"),
    [
        ("barrier", 3, None),
        ("barrier", 4, r"not all threads come: bar\.sync at \? \(3 threads wait\)"),
        ("two_barriers", 1, None),
        ("two_barriers", 2, "threads of a block meet at different barriers"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_barriers(machine, name, threads, fault, seed):
    with machine.schedule(seed=seed):
        check(machine, name, 2, threads, fault)


def test_a_barrier_counts_votes(machine):
    assert run(machine, "vote_of_a_block", 2, 3)[:6] == [1] * 6
    assert run(machine, "vote_of_a_block", 2, 1)[:2] == [0] * 2


def shuffled(kind, lane, by, limits):
    """The lane that one reads, and whether it is in its segment, as NVIDIA's manual defines it."""
    segment, clamp = limits >> 8 & 31, limits & 31
    last = (lane & segment) | (clamp & ~segment & 31)
    chosen = (lane & segment) | (by & ~segment & 31)
    other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": chosen}[kind]
    inside = other >= last if kind == "up" else other <= last
    return other if inside else lane, inside


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
def test_shuffles(machine, kind):
    for limits in (0x1F, 0, 0x181F, 0x1800, 0x1C03, 0x100F):
        for by in range(32):
            found = run(machine, f"shuffle_{kind}", 1, 32, (by, limits, *[0] * 32))[2:]
            true = [shuffled(kind, lane, by, limits) for lane in range(32)]
            assert found == [lane + 32 * inside for lane, inside in true]


@pytest.mark.parametrize(
    ("name", "threads", "fault"),
    [
        ("shuffle_of_four", 32, None),
        ("shuffle_without_own_lane", 4, None),
        ("shuffle_without_own_lane", 5, "a lane's mask is without it"),
        ("shuffle_from_outside", 8, "a lane reads one that is not in its mask"),
        ("shuffle_without_one", 3, None),
        ("shuffle_without_one", 4, "not all threads come: shfl"),
        ("vote_without_own_lane", 4, None),
        ("vote_without_own_lane", 5, "a lane's mask is without it"),
        ("vote_of_two_masks", 1, None),
        ("vote_of_two_masks", 5, "lanes of a warp meet at different instructions or masks"),
        ("warp_barrier_without_own_lane", 4, None),
        ("warp_barrier_without_own_lane", 5, "a lane's mask is without it"),
    ],
)
def test_masks(machine, name, threads, fault):
    check(machine, name, 1, threads, fault)


def test_values_in_masks(machine):
    assert run(machine, "shuffle_of_four", 1, 32)[:5] == [1, 0, 3, 2, 0]
    assert run(machine, "vote", 1, 40)[:40] == [0xFFFFFFFC - 2**32] * 32 + [0xFF] * 8
    assert run(machine, "vote_of_four", 1, 32)[:5] == [0b1100] * 4 + [0]


# Races


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize(("blocks", "threads"), [(2, 1), (1, 2)], ids=["two blocks", "one block"])
def test_messages(machine, message, blocks, threads):
    is_race = MESSAGES[message][2 if blocks == 2 else 3]
    with machine.schedule(races=True):  # the writer comes first
        found = check(machine, f"message_{message}", blocks, threads, "race in global memory" if is_race else None)
    assert is_race or found[:2] == [7, 7]


def test_a_plain_write_ends_a_chain_of_atomics(machine):
    with machine.schedule(races=True):
        assert check(machine, "chain", 3, 1)[1] == 7
        check(machine, "ended_chain", 3, 1, "block 2 thread 0 reads what block 0 thread 0 wrote")


@pytest.mark.parametrize(
    ("name", "is_race"),
    [
        ("count", False),
        ("count_and_read", True),
        ("last_one_stores", False),
        ("first_one_stores", True),
        ("same_value", True),
        ("same_value_of_one", False),
        ("own_bytes", False),
        ("bytes_of_a_vector", True),
        ("bytes_beside_a_vector", False),
        ("vector_of_bytes", True),
    ],
)
@pytest.mark.parametrize(("blocks", "threads"), [(1, 8), (4, 2)])
def test_races(machine, name, is_race, blocks, threads):
    check_race(machine, name, blocks, threads, is_race)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("exchange", None),
        ("exchange_in_a_warp", None),
        ("exchange_after_a_shuffle", "shared"),
        ("exchange_after_a_fence", "shared"),
        ("same_shared_value", None),
        ("other_shared_value", "shared"),
        ("same_shared_value_elsewhere", "shared"),
        ("write_after_both", None),
        ("write_after_one", "shared"),
        ("all_read_and_one_writes", None),
        ("all_read_while_one_writes", "global"),
    ],
)
def test_races_in_a_block(machine, name, place):
    for seed in (0, 3):
        with machine.schedule(seed=seed, races=True):
            check(machine, name, 1, 8, place and f"(race in {place} memory|shared memory is read before)")


def test_a_race_is_told_with_both_threads(machine):
    text = "race in global memory: block 1 thread 0 writes what block 0 thread 0 wrote at ?: st.global.u32 at ?"
    with machine.schedule(races=True), pytest.raises(RuntimeError) as error:
        run(machine, "same_value", 2, 1)
    assert str(error.value) == f"same_value: {text} (block 1 thread 0)"


def test_a_seed_interrupts_threads_anywhere(machine):
    sums = {}
    for seed in (0, 1, 1, 2, 3):
        with machine.schedule(resident=2, seed=seed):
            total = run(machine, "add_one", 2, 32)[0]
        assert sums.setdefault(seed, total) == total
    assert sums[0] == 64
    assert len({*sums.values()}) > 2


def test_a_seed_chooses_the_order_of_blocks(machine):
    orders = []
    for seed in (0, 1, 2):
        with machine.schedule(seed=seed):
            orders.append(tuple(run(machine, "tickets", 16, 1)[1:17]))
    assert orders[0] == tuple(range(16))
    assert [sorted(order) for order in orders] == [list(range(16))] * 3
    assert len({*orders}) == 3


# Memory


@pytest.mark.parametrize(
    ("name", "at", "fault"),
    [
        ("load", 0, None),
        ("load", 36, None),
        ("load", 40, "an access outside of all tensors"),
        ("load", -4, "an access outside of all tensors"),
        ("load", 2, "an access of 4 bytes is not aligned"),
        ("store", 36, None),
        ("store", 40, "an access outside of all tensors"),
        ("store", 6, "an access of 4 bytes is not aligned"),
        ("load_16", 16, None),
        ("load_16", 8, "an access of 16 bytes is not aligned"),
        ("load_16", 32, "an access outside of all tensors"),
        ("store_shared", 248, None),
        ("store_shared", 252, "an access of 8 bytes is not aligned"),
        ("store_shared", 256, "an access past the end of shared memory"),
    ],
)
def test_ends_and_alignment(machine, name, at, fault):
    check(machine, name, 1, 1, fault, contents=(at, *[0] * 9))


def test_shared_memory_of_the_launch_comes_after_the_kernels(machine):
    with machine.memory():
        x = torch.tensor([256])
    machine.run("store_shared", 1, 1, x, shared_bytes=8)


@pytest.mark.parametrize(
    ("name", "blocks", "fault"),
    [
        ("written", 1, None),
        ("unwritten", 1, "shared memory is read before it is written"),
        ("half_written", 1, "shared memory is read before it is written"),
        ("written_by_block_0", 1, None),
        ("written_by_block_0", 2, r"shared memory is read before it is written.*\(block 1 thread 0\)"),
        ("past_the_parameters", 1, "past the end of the parameters"),
    ],
)
def test_memory_that_was_never_written(machine, name, blocks, fault):
    check(machine, name, blocks, 1, fault)


def test_new_tensors_and_registers_hold_poison(machine):
    with machine.memory():
        assert torch.empty(1000).isnan().all()
    results = [np.uint32(run(machine, "unwritten_register", 1, 1, (value,))[0] % 2**32) for value in (0, 1)]
    assert [hex(x) for x in results] == ["0xfefefefe"] * 2


@pytest.mark.parametrize(
    ("name", "threads", "fault"),
    [
        ("nothing", 64, None),
        ("nothing", 65, "more threads than the kernel was compiled for"),
        ("trap", 1, None),
        ("trap", 2, r"trap: trap at \? \(block 0 thread 1\)"),
        ("divide", 1, "division by zero"),
    ],
)
def test_other_faults(machine, name, threads, fault):
    check(machine, name, 1, threads, fault)


def test_a_quotient(machine):
    check(machine, "divide", 1, 1, contents=(1,))


def test_a_deep_copy_is_in_reach(machine):
    """That of a parameter is a new tensor; that of a buffer is a new storage, from another allocator of PyTorch's."""
    with machine.memory():
        x = torch.nn.BatchNorm1d(64)
        twin = copy.deepcopy(x)
    for tensor in (x.weight, x.running_mean, twin.weight, twin.running_mean):
        machine.run("own_number", 1, 64, tensor)
        assert tensor.detach().view(torch.int32).tolist() == list(range(64))


def test_a_barrier_of_another_kernel_of_this_name(machine):
    """Its number says nothing about the one that has the name now."""
    texts = [f"{HEAD}.visible .entry namesake()\n{{\n{body}bar.sync 0;\nret;\n}}\n" for body in ("", "membar.gl;\n")]
    build.kernels(texts[0])
    [barrier] = machine.synchronizations("namesake")
    with machine.without(barrier):
        pass
    build.kernels(texts[1])
    with pytest.raises(LookupError, match=r"another kernel of this name.*membar\.gl"), machine.without(barrier):
        pass


# Devices and threads


@pytest.mark.parametrize("made_on", [0, 1])
@pytest.mark.parametrize("launched_on", [0, 1])
def test_a_kernel_reaches_memory_of_its_device_alone(machine, made_on, launched_on):
    with machine.device(made_on), machine.memory():
        x = torch.zeros(4, dtype=torch.int32)
    with machine.device(launched_on):
        if made_on == launched_on:
            machine.run("count", 2, 2, x)
        else:
            with pytest.raises(RuntimeError, match=r"^count: memory of another device"):
                machine.run("count", 2, 2, x)
    assert x[0].item() == (4 if made_on == launched_on else 0)


def test_host_threads_launch_at_once(machine):
    """Each has a device of its own, and only its own faults."""
    answers = {}

    def launch(device, name):
        with machine.device(device):
            answers[device] = [fault_of(name, tensors[device]) for _ in range(200)]

    def fault_of(*args):
        try:
            machine.run(args[0], 2, 32, args[1])
        except RuntimeError as error:
            return str(error)
        return ""

    with machine.memory():
        tensors = []
        for device in (0, 1):
            with machine.device(device):
                tensors.append(torch.zeros(64, dtype=torch.int32))
    threads = [threading.Thread(target=launch, args=args) for args in [(0, "exchange"), (1, "trap")]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == [""] * 200
    assert set(answers[1]) == {"trap: trap: trap at ? (block 0 thread 1)"}
    assert tensors[0].tolist() == [i % 32 ^ 1 for i in range(64)]
