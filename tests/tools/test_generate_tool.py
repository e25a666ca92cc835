"""tools/generate.py from its command line: text as it comes, batches of prompts, conversations, two processes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import generate
import pytest
import torch
from hf.hf_models import save_ours
from support.command_line import ROOT, environment, run_alone

from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer
from megazebra.errors import UserError
from megazebra.generate.generator import Generator
from megazebra.generate.loading import load_model
from megazebra.generate.sampling import Sampling
from megazebra.generate.text import Text, find_tokenizer

PROMPTS = ["def main(", "größer", "x"]
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("models") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_ours(folder, vocab_size=259)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    return folder


@pytest.fixture
def run(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The tool in this process; what it prints on stdout and stderr."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))

    def run_tool(*options: object) -> tuple[str, str]:
        generate.main([str(model), "--max-new-tokens=6", *map(str, options)])
        return capsys.readouterr()

    return run_tool


def expected(folder: Path, prompts: list[str], new: int = 6, sampling: Sampling | None = None) -> list[str]:
    text = Text(find_tokenizer(folder, None))
    generator = Generator(load_model(folder, "cpu", torch.float32))
    ids = [text.prompt(prompt) for prompt in prompts]
    return [text.decode(row) for row in generator.generate(ids, new, sampling or Sampling(), text.eos_ids)]


def test_text_on_stdout_and_figures_beside(run: Run, model: Path) -> None:
    out, err = run("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--chunk=4")
    assert out.splitlines() == "\n".join(expected(model, PROMPTS[:2])).splitlines()
    assert err.startswith(f"{model}: layers GLLL, float32, cpu; attention backend blocked")
    # 9 and 8 tokens; of the longer row, 9 + 6 - 1 columns in the global layer and 5 in the others: 29 of 56.
    column = 2 * 2 * 8 * 4
    assert re.search(r"prefill 17 tokens, [\d,.]+ tokens/s, decode [\d,.]+ tokens/s; cache ", err)
    assert f"cache {29 * column:,} bytes, {29 / 56:.3f} of the {56 * column:,} that full attention takes" in err


def test_batches_of_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "", PROMPTS[2]]))
    drawn = ("--temperature=1.5", "--top-p=0.9", "--seed=4")
    made = tmp_path / "answers" / "out.jsonl"  # in a folder that there is not yet
    run("--prompt-file", tmp_path / "prompts.txt", "--output", made, "--batch-size=2", *drawn)
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["text"] for row in rows] == expected(model, PROMPTS, sampling=Sampling(1.5, 0.9, seed=4))
    assert [row["prompt_tokens"] for row in rows] == [len(prompt.encode()) for prompt in PROMPTS]
    assert {row["ended"] for row in rows} <= {"eos", "length"}
    assert all(row["new_tokens"] == 6 for row in rows if row["ended"] == "length")
    assert [path.name for path in made.parent.iterdir()] == ["out.jsonl"]

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    out, _ = run("--prompt-file", tmp_path / "prompts.jsonl", "--batch-size=3", *drawn)
    assert [json.loads(line) for line in out.splitlines()] == rows
    # A prompt of its own is the first of its file.
    out, _ = run("--prompt", PROMPTS[0], "--json", *drawn)
    assert json.loads(out) == rows[0]


def test_an_error_midway_leaves_the_old_output(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "out.jsonl").write_text("old")
    decode, calls = Text.decode, []

    def broken(self: Text, tokens: list[int]) -> str:
        calls.append(tokens)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return decode(self, tokens)

    monkeypatch.setattr(Text, "decode", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run("--prompt-file", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl", "--batch-size=1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_conversations(run: Run, model: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + '\n{"prompt": "Hi"}\n')
    out, _ = run("--prompt-file", tmp_path / "chats.jsonl", "--chat=chatml")
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["prompt_tokens"] == second["prompt_tokens"] == len("<user\nHi>\n<assistant\n")
    assert first["text"] == second["text"]
    with pytest.raises(UserError, match=r"chats.jsonl, line 1 is not of the form .*; conversations need --chat"):
        run("--prompt-file", tmp_path / "chats.jsonl")


def test_on_a_terminal_all_that_was_said_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hi", "", "And?", None])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(generate, "ask", lambda: next(lines))
    out, err = run("--chat=chatml", "--max-new-tokens=3")
    # Two prompts: the question alone, then question, answer and question.
    (tokens,) = re.findall(r"prefill (\d+) tokens", err)
    alone = len("<user\nHi>\n<assistant\n")
    answer = out.splitlines()[0]
    assert int(tokens) == 2 * alone + len(answer.encode()) + len(">\n<user\nAnd?>\n<assistant\n")


def test_without_a_terminal_stdin_is_the_prompt(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n"))
    out, _ = run("--json")
    row = json.loads(out)
    assert (row["prompt"], row["text"]) == (PROMPTS[0], *expected(model, PROMPTS[:1]))


def test_a_long_prompt_is_remarked_on(run: Run) -> None:
    _, err = run("--prompt", "x" * 70)
    assert "note: 76 tokens are more than model.max_position_embeddings=64" in err


def test_mistakes_show_before_torch_is_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n\n{"text": 1}\n')
    for options, message in {
        ("--top-p=2",): "top_p=2.0 is a share of the probability",
        ("--tensor=2", "--prompt=x"): "1 processes were started, but --tensor is 2",
        ("--prompt-file", str(tmp_path / "empty.txt")): "has no prompt; write one on each line",
        ("--prompt-file", str(tmp_path / "broken.jsonl")): "broken.jsonl, line 3 is not of the form",
        ("--prompt-file", str(tmp_path / "absent.txt")): "absent.txt",
        ("--prompt=x", "--output=y"): "--output is where rows of --prompt-file go",
        ("--chunk=0",): "argument --chunk: 0 is less than 1",
    }.items():
        check = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'tools'); import generate; "
        program = f"{check}from megazebra.launch import readable_errors\nwith readable_errors(): generate.main()"
        done = run_alone("-c", program, str(model), *options)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "a\ngrößer".encode("latin-1"), "latin.txt, line 2 is not UTF-8 .*; encode it so"),
        ("latin.jsonl", b'{"prompt": "x"}\n\n{"prompt": "\xff"}', "latin.jsonl, line 3 is not UTF-8"),
        ("deep.jsonl", b'{"prompt": "x"}\n' + b"[" * 100_000, "deep.jsonl, line 2 is nested too deeply"),
        ("half.jsonl", b'{"prompt": "a\\ud800"}', "half.jsonl, line 1 has half of a surrogate pair"),
        (
            "chat.jsonl", b'{"messages": [{"role": "user", "content": "a\\ud800"}]}',
            "chat.jsonl, line 1 has half of a surrogate pair",
        ),
    ],
)  # fmt: skip
def test_what_is_no_text_is_told_by_its_line(run: Run, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run("--prompt-file", tmp_path / name, *(["--chat=chatml"] if name.startswith("chat") else []))


def test_a_prompt_that_is_not_utf_8_is_told(run: Run) -> None:
    with pytest.raises(UserError, match=r"--prompt 'a\\udcff' is not UTF-8; encode it so"):
        run("--prompt", os.fsdecode(b"a\xff"))


def test_two_processes_are_as_one(run: Run, model: Path) -> None:
    """Started as any launcher does; the first one writes."""
    options = ["--max-new-tokens=6", "--prompt", PROMPTS[0], "--json", "--temperature=1", "--seed=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "generate.py"), str(model), "--tensor=2", *options],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                MASTER_PORT="29641",
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (first, err), (second, _) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err
    out, _ = run(*options)
    assert json.loads(first) == json.loads(out)
    assert second == ""
    assert "on each of 2 ranks" in err
