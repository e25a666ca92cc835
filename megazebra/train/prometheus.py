"""The latest metrics at an address that Prometheus asks, in its text format 0.0.4. Rank 0 only.

Every number of the newest row of each kind is a gauge: megazebra_train_loss, megazebra_validation_loss{source="books"},
megazebra_evaluation_loss{task="text",length="4096"}, megazebra_train_comm_bytes_by{name="tp.all_reduce"}. All have the
labels `run` (its folder) and, in a run of stages, `stage`. megazebra/train/metrics.py says what the fields mean.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple

from megazebra.config.schema import Config, PrometheusConfig
from megazebra.train.metrics import identity_of

Row = dict[str, Any]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SCRAPE_TIMEOUT_S = 10
_POLL_S = 0.1  # how soon it ends when it is to


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


class Prometheus:
    """An HTTP server in a thread of its own, from construction to `close`.

    Raises ValueError, naming the key, when it cannot listen at logging.prometheus.host and port.
    """

    def __init__(self, config: Config) -> None:
        self._run = {"run": Path(config.run.dir).name}
        self._newest: dict[tuple[Any, ...], Row] = {}
        self._skipped = 0
        self._last_row_at = 0.0
        self._lock = threading.Lock()
        self._server = _listen(config.logging.prometheus, self.exposition)
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(_POLL_S,), name="prometheus", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        with self._lock:
            self._newest[(row["kind"], *identity_of(row).items())] = dict(row)
            self._skipped += "skipped" in row
            self._last_row_at = time.time()

    def close(self, failed: bool) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def exposition(self) -> str:
        """What a scrape is answered."""
        with self._lock:
            rows, skipped, last_row_at = list(self._newest.values()), self._skipped, self._last_row_at
        samples = [Sample(name, self._run | labels, value) for row in rows for name, labels, value in samples_of(row)]
        last = Sample("megazebra_last_row_timestamp_seconds", self._run, last_row_at)
        refused = Sample("megazebra_skipped_updates_total", self._run, skipped)
        lines = [
            *_family(last.name, "gauge", "Unix time of the newest row; 0 before the first.", [last]),
            *_family(refused.name, "counter", "Updates the guard refused since the stage began here.", [refused]),
            *_gauges(samples),
        ]
        return "\n".join(lines) + "\n"


def samples_of(row: Row) -> Iterator[Sample]:
    """A row's numbers; of a field with entries by name, each entry's."""
    labels = {name: str(value) for name, value in identity_of(row).items()}
    if row.get("stage"):
        labels["stage"] = row["stage"]
    for field, value in row.items():
        if field in ("kind", *labels):
            continue
        metric = f"megazebra_{row['kind']}_{field}"
        if _is_number(value):
            yield Sample(metric, labels, value)
        elif isinstance(value, dict):
            for name, entry in value.items():
                numbers = entry.items() if isinstance(entry, dict) else [("", entry)]
                for what, number in numbers:
                    if _is_number(number):
                        yield Sample(f"{metric}_{what}_by" if what else f"{metric}_by", labels | {"name": name}, number)


def _gauges(samples: Iterable[Sample]) -> Iterator[str]:
    """Each metric's samples together, as the format wants them."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    for name, family in by_name.items():
        kind, _, field = name.removeprefix("megazebra_").partition("_")
        yield from _family(name, "gauge", f"Newest {field} of the {kind} rows of metrics.jsonl.", family)


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    yield from (_line(*sample) for sample in samples)


def _line(name: str, labels: dict[str, str], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Server(ThreadingTCPServer):  # http.server's own would ask for the machine's name, which may take long
    allow_reuse_address = True  # the next stage listens where the last one did
    daemon_threads = True  # a scrape that hangs does not keep the run from ending

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is its own affair, not the log's."""


def _listen(config: PrometheusConfig, exposition: Any) -> _Server:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SCRAPE_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "the metrics are at /metrics")
                return
            body = exposition().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are no news."""

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET

    try:
        server = Server((config.host, config.port), Handler)
    except OSError as error:
        raise ValueError(
            f"logging.prometheus.port={config.port}: cannot listen at {config.host} ({error.strerror or error}); set "
            "another logging.prometheus.port, or logging.prometheus.enabled=false"
        ) from error
    # What 'localhost' stands for is the machine's to say.
    if not config.expose and not ip_address(server.server_address[0]).is_loopback:  # type: ignore[arg-type]
        server.server_close()
        raise ValueError(
            f"logging.prometheus.host={config.host} is {server.server_address[0]!r} here, no loopback address; "
            "set logging.prometheus.host=127.0.0.1"
        )
    return server
