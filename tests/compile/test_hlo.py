"""Kernels, library calls and collectives, counted in the text of compiled programs."""

import importlib.util
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from chargpt_jax.compile.hlo import Module, shape_bytes, work_per_unit
from tests.compile.hlo_texts import LAYERS, SEQUENCES, TEXTS, WIDTH, text_for

COMPILERS = {"h100:2": "jax_cuda12_plugin", "v5e:2x2": "libtpu"}


def test_kernels_of_one_iteration_on_a_gpu_are_counted():
    """Of one iteration: 13 fusions (3 in each of 3 layers, 1 in a branch, 3 others) and 5 copies (1 in each layer)."""
    work = work_per_unit(text_for("h100:2"))
    assert work.opcodes == {"fusion": 13, "copy": 5, "all-reduce": 1}
    assert (work.total, work.unknown_loops) == (19, 0)


def test_fusions_of_one_iteration_on_a_tpu_are_counted():
    """A fusion and two copies in each of 3 layers; the larger branch has a copy before and one after its sort."""
    work = work_per_unit(text_for("v5e:2x2"))
    assert (work.opcodes["fusion"], work.opcodes["copy"], work.opcodes["sort"]) == (3, 9, 1)
    assert work.opcodes["custom-call"] == 0


@pytest.mark.parametrize("topology", TEXTS)
def test_collectives_have_kind_and_bytes(topology):
    work = work_per_unit(text_for(topology))
    assert work.collectives == {"all-reduce": 1}
    assert work.collective_bytes == {"all-reduce": 4 * SEQUENCES * WIDTH}


def test_known_trip_count_multiplies_the_body():
    text = text_for("h100:2")
    more = text.replace(f'"known_trip_count":{{"n":"{LAYERS}"}}', f'"known_trip_count":{{"n":"{LAYERS + 10}"}}')
    assert work_per_unit(more).total == work_per_unit(text).total + 10 * 4


def test_trip_count_is_read_from_the_condition_on_a_tpu():
    text = text_for("v5e:2x2")
    assert "known_trip_count" not in text
    end = "%constant.21.clone.1 = s32[]{:T(128)} constant"
    more = text.replace(f"{end}({LAYERS})", f"{end}({LAYERS + 10})")
    assert work_per_unit(more).total == work_per_unit(text).total + 10 * 4


def test_loop_without_a_constant_end_counts_once():
    text = text_for("v5e:2x2").replace("%get-tuple-element.72, %constant.21", "%constant.21, %get-tuple-element.72")
    work = work_per_unit(text)
    assert work.unknown_loops == 1
    assert work.opcodes["fusion"] == 1


def test_instructions_inside_fusions_do_not_count():
    module = Module(text_for("h100:2"))
    (name,) = [name for name in module.computations if name.startswith("gemm_fusion")]
    assert module.work(name).opcodes["dot"] == 1
    assert "dot" not in module.unit().opcodes


HEAD = "HloModule small\n\n%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n}\n"


def counted(*lines: str, extra: str = "") -> Counter[str]:
    body = "\n".join(f"  {line}" for line in lines)
    work = work_per_unit(
        f"{HEAD}{extra}\nENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{body}\n}}\n"
    )
    return work.opcodes + Counter({f"{kind} bytes": size for kind, size in work.collective_bytes.items()})


@pytest.mark.parametrize(
    "line",
    [
        "%c = f32[] constant(1)",
        "%t = (f32[8]{0}, f32[]) tuple(%x, %c)",
        '%b = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"',
        "%d = f32[8]{0} copy-done(%s)",
        "%p = u32[] partition-id()",
    ],
)
def test_bookkeeping_is_no_work(line):
    assert counted(line) == {}


def test_library_call_is_work():
    assert counted('%g = (f32[8]{0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$gemm"') == {
        "custom-call": 1
    }


def test_asynchronous_start_and_done_count_once():
    lines = "%s = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%x)", "%d = f32[8]{0} copy-done(%s)"
    assert counted(*lines) == {"copy": 1}


@pytest.mark.parametrize(
    ("line", "bytes_"),
    [
        ("%g = f32[32]{0} all-gather(%x), dimensions={0}", 128),
        ("%g = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}", 128),
        ("%g = f32[2]{0} reduce-scatter(%x), dimensions={0}, to_apply=%sum", 32),
        ("%g = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)", 40),
        ("%g = f32[8]{0} all-reduce-start(%x), to_apply=%sum", 32),
        ("%g = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%x), dimensions={0}, to_apply=%sum", 32),
    ],
)
def test_bytes_of_a_collective_are_those_of_its_larger_side(line, bytes_):
    found = counted(line)
    (kind,) = [kind for kind in found if not kind.endswith("bytes")]
    assert found == {kind: 1, f"{kind} bytes": bytes_}


@pytest.mark.parametrize(
    ("call", "attribute"), [("async-start", "calls"), ("call-start", "to_apply"), ("call", "to_apply")]
)
def test_called_computation_counts(call, attribute):
    extra = "\n%called (y: f32[8]) -> f32[8] {\n  %y = f32[8]{0} parameter(0)\n"
    extra += "  ROOT %r = f32[8]{0} all-reduce(%y), to_apply=%sum\n}\n"
    line = f"%a = f32[8]{{0}} {call}(%x), {attribute}=%called"
    assert counted(line, extra=extra) == {"all-reduce": 1, "all-reduce bytes": 32}


def test_collective_inside_a_fusion_counts_as_part_of_it():
    extra = "\n%fused (y: f32[8]) -> f32[2] {\n  %y = f32[8]{0} parameter(0)\n"
    extra += "  ROOT %r = f32[2]{0} reduce-scatter(%y), dimensions={0}, to_apply=%sum\n}\n"
    line = "%a = f32[2]{0} fusion(%x), kind=kCustom, calls=%fused"
    assert counted(line, extra=extra) == {"fusion": 1, "reduce-scatter bytes": 32}


def test_collective_in_a_chain_of_fusions_counts_once():
    """As on a TPU, which starts it in one fusion, continues it in others and ends it in a last one."""
    gather = '%g = f32[64]{0} all-gather(%y), dimensions={0}, frontend_attributes={chain_id="0"}'
    target = "ROOT %r = f32[64]{0} custom-call(%g), custom_call_target="
    steps = f'{target}"AsyncCollectiveStart"', "ROOT %r = f32[64]{0} copy(%y)", f'{target}"AsyncCollectiveDone"'
    extra = "".join(
        f"\n%fused_{i} (y: f32[8]) -> f32[64] {{\n  %y = f32[8]{{0}} parameter(0)\n  {gather}\n  {step}\n}}\n"
        for i, step in enumerate(steps)
    )
    lines = [f"%a_{i} = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%fused_{i}" for i in range(len(steps))]
    assert counted(*lines, extra=extra) == {"fusion": 3, "all-gather bytes": 256}


def test_sum_of_which_a_slice_is_used_is_a_reduce_scatter():
    extra = "\n%fused (y: f32[8]) -> f32[2] {\n  %y = f32[8]{0} parameter(0)\n  %i = s32[] constant(0)\n"
    extra += "  %s = f32[8]{0} all-reduce(%y), to_apply=%sum\n"
    extra += "  ROOT %r = f32[2]{0} dynamic-slice(%s, %i), dynamic_slice_sizes={2}\n}\n"
    line = "%a = f32[2]{0} fusion(%x), kind=kCustom, calls=%fused"
    assert counted(line, extra=extra) == {"fusion": 1, "reduce-scatter bytes": 32}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,64]{1,0}", 768),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("f32[]", 4),
        ("pred[5]{0}", 5),
        ("f8e4m3fn[10]{0}", 10),
        ("s4[3]{0}", 2),
        ("c64[2]", 16),
        ("(f32[2]{0}, /*index=1*/s32[]{:T(128)})", 12),
        ("token[]", 0),
        ("f32[0,5]", 0),
    ],
)
def test_shape_bytes(shape, size):
    assert shape_bytes(shape) == size


def test_text_of_a_cpu_program_is_read_as_well():
    """A law on real compilations: each more layer adds the same work."""

    def work(layers: int) -> int:
        shapes = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((layers, 32, 32), jnp.float32)
        step = jax.jit(lambda x, ws: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0])
        return work_per_unit(step.lower(*shapes).compile().as_text()).total

    assert work(7) - work(5) == work(5) - work(3) > 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", TEXTS)
def test_stored_texts_are_what_the_compiler_still_gives(topology):
    """Counts of kernels may differ between versions; what devices exchange may not."""
    if importlib.util.find_spec(COMPILERS[topology]) is None:
        pytest.skip(f"{COMPILERS[topology]} is not installed here")
    code = "from chargpt_jax.compile.hlo import work_per_unit; from tests.compile.hlo_texts import compiled_text; "
    code += f"work = work_per_unit(compiled_text({topology!r})); print(work.total, dict(work.collective_bytes))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    total, _, collectives = done.stdout.strip().splitlines()[-1].partition(" ")
    assert collectives == f"{{'all-reduce': {4 * SEQUENCES * WIDTH}}}"
    assert LAYERS <= int(total) <= 2 * work_per_unit(text_for(topology)).total
