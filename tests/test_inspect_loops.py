"""Loops in machine code: which there are, and a float64 loop that is planted is found."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import inspect_cpu, inspect_cuda, inspect_triton
from benchmarks.inspect_cpu import Version
from benchmarks.inspect_loops import Loops, inspect, loops_over_blocks, natural_loops, of_ptx, of_sass, of_x86

ROOT = Path(__file__).parent.parent


def sass(*instructions):
    """A listing as of cuobjdump. Labels are written as ``name:`` before an instruction, and jumps name them."""
    at = {}
    for i, text in enumerate(instructions):
        if ":" in text:
            at[text.partition(":")[0]] = f"0x{16 * i:04x}"
    lines = []
    for i, text in enumerate(instructions):
        code = text.rpartition(": ")[2]
        for name, address in at.items():
            code = code.replace(f"<{name}>", address)
        lines += [f"        /*{16 * i:04x}*/                   {code} ;    /* 0x0123456789abcdef */", " /* 0x0 */"]
    return of_sass(lines)


LOAD = "LDG.E.128.CONSTANT R4, [R2.64]"
BACK = "@P0 BRA <loop>"


def test_a_loop_in_float32():
    code = sass("F2F.F64.F32 R2, R3", f"loop: {LOAD}", "FADD R8, R8, R4", BACK, "DADD R6, R6, R2", "EXIT")
    assert natural_loops(code) == [frozenset({1, 2, 3})]
    assert inspect(code) == Loops(with_float64=0, without=1)


@pytest.mark.parametrize(
    "instruction",
    ["DADD R6, R6, R2", "F2F.F64.F32 R2, R4", "@P1 DFMA R2, R2, R2, R2", "F2F.F32.F64 R2, R4", "MUFU.RSQ64H R2, R4"],
)
def test_float64_in_a_loop_is_found(instruction):
    code = sass(f"loop: {LOAD}", instruction, BACK, "EXIT")
    assert inspect(code) == Loops(with_float64=1, without=0)


def test_float64_beside_the_line_of_a_loop_is_found():
    """Compilers put rare parts behind the end, from where a jump leads back into the middle."""
    code = sass(
        f"loop: {LOAD}",
        "@P1 BRA <rare>",
        "join: FADD R8, R8, R4",
        BACK,
        "EXIT",
        "rare: DADD R6, R6, R2",
        "BRA <join>",
    )
    assert natural_loops(code) == [frozenset({0, 1, 2, 3, 5, 6})]
    assert inspect(code) == Loops(with_float64=1, without=0)


def test_float64_after_a_way_out_is_not_in_the_loop():
    code = sass(f"loop: {LOAD}", "@P1 BRA <out>", "BRA <loop>", "out: DADD R6, R6, R2", "EXIT")
    assert inspect(code) == Loops(with_float64=0, without=1)


def test_a_call_that_leaves_a_loop():
    """As nvcc writes a far jump. What a call returns from is no part of the loop."""
    code = sass(f"loop: {LOAD}", "@P1 CALL.REL.NOINC <out>", "BRA <loop>", "out: DADD R6, R6, R2", "EXIT")
    assert inspect(code) == Loops(with_float64=0, without=1)
    code = sass(
        f"loop: {LOAD}", "CALL.REL.NOINC <divide>", BACK, "EXIT", "divide: MUFU.RCP R1, R2", "RET.REL.NODEC R2 0x0"
    )
    assert natural_loops(code) == [frozenset({0, 1, 2})]


def test_threads_meet_again_where_a_barrier_says():
    """`BSYNC` leads to the address of its `BSSY`, from wherever it stands."""
    code = sass(
        f"loop: {LOAD}",
        "BSSY B0, <met>",
        "@P1 BRA <rare>",
        "BSYNC B0",
        "met: FADD R8, R8, R4",
        BACK,
        "EXIT",
        "rare: DADD R6, R6, R2",
        "BSYNC B0",
    )
    assert natural_loops(code) == [frozenset({0, 1, 2, 3, 4, 5, 7, 8})]


def test_only_the_inner_of_two_loops_counts():
    """A run in float32, joined in float64."""
    code = sass(
        "loop: MOV R1, RZ", f"inner: {LOAD}", "FADD R8, R8, R4", "@P1 BRA <inner>", "DADD R6, R6, R2", BACK, "EXIT"
    )
    assert sorted(map(len, natural_loops(code))) == [3, 6]
    assert inspect(code) == Loops(with_float64=0, without=1)


def test_loops_that_read_nothing_do_not_count():
    code = sass("loop: DADD R6, R6, R2", BACK, "LDG.E.64 R4, [R2.64]", "@P0 BRA <loop>", "EXIT")
    assert inspect(code) == Loops(with_float64=0, without=0)


PTX = """
.visible .entry kernel(.param .u64 p) {
    .reg .b32 %r<4>;
    mov.b32 %r1, 0f00000000;    // 0.0
$L__BB0_1:  // a loop
    ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd1 + 0 ];
    BODY
    @%p1 bra $L__BB0_1;
    bra.uni $L__BB0_2;
$L__BB0_2:
    cvt.f64.f32 %rd2, %r1;
    ret;
}
"""


def test_loops_of_ptx():
    assert inspect(of_ptx(PTX.replace("BODY", "add.rn.f32 %r1, %r1, %r2;"))) == Loops(0, 1)
    assert inspect(of_ptx(PTX.replace("BODY", "add.rn.f64 %rd3, %rd3, %rd2;"))) == Loops(1, 0)


# A loop over blocks with a loop over a block's vectors in it, and then one over what is left.
X86 = """
   10:	prefetchw 0x800(%rdi)
   14:	movaps (%rdi,%rax,1),%xmm0
   18:	BODY
   1c:	cmp    $0x100,%rax
   20:	jne    14 <f(float*, long)+0x4>
   24:	cmp    %rdx,%rcx
   28:	jle    10 <f(float*, long)>
   2c:	addss  (%rdi,%rax,1),%xmm0
   30:	cmp    %rdx,%rax
   34:	jne    2c <f(float*, long)+0x1c>
   38:	jmp    900 <f(float*, long) [clone .cold]>
   3c:	ret
"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("mulps  %xmm1,%xmm0", (1, 0)),
        ("vmulpd %ymm1,%ymm0,%ymm0", (1, 0)),
        ("mulss  %xmm1,%xmm0", (1, 1)),
        ("vsqrtsd %xmm1,%xmm0,%xmm0", (1, 1)),
        ("paddd  %xmm1,%xmm0", (0, 0)),
    ],
)
def test_loops_of_x86(body, found):
    code = of_x86(X86.replace("BODY", body).splitlines())
    assert sorted(map(len, natural_loops(code))) == [3, 4, 7]
    assert loops_over_blocks(code) == found
    assert [x.falls_through for x in code[-2:]] == [False, False]


def test_versions_of_a_function():
    """One symbol for each instruction set, and others that do not count."""
    heads = [
        "trainops::cpu::(anonymous namespace)::update_tile(long)",
        "trainops::cpu::(anonymous namespace)::update_tile(long) [clone .avx2_f16c]",
        "trainops::cpu::(anonymous namespace)::update_tile(long) [clone .resolver]",
        "trainops::cpu::(anonymous namespace)::other(long)",
    ]
    bodies = ["mulss  %xmm1,%xmm0", "vmulps %ymm1,%ymm0,%ymm0", "ret", "ret"]
    pairs = zip(heads, bodies, strict=True)
    listing = "\n".join(f"0000010 <{head}>:{X86.replace('BODY', body)}" for head, body in pairs)
    assert inspect_cpu.versions_in(listing) == {
        "update_tile(long)": {"default": Version(0, 1, 1), "avx2": Version(32, 1, 0)}
    }


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (Version(32, 3), ""),
        (Version(16, 3), "narrow"),
        (Version(32, 3, 1), "1 not vectorised"),
        (Version(32, 0), "no loop found"),
    ],
)
def test_faults_of_cpu_kernels(version, message):
    assert inspect_cpu.fault("update_tile(SGD)", "avx2", version) == message


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [
        ("ema_kernel", (1, 1), [(2, 0), (2, 1), (0, 0), (1, 0)]),
        ("reduce_kernel<L2Norm>", (1, 1), [(2, 0), (2, 1)]),
        ("drop_path_kernel<float>", (0, 1), [(1, 0), (1, 1), (0, 0)]),
        ("drop_path_kernel<double>", (1, 0), []),
    ],
)
def test_faults_of_cuda_kernels(kernel, right, wrong):
    found = inspect_cuda.Kernel(32, 0, 0, 0, 99, 99)
    assert inspect_cuda.fault(kernel, found._replace(float64_loops=right[0], other_loops=right[1])) == ""
    for loops in wrong:
        it = found._replace(float64_loops=loops[0], other_loops=loops[1])
        assert inspect_cuda.fault(kernel, it) == "float64 in an inner loop"


# Compiles variants as they are, and as if they computed in float64.
PLANTED = """
import json
from benchmarks.inspect_triton import Task, compile_task, fault
from benchmarks.triton_variants import variants
found = []
for kernel, label in json.loads({wanted!r}):
    variant = next(x for x in variants() if x.kernel == kernel and x.label == label)
    wide = {{name: ":float64" for name in ("WIDE", "AVERAGE_WIDE") if name in variant.constants}}
    planted = variant._replace(constants=variant.constants | wide)
    found.append([fault(variant, compile_task(Task(x, "sm_80"))) for x in (variant, planted)])
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_planted_loop_of_triton_is_found():
    wanted = [
        ("partial_results", "l2_norm float32"),
        ("partial_results", "inf_norm bfloat16"),
        ("transform", "scale float16"),
        ("ema", "float32 of bfloat16"),
        ("update", "adamw, float32, float32 average"),
        ("drop_path_backward", "float32 of float32"),
    ]
    script = PLANTED.format(wanted=json.dumps(wanted))
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for (clean, planted), which in zip(json.loads(done.stdout.splitlines()[-1]), wanted, strict=True):
        assert clean == "", which
        assert "float64 in an inner loop" in planted, which


def test_a_second_look_has_its_own_loops_and_no_more():
    def variant(label):
        return next(x for x in inspect_triton.variants() if (x.kernel, x.label) == ("partial_results", label))

    allowed = {"l1_norm float32": 2, "l2_norm bfloat16": 2, "inf_norm float16": 0, "l2_norm float64": None}
    assert {label: variant(label).float64_loops for label in allowed} == allowed
    others = [x for x in inspect_triton.variants() if x.kernel != "partial_results"]
    assert {x.float64_loops for x in others} == {0, None}
    assert all(x.float64_loops == 0 for x in others if x.reads and "float64" not in x.reads)
