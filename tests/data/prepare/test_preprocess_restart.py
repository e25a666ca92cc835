"""The same bytes whatever the workers, and whoever is killed on the way."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encode_task import Sizes
from megazebra.data.prepare.encoders.tokenizer import load_tokenizer
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.open_encoder import EncoderOptions, open_encoder
from megazebra.data.prepare.parts import PartWriter
from megazebra.data.prepare.preprocess import preprocess

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
ROOT = Path(__file__).parents[3]
WORDS = ["zebra", "giraffe", "größer", "日本", "def f(x):", "\n", "return", "0"]
SMALL = Sizes(task=30_000, part=8_000, batch=2_000, process=1)


def text(n: int) -> str:
    choose = random.Random(n)
    return " ".join(choose.choices(WORDS, k=choose.randrange(20, 200)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Texts, a file of lines to be cut, a compressed one, and what has to be left out of them."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "files").mkdir()
    for n in range(60):
        (folder / "files" / f"{n:02}.txt").write_text(text(n))
    (folder / "files" / "latin.txt").write_bytes("größer".encode("latin-1"))
    lines = [json.dumps({"text": text(n)}).encode() + b"\n" for n in range(100, 400)]
    (folder / "a.jsonl").write_bytes(b"".join([*lines[:150], b'{"text": ""}\n']))
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[150:])))
    return folder


def job(source, output, **changes):
    options = {"encoder": EncoderOptions(tokenizer=""), "train_tokenizer": 300, "validation_share": 0.1}
    return Preprocessing(inputs=(str(source),), output=str(output), sizes=SMALL, **{**options, **changes})


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """Report and files of a build by one worker in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return preprocess(job(source, folder)), content(folder)


def test_every_document_is_there_once_and_in_order(undisturbed, tmp_path):
    report, files = undisturbed
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    order = [*range(100, 250), *range(60), *range(250, 400)]  # a.jsonl, files, z.jsonl.gz
    documents = {}
    for name in ("train", "validation"):
        corpus = Corpus(tmp_path / name)
        corpus.verify()
        documents[name] = [tokenizer.decode(corpus.read(i).tolist()[:-1]) for i in range(corpus.documents)]
        assert documents[name] == [found for found in map(text, order) if found in set(documents[name])]
    assert sorted(documents["train"] + documents["validation"]) == sorted(map(text, order))
    assert 15 <= len(documents["validation"]) <= 65
    assert report.skipped.counts == {"is empty": 1, "is not UTF-8": 1}


def test_workers_and_parts_decide_nothing(source, undisturbed, tmp_path):
    for workers, sizes in ((2, SMALL), (1, replace(SMALL, part=10**9, batch=10**9))):
        report = preprocess(replace(job(source, tmp_path), workers=workers, sizes=sizes, force=True))
        assert content(tmp_path) == undisturbed[1]
        assert report.skipped == undisturbed[0].skipped


def test_tasks_decide_nothing_once_there_is_a_tokenizer(source, tmp_path):
    found = []
    for sizes in (SMALL, replace(SMALL, task=10_000, part=30_000), Sizes()):
        options = {"encoder": EncoderOptions(tokenizer="bytes"), "train_tokenizer": None, "force": True}
        preprocess(replace(job(source, tmp_path, **options), sizes=sizes))
        found.append(content(tmp_path))
    assert found[0] == found[1] == found[2]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from megazebra.data.prepare.preprocess import preprocess
from megazebra.data.prepare.encode_task import Sizes
from megazebra.data.prepare.open_encoder import EncoderOptions, open_encoder
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.workers import WorkerDiedError

try:
    preprocess({job!r})
except (KeyboardInterrupt, WorkerDiedError) as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
"""


@contextlib.contextmanager
def build(job):
    """The build as a process that prints its peak memory; whatever happens, it and its workers end."""
    program = PROGRAM.format(root=str(ROOT), job=job)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in told_by_proc(pid, "cmdline")]


def is_running(pid):
    return told_by_proc(pid, "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def told_by_proc(pid, file):
    """What /proc tells of a process, nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert met


def parts_in(output):
    return len([path for path in output.glob(".parts/*/*/part.json") if path.parent.suffix != ".partial"])


def kill_one(victim, process, output, parts, delay):
    """Kill the main process or a worker when there are more than `parts` parts; whether it was still at work."""
    wait_until(lambda: parts_in(output) > parts or process.poll() is not None)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    workers = workers_of(process)
    target = {"main": [process.pid], "worker": workers}[victim]
    if not target:  # it is joining the parts
        target = [process.pid]
    os.kill(target[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    if target[-1] != process.pid and process.returncode != 0:
        assert errors.startswith("WorkerDiedError: a worker process was killed by SIGKILL")
    wait_until(lambda: not any(map(is_running, workers)))
    return True


@needs_proc
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_at_random_moments_the_next_build_goes_on(source, undisturbed, tmp_path, seed):
    choose = random.Random(seed)
    kills = 0
    for victim in choose.sample(["main", "worker", "main", "worker"], k=4):
        parts = parts_in(tmp_path)
        with build(job(source, tmp_path, workers=2)) as process:
            kills += kill_one(victim, process, tmp_path, parts + choose.randrange(8), choose.random() * 0.02)
        assert parts_in(tmp_path) >= parts or (tmp_path / "train.idx").exists()
    assert kills > 0
    with build(job(source, tmp_path, workers=2)) as process:
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), errors
    assert content(tmp_path) == undisturbed[1]


def test_parts_of_a_build_killed_at_its_very_end_go(source, undisturbed, tmp_path):
    preprocess(job(source, tmp_path))
    (tmp_path / ".parts" / "build-0" / "000000-0000").mkdir(parents=True)
    assert preprocess(job(source, tmp_path)).up_to_date
    assert content(tmp_path) == undisturbed[1]


def test_part_that_a_killed_builds_worker_finishes_first_is_taken(source, tmp_path):
    """Its process may live for another batch after the main one; what it writes is the same."""
    encoder = open_encoder(EncoderOptions(tokenizer="bytes"))

    def write(text_of_part, meanwhile=lambda: None):
        with PartWriter(tmp_path / "000000-0000", encoder) as writer:
            writer.add(encoder.encode([text_of_part]), validation=False)
            meanwhile()
            writer.publish()

    write("text", meanwhile=lambda: write("text"))
    with pytest.raises(CorpusError, match="process of an earlier build was still at work"):
        write("that other --workers cut elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["000000-0000"]
    assert Corpus(tmp_path / "000000-0000" / "train").tokens == len("text") + 1


@needs_proc
def test_interrupted_build_leaves_no_process_and_no_traceback(source, undisturbed, tmp_path):
    with build(job(source, tmp_path, workers=2)) as process:
        wait_until(lambda: parts_in(tmp_path) > 0)
        workers = workers_of(process)
        for pid in (process.pid, *workers):  # a terminal sends it to all of them
            os.kill(pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert errors in ("KeyboardInterrupt: \n", "")
    wait_until(lambda: not any(map(is_running, workers)))
    preprocess(job(source, tmp_path))
    assert content(tmp_path) == undisturbed[1]


@needs_proc
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Ninety megabytes of lines take no more than nine do, but for a buffer or two; so does joining the parts."""
    peaks = []
    for documents in (4_000, 40_000):
        path = tmp_path / f"{documents}.jsonl.gz"
        lines = (json.dumps({"text": f"{n} " * 400}).encode() + b"\n" for n in range(documents))
        path.write_bytes(gzip.compress(b"".join(lines), 1))
        encoder = EncoderOptions(tokenizer="bytes")
        request = Preprocessing(inputs=(str(path),), output=str(tmp_path / f"{documents}"), encoder=encoder)
        with build(request) as process:
            peak, errors = process.communicate(timeout=60)
        assert errors == ""
        peaks.append(int(peak) / 1024)
    assert peaks[1] - peaks[0] < 20
