"""`compile`: the one place that strings the stages together, from a checkpoint to an artifact."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tilewright import frontend, manifest
from tilewright.artifact import describe_parameter, sha256
from tilewright.codegen.artifact import check_output, write_artifact
from tilewright.codegen.build import build
from tilewright.codegen.library import Library, check_library, write_library
from tilewright.codegen.lower import Lowered, lower
from tilewright.codegen.model import EncoderModel, Head
from tilewright.codegen.pad import pad
from tilewright.codegen.passes import dump
from tilewright.codegen.workload import Workload
from tilewright.cpu import cpu_features
from tilewright.errors import InvalidInput, InvalidModel
from tilewright.frontend.config import read_json
from tilewright.manifest import MAX_TOKENS, LayerRecord, LevelRecord, Limits, Manifest, Output, TuningRecord, library_name
from tilewright.program import Program
from tilewright.schedules.apply import apply
from tilewright.schedules.choice import Sparse, plan
from tilewright.schedules.isa import Isa, known_cpu, resolve_all
from tilewright.scratch import scratch
from tilewright.tuning.records import Log, Record, find_log
from tilewright.tuning.replay import Replay, replay
from tilewright.weights import WeightPool

_CHECKPOINT = {".onnx", ".safetensors", ".json"}
STAGES = ("load", "lower", "schedule", "build", "write")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk: its directory, what is in it, and what tuning records did, by level."""

    path: Path
    manifest: Manifest
    replays: Mapping[str, Replay]


def compile(
    model_path: str | Path | EncoderModel,
    target: str = "native",
    output: str | Path = "model.tw",
    *,
    max_tokens: int = 4096,
    sparse: Sparse = "auto",
    library: Library | None = None,
    overwrite: bool = True,
    self_check: bool = True,
    debug_dump: str | Path | None = None,
    tuning_records: str | Path | None = None,
    tuned_for: str | None = None,
    tuned_threads: int = 1,
    progress: Progress = lambda stage: None,
) -> Artifact:
    """Compile a quantised checkpoint (or an EncoderModel) into the artifact directory `output`, or into a `library`.

    target: what to compile for, or several with commas: `native`, an ISA level (portable, avx2, avx512vnni), an LLVM CPU, an
    instance type or a processor's name, each of which means the best level it runs, or `server`, which is several levels.
    The engine runs the best that its CPU has. Compiling for another CPU works anywhere.
    max_tokens: tokens one run of the module may hold; the engine splits larger batches, so it bounds memory, not batches.
    self_check: run an ONNX graph beside the model read from it, and refuse it where they differ.
    sparse: whether zero blocks are skipped: `auto` where the CPU's rates say that it pays, `always` wherever there is a kernel
    for it, or `never`.
    library: the library for C programs to write to the directory `output` instead of an artifact.
    debug_dump: a directory to write the module to after each pass, in a folder for each level.
    tuning_records: a tuning log, or a directory of them. Default: the log that comes along for the target's CPU. Kernels
    without a record that fits exactly, and all of them unless `sparse` is `auto`, are decided by rates and defaults.
    tuned_for: the CPU whose records to take where `target` names no CPU, but levels. tuned_threads: take records of so many.
    progress: called with each name of STAGES as the stage begins; lower, schedule and build come once for each level.
    Raises a TilewrightError with a one-line message; nothing is left at `output` then.
    """
    isas, cpu = resolve_all(target, cpu_features()), known_cpu(target)
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise InvalidInput(f"max_tokens is {max_tokens}; expected 1 to {MAX_TOKENS}")
    (check_library if library else check_output)(output, overwrite=overwrite)
    log = _log(tuning_records, known_cpu(target) if tuned_for is None else _named(tuned_for), sparse)
    progress("load")
    model = pad(model_path if isinstance(model_path, EncoderModel) else frontend.load(model_path, self_check))
    pool, levels, libraries, replays = WeightPool(), [], {}, {}
    with _working_directory() as place:
        for isa in isas:
            progress("lower")
            replayed = replays[isa.name] = replay(model, plan(model, isa, cpu, sparse), log, tuned_threads)
            lowered = lower(model, replayed.plan, max_tokens)
            libraries[isa.name] = place / library_name(isa.name)
            with dump(None if debug_dump is None else Path(debug_dump) / isa.name):
                progress("schedule")
                module = apply(lowered.module, lowered.specs)
                progress("build")
                program = build(module, isa.target(), libraries[isa.name], tuple(lowered.parameters))
            levels.append(_level(isa, lowered, pool.add(isa.name, lowered.parameters), replayed, program))
        progress("write")
        provenance = _provenance(model_path, model, {"target": target, "max_tokens": max_tokens, "sparse": sparse})
        artifact = Path(output) if library is None else place / "model.tw"
        written = write_artifact(
            artifact,
            libraries=libraries,
            weights=pool.tensors,
            manifest=_manifest(model, tuple(levels), lowered, provenance),
            tokenizer=model.tokenizer,
            overwrite=overwrite,
        )
        if library is not None:
            objects = {level: file.with_suffix(".o") for level, file in libraries.items()}
            workspace = place / "library"
            workspace.mkdir()
            write_library(output, library, artifact=artifact, objects=objects, workspace=workspace, overwrite=overwrite)
    return Artifact(Path(output), written, replays)


def _named(cpu: str) -> str:
    """The LLVM CPU that `--tuned-for` means."""
    if (known := known_cpu(cpu)) is None:
        raise InvalidInput(f"--tuned-for {cpu} names no CPU; give native, an LLVM CPU, an instance type or a processor's name")
    return known


def _log(path: str | Path | None, cpu: str | None, sparse: Sparse) -> Log:
    """The tuning log to compile by."""
    if sparse == "auto":
        return find_log(None if path is None else Path(path), cpu)
    if path is not None:
        raise InvalidInput(f"tuning records were given with sparse={sparse}, which they would overrule; leave one out")
    return Log()


@contextmanager
def _working_directory() -> Iterator[Path]:
    try:
        with scratch(Path(tempfile.gettempdir()), "tilewright-compile-") as place:
            yield place
    except OSError as error:
        raise InvalidInput(f"cannot work in the temporary directory ({error}); free space there or set TMPDIR") from error


def _level(isa: Isa, lowered: Lowered, parameters: dict[str, str], replayed: Replay, program: Program) -> LevelRecord:
    layers = tuple(
        LayerRecord(
            name=kernel.name,
            shape=kernel.shape,
            block=kernel.spec.linear.block,
            density=kernel.density,
            kernel=kernel.workload.key(),
            schedule=kernel.spec.schedule,
            note=kernel.reason,
        )
        for kernel in lowered.kernels
    )
    described = {
        name: describe_parameter(tensor, lowered.parameters[name], lowered.roles.get(name, "values"))
        for name, tensor in parameters.items()
    }
    tuning = {name: tuple(map(_tuning, records)) for name, records in replayed.applied.items()}
    return LevelRecord(
        isa.name, isa.features, library_name(isa.name), described, layers, tuning, program, replayed.plan.run_tokens
    )


def _tuning(record: Record) -> TuningRecord:
    gain = record.gain
    return TuningRecord(record.key, Workload.parse(record.key).tokens, gain.median, gain.low, gain.high, record.peak[0])


def _manifest(model: EncoderModel, levels: tuple[LevelRecord, ...], lowered: Lowered, provenance: dict[str, Any]) -> Manifest:
    """The manifest of `levels`; inputs, outputs and limits are those of any of them, `lowered`."""
    config, types = model.config, model.embeddings.token_type
    return Manifest(
        levels=levels,
        inputs=("input_ids", "attention_mask", "token_type_ids") if types is not None else ("input_ids", "attention_mask"),
        outputs=tuple(Output(**dataclasses.asdict(output)) for output in lowered.outputs),
        limits=Limits(
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            max_tokens=lowered.max_tokens,
            token_types=1 if types is None else len(types),
        ),
        architecture=config.architecture,
        head=_head(model.head),
        labels=config.labels,
        provenance=provenance,
    )


def _head(head: Head) -> manifest.Head:
    """What the outputs of `head` mean."""
    if head.kind == "none":
        return manifest.Head("embedding", pooling=head.pooling, normalized=head.normalize)
    return manifest.Head(head.kind, problem_type=head.problem)


def _earlier(file: Path) -> dict[str, Any]:
    """What the provenance.json `file` of a checkpoint says of it, its earlier steps above all."""
    recorded: dict[str, Any] = read_json(file, dict)
    steps = recorded.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise InvalidModel(f"{file}: steps must be a list of objects; remove the file, or copy it again")
    return recorded


def _provenance(source: str | Path | EncoderModel, model: EncoderModel, settings: dict[str, Any]) -> dict[str, Any]:
    """The steps that led to the artifact: those recorded beside the checkpoint, then this one."""
    step: dict[str, Any] = {
        "step": "compile",
        "settings": settings,
        "notes": list(model.notes),
        "versions": {name: version(name) for name in ("tilewright", "apache-tvm", "apache-tvm-ffi", "numpy")},
    }
    earlier: dict[str, Any] = {}
    if not isinstance(source, EncoderModel):
        path = Path(source)
        # the folders of sentence-transformers modules are named 1_Pooling
        found = [path] if path.is_file() else sorted([*path.glob("*"), *path.glob("*_*/*")])
        files = [file for file in found if file.suffix in _CHECKPOINT and file.is_file()]
        step["input_sha256"] = {str(file.relative_to(path)) if file != path else file.name: sha256(file) for file in files}
        recorded = path / "provenance.json"
        if recorded.is_file():
            earlier = _earlier(recorded)
    return earlier | {"steps": [*earlier.get("steps", []), step]}
