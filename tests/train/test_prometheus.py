"""The Prometheus endpoint: what a scrape reads, who may reach it, and that nothing about it ends training."""

from __future__ import annotations

import math
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from megazebra.config import Config, ConfigError, load_config
from megazebra.train.prometheus import CONTENT_TYPE, Prometheus
from megazebra.train.trackers import check_trackers, open_trackers

TRAIN = {
    "kind": "train", "step": 7, "loss": 2.5, "grad_norm": math.inf, "mfu": None, "lr": 3e-4, "stage": 'a "long" \\one',
    "comm": {"tp.all_reduce": {"calls": 4, "bytes": 1024}, "zero.all_gather": {"calls": 1, "bytes": 10}},
}  # fmt: skip
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\} (\S+)')


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def config(port: int) -> Config:
    return Config.model_validate({"run": {"dir": "runs/zebra"}, "logging": {"prometheus": endpoint(port)}})


@pytest.fixture
def server(config: Config) -> Iterator[Prometheus]:
    server = Prometheus(config)
    yield server
    server.close(failed=False)


def endpoint(port: int, **more: Any) -> dict[str, Any]:
    return {"enabled": True, "port": port, **more}


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        return answer.read().decode()


def parsed(text: str) -> dict[tuple[str, str], float]:
    """Samples by name and labels; checks the format: every family once, in one piece, after its HELP and TYPE."""
    samples: dict[tuple[str, str], float] = {}
    announced: list[str] = []
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            announced.append(line.split()[2])
            assert announced.count(announced[-1]) == 1
        elif line.startswith("# TYPE "):
            assert line.split()[2:] in ([announced[-1], "gauge"], [announced[-1], "counter"])
        else:
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found[1] == announced[-1]
            assert (found[1], found[2]) not in samples
            samples[found[1], found[2]] = float(found[3])
    return samples


def test_a_scrape_reads_the_newest_row_of_each_kind(server: Prometheus, port: int) -> None:
    assert set(parsed(scrape(port)).values()) == {0}, "before the first step"
    server.log({**TRAIN, "step": 6, "skipped": "loss is nan", "loss": math.nan, "gone": 1})
    assert math.isnan(parsed(scrape(port))["megazebra_train_loss", r'run="zebra",stage="a \"long\" \\one"'])
    server.log(TRAIN)
    server.log({"kind": "validation", "step": 6, "source": "books", "loss": 2.25, "seconds": 1.5})
    server.log({"kind": "validation", "step": 6, "source": "chats\n", "loss": 2, "seconds": 1.5})
    server.log({"kind": "data", "step": 6, "epochs": {"books": 0.25}})
    server.log({"kind": "checkpoint", "step": 6, "bytes": 12, "stall_s": 0.5, "seconds": 2.0})
    server.log({"kind": "stage", "step": 6, "name": "long", "number": 2, "config": {"train.lr": 0.1, "data.path": "x"}})
    samples = parsed(scrape(port))
    stage = r'run="zebra",stage="a \"long\" \\one"'
    assert samples["megazebra_train_loss", stage] == 2.5
    assert samples["megazebra_train_step", stage] == 7
    assert samples["megazebra_train_grad_norm", stage] == math.inf
    assert samples["megazebra_train_comm_bytes_by", f'{stage},name="tp.all_reduce"'] == 1024
    assert samples["megazebra_train_comm_calls_by", f'{stage},name="zero.all_gather"'] == 1
    assert samples["megazebra_validation_loss", 'run="zebra",source="books"'] == 2.25
    assert samples["megazebra_validation_loss", r'run="zebra",source="chats\n"'] == 2
    assert samples["megazebra_data_epochs_by", 'run="zebra",name="books"'] == 0.25
    assert samples["megazebra_checkpoint_bytes", 'run="zebra"'] == 12
    assert samples["megazebra_skipped_updates_total", 'run="zebra"'] == 1
    assert samples["megazebra_last_row_timestamp_seconds", 'run="zebra"'] > 1.7e9
    names = {name for name, _ in samples}
    assert not names & {"megazebra_train_mfu", "megazebra_train_gone", "megazebra_train_skipped"}


def test_clients_that_misbehave_disturb_nobody(
    server: Prometheus, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as silent:  # it never asks, and is there all the time
        for nonsense in (b"", b"\x00\xff\r\n\r\n", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as rude:
                rude.sendall(nonsense)  # and leaves without reading
        for method, path, status in (("GET", "/../etc/passwd", 404), ("POST", "/metrics", 501)):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=20)
            assert refused.value.code == status
            refused.value.close()
        server.log(TRAIN)
        assert "megazebra_train_loss" in scrape(port)
        silent.sendall(b"\r\n")
    assert capfd.readouterr() == ("", "")


def test_stages_listen_one_after_the_other(config: Config, port: int) -> None:
    for _ in range(2):
        trackers = open_trackers(config, 0)
        trackers.log(TRAIN)
        assert "megazebra_train_loss" in scrape(port)
        trackers.close()
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_a_taken_port_is_an_error_at_the_start(config: Config, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match=rf"^logging.prometheus.port={port}: cannot listen.*set another"):
            check_trackers(config)
        monkeypatch.setenv("RANK", "1")
        check_trackers(config)  # rank 0 alone listens


def test_only_an_explicit_key_exposes_it() -> None:
    on = ["logging.prometheus.enabled=true"]
    for host in ("127.0.0.1", "127.3.2.1", "localhost", "::1"):
        load_config(None, [*on, f"logging.prometheus.host='{host}'"])
    for host in ("0.0.0.0", "::", "10.0.0.7", "login-node", "localhost.example.org"):
        with pytest.raises(ConfigError) as refused:
            load_config(None, [*on, f"logging.prometheus.host='{host}'"])
        (problem,) = refused.value.problems
        assert "no loopback address" in problem
        assert "set logging.prometheus.host=127.0.0.1, or logging.prometheus.expose=true" in problem
        load_config(None, [*on, f"logging.prometheus.host='{host}'", "logging.prometheus.expose=true"])
    with pytest.raises(ConfigError, match=r"exposes nothing at logging.prometheus.host=127.0.0.1"):
        load_config(None, [*on, "logging.prometheus.expose=true"])


def test_a_localhost_that_is_elsewhere_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may call any of its addresses so."""
    monkeypatch.setattr("megazebra.train.prometheus.ip_address", lambda host: ip_address("10.0.0.7"))
    with pytest.raises(ValueError, match=r"no loopback address; set logging.prometheus.host"):
        Prometheus(config)


def test_evaluations_are_told_apart(server: Prometheus, port: int) -> None:
    for length, depth, loss in ((512, 0.0, 1.0), (512, 0.5, 2.0), (4096, 0.5, 3.0)):
        server.log({"kind": "evaluation", "step": 6, "task": "passkey", "length": length, "depth": depth, "loss": loss})
    samples = parsed(scrape(port))
    found = {labels: value for (name, labels), value in samples.items() if name == "megazebra_evaluation_loss"}
    assert found == {
        'run="zebra",task="passkey",length="512",depth="0.0"': 1,
        'run="zebra",task="passkey",length="512",depth="0.5"': 2,
        'run="zebra",task="passkey",length="4096",depth="0.5"': 3,
    }
