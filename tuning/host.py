"""The machine that is tuned for, reached by TVM RPC: this one, by a server pinned to cores, or servers of a tracker."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tvm import rpc
from tvm.error import RPCError

from tilewright.cpu import available_cores, listed_features
from tilewright.errors import ArtifactTargetMismatch, InvalidInput, TilewrightError
from tilewright.schedules.isa import Isa
from tilewright.tuning.peak import Meter
from tilewright.tuning.probe import DUMP, FILES, build_probe
from tilewright.tuning.records import Machine

_KEY = "tilewright"
_START = 90
"""Seconds within which a server must answer: importing TVM takes some on a busy machine."""

_ONE_CORE_PER_THREAD = -2  # AffinityMode::kSpecifyOneCorePerThread


class HostLost(TilewrightError):
    """The machine does not answer any more."""


class Host:
    """One machine. All its methods raise HostLost where it stopped answering."""

    def __init__(self, session: Any, probe: Path, threads: int) -> None:
        self._session = session
        self._loaded: dict[str, Any] = {}
        self.device = session.cpu(0)
        self._probe = self.load(probe)
        if threads > 1:
            cores = [str(core) for core in range(threads)]
            self.call(session.get_function("runtime.config_threadpool"), _ONE_CORE_PER_THREAD, threads, cores)
        else:
            self.call(session.get_function("runtime.config_threadpool"), _ONE_CORE_PER_THREAD, 1)

    @staticmethod
    def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """`function` of the machine's."""
        try:
            return function(*arguments, **named)
        except (RPCError, OSError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or ["no reason given"]
            raise HostLost(f"the machine that is measured on failed: {lines[-1]}") from None

    def load(self, library: Path) -> Any:
        """The functions of a library, loaded there once."""
        if library.name not in self._loaded:
            self.call(self._session.upload, str(library), target=library.name)
            self._loaded[library.name] = self.call(self._session.load_module, library.name)
        return self._loaded[library.name]

    def read(self, file: str) -> str:
        """One of FILES; empty where there is none."""
        self.call(self._probe["dump"], FILES.index(file))
        return bytes(self.call(self._session.download, DUMP)).decode("utf-8", "replace")

    @cached_property
    def features(self) -> frozenset[str]:
        """Of its CPU, that a process there may use, under LLVM's names."""
        listed = listed_features(self.read("/proc/cpuinfo"))
        if "amx-tile" in listed and self.call(self._probe["tiles"]) != 0:
            return frozenset(name for name in listed if not name.startswith("amx-"))
        return listed

    @cached_property
    def cpu(self) -> str:
        """LLVM's name of its CPU."""
        return str(self.call(self._session.get_function("target.llvm_get_system_cpu")))

    @cached_property
    def meter(self) -> Meter:
        """Its peak loops."""
        return Meter(self._probe, self.device, self.features)

    @cached_property
    def machine(self) -> Machine:
        """The facts that its times depend on."""
        info = self.read("/proc/cpuinfo")

        def field(name: str) -> str:
            found = re.search(rf"^{name}\s*:\s*(.*)$", info, re.MULTILINE)
            return found[1] if found else "unknown"

        caches = []
        for file in FILES:
            if file.endswith("/level") and (level := self.read(file).strip()):
                index = file.removesuffix("level")
                kind = self.read(f"{index}type").strip()
                caches.append(
                    f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') } {self.read(f'{index}size').strip()}"
                )
        guest = " ".join(self.read(f"/sys/class/dmi/id/{name}").strip() for name in ("sys_vendor", "product_name")).strip()
        return Machine(
            {
                "cpu": field("model name"),
                "llvm": self.cpu,
                "caches": ", ".join(caches),
                "microcode": field("microcode"),
                "clock": f"{max(self.meter.clock(0.002) for _ in range(5)):.1f} GHz",
                "hypervisor": (guest or "unnamed") if "hypervisor" in field("flags").split() else "none",
            }
        )

    def jiffies(self) -> tuple[int, int]:
        """Since boot: those that the hypervisor stole, and all."""
        return int(self.call(self._probe["jiffies"], 0)), int(self.call(self._probe["jiffies"], 1))


Connect = Callable[[], Host]
"""Reaches a machine; called again when one is lost."""


@contextmanager
def local(threads: int) -> Iterator[Connect]:
    """Reaches the machine that runs this, by an RPC server on its last cores; nothing is built while it measures."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise InvalidInput(f"{threads} threads were asked for; this process may use {available_cores()} cores")
    servers: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="tilewright-probe-") as scratch:
        probe = build_probe(Path(scratch))

        def connect() -> Host:
            servers.append(_serve(cores[-threads:], port := _free_port()))
            return Host(_answering("127.0.0.1", port, servers[-1]), probe, threads)

        try:
            yield connect
        finally:
            for server in servers:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _serve(cores: Sequence[int], port: int) -> subprocess.Popen[bytes]:
    """An RPC server that runs on `cores`, in a process group of its own, which Ctrl-C does not reach."""
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "tvm.exec.rpc_server"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), "--key", _KEY]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.Popen([*command, *where], start_new_session=True, **silent)  # type: ignore[call-overload,no-any-return]
    except OSError as error:
        raise TilewrightError(f"tuning needs taskset, which cannot be run ({error.strerror}); install util-linux") from None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _answering(address: str, port: int, server: subprocess.Popen[bytes]) -> Any:
    """A session of a server that may still be starting."""
    end = time.monotonic() + _START
    while time.monotonic() < end and server.poll() is None:
        with suppress(RPCError, OSError, RuntimeError):
            return rpc.connect(address, port, key=_KEY)
        time.sleep(0.2)
    raise HostLost(f"the RPC server on this machine did not answer within {_START} s")


@contextmanager
def remote(tracker: str, key: str, threads: int, isas: Sequence[Isa], timeout: int = 20) -> Iterator[Connect]:
    """The servers that registered under `key` at `tracker`, HOST:PORT: the first that has all levels of `isas`.

    When one is lost another of the same CPU takes its place. Raises InvalidInput where the tracker cannot be reached, and
    ArtifactTargetMismatch for a level that no server has.
    """
    address, _, port = tracker.rpartition(":")
    if not port.isdigit() or not address:
        raise InvalidInput(f"--rpc-tracker is {tracker!r}; expected HOST:PORT")
    cpu: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tilewright-probe-") as scratch:
        probe = build_probe(Path(scratch))

        def connect() -> Host:
            try:
                client = rpc.connect_tracker(address, int(port))
                waiting = _registered(client.summary(), key)
            except (RPCError, OSError, RuntimeError):
                raise InvalidInput(f"there is no RPC tracker at {tracker}; start one: python -m tvm.exec.rpc_tracker") from None
            if not waiting:
                raise InvalidInput(
                    f"tracker {tracker} has no server under the key {key}; start one on the machine to tune for: "
                    f"python -m tvm.exec.rpc_server --tracker {tracker} --key {key}"
                )
            seen: list[Host] = []  # kept, so that the tracker does not give one of them again
            lacks: Mapping[str, list[str]] = {}
            for _ in range(waiting):
                with suppress(RPCError, OSError, RuntimeError, HostLost):
                    seen.append(Host(client.request(key, session_timeout=0, max_retry=1), probe, threads))
                    host = seen[-1]
                    lacks = {isa.name: sorted(set(isa.features) - host.features) for isa in isas}
                    if not any(lacks.values()) and cpu in ([], [host.cpu]):
                        cpu[:] = [host.cpu]
                        return host
            missing = "; ".join(f"{name} needs {', '.join(features)}" for name, features in lacks.items() if features)
            if missing:
                raise ArtifactTargetMismatch(f"no server of {tracker} under the key {key} can run what is tuned for: {missing}")
            raise HostLost(f"no server of {tracker} under the key {key} answers" + (f" that is a {cpu[0]}" if cpu else ""))

        yield connect


def _registered(summary: Mapping[str, Any], key: str) -> int:
    """How many servers a tracker has under `key`, free or not."""
    free = int(summary["queue_info"].get(key, {}).get("free", 0))
    return max(free, sum(1 for info in summary["server_info"] if info.get("key") == f"server:{key}"))
