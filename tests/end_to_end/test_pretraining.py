"""The command a user runs: real launcher, real processes, real text (the sources of Python's asyncio)."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from support.command_line import ROOT, STEPS, arguments, finish, launch, losses, run_alone, train_rows

from megazebra.config import load_config
from megazebra.data.prepare.encoders.tokenizer import load_tokenizer
from megazebra.train.metrics import read_metrics


@pytest.fixture(scope="session")
def finished_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Tensor and sequence parallelism under ZeRO 1 on two processes, undisturbed; its folder and output."""
    run_dir = tmp_path_factory.mktemp("run")
    process = launch(29611, *arguments(corpus, run_dir, "--parallel.tensor=2", "--parallel.sequence_parallel=true"))
    output = finish(process)
    assert process.returncode == 0, output
    return run_dir, output


def test_a_person_can_follow_the_run(finished_run: tuple[Path, str]) -> None:
    run_dir, output = finished_run
    assert "layout   dp 1 x cp 1 x tp 2, ZeRO 1, fp32, sequence parallel on" in output
    assert "attention backend blocked" in output
    assert len(re.findall(r"^step +\d+/16  loss \d", output, re.MULTILINE)) == STEPS, "one line a step, from rank 0"
    assert re.search(r"train loss +\d+\.\d+", output)
    assert re.search(r"validation loss +\d+\.\d+  \(the bar to beat, a unigram model: \d", output)
    assert f"written to {run_dir}" in output
    assert "Warning" not in output


def test_the_run_generates_text(finished_run: tuple[Path, str], corpus: Path) -> None:
    """By its folder alone: weights of two ranks, and the tokenizer that its corpus names."""
    run_dir, _ = finished_run
    options = ["--prompt", "def main(", "--max-new-tokens=20", "--json"]
    done = run_alone(str(ROOT / "tools" / "generate.py"), str(run_dir), *options)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["new_tokens"] == 20 or row["ended"] == "eos"
    assert row["prompt_tokens"] == len(load_tokenizer(corpus / "tokenizer.json").encode("def main(").ids)
    assert row["text"]
    # Local layers keep their window of 16 alone.
    columns = row["prompt_tokens"] + 20 - 1
    assert f" {(columns + 3 * 16) / (4 * columns):.3f} of the " in done.stderr


def test_the_run_folder_holds_everything(finished_run: tuple[Path, str]) -> None:
    run_dir, _ = finished_run
    rows = train_rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    documented = {
        "step", "tokens", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s", "flops_per_s", "mfu",
        "comm_bytes", "peak_memory_bytes", "data_wait_s",
    }  # fmt: skip
    assert all(documented <= row.keys() for row in rows)
    assert rows[-1]["tokens"] == STEPS * 4 * 64
    # Single batches of 256 tokens scatter by some tenths; it began at ln(512) = 6.24.
    assert sum(row["loss"] for row in rows[-4:]) / 4 < rows[0]["loss"] - 0.1
    assert rows[0]["mfu"] is None, "no peak is known for a CPU"
    assert rows[0]["comm"]["tp.all_gather"]["calls"] > 0
    assert rows[0]["comm_bytes"] == sum(entry["bytes"] for entry in rows[0]["comm"].values())
    validation = [row["step"] for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "validation"]
    assert validation == [8, 16]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000016\n"


def test_the_resolved_configuration_reloads_to_itself(finished_run: tuple[Path, str]) -> None:
    run_dir, _ = finished_run
    config = load_config(run_dir / "config.yaml", [])
    assert config.parallel.tensor == 2
    assert config.model.vocab_size == 512
    index = json.loads((run_dir / "checkpoints" / "step_00000016" / "index.json").read_text())
    assert index["config"] == config.model_dump(mode="json")


@pytest.mark.slow
def test_killing_a_rank_ends_the_run_at_once_and_resuming_loses_nothing(
    corpus: Path, finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    layout = ["--parallel.tensor=2", "--parallel.sequence_parallel=true"]
    process = launch(29612, *arguments(corpus, tmp_path, *layout))
    assert process.stdout is not None
    head: list[str] = []
    for line in process.stdout:
        head.append(line)
        if line.startswith("step  7/"):
            break
    else:
        pytest.fail("".join(head))
    killed_at = time.monotonic()
    os.kill(_rank_pid(process, rank=1), signal.SIGKILL)
    output = "".join(head) + finish(process, timeout=60)
    assert time.monotonic() - killed_at < 20, "the launcher must notice within seconds"
    assert process.returncode != 0
    assert "exits with return code = -9" in output or "lost the connection to another rank" in output

    resumed = launch(29613, *arguments(corpus, tmp_path, *layout))
    output = finish(resumed)
    assert resumed.returncode == 0, output
    assert "resumed  after step 4" in output
    assert losses(tmp_path) == losses(finished_run[0]), "every loss, bit for bit"


def test_a_run_can_begin_with_the_weights_of_another(
    corpus: Path, finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir, _ = finished_run
    few = ["--train.steps=2", "--schedule.warmup_steps=1", "--model.pattern=LLLG", "--validation.interval=0"]
    done = run_alone(*arguments(corpus, tmp_path, *few, f"--checkpoint.init_from={run_dir}"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"weights  {run_dir}/checkpoints/step_00000016" in done.stdout
    assert "  model.pattern was GLLL, is LLLG now" in done.stdout
    # Where that run ended, not at ln(512) = 6.24; another place of the global layer costs little.
    assert losses(tmp_path)[0][1] < losses(run_dir)[0][1] - 0.1


def _rank_pid(launcher: subprocess.Popen[str], rank: int) -> int:
    """Process id of a rank, found among the launcher's group by its own argument."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if os.getpgid(int(folder.name)) == launcher.pid and f"--local_rank={rank}".encode() in command:
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_one_process_needs_no_launcher_and_a_finished_run_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    args = arguments(corpus, tmp_path, "--train.steps=3")
    first = run_alone(*args)
    assert first.returncode == 0, first.stderr
    before = losses(tmp_path)
    again = run_alone(*args)
    assert again.returncode == 0, again.stderr
    assert "nothing to do: train.steps=3 are made; raise it to go on" in again.stdout
    assert losses(tmp_path) == before


def test_zero_3_in_bf16_with_a_users_deepspeed_file_and_trackers(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": false}}')
    result = run_alone(
        *arguments(
            corpus, tmp_path / "run", "--train.steps=3", "--train.precision=bf16", "--parallel.zero_stage=3",
            "--logging.tensorboard=true", "--logging.wandb.enabled=true",
            "--deepspeed_config", str(tmp_path / "ds.json"), "--local_rank=0",
        ),
        WANDB_MODE="offline",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ZeRO 3, bf16" in result.stdout
    assert "MA " not in result.stdout, "DeepSpeed's memory tables are not for users"
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data.path=nowhere/train"], r"data.path.*nowhere/train.*does not exist.*tools/preprocess_data.py"),
        (["--model.pattern=GLLLL"], r"model.pattern.*5 symbols.*num_layers=4"),
        (["--model.window=0"], r"model.window=0"),
        (["--parallel.tensor=3"], r"parallel.tensor"),
        (["--data.seq_len=128"], r"data.seq_len.*model.max_position_embeddings"),
        (["--parallel.tensor=2"], r"world size 1"),
        (["--train.attention_backend=blokced"], r"blokced.*blocked"),
        (["--train.attention_backend=flash"], r"flash"),
        (["--model.windw=3"], r"unknown key 'model.windw'; did you mean 'model.window'\?"),
        (["--model.vocab_size=100"], r"vocab"),
    ],
)
def test_mistakes_end_in_one_readable_message(corpus: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    result = run_alone(*arguments(corpus, tmp_path / "run", *changes))
    assert result.returncode == 2
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_an_empty_corpus_is_named(corpus: Path, tmp_path: Path) -> None:
    """Megatron's format allows a corpus without a document: header, no sequence, one document boundary."""
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 0, 1)
    (tmp_path / "empty.idx").write_bytes(header + struct.pack("<q", 0))
    (tmp_path / "empty.bin").write_bytes(b"")
    result = run_alone(*arguments(corpus, tmp_path / "run", f"--data.path={tmp_path}/empty"))
    assert result.returncode == 2
    assert re.search(r"error: .*empty.* (empty|no tokens)", result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


def test_another_configuration_does_not_continue_a_run(
    corpus: Path, finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir, _ = finished_run
    before = sorted(path.name for path in run_dir.rglob("*"))
    result = run_alone(*arguments(corpus, run_dir, "--model.ffn_hidden_size=96"))
    assert result.returncode == 2
    assert "model.ffn_hidden_size=64 there, 96 here" in result.stderr
    assert sorted(path.name for path in run_dir.rglob("*")) == before
    assert load_config(run_dir / "config.yaml", []).model.ffn_hidden_size == 64


def test_a_disk_that_fills_while_saving(corpus: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the system refuses the write in the middle of the file."""
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = run_alone("-c", code, *arguments(corpus, tmp_path))
    assert result.returncode == 2, result.stderr
    assert re.search(r"error: cannot write .*step_00000004: rank 0: .*[Ff]ile too large", result.stderr), result.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []
    # Training goes on beside the writing, until it is noticed that it failed.
    assert 4 <= len(train_rows(tmp_path)) < 8, "what was measured is kept, and the next save is not reached"
