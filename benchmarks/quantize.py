"""What quantisation changes: cosines of e5v-tiny's embeddings to its own in float32, and the size of the weights.

Images and their names come from the held-out part of the small benchmark. Cosines say nothing about larger models,
which quantise better or worse: `e5v embed --quantize` prints those of the model at hand.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from e5v_st import load
from e5v_st.probes import cosines, embed_probes
from e5v_st.quantize import LIBRARIES

OUT = Path(__file__).parent / "results" / "quantize.json"


def megabytes(language_model: Any) -> float:
    """Size of the weights of the layers; scales, which are some percent, are not counted."""
    weights = language_model.layers.parameters()
    return sum(getattr(w, "qdata", w).nbytes for w in weights) / 1e6


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="e5v-tiny", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=200, help="texts, and images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args()
    where: dict[str, Any] = {"device": args.device, "model_kwargs": {"dtype": "float32"}}

    full = load(args.model, **where)
    expected, size = embed_probes(full, args.count), megabytes(full[0].model.language_model)
    rows = []
    for mode in (None, *LIBRARIES):
        # Half precision, for which nothing is needed, is what the others have to be compared with
        how = {"quantize": mode} if mode else {"model_kwargs": {"dtype": "bfloat16"}}
        model = load(args.model, **{**where, **how})
        weights = megabytes(model[0].model.language_model)  # before the first use, when bitsandbytes may repack them
        row: dict[str, Any] = {"mode": mode or "bfloat16", "layers_mb": round(weights, 2), "float32_mb": round(size, 2)}
        for kind, values in cosines(embed_probes(model, args.count), expected).items():
            row[kind] = {"mean": round(float(values.mean()), 5), "min": round(float(values.min()), 5)}
        rows.append(row)
        print(
            f"{row['mode']:9} {weights:6.2f} of {size:.2f} MB   "
            + "   ".join(f"{k}: mean {row[k]['mean']:.4f}, min {row[k]['min']:.4f}" for k in expected)
        )
    result = {
        "model": args.model,
        "count": args.count,
        "device": args.device,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "torchao")},
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
