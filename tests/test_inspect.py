"""The inspection of machine code: what it finds wrong, what it compiles, and what it keeps."""

from collections import Counter
from types import SimpleNamespace

import pytest
from targets import TARGETS

from benchmarks import inspect_cache, inspect_cuda, inspect_triton
from benchmarks.inspect_triton import TARGETS as GPUS
from benchmarks.inspect_triton import Found, every_task, expected, fault, sample
from trainops import core

pytestmark = pytest.mark.skipif(
    not any(target.backend == "triton" for target in TARGETS), reason="Triton is not installed"
)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(inspect_cache, "FOLDER", tmp_path)
    return tmp_path


def variant_of(kernel):
    return next(task.variant for task in every_task() if task.variant.kernel == kernel)


def right(variant):
    return Found(32, 0, *expected(variant), narrow_stores=variant.narrow_stores or 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"spilled": 8}, "spills"),
        ({"wide_loads": 0}, "loads are not all wide"),
        ({"wide_stores": 0}, "stores are not all wide"),
        ({"narrow_stores": 9}, "narrow stores"),
        ({"float64_loops": 0, "other_loops": 1}, ""),
        ({"float64_loops": 1, "other_loops": 1}, "float64 in an inner loop"),
        ({"float64_loops": 0, "other_loops": 0}, "float64 in an inner loop"),
    ],
)
def test_faults_of_triton_kernels(change, message):
    variant = variant_of("drop_path_backward")
    assert fault(variant, right(variant)._replace(**change)) == message


def test_a_variant_as_it_should_be_has_no_fault():
    assert {fault(variant, right(variant)) for variant in inspect_triton.variants()} == {""}


def test_accesses_that_are_no_multiple_are_a_fault():
    variant = variant_of("ema")
    loads, _ = expected(variant)
    assert fault(variant, right(variant)._replace(wide_loads=2 * loads)) == ""
    assert fault(variant, right(variant)._replace(wide_loads=2 * loads - 1)) == "loads are not all wide"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"stack": 16}, "uses stack"),
        ({"local": 16}, "uses local memory"),
        ({"loads": 0}, "narrow loads"),
        ({"stores": 0}, "narrow stores"),
        ({"float64_loops": 2}, "float64 in an inner loop"),
    ],
)
def test_faults_of_cuda_kernels(change, message):
    kernel = inspect_cuda.Kernel(32, 0, 0, 0, *inspect_cuda.LEAST["ema_kernel"], float64_loops=1, other_loops=1)
    assert inspect_cuda.fault("ema_kernel", kernel._replace(**change)) == message


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("10ema_kernelENS0_11DeviceTableEdPKb", "ema_kernel"),
        ("16drop_path_kernelIdEEvNS0_8DropPathE", "drop_path_kernel<double>"),
        ("15backward_kernelIfLb1EEEvNS0_16DropPathBackwardE", "backward_kernel<float, true>"),
        ("13update_kernelINS_5AdamWELb1EEEvNS0_10UpdateArgsE", "update_kernel<AdamW, true>"),
        ("13reduce_kernelINS_7InfNormEEEvNS0_10ReduceArgsE", "reduce_kernel<InfNorm>"),
        ("13update_kernelINS_4LionELb0EdEEvNS0_10UpdateArgsE", "update_kernel<Lion, false, double>"),
        ("$__internal_0_$__cuda_sm20_div_rn_f64_full", None),
    ],
)
def test_names_of_cuda_kernels(symbol, name):
    space = "_ZN8trainops4cuda41_GLOBAL__N__33ada180_9_update_cu_f927e0e3"
    assert inspect_cuda.name_of(symbol if symbol[0] == "$" else space + symbol) == name


def test_the_sample_has_every_variant_and_each_kernel_for_both_vendors():
    tasks = sample()
    assert [task.variant for task in tasks] == list(inspect_triton.variants())
    targets = {}
    for variant, target in tasks:
        targets.setdefault((variant.module, variant.kernel), set()).add(GPUS[target][0])
    assert all(found == {"cuda", "hip"} for found in targets.values())
    assert {task.target for task in tasks} == set(GPUS)


@pytest.fixture
def versions(monkeypatch):
    """Functions have a hash of their source, which under the interpreter they have not: here it is a number."""
    versions = Counter()

    def function_of(name):
        return SimpleNamespace(cache_key=(name, versions[name]))

    monkeypatch.setattr(inspect_triton, "function_of", function_of)
    return versions


def test_keys_are_those_of_all_that_a_result_depends_on(versions):
    tasks = every_task()
    keys = [inspect_triton.key(task) for task in tasks]
    assert len(set(keys)) == len(tasks)
    assert keys == [inspect_triton.key(task) for task in tasks]
    for function in (*versions,):
        versions[function] += 1
        changed = {task.variant for key, task in zip(keys, tasks, strict=True) if inspect_triton.key(task) != key}
        versions[function] -= 1
        used = [variant for variant in inspect_triton.variants() if function in functions_of(variant)]
        assert 0 < len(used) < len(tasks)
        assert [variant for variant in inspect_triton.variants() if variant in changed] == used


def functions_of(variant):
    """A rule's functions are constants of the kernels of a step."""
    return {f"@{variant.module}.{variant.kernel}", *(x for x in variant.constants.values() if f"{x}"[0] == "@")}


def test_every_rule_is_compiled():
    rules = [kind for kind, schema in core.schemas.items() if schema.settings]
    used = {function for variant in inspect_triton.variants() for function in functions_of(variant)}
    for rule in rules:
        assert {
            f"@{rule}.{function}" for function in ("store_scalars", "load_scalars", "new_state", "new_param")
        } <= used


def test_what_is_known_is_not_compiled_again(monkeypatch, versions):
    monkeypatch.setattr(inspect_triton, "ProcessPoolExecutor", None)
    tasks = every_task()[:3]
    for i, task in enumerate(tasks):
        inspect_cache.keep(inspect_triton.key(task), Found(i, 0, 2, 1))
    assert list(inspect_triton.find(tasks)) == [(task, Found(i, 0, 2, 1)) for i, task in enumerate(tasks)]
    with pytest.raises(TypeError, match="not callable"):
        list(inspect_triton.find(every_task()[:4]))


def test_what_was_found_is_kept(folder):
    key, calls = inspect_cache.key_of("a", ("b", 1)), []

    def find():
        calls.append(None)
        return {"registers": 32}

    for _ in range(2):
        assert inspect_cache.remembered(key, find) == {"registers": 32}
    assert len(calls) == 1
    assert [path.name for path in folder.iterdir()] == [f"{key}.json"]
    (folder / f"{key}.json").write_text('{"registers"')  # cut off
    assert inspect_cache.remembered(key, find) == {"registers": 32}
    assert len(calls) == 2


def test_keys_see_what_files_hold(tmp_path):
    path = tmp_path / "module.so"
    path.write_bytes(b"one")
    before = inspect_cache.key_of(path)
    path.write_bytes(b"two")
    assert inspect_cache.key_of(path) != before
    assert inspect_cache.key_of("a", "b") != inspect_cache.key_of("ab")
