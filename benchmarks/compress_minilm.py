"""How models/minilm-l6-80-4x1 was made: all-MiniLM-L6-v2 pruned by `obs`, then distilled from itself on SQuAD's training texts.

    python -m benchmarks.compress_minilm STATE [--block 4x1] [--sparsity 0.8] [--decay TOKENS] [--average COUNT]

STATE is a directory. It gets `pruned/` (the model after pruning), `state.pt` (everything that training needs to go on: run the
same command again after an interrupt or a kill), `log.jsonl`, `snapshots/` of the weights every few minutes, and in the end
`final/`. The learning rate is constant until `--decay` is given, or a file STATE/decay with the number of tokens over which
it falls to zero; what was there before the decay stays as `stable.pt`, from which a longer training can go on. `--average`
writes the mean of the last COUNT snapshots to `final/` instead, which needs no decay.

No labels are used. Every batch holds texts of one length, so nothing is padded. Word embeddings are frozen, dropout is off,
matrices are multiplied in bfloat16 where the CPU has instructions for it (master weights stay float32). Attention runs as
plain matrix products: torch's fused bfloat16 backward is up to 15 times slower on short texts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import assets
from tilewright.pipeline.distillation import DistillationSettings, Distiller
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning.masks import frozen, masks_of
from tilewright.pipeline.pruning.obs import ObsSettings, prune

MAX_LENGTH = 256
CALIBRATION = {"paragraphs": 700, "questions": 3000}
BATCH = {"paragraphs": 1024, "questions": 512}  # tokens of the two batches of a step
SETTINGS = DistillationSettings(attention=0.5, feed_forward=0.5, embedding=4.0)
BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
WARMUP, SAVE, SNAPSHOT, REPORT = 50, 180.0, 300.0, 25  # steps, seconds, seconds, steps


@dataclass
class Progress:
    """Where training is; `decay0` and `decayn` are the tokens at which the decay began and over which it lasts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    decay0: int | None = None
    decayn: int | None = None


class Batches:
    """Endless batches of up to `size` tokens, each of texts of one length; every epoch has an order of its own seed."""

    def __init__(self, texts: list[list[int]], size: int, seed: int, epoch: int = 0, at: int = 0) -> None:
        self.texts, self.size, self.seed, self.epoch, self.at = texts, size, seed, epoch, at
        self.order = self._order()

    def __next__(self) -> Tensor:
        if self.at == len(self.order):
            self.epoch, self.at = self.epoch + 1, 0
            self.order = self._order()
        self.at += 1
        return torch.tensor([self.texts[i] for i in self.order[self.at - 1]])

    def _order(self) -> list[list[int]]:
        source = random.Random(f"{self.seed}/{self.epoch}/{self.size}")
        indices = list(range(len(self.texts)))
        source.shuffle(indices)
        open_batches: dict[int, list[int]] = {}
        full = []
        for index in indices:
            length = len(self.texts[index])
            batch = open_batches.setdefault(length, [])
            batch.append(index)
            if (len(batch) + 1) * length > self.size:
                full.append(open_batches.pop(length))
        source.shuffle(full)
        return full


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune MiniLM by obs and distil it from itself, resumably.")
    parser.add_argument("state", type=Path, help="directory of everything that is written")
    parser.add_argument("--block", default="4x1")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--decay", type=int, help="tokens over which the learning rate falls to zero, from now on")
    parser.add_argument("--average", type=int, help="write the mean of the last snapshots to final/ instead of training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # not annotated there
    block = tuple(map(int, options.block.split("x")))
    options.state.mkdir(parents=True, exist_ok=True)
    if options.decay is not None:
        (options.state / "decay").write_text(str(options.decay))
    if options.average is not None:
        save_average(options.state, options.average)
        return
    paragraphs, questions = squad_texts()
    pruned = options.state / "pruned"
    if not pruned.exists():
        settings = ObsSettings(block=block, sparsity=options.sparsity, balanced=True)
        model = load(assets.minilm())
        prune(model, calibration(paragraphs, questions), settings, show_pruned)
        model.save_pretrained(pruned)
    Training(options, load(pruned), (paragraphs, questions), block).run()


def show_pruned(done: int, total: int) -> None:
    print(f"pruned {done} of {total} linears", flush=True)


def load(path: Path) -> Any:
    return transformers.BertModel.from_pretrained(path, add_pooling_layer=False).eval()


def save_final(model: Any, place: Path) -> None:
    model.eval().save_pretrained(place / "final")
    (place / "final" / "tokenizer.json").write_bytes((assets.minilm() / "tokenizer.json").read_bytes())


def save_average(place: Path, count: int) -> None:
    """Write the model whose weights are the mean of the last `count` snapshots; their masks are the same."""
    files = sorted((place / "snapshots").glob("*.pt"))[-count:]
    weights = [torch.load(file)["model"] for file in files]
    model = load(place / "pruned")
    model.load_state_dict({name: sum(w[name] for w in weights) / len(weights) for name in weights[0]}, strict=False)
    save_final(model, place)


def squad_texts() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the distinct paragraphs and of the questions of SQuAD's training set."""
    articles = json.loads(assets.squad_train().read_text(encoding="utf-8"))["data"]
    entries = [entry for article in articles for entry in article["paragraphs"]]
    tokenizer = Tokenizer.from_file(str(assets.minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    paragraphs = list(dict.fromkeys(entry["context"] for entry in entries))
    questions = [question["question"].strip() for entry in entries for question in entry["qas"]]
    first, second = ([encoding.ids for encoding in tokenizer.encode_batch(texts)] for texts in (paragraphs, questions))
    return first, second


def calibration(paragraphs: list[list[int]], questions: list[list[int]]) -> Iterator[dict[str, Tensor]]:
    """Batches of one length from texts spread evenly over both lists."""
    by_length: dict[int, list[list[int]]] = {}
    for texts, count in ((paragraphs, CALIBRATION["paragraphs"]), (questions, CALIBRATION["questions"])):
        for text in (texts[i * len(texts) // count] for i in range(count)):
            by_length.setdefault(len(text), []).append(text)
    for length, texts in sorted(by_length.items()):
        size = max(1, 4096 // length)
        for start in range(0, len(texts), size):
            yield {"input_ids": torch.tensor(texts[start : start + size])}


class Training:
    """Distillation of a pruned student with frozen masks; goes on from STATE/state.pt where there is one."""

    def __init__(
        self, options: argparse.Namespace, student: Any, texts: tuple[list[list[int]], list[list[int]]], block: tuple[int, ...]
    ) -> None:
        self.place: Path = options.state
        self.peak: float = options.learning_rate
        self.student, self.teacher = student, load(assets.minilm())
        self.linears = encoder_modules(student).linears
        self.masks = masks_of(self.linears, (block[0], block[1]))
        student.embeddings.requires_grad_(False)
        student.train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.progress, at = Progress(), (0, 0, 0, 0)
        if (self.place / "state.pt").exists():
            saved = torch.load(self.place / "state.pt", weights_only=False)
            student.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["opt"])
            self.progress, at = Progress(**saved["st"]), saved["data"]
        self.streams = {
            "paragraphs": Batches(texts[0], BATCH["paragraphs"], options.seed, *at[:2]),
            "questions": Batches(texts[1], BATCH["questions"], options.seed, *at[2:]),
        }
        self.means: dict[str, float] = {}

    def run(self) -> None:
        """Train until the decay is over, or a SIGINT or SIGTERM."""
        stopping: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, frame: stopping.append(received))
        progress = self.progress
        saved, shown = time.monotonic(), progress.seconds
        reported = (progress.tokens, time.monotonic())
        with frozen(self.linears, self.masks), Distiller(self.student, self.teacher, SETTINGS) as distiller:
            while not stopping and (rate := self.rate()) > 0:
                started = time.monotonic()
                self.step(distiller, rate)
                progress.seconds += time.monotonic() - started
                if progress.step % REPORT == 0:
                    self.report((progress.tokens - reported[0]) / (time.monotonic() - reported[1]), rate)
                    reported = (progress.tokens, time.monotonic())
                if time.monotonic() - saved > SAVE:
                    self.save("state.pt")
                    saved = time.monotonic()
                if progress.seconds - shown > SNAPSHOT:
                    self.snapshot()
                    shown = progress.seconds
        self.save("state.pt")
        self.snapshot()
        if not stopping:
            save_final(self.student, self.place)

    def rate(self) -> float:
        """Linear warm-up, constant, and once STATE/decay says so linear decay to zero."""
        progress, wanted = self.progress, self.place / "decay"
        if progress.decay0 is None and wanted.exists():
            self.save("stable.pt")
            progress.decay0, progress.decayn = progress.tokens, int(wanted.read_text())
        rate = self.peak * min(1.0, (progress.step + 1) / WARMUP)
        if progress.decay0 is not None and progress.decayn is not None:
            rate *= 1 - (progress.tokens - progress.decay0) / progress.decayn
        return rate

    def step(self, distiller: Distiller, rate: float) -> None:
        """One step on a batch of paragraphs and one of questions, at learning rate `rate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for kind, stream in self.streams.items():
            ids = next(stream)
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                with sdpa_kernel(SDPBackend.MATH):
                    outputs = self.student(input_ids=ids)
                loss, parts = distiller(outputs, {"input_ids": ids})
            (0.5 * loss).backward()
            self.progress.tokens += ids.numel()
            for name, part in parts.items():
                key = f"{kind}_{name}"
                self.means[key] = 0.95 * self.means.get(key, part.item()) + 0.05 * part.item()
        if not all(map(math.isfinite, self.means.values())):
            raise SystemExit(f"the loss is not finite at step {self.progress.step}; state.pt is the last good state")
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.progress.step += 1

    def report(self, speed: float, rate: float) -> None:
        """Write one line on the losses, which are running means, to log.jsonl and to stdout."""
        line = {**asdict(self.progress), "tokens_per_s": round(speed), "learning_rate": rate, **self.means}
        with (self.place / "log.jsonl").open("a") as log:
            print(json.dumps(line), file=log)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.means.items())
        print(f"{self.progress.tokens} tokens, {speed:.0f}/s, learning rate {rate:.1e}, {losses}", flush=True)

    def save(self, name: str) -> None:
        """Write all that training goes on from; the file is whole or not there."""
        data = tuple(number for stream in self.streams.values() for number in (stream.epoch, stream.at))
        weights, optimizer = self.student.state_dict(), self.optimizer.state_dict()
        torch.save({"model": weights, "opt": optimizer, "st": asdict(self.progress), "data": data}, self.place / f"{name}.part")
        (self.place / f"{name}.part").rename(self.place / name)

    def snapshot(self) -> None:
        """Keep the weights of the layers as they are now, for the curve of quality over time."""
        (self.place / "snapshots").mkdir(exist_ok=True)
        weights = {name: value for name, value in self.student.state_dict().items() if not name.startswith("embeddings.")}
        file = self.place / "snapshots" / f"{self.progress.tokens // 1000:06d}k.pt"
        torch.save({"model": weights, "st": asdict(self.progress)}, file)


if __name__ == "__main__":
    main()
