"""Text from a model: a run, one of its training checkpoints, or a model folder.

python tools/generate.py runs/zebra --prompt "def main(" --max-new-tokens 100      text as it comes
python tools/generate.py models/llama                                              interactive, on a terminal
python tools/generate.py models/chat --chat --temperature 0.7 --top-p 0.9          a conversation
python tools/generate.py models/llama --prompt-file prompts.jsonl --output answers.jsonl
deepspeed --num_gpus 2 tools/generate.py models/llama --tensor 2 --prompt "Once"   or under torchrun

Prompts are read in chunks; global layers keep keys and values of all tokens, local layers of the last window only.
Speed and the size of this cache beside that of full attention are printed on stderr. Drawn tokens depend on the seed
and the prompt's number alone, not on what else is in the batch (to rounding, which differs between batches). Models
with longrope are the exception: where one row of a batch reaches beyond the original length, all are read by the long
factors.

A prompt file has one prompt on a line, or is .jsonl with {"prompt": text} or, with --chat, {"messages": [...]}. What is
written then, to --output or stdout, are lines of JSON: prompt, text, prompt_tokens, new_tokens, and ended: eos or
length.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from option_types import count

from megazebra.config.backends import attention_backend_names
from megazebra.data.prepare.encoders.encoded import is_unicode
from megazebra.durable import text_file
from megazebra.errors import UserError
from megazebra.generate.sampling import Sampling
from megazebra.launch import complete_environment, rank, readable_errors, world_size

if TYPE_CHECKING:
    from megazebra.generate.generator import Generation, Generator
    from megazebra.generate.text import Text
    from megazebra.parallel.mesh import ParallelMesh

DTYPES = ("bfloat16", "float16", "float32")
FROM_TOKENIZER = "tokenizer"
TIMEOUT_S, INTERACTIVE_TIMEOUT_S = 600.0, 7 * 24 * 3600.0  # other ranks wait while the first one's user thinks

Prompt = str | list[dict[str, str]]  # a text, or the messages of a conversation


@dataclass
class Totals:
    """What was generated, and how fast, by all calls together."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cache_bytes: int = 0
    full_attention_bytes: int = 0

    def add(self, generation: Generation) -> None:
        self.prompt_tokens += sum(generation.prompt_lengths)
        self.decoded_tokens += generation.decoded_tokens
        self.prefill_s += generation.prefill_s
        self.decode_s += generation.decode_s
        self.cache_bytes = max(self.cache_bytes, generation.cache.nbytes)
        self.full_attention_bytes = max(self.full_attention_bytes, generation.cache.full_attention_nbytes)

    def describe(self) -> str:
        decode = f", decode {self.decoded_tokens / self.decode_s:,.1f} tokens/s" if self.decode_s else ""
        return (
            f"prefill {self.prompt_tokens:,} tokens, {self.prompt_tokens / self.prefill_s:,.1f} tokens/s{decode}; "
            f"cache {self.cache_bytes:,} bytes, {self.cache_bytes / self.full_attention_bytes:.3f} of the "
            f"{self.full_attention_bytes:,} that full attention takes"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    prompts = given_prompts(options)
    complete_environment()
    if world_size() != options.tensor:
        raise UserError(
            f"{world_size()} processes were started, but --tensor is {options.tensor}; they have to be as many "
            f"(deepspeed --num_gpus {options.tensor} tools/generate.py ..., or torchrun --nproc-per-node)"
        )

    import torch  # takes seconds: after mistakes on the command line have shown

    from megazebra.generate.generator import Generator
    from megazebra.generate.loading import load_model
    from megazebra.generate.text import Text, find_tokenizer
    from megazebra.train.session import own_device

    text = Text(find_tokenizer(options.model, options.tokenizer), options.chat)
    device = own_device()
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    with tensor_parallel_ranks(options.tensor, device, TIMEOUT_S if prompts else INTERACTIVE_TIMEOUT_S) as mesh:
        model = load_model(options.model, device, getattr(torch, dtype), options.attention_backend, mesh)
        config = model.model.config
        layers = "".join("L" if spec.is_local else "G" for spec in model.model.specs)
        say(f"{options.model}: layers {layers}, {dtype}, {device.type}; {model.runtime.backend.reason}")
        session = Session(options, sampling, Generator(model), text, config.max_position_embeddings)
        if options.prompt_file:
            session.write_all(prompts)
        elif prompts:
            for number, prompt in enumerate(prompts):
                session.show(prompt, number)
        else:
            session.converse(mesh)
        if session.totals.prompt_tokens:
            say(session.totals.describe() + (f", on each of {options.tensor} ranks" if options.tensor > 1 else ""))


class Session:
    """Prompts to text with one model; every rank goes through it, the first one writes.

    trained_for: tokens that the model's position embedding is configured for.
    """

    def __init__(
        self, options: argparse.Namespace, sampling: Sampling, generator: Generator, text: Text, trained_for: int
    ) -> None:
        self.options = options
        self.sampling = sampling
        self.generator = generator
        self.text = text
        self.trained_for = trained_for
        self.totals = Totals()

    def start(self, prompts: list[Prompt], first_row: int) -> Generation:
        ids = [self.ids(prompt) for prompt in prompts]
        longest = max(map(len, ids)) + self.options.max_new_tokens
        if longest > self.trained_for:
            say(f"note: {longest:,} tokens are more than model.max_position_embeddings={self.trained_for:,}")
        return self.generator.start(
            ids, self.options.max_new_tokens, self.sampling, self.text.eos_ids, self.options.chunk, first_row
        )

    def ids(self, prompt: Prompt) -> list[int]:
        if self.options.chat is None:
            assert isinstance(prompt, str)
            return self.text.prompt(prompt)
        return self.text.conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def show(self, prompt: Prompt, number: int) -> str:
        """Print what the model says as it comes, or with --json at the end; returns it."""
        generation = self.start([prompt], number)
        stream = self.text.stream()
        as_json = self.options.json
        for (token,) in generation:
            assert token is not None
            if not as_json:
                write(stream.push(token))
        self.totals.add(generation)
        row = self.row(prompt, generation, 0)
        write(f"{json.dumps(row)}\n" if as_json else f"{stream.end()}\n")
        return row["text"]

    def write_all(self, prompts: list[Prompt]) -> None:
        """All prompts in batches, their rows of JSON in order."""
        with output(self.options.output) as file:
            for first in range(0, len(prompts), self.options.batch_size):
                batch = prompts[first : first + self.options.batch_size]
                generation = self.start(batch, first)
                for _ in generation:
                    pass
                self.totals.add(generation)
                for place, prompt in enumerate(batch):
                    file.write(json.dumps(self.row(prompt, generation, place)) + "\n")
                file.flush()

    def converse(self, mesh: ParallelMesh) -> None:
        """Prompts from the terminal, until its end; with a chat template each with all that was said before."""
        from megazebra.parallel.collectives import gather_objects

        messages: list[dict[str, str]] = []
        number = 0
        while (line := gather_objects(ask() if mesh.tp.rank == 0 else None, mesh.tp)[0]) is not None:
            if not line.strip():
                continue
            if self.options.chat is None:
                self.show(line, number)
            else:
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": self.show(messages, number)})
            number += 1

    def row(self, prompt: Prompt, generation: Generation, place: int) -> dict[str, Any]:
        tokens = generation.tokens[place]
        return {
            "prompt": prompt,
            "text": self.text.decode(tokens),
            "prompt_tokens": generation.prompt_lengths[place],
            "new_tokens": len(tokens),
            "ended": "eos" if tokens[-1] in self.text.eos_ids else "length",
        }


def given_prompts(options: argparse.Namespace) -> list[Prompt]:
    """From the options; none of them where they are to be read from the terminal.

    Raises UserError naming the file and line that is no prompt.
    """
    if options.prompt is not None:
        if broken := [prompt for prompt in options.prompt if not is_unicode(prompt)]:
            raise UserError(f"--prompt {broken[0]!r} is not UTF-8; encode it so")
        return list(options.prompt)
    if options.prompt_file is None:
        # Under a launcher only the first rank may have the user's terminal.
        return [] if world_size() > 1 or sys.stdin.isatty() else [sys.stdin.read().removesuffix("\n")]
    try:
        lines = options.prompt_file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{options.prompt_file}, line {number} is not UTF-8 ({error.reason}); encode it so") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{options.prompt_file} has no prompt; write one on each line")
    if options.prompt_file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{options.prompt_file}, line {number}", options.chat) for number, line in numbered]


def _prompt_of(line: str, where: str, chat: str | None) -> Prompt:
    try:
        record = json.loads(line)
        is_text = is_unicode(json.dumps(record, ensure_ascii=False))
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply; give a prompt or messages alone") from error
    if not is_text:
        raise UserError(f"{where} has half of a surrogate pair, which is no text; mend or remove it")
    found = record.get("prompt", record.get("messages")) if isinstance(record, dict) else None
    if isinstance(found, str) and found:
        return found
    if chat is not None and isinstance(found, list) and found and all(_is_message(message) for message in found):
        return found
    wanted = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": text}' if chat else '{"prompt": text}'
    raise UserError(f"{where} is not of the form {wanted}{'' if chat else '; conversations need --chat'}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


@contextmanager
def tensor_parallel_ranks(tensor: int, device: Any, timeout_s: float) -> Iterator[ParallelMesh]:
    """The mesh of all processes, whose connections end with the block."""
    from datetime import timedelta

    import torch.distributed as dist

    from megazebra.config.schema import ParallelConfig
    from megazebra.parallel.mesh import ParallelMesh

    if tensor > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    yield ParallelMesh.build(ParallelConfig(tensor=tensor), device)
    if tensor > 1:
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Where rows go: stdout, or a file that appears when it is whole. Ranks but the first write nothing."""
    if rank() != 0:
        with open(os.devnull, "w") as nothing:
            yield nothing
    elif path is None:
        yield sys.stdout
    else:
        with text_file(path) as file:
            yield file


def ask() -> str | None:
    """A line from the user; None at the end."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and editing keys)
    try:
        return input("> ")
    except EOFError:
        print(file=sys.stderr)
        return None


def write(text: str) -> None:
    if rank() == 0:
        print(text, end="", flush=True)


def say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a run (its latest checkpoint), a checkpoint, a model"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; default: ask for them")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="many prompts, generated in batches")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where rows of --prompt-file go (default: stdout)")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="of --prompt-file (default: 8)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH",
        help="tokenizer.json, sentencepiece .model or a folder (default: the model's, else of the run's corpus)",
    )  # fmt: skip
    parser.add_argument(
        "--chat", nargs="?", const=FROM_TOKENIZER, metavar="TEMPLATE",
        help="converse, by the tokenizer's own chat template, a built-in one (chatml, llama3, ...) or a .jinja file",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share of probability (default: 1, all)")
    parser.add_argument("--top-k", type=count, metavar="K", help="tokens considered (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawn tokens (default: 0)")
    parser.add_argument(
        "--chunk", type=count, default=2048, metavar="N", help="prompt tokens at a time (default: 2048)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and cache (default: float32, on GPUs bfloat16)")
    parser.add_argument("--attention-backend", choices=("auto", *attention_backend_names()), default="auto")
    parser.add_argument("--tensor", type=count, default=1, metavar="N", help="tensor-parallel size: all processes")
    parser.add_argument("--json", action="store_true", help="rows of JSON for --prompt too")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    options = parser.parse_args(arguments)
    if options.output and not options.prompt_file:
        parser.error("--output is where rows of --prompt-file go; give that, too")
    return options


if __name__ == "__main__":
    with readable_errors():
        main()
