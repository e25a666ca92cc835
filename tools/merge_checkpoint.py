"""Merge a training checkpoint, whatever layout wrote it, into a model folder: whole weights in safetensors files.

python tools/merge_checkpoint.py runs/zebra models/zebra                     weights, in the run's precision
python tools/merge_checkpoint.py runs/zebra/checkpoints/step_00000200 models/zebra --dtype float32
python tools/merge_checkpoint.py runs/zebra models/zebra --with-optimizer    also models/zebra-master, -exp_avg, ...

Needs the memory of the largest weight, whatever the model's size. Each folder appears complete or not at all. The
tokenizer of the run's corpus comes along where it is still there. What is written can be trained on
(--checkpoint.init_from) and exported (tools/convert_hf.py export).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from byte_bar import byte_bar

from megazebra.launch import readable_errors

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    import torch  # takes seconds: after mistakes on the command line have shown

    from megazebra.checkpoint.merge import Merge
    from megazebra.checkpoint.reader import TrainingCheckpoint
    from megazebra.checkpoint.store import CheckpointError
    from megazebra.hf.run_tokenizer import find_tokenizer

    checkpoint = TrainingCheckpoint.open(options.checkpoint)
    dtype = options.dtype or {"bf16": "bfloat16", "fp32": "float32"}[checkpoint.config.train.precision]
    tokenizer = find_tokenizer(checkpoint.config, options.tokenizer)
    merge = Merge(checkpoint, options.output, getattr(torch, dtype), options.with_optimizer, tokenizer.files)
    for folder in merge.folders():
        if folder.exists():
            raise CheckpointError(f"{folder} exists; choose another OUTPUT, or remove it first")
    step, layout = checkpoint.progress["step"], checkpoint.layout
    print(
        f"{checkpoint.folder}: step {step:,}, {len(checkpoint.names)} weights in {len(checkpoint.files)} files, "
        f"written by tp {layout['tensor']} x cp {layout['context']} x dp {layout['data']}, ZeRO-{layout['zero_stage']}"
    )
    for folder, state in merge.folders().items():
        what = f"weights in {dtype}" if folder == options.output else f"{state} in float32"
        print(f"  to {folder}: {what}")
    print(f"  {tokenizer.told}")
    total = merge.total_bytes()
    if options.dry_run:
        print(f"{total:,} bytes would be written; nothing was, and no checksum was compared (--dry-run)")
        return
    with byte_bar("verifying", sum(checkpoint.files.values())) as advance:
        checkpoint.verify(advance)
    with byte_bar("merging", total) as advance:
        merge.write(options.max_file_bytes, advance)
    print(f"wrote {total:,} bytes")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run (its latest) or one of its step_...")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the run's precision)")
    parser.add_argument(
        "--with-optimizer", action="store_true", help="fp32 master weights and moments too, in folders beside OUTPUT"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH",
        help="tokenizer.json, tokenizer.model or a Hugging Face model's folder to put beside the weights (default: the "
        "tokenizer of the run's corpus)",
    )  # fmt: skip
    parser.add_argument(
        "--max-file-bytes", type=int, default=5 * 10**9, metavar="N",
        help="size of a file of weights; one larger weight has a file of its own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with readable_errors():
        main()
