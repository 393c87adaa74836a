"""Questions per second on SQuAD v1.1, beside peers that pad: the sample's questions with their contexts, at real lengths.

    make peers                          # once
    python -m benchmarks.real_text      # DistilBERT, 80 % zero, 1 thread, batches of 1 and of 8

Ours packs the tokens of a batch. Peers run either everything padded to 384 tokens, or buckets of 128, 256 and 384: a
question goes to the smallest that holds it, and a bucket runs when it has a batch; what is left at the end moves up.
Padded to 384 every question costs the same, so that those settings run a quarter of the sample. Results go to
`.bench/results/real_text.json`, which `python -m benchmarks.report` turns into a table.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks import assets, report
from benchmarks.peers.process import Worker, WorkerError
from benchmarks.peers.table import PEERS, WORK, Peer, ours
from benchmarks.run import Case, Run, running, save_work
from tilewright.cpu import cpu_features
from tilewright.schedules.isa import resolve

LONGEST = 384
BUCKETS = (128, 256, LONGEST)
BATCHES = (1, 8)
ENGINES = ("onnxruntime fp32", "onnxruntime int8 dynamic", "deepsparse int8 4x1")
_TURNS = 8
_SEED = 0

Array = NDArray[np.int64]
Item = tuple[Array, Array]


@dataclass(frozen=True)
class Setting:
    """How an engine runs the questions: `lengths` it pads to (none: it packs), and the share of the sample it runs."""

    peer: str
    batch: int
    lengths: tuple[int, ...] = ()
    share: float = 1.0

    @property
    def label(self) -> str:
        """The engine, and what it pads to."""
        return f"{self.peer}, " + (f"padded to {'/'.join(map(str, self.lengths))}" if self.lengths else "packed")


def squad(count: int, tokenizer: Path) -> list[list[int]]:
    """Ids of `count` questions of the development set with their contexts, drawn at random, cut to LONGEST tokens."""
    pairs = [
        (qa["question"].strip(), paragraph["context"])
        for article in json.loads(assets.squad_dev().read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    encode = Tokenizer.from_file(str(tokenizer))
    encode.no_padding()
    encode.enable_truncation(LONGEST, strategy="only_second")
    return [item.ids for item in encode.encode_batch(random.Random(_SEED).sample(pairs, count))]


def pad(group: Sequence[Sequence[int]], rows: int, length: int) -> Item:
    """(ids, mask) [rows, length] of the sequences, zero where there is none; a row of padding alone attends to one token."""
    ids, mask = np.zeros((2, rows, length), np.int64)
    mask[:, 0] = 1
    for row, sequence in enumerate(group):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask


def packed(sequences: Sequence[Sequence[int]], batch: int) -> Iterator[tuple[Item, int]]:
    """Batches in the order of the questions, with the number of questions in each; no longer than their longest."""
    for start in range(0, len(sequences), batch):
        group = sequences[start : start + batch]
        yield pad(group, len(group), max(map(len, group))), len(group)


def bucketed(sequences: Sequence[Sequence[int]], batch: int, lengths: Sequence[int]) -> Iterator[tuple[Item, int]]:
    """Full batches of each length; only the last of all may hold rows of padding."""
    left: list[Sequence[int]] = []
    for shorter, length in zip((0, *lengths), lengths, strict=False):
        left += [sequence for sequence in sequences if shorter < len(sequence) <= length]
        whole = len(left) if length == lengths[-1] else len(left) // batch * batch
        for start in range(0, whole, batch):
            group = left[start : min(start + batch, whole)]
            yield pad(group, batch, length), len(group)
        left = left[whole:]


def settings(peers: Sequence[Peer], levels: Sequence[str]) -> list[Setting]:
    """All ways to run the questions."""
    return [
        *(Setting(ours(level).name, batch) for level in levels for batch in BATCHES),
        *(Setting(peer.name, batch, BUCKETS) for peer in peers for batch in BATCHES),
        *(Setting(peer.name, batch, (LONGEST,), 0.25) for peer in peers for batch in BATCHES),
    ]


class Queue:
    """The batches of a setting, as items of its worker's work, dealt out over the turns."""

    def __init__(self, setting: Setting, worker: Worker, batches: Sequence[tuple[Item, int]], first: int) -> None:
        self.setting = setting
        self.worker = worker
        self.questions = sum(count for _, count in batches)
        self.items = list(range(first, first + len(batches)))
        self.seconds = 0.0

    def turn(self, number: int) -> None:
        """Run what falls to turn `number`, after an untimed call, which brings the weights back into the caches."""
        if items := self.items[number::_TURNS]:
            self.seconds += sum(self.worker.run([items[0], *items])[1:])


def measure(run: Run, case: Case, peers: Sequence[Peer], levels: Sequence[str], count: int) -> None:
    """Start the engines, run all settings in turns, and note the questions per second."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        queues: list[Queue] = []
        sequences = squad(count, case.checkpoint(PEERS[0]).form("float") / "tokenizer.json")
        lengths = sorted(map(len, sequences))
        run.data["settings"]["tokens"] = {"median": lengths[count // 2], "mean": sum(lengths) / count, "most": lengths[-1]}
        wanted = settings(peers, levels)
        for peer in [*map(ours, levels), *peers]:
            started = run.start(peer, case, scratch, stack)
            if started is None:
                continue
            items: list[Item] = []
            for setting in (setting for setting in wanted if setting.peer == peer.name):
                part = sequences[: round(count * setting.share)]
                batches = list(
                    bucketed(part, setting.batch, setting.lengths) if setting.lengths else packed(part, setting.batch)
                )
                queues.append(Queue(setting, started[0], batches, len(items)))
                items += [item for item, _ in batches]
            run.show(case, f"prepare {peer.name}")
            try:
                started[0].work(save_work(scratch / "work.npz", items))
            except WorkerError as error:
                run.note(case, peer.name, str(error))
                queues = [queue for queue in queues if queue.worker is not started[0]]
        for number in range(_TURNS):
            for queue in list(queues):
                run.show(case, f"turn {number + 1} of {_TURNS}, {queue.setting.label}, batch {queue.setting.batch}")
                try:
                    queue.turn(number)
                except WorkerError as error:
                    run.note(case, f"{queue.setting.label}, batch {queue.setting.batch}", str(error))
                    queues.remove(queue)
        run.data["throughput"] = [result(queue) for queue in queues]


def result(queue: Queue) -> dict[str, Any]:
    """A row of the report."""
    rate = queue.questions / queue.seconds
    return {"engine": queue.setting.label, "batch": queue.setting.batch, "questions": queue.questions, "per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=192, help="best a multiple of 32: no batch is padded then")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=[peer.name for peer in PEERS], metavar="PEER")
    parser.add_argument("--levels", nargs="+", default=["avx2", "native"], help="ISA levels to compile ours for")
    parser.add_argument("--output", type=Path, default=WORK / "results" / "real_text.json")
    options = parser.parse_args()
    levels = list(dict.fromkeys(resolve(level, cpu_features()).name for level in options.levels))
    case = Case(threads=options.threads)
    with running(options.output, {"case": str(case), "questions": options.questions, "seed": _SEED}) as run:
        peers = [peer for peer in PEERS if peer.name in options.engines]
        measure(run, case, peers, levels, options.questions)
    print(report.markdown([run.data]))


if __name__ == "__main__":
    main()
