"""Processes that fork: engines of the parent go on in the children, whatever the parent was doing. A hang fails by time-out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import os, sys, threading, time, traceback
import numpy as np
import tilewright
from tests import toy

path, threads = sys.argv[1], int(sys.argv[2])
IDS = [[1, 2, 3], [4, 5, 6]]

def right(engine):
    outputs = engine(IDS)
    for row, ids in enumerate(IDS):
        for name, expected in toy.expected(ids).items():
            np.testing.assert_array_equal(outputs[name][row], expected)
    assert engine.tokenize(["a b"])["input_ids"].tolist() == [[1, 2]]

def in_child(*jobs):
    child = os.fork()
    if child == 0:
        try:
            for job in jobs:
                job()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def wait(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

CASES = {
    "used": """
engine = tilewright.load(path, threads)
right(engine)
wait(in_child(lambda: right(engine), lambda: wait(in_child(lambda: right(engine)))))
right(engine)
""",
    "not used": """
engine = tilewright.load(path, threads)
wait(in_child(lambda: right(engine)))
right(engine)
""",
    "closed": """
right(tilewright.load(path, threads))
wait(in_child(lambda: right(tilewright.load(path, threads))))
""",
    "while other threads compute": """
engines = [tilewright.load(path, threads), tilewright.load(path, 3 - threads)]
stop = threading.Event()
def compute(engine):
    while not stop.is_set():
        engine(np.ones((60, 32), int))
        engine.tokenize(["a b c"] * 50)
workers = [threading.Thread(target=compute, args=(engine,)) for engine in engines * 2]
for worker in workers:
    worker.start()
for _ in range(10):
    wait(in_child(*(lambda engine=engine: right(engine) for engine in engines), lambda: right(tilewright.load(path, threads))))
stop.set()
for worker in workers:
    worker.join()
""",
    # a master that loads and warms up, workers that answer requests, and one that is replaced, as gunicorn --preload does
    "prefork": """
engine = tilewright.load(path, threads)
right(engine)
def serve(requests, answers):
    while data := os.read(requests, 4):
        ids = np.frombuffer(data, np.uint8).astype(int)[None]
        os.write(answers, engine(ids)["score"][0].astype(np.float32).tobytes())
def worker():
    (requests, ask), (answer, answers) = os.pipe(), os.pipe()
    child = in_child(lambda: os.close(ask), lambda: serve(requests, answers))
    os.close(requests); os.close(answers)
    return child, ask, answer
workers = [worker() for _ in range(4)]
for turn in range(40):
    if turn == 20:
        child, ask, _ = workers[0]
        os.kill(child, 9); os.waitpid(child, 0)
        right(engine)
        workers[0] = worker()
    _, ask, answer = workers[turn % 4]
    ids = [turn, turn + 1, turn + 2, 99]
    os.write(ask, bytes(ids))
    np.testing.assert_array_equal(np.frombuffer(os.read(answer, 16), np.float32), toy.expected(ids)["score"])
for _, ask, _ in workers:
    os.close(ask)
for child, _, _ in workers:
    os.kill(child, 15)
""",
    "multiprocessing": """
import multiprocessing
engine = tilewright.load(path, threads)
right(engine)
process = multiprocessing.get_context("fork").Process(target=right, args=(engine,))
process.start(); process.join()
assert process.exitcode == 0
""",
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_an_engine_goes_on_in_a_forked_child(case: str, threads: int, toy_artifact: Path) -> None:
    script = COMMON + CASES[case]
    command = [sys.executable, "-c", script, str(toy_artifact), str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
