"""Counting instructions: what is read from objdump and callgrind, and how it is added up."""

import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import counts
from tests import toy
from tilewright.errors import InvalidInput, TilewrightError

LIBRARY = "/somewhere/model.avx2.so"

OBJDUMP = """
/somewhere/model.avx2.so:     file format elf64-x86-64

Disassembly of section .plt:

0000000000000100 <TVMBackendParallelLaunch@plt>:
 100:	jmp    *0x2ee2(%rip)        # 4000 <TVMBackendParallelLaunch@Base>

Disassembly of section .text:

0000000000000200 <__tvm_ffi_up>:
 200:	call   300 <up_compute_>
 205:	ret

0000000000000300 <up_compute_>:
 300:	lea    0x2(%rip),%rdi        # 304 <up_compute_+0x4>
 302:	ret
 303:	data16 cs nopw 0x0(%rax,%rax,1)
 304:	vxorps %ymm0,%ymm0,%ymm0
 308:	movzwl (%rbx,%r14,1),%eax
 30c:	vpunpcklwd %ymm6,%ymm5,%ymm14
 310:	vpmaddwd (%rdi,%r14,4),%ymm14,%ymm15
 314:	jne    308 <up_compute_+0x8>
 318:	vpaddd %ymm1,%ymm2,%ymm1
 31c:	vfmadd213ps %ymm1,%ymm2,%ymm1
 320:	vmovups %ymm1,(%r15,%r8,2)
 324:	jmp    304 <up_compute_+0x4>

0000000000000400 <down_2_compute_>:
 400:	vpmaddwd %ymm0,%ymm1,%ymm2
 404:	vmulps %ymm2,%ymm2,%ymm2
 408:	jl     400 <down_2_compute_>
 40c:	jl     308 <up_compute_+0x8>

0000000000000500 <down_compute_>:
 500:	vzeroupper

0000000000000600 <shape_func_compute_>:
 600:	ret
"""

PROFILE = f"""# callgrind format
positions: instr line
events: Ir

ob=/usr/bin/python3
fl=???
fn=main
0x308 0 1000
cob={LIBRARY}
cfi=???
cfn=0x304
calls=1 0x304 0
0x30c 0 555

ob={LIBRARY}
fl=???
fn=0x304
0x304 0 2
0x308 0 8
0x30c 0 8
0x310 0 8
0x314 0 8
0x318 0 2
cfn=memset
calls=1 0x700 0
0x318 12 777
0x31c 0 2
0x320 14 2
0x324 0 2

fn=down_2_compute_
0x400 0 3
0x404 0 3
0x500 0 1
0x600 0 5
0x310 0 8
"""


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("vpmaddwd (%rax),%ymm1,%ymm2", "dot products"),
        ("vmovdqu (%rdx,%rax,8),%ymm5", "vector loads and stores"),
        ("vpbroadcastd -0xc(%rdi,%r14,4),%ymm6", "vector loads and stores"),
        ("vpmovzxbw (%rax),%ymm0", "vector loads and stores"),
        ("vextractf128 $0x1,%ymm0,(%rax)", "vector loads and stores"),
        ("vpbroadcastd %xmm1,%ymm1", "shuffles and moves"),
        ("vpmovzxbw %xmm0,%ymm0", "shuffles and moves"),
        ("vmovaps %ymm7,%ymm12", "shuffles and moves"),
        ("vpackusdw %ymm1,%ymm0,%ymm0", "shuffles and moves"),
        ("vperm2i128 $0x31,%ymm0,%ymm13,%ymm5", "shuffles and moves"),
        ("vpinsrd $0x1,(%rax),%xmm0,%xmm0", "shuffles and moves"),
        ("vpaddd (%rax),%ymm0,%ymm1", "other vector"),
        ("vpmaxsd %ymm0,%ymm1,%ymm1", "other vector"),
        ("vcvtdq2ps %ymm0,%ymm0", "other vector"),
        ("jne 184a0 <up_compute_+0xbd0>", "branches"),
        ("call *(%rax)", "branches"),
        ("ret", "branches"),
        ("movzwl (%rbx,%r14,1),%eax", "scalar"),
        ("vzeroupper", "scalar"),
        ("nopw 0x0(%rax,%rax,1)", "scalar"),
    ],
)
def test_classes(instruction: str, name: str) -> None:
    assert counts.classify(instruction) == name


def test_instructions_belong_to_kernels() -> None:
    code = counts.disassembly(OBJDUMP)
    assert Counter(kernel for kernel, _ in code.values()) == {"up": 14, "down": 5}
    assert code[0x310] == ("up", "vpmaddwd (%rdi,%r14,4),%ymm14,%ymm15")
    assert 0x100 not in code and 0x600 not in code


def test_product_loops_are_innermost_and_integer() -> None:
    """Neither the loop around (304), nor that with a float product (400), nor the jump into another kernel (40c)."""
    assert counts.product_loops(counts.disassembly(OBJDUMP)) == {0x308, 0x30C, 0x310, 0x314}


def test_profile_is_added_up_by_kernel() -> None:
    executed = counts.executions(PROFILE)
    assert executed["/usr/bin/python3", 0x308] == 1000
    assert executed[LIBRARY, 0x310] == 16  # listed for two functions; calls are not counted again
    table = counts.tabulate(executed, LIBRARY, counts.disassembly(OBJDUMP))
    assert table == {
        ("up", "product loops", "scalar"): 8,
        ("up", "product loops", "shuffles and moves"): 8,
        ("up", "product loops", "dot products"): 16,
        ("up", "product loops", "branches"): 8,
        ("up", "rest", "other vector"): 6,
        ("up", "rest", "vector loads and stores"): 2,
        ("up", "rest", "branches"): 2,
        ("down", "rest", "dot products"): 3,
        ("down", "rest", "other vector"): 3,
        ("down", "rest", "scalar"): 1,
        ("around the kernels", "", ""): 1005,
    }
    assert counts.markdown(table).splitlines()[2:] == [
        "| up | product loops | 40 | 3.8% | 2.50 | 40.0% | 0.0% | 20.0% | 0.0% | 20.0% | 20.0% |",
        "| up | rest | 10 | 0.9% | 0.62 | 0.0% | 20.0% | 0.0% | 60.0% | 20.0% | 0.0% |",
        "| down | rest | 7 | 0.7% |  | 42.9% | 0.0% | 0.0% | 42.9% | 0.0% | 14.3% |",
        "| around the kernels |  | 1,005 | 94.6% |  |  |  |  |  |  |  |",
        "| all |  | 1,062 |  |  | 1.8% | 0.2% | 0.8% | 0.8% | 0.9% | 0.8% |",
    ]


@pytest.mark.parametrize("missing", ["valgrind", "objdump", "gcc"])
def test_a_missing_tool_is_named(missing: str, toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing else tool)
    monkeypatch.setattr(sys, "argv", ["counts", str(toy_artifact)])
    with pytest.raises(SystemExit, match=rf"^{missing} was not found; install it with: .*$"):
        counts.main()


def test_what_cannot_run_is_told(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    with pytest.raises(InvalidInput, match="avx2; the artifact holds portable"):
        counts.measure(toy_artifact, ["1x5"])
    with pytest.raises(TilewrightError, match=r"^gcc failed: .*no-such\.h: No such file or directory$"):
        counts._run("gcc", "-xc", "-", text="#include <no-such.h>")
    with pytest.raises(TilewrightError, match="false failed: exit status 1"):
        counts._run("false")


NEEDED = [shutil.which(tool) for tool in ("valgrind", "objdump", "gcc")] + [Path("/usr/include/valgrind/callgrind.h").exists()]


@pytest.mark.skipif(not all(NEEDED), reason="no Valgrind")
def test_calls_are_counted_one_by_one(toy_library: Path, tmp_path: Path) -> None:
    """A kernel runs as many instructions more for its second and its third group of tokens."""
    (level,) = toy.MANIFEST.levels
    manifest = replace(toy.MANIFEST, levels=(replace(level, name="avx2", library="model.avx2.so"),))
    tables = counts.measure(toy.write(tmp_path / "toy.tw", toy_library, manifest), ["1x16", "2x16", "3x16"])
    one, two, three = (sum(n for key, n in table.items() if key[0] == "hidden") for table in tables.values())
    assert 0 < two - one == three - two
    for table in tables.values():
        assert {kernel for kernel, _, _ in table} == {"hidden", "score", "total", "around the kernels"}
