import subprocess
import sys

TENSORIZE = """
from tvm.s_tir import Schedule, TensorIntrin
from tvm.script import tirx as T

@T.prim_func(s_tir=True)
def add(A: T.Buffer((4,), "int32", offset_factor=1), C: T.Buffer((4,), "int32", offset_factor=1)) -> None:
    with T.sblock("root"):
        T.reads(C[0:4], A[0:4])
        T.writes(C[0:4])
        for i in T.serial(4):
            with T.sblock("update"):
                vi = T.axis.remap("S", [i])
                C[vi] = C[vi] + A[vi]

@T.prim_func(s_tir=True)
def main(A: T.Buffer((16,), "int32"), C: T.Buffer((16,), "int32")):
    for i in T.serial(16):
        with T.sblock("C"):
            vi = T.axis.remap("S", [i])
            C[vi] = C[vi] + A[vi]

TensorIntrin.register("add4", add, add)
schedule = Schedule(main)
outer, inner = schedule.split(schedule.get_loops(schedule.get_sblock("C"))[0], [None, 4])
schedule.tensorize(inner, "add4")
print("tensorized")
"""


def test_tensorize_does_not_crash_with_the_pinned_tvm_ffi(tmp_path) -> None:
    script = tmp_path / "tensorize.py"  # TVMScript reads its own source
    script.write_text(TENSORIZE)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "tensorized\n"), done.stderr
