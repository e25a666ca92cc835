"""Checkpoints laid out anew, and those of other trainers read.

python tools/reshard_checkpoint.py runs/zebra runs/zebra-tp4 --tensor 4 --data 2
python tools/reshard_checkpoint.py llama-zero models/llama --model Llama-2-7b-hf
python tools/reshard_checkpoint.py megatron-llama models/llama --model.vocab_size=32000

From a training checkpoint of ours (a run's latest, or one of its step_...) to a run folder in which every rank of
another layout finds its own files: the run that is started with --run.dir=OUTPUT resumes from it, bit for bit as from
the original, and no rank opens another's files. --data counts the ranks that ZeRO shards over: data- times
context-parallel.

From folders of DeepSpeed's ZeRO 1, 2 and 3 and of Megatron (format "torch"; Megatron-LM, Megatron-DeepSpeed,
Megatron-core; any number of tensor-parallel ranks, no pipeline) with models like Llama to a model folder, to train on
(--checkpoint.init_from) or to export (tools/convert_hf.py export). What a pickle in them wants to be called is not.

Needs the memory of the largest weight, whatever the model's size. Folders appear complete or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byte_bar import byte_bar

from megazebra.errors import UserError
from megazebra.launch import readable_errors

if TYPE_CHECKING:
    from megazebra.checkpoint.reader import TrainingCheckpoint
    from megazebra.foreign.shards import ShardedModel

DTYPES = ("bfloat16", "float16", "float32")
_FOR_OURS, _FOR_OTHERS = ("tensor", "data", "zero_stage"), ("model", "dtype", "with_optimizer", "overrides")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    from megazebra.checkpoint.reader import TrainingCheckpoint  # takes seconds: after mistakes above have shown
    from megazebra.foreign.opening import read_foreign

    theirs = read_foreign(options.input)
    _refuse(options, _FOR_OTHERS if theirs is None else _FOR_OURS)
    if theirs is None:
        reshard(TrainingCheckpoint.open(options.input), options)
    else:
        read_into_model_folder(theirs, options)


def reshard(checkpoint: TrainingCheckpoint, options: argparse.Namespace) -> None:
    from megazebra.checkpoint.fragments import MAX_FILE_BYTES
    from megazebra.checkpoint.reshard import Reshard

    if options.tensor is None or options.data is None:
        raise UserError(f"{options.input} is a training checkpoint of ours; give the layout it gets: --tensor, --data")
    resharding = Reshard(checkpoint, options.output, options.tensor, options.data, options.zero_stage)
    resharding.check_absent()
    there, here = checkpoint.layout, resharding.layout
    print(
        f"{checkpoint.folder}: step {checkpoint.progress['step']:,}, {len(checkpoint.names)} weights, written by "
        f"tp {there['tensor']} x cp {there['context']} x dp {there['data']}, ZeRO-{there['zero_stage']}"
    )
    print(f"  to {resharding.folder}: tp {here['tensor']} x {here['data']} ranks, ZeRO-{here['zero_stage']}")
    total = resharding.total_bytes()
    if options.dry_run:
        print(f"{total:,} bytes would be written; nothing was, and no checksum was compared (--dry-run)")
        return
    with byte_bar("verifying", sum(checkpoint.files.values())) as advance:
        checkpoint.verify(advance)
    with byte_bar("resharding", total) as advance:
        resharding.write(options.max_file_bytes or MAX_FILE_BYTES, advance)
    print(f"wrote {total:,} bytes")


def read_into_model_folder(sharded: ShardedModel, options: argparse.Namespace) -> None:
    import torch

    from megazebra.checkpoint.merge import Merge
    from megazebra.checkpoint.new_folder import check_absent
    from megazebra.checkpoint.weight_files import MAX_FILE_BYTES
    from megazebra.foreign.opening import model_of, whole_weights

    model = model_of(sharded, options.model, options.overrides)
    weights = whole_weights(sharded, model)
    dtype = getattr(torch, options.dtype) if options.dtype else weights.dtype(weights.names[0])
    if options.with_optimizer and weights.states(weights.names[0]) == ["master"]:
        raise UserError(f"{sharded.description} has no optimizer state that we read; leave --with-optimizer out")
    merge = Merge(weights, options.output, dtype, options.with_optimizer)
    for folder in merge.folders():
        check_absent(folder)
    print(f"{sharded.description}: step {sharded.progress['step']:,}, {len(weights.names)} weights")
    print(f"  pattern {model.pattern} over {model.num_layers} layers, vocabulary of {model.vocab_size:,} tokens")
    for folder, state in merge.folders().items():
        what = f"weights in {str(dtype).removeprefix('torch.')}" if folder == options.output else f"{state} in float32"
        print(f"  to {folder}: {what}")
    total = merge.total_bytes()
    if options.dry_run:
        print(f"{total:,} bytes would be written; nothing was (--dry-run)")
        return
    with byte_bar("reading", total) as advance:
        merge.write(options.max_file_bytes or MAX_FILE_BYTES, advance)
    print(f"wrote {total:,} bytes")


def _refuse(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UserError for options that this kind of input does not read."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False and value != []:  # 0 is a value
            option = options.overrides[0] if name == "overrides" else f"--{name.replace('_', '-')}"
            kind = "a training checkpoint of ours" if names is _FOR_OTHERS else "a folder of another trainer's"
            raise UserError(f"{option} is not read: {options.input} is {kind}; leave it out")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("input", metavar="INPUT", type=Path, help="checkpoint to read")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to make")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument(
        "--max-file-bytes", type=int, metavar="N",
        help="size of a file; one larger weight has a file of its own (default: 2 GiB, of a model folder 5 GB)",
    )  # fmt: skip
    ours = parser.add_argument_group("from a training checkpoint of ours")
    ours.add_argument("--tensor", type=int, metavar="T", help="tensor-parallel size of the layout")
    ours.add_argument("--data", type=int, metavar="D", help="its data- times context-parallel size")
    ours.add_argument(
        "--zero-stage", type=int, choices=(0, 1, 2, 3), help="its ZeRO stage (default: that of the checkpoint)"
    )
    theirs = parser.add_argument_group(
        "from a folder of another trainer's", "--model.KEY=VALUE changes a key of the model's configuration"
    )
    theirs.add_argument(
        "--model", type=Path, metavar="PATH",
        help="what the model is: a YAML file of ours, a Hugging Face folder (default: the options that Megatron saved)",
    )  # fmt: skip
    theirs.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    theirs.add_argument(
        "--with-optimizer", action="store_true", help="fp32 master weights and moments too, in folders beside OUTPUT"
    )
    options, rest = parser.parse_known_args(arguments)
    options.overrides = [argument for argument in rest if argument.startswith("--model.")]
    if strange := [argument for argument in rest if argument not in options.overrides]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    return options


if __name__ == "__main__":
    with readable_errors():
        main()
