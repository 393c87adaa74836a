"""Tuning logs: for each CPU a file of JSON lines that say which decisions were measured to be best, and how.

A line is a `Record`, about one workload and one bucket of tokens, or a `Machine` that records were taken on. Lines are sorted,
so that logs of two people merge. Decisions are kept as data rather than as a trace of a schedule, beside a hash of the kernels
that they turned into: a record is valid for as long as the compiler makes the same kernels of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tilewright.codegen.layer_kernels import Decisions
from tilewright.codegen.workload import Workload
from tilewright.errors import InvalidInput
from tilewright.files import parse_json, read_text
from tilewright.tuning.statistics import Gain, gain

SCHEMA = 1
"""Version of a line. Lines of other versions are kept by merges and read by nobody."""

Values = dict[str, Any]
"""Decisions, or some of them, as JSON."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Trial:
    """A candidate: what it decides otherwise than the default, and its seconds a call over the default's, taken in turns."""

    changes: Values
    ratio: Seconds

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Record:
    """What was found about one workload, bucket of tokens and number of threads.

    key: `Workload.key()`. decisions, default: in full. hash, default_hash: of the scheduled kernels (`replay.kernel_hash`).
    best_seconds, default_seconds: paired samples of a call, taken in turns. peak: share of the core's peak that best and
    default reached, on non-zeros. trials: all candidates in the order in which they were tried. machine: `Machine.name`.
    A workload whose default won has a record too, whose decisions are the default's.
    """

    key: str
    decisions: Values
    default: Values
    hash: str
    default_hash: str
    best_seconds: tuple[Seconds, ...]
    default_seconds: tuple[Seconds, ...]
    peak: tuple[Share, Share]
    machine: str
    trials: tuple[Trial, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def gain(self) -> Gain:
        """Of best over default; 1 where the default won."""
        if self.decisions == self.default:
            return Gain(1.0, 1.0, 1.0)
        return gain(self.default_seconds, self.best_seconds)

    @property
    def text(self) -> str:
        """The line."""
        return _line({"record": dataclasses.asdict(self)})


@dataclass(frozen=True)
class Machine:
    """What a record's times depend on: the facts of `machine.facts`, by name."""

    facts: dict[str, str]

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def name(self) -> str:
        """Short, and equal for equal facts only."""
        return hashlib.sha256(_line(self.facts).encode()).hexdigest()[:12]

    @property
    def text(self) -> str:
        """The line."""
        return _line({"machine": dataclasses.asdict(self)})


@dataclass(frozen=True)
class Log:
    """Records by key, machines by name, and lines of other schema versions."""

    records: Mapping[str, Record] = field(default_factory=dict)
    machines: Mapping[str, Machine] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()

    @classmethod
    def of(cls, records: Iterable[Record], machines: Iterable[Machine] = ()) -> Log:
        """A log of these; of two records of one key, the better."""
        made = cls({}, {machine.name: machine for machine in machines})
        for record in records:
            made = made.merged(cls({record.key: record}))
        return made

    def merged(self, other: Log) -> Log:
        """What both know; of two records of one key, that of the larger paired gain (then by their text, in any order)."""
        records = dict(self.records)
        for key, record in other.records.items():
            old = records.get(key)
            records[key] = record if old is None else max(old, record, key=lambda one: (one.gain.median, one.text))
        return Log(records, {**self.machines, **other.machines}, self.foreign | other.foreign)

    def by_task(self, threads: int) -> dict[str, dict[int, Record]]:
        """Key of a workload for any number of tokens (`Workload.at(0, threads)`) to its records by bucket."""
        found: dict[str, dict[int, Record]] = {}
        for key, record in self.records.items():
            if (task := Workload.parse(key)).threads == threads:
                found.setdefault(task.at(0, threads).key(), {})[task.tokens] = record
        return found

    @property
    def text(self) -> str:
        """The file: machines first, all lines sorted."""
        machines = [machine.text for _, machine in sorted(self.machines.items())]
        records = [record.text for _, record in sorted(self.records.items())]
        return "".join(f"{line}\n" for line in (*machines, *records, *sorted(self.foreign)))

    def write(self, path: Path) -> None:
        """Replace the file at `path` in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(self.text, "utf-8")
        scratch.replace(path)


def encode(decisions: Decisions) -> Values:
    """Decisions as JSON would hold them."""
    value: Values = json.loads(json.dumps(dataclasses.asdict(decisions)))
    return value


def read_log(path: Path) -> Log:
    """The log at `path`. Raises InvalidInput for what cannot be read, and for a corrupt line, which it names."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InvalidInput(f"{path} is no tuning log ({reason}); expected a file that `tilewright tune` wrote") from None
    records: dict[str, Record] = {}
    machines: dict[str, Machine] = {}
    foreign: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = _parse(line)
        except ValueError as error:
            raise InvalidInput(f"{path}, line {number}: {_reason(error)}; restore the line or remove it") from None
        if isinstance(found, Machine):
            machines[found.name] = found
        elif isinstance(found, str):
            foreign.add(found)
        elif found.key in records:
            raise InvalidInput(f"{path}, line {number}: a second record of {found.key}; use `tilewright logs merge`")
        else:
            records[found.key] = found
    return Log(records, machines, frozenset(foreign))


_RECORD, _MACHINE = TypeAdapter(Record), TypeAdapter(Machine)


def _parse(line: str) -> Record | Machine | str:
    """The content of a line; a line of another schema version as it is. Raises ValueError."""
    value = parse_json(line)
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("expected one object, record or machine")
    kind, content = next(iter(value.items()))
    if isinstance(content, dict) and isinstance(content.get("schema", SCHEMA), int) and content.get("schema", SCHEMA) != SCHEMA:
        return line
    if kind == "machine":
        return _MACHINE.validate_json(json.dumps(content), strict=True)
    if kind != "record":
        raise ValueError(f"expected a record or a machine, found {kind!r}")
    record = _RECORD.validate_json(json.dumps(content), strict=True)
    try:
        task = Workload.parse(record.key)
    except ValueError:
        return line  # a workload of another version
    if not task.tokens or not task.threads:
        raise ValueError(f"key {record.key} is for any number of tokens or threads")
    if len(record.best_seconds) != len(record.default_seconds) or not record.best_seconds:
        raise ValueError("best_seconds and default_seconds must be pairs")
    return record


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
    return f"not a line of a tuning log ({error})"


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def find_log(path: Path | None, cpu: str | None) -> Log:
    """The log to compile by: `path`, or in a directory that of LLVM CPU `cpu`; without a path the one that comes along.

    Empty where none comes along, or no CPU is known. Raises InvalidInput for a path without a log.
    """
    if path is not None and path.is_dir():
        if cpu is None:
            raise InvalidInput(f"{path} is a directory of logs; name the CPU with --tuned-for, or the file")
        path = path / log_name(cpu)
    if path is not None:
        return read_log(path)
    return Log() if cpu is None else _packaged(cpu)


def known_logs(directory: Path, but: Path) -> list[Log]:
    """The logs of other CPUs: those in `directory` less the file `but`, and those that come along."""
    paths = sorted(directory.glob("*.jsonl")) if directory.is_dir() else []
    with as_file(files("tilewright.tuning_logs")) as packaged:
        paths += sorted(packaged.glob("*.jsonl"))
        return [read_log(path) for path in dict.fromkeys(map(Path.resolve, paths)) if path != but.resolve()]


def log_name(cpu: str) -> str:
    """File name of the log of an LLVM CPU."""
    return f"{cpu}.jsonl"


@cache
def _packaged(cpu: str) -> Log:
    with as_file(files("tilewright.tuning_logs") / log_name(cpu)) as path:
        return read_log(path) if path.is_file() else Log()
