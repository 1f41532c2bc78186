"""Step time and memory of training against a plain re-statement of the published step, on the same weights.

Makes a mid-size LLaVA-NeXT with random weights (``random_model.py``) and runs the same steps of 24 NLI-like triplets in
both ways, each in a process of its own, in turns:

- *published*: as ft_llm.py of kongds/E5-V: LoRA on the causal language model, the three columns concatenated, padded on
  the left to a multiple of 8, logits and all layers' states computed, cross entropy over cosines. (Its mask is put
  right here, so that both compute the same loss, and rotary positions make the padding on the left harmless.)
- *ours*: the model, collator and loss of training/train_nli.py.

Both: float32, LoRA of rank 64 on all linear layers, no dropout, activation checkpointing, AdamW.

    OMP_NUM_THREADS=2 python benchmarks/train_speed.py       # writes benchmarks/results/train_speed.json

With ``--images`` the steps are those of ``image_steps.py``: 12 pairs of an image with a text and an image, against
plain sentence-transformers. The number says how many rows share their images::

    OMP_NUM_THREADS=1 python benchmarks/train_speed.py --images 2 --steps 1      # …/train_speed_images_2.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_steps
import torch
from random_model import draw_triplet, make_checkpoint

OUT = Path(__file__).parent / "results" / "train_speed.json"
ROWS = 24  # ft_llm.py: micro_batch_size
RANK, ALPHA, LEARNING_RATE, MAX_TOKENS = 64, 16, 4e-4, 32

Step = Callable[[Any], float]


def triplets(steps: int) -> list[list[dict[str, str]]]:
    """Batches of NLI-like triplets, one more to warm up."""
    dice = random.Random(0)
    return [[draw_triplet(dice) for _ in range(ROWS)] for _ in range(steps + 1)]


def load_published(folder: Path) -> Step:
    """The published script's step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM, LlavaNextForConditionalGeneration

    from e5v_st.model.prompts_e5v import PROMPTS, render

    whole = LlavaNextForConditionalGeneration.from_pretrained(folder)
    llama = LlamaForCausalLM(whole.config.text_config)
    llama.model, llama.lm_head = whole.model.language_model, whole.lm_head
    del whole
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(llama, config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )

    def step(batch: list[dict[str, str]]) -> float:
        sentences = [row[name] for name in batch[0] for row in batch]
        cut = tokenizer(sentences, truncation=True, max_length=MAX_TOKENS, add_special_tokens=False).input_ids
        texts = [
            render(PROMPTS["text"], "llama3", tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in cut
        ]
        rows = tokenizer(texts).input_ids
        width = -(-max(map(len, rows)) // 8) * 8
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, -1]
        anchors, others = states[: len(batch)], states[len(batch) :]
        cosines = torch.nn.functional.cosine_similarity(anchors[:, None], others[None], dim=-1) / 0.05
        loss = torch.nn.functional.cross_entropy(cosines, torch.arange(len(batch)))
        return _update(loss, optimizer)

    return step


def load_ours(folder: Path) -> Step:
    """The step of training/train_nli.py."""
    model, columns_of, loss_of, optimizer = prepare_ours(folder)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(batch: list[dict[str, str]]) -> float:
        return _update(loss_of(columns_of(batch), None), optimizer)

    return step


def prepare_ours(folder: Path, rows: int = ROWS) -> tuple[Any, Callable[[list], list[dict]], Any, Any]:
    """Returns the model of training/train_nli.py, what makes a batch's columns, its loss, and an optimizer.

    Args:
        folder: The checkpoint.
        rows: Of a batch.
    """
    from e5v_st.training.collate import make_collator
    from e5v_st.training.losses import make_loss
    from e5v_st.training.model import load_for_training
    from e5v_st.training.recipes import Settings

    torch.manual_seed(0)
    model = load_for_training(str(folder), bits=32, lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0).cpu().train()
    settings = Settings(max_tokens=MAX_TOKENS, mini_batch_size=rows)
    collator = make_collator(model, settings)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )

    def columns_of(batch: list[dict[str, str]]) -> list[dict]:
        features = collator(batch)
        return [
            {key.removeprefix(f"{name}_"): value for key, value in features.items() if key.startswith(f"{name}_")}
            for name in batch[0]
        ]

    return model, columns_of, make_loss(model, settings, rows, 1), optimizer


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


WAYS: dict[str, Callable[[Path], Step]] = {"published": load_published, "ours": load_ours}


def run_way(folder: Path, way: str, steps: int, uses: int = 0) -> dict[str, Any]:
    """Runs one way in this process: losses, seconds and MiB; the first step warms up and is not timed.

    Args:
        folder: The checkpoint.
        way: A name of ``WAYS``, or, with images, of ``image_steps.WAYS``.
        steps: The number of timed steps.
        uses: How many rows share their images; 0 for texts.
    """
    step = (image_steps.WAYS if uses else WAYS)[way](folder)
    loaded = _resident_mib()
    losses, seconds, cpu = [], [], []
    for batch in image_steps.pairs(uses, steps) if uses else triplets(steps):
        wall, own = time.perf_counter(), time.process_time()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - own)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "losses": losses,
        "seconds": seconds[1:],
        "cpu_seconds": cpu[1:],
        "step_mib": peak - loaded,
        "peak_mib": peak,
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(steps: int, rounds: int, uses: int = 0) -> dict[str, Any]:
    """Runs both ways in turns, each time in a process of its own, and puts the figures together.

    See :func:`run_way` for the arguments.
    """
    ways = image_steps.WAYS if uses else WAYS
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as parent:
        folder = make_checkpoint(Path(parent) / "model")
        for _ in range(rounds):
            for way in ways:
                command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--steps", str(steps)]
                command += ["--images", str(uses)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
    table = {
        way: {
            **{key: statistics.median(v for run in runs for v in run[key]) for key in ("seconds", "cpu_seconds")},
            **{key: statistics.median(run[key] for run in runs) for key in ("step_mib", "peak_mib")},
            "losses": runs[0]["losses"],
        }
        for way, runs in found.items()
    }
    published, ours = (table[way] for way in ways)
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python", "benchmarks/train_speed.py", *sys.argv[1:]]),
        "ways": table,
        "times_as_fast": published["seconds"] / ours["seconds"],
        "times_as_fast_cpu": published["cpu_seconds"] / ours["cpu_seconds"],
        "memory_of_a_step": ours["step_mib"] / published["step_mib"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(published["losses"], ours["losses"], strict=True)),
    }


def main() -> None:
    """Prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="pairs with images, which N rows share")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices={**WAYS, **image_steps.WAYS}, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run_way(args.folder, args.way, args.steps, args.images)))
        return
    result = measure(args.steps, args.rounds, args.images)
    print(f"{'':12}{'s a step':>10}{'CPU s':>10}{'step MiB':>10}{'peak MiB':>10}{'last loss':>12}")
    for way, row in result["ways"].items():
        figures = f"{row['seconds']:10.2f}{row['cpu_seconds']:10.2f}{row['step_mib']:10.0f}{row['peak_mib']:10.0f}"
        print(f"{way:12}{figures}{row['losses'][-1]:12.6f}")
    print(
        f"{result['times_as_fast']:.2f} times as fast (CPU time: {result['times_as_fast_cpu']:.2f}), "
        f"{result['memory_of_a_step']:.2f} of a step's memory, "
        f"losses differ by {result['largest_loss_difference']:.1e} at most"
    )
    out = args.out or (OUT.with_name(f"{OUT.stem}_images_{args.images}.json") if args.images else OUT)
    out.parent.mkdir(exist_ok=True)
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    partial.replace(out)


if __name__ == "__main__":
    main()
