"""What `gossamer demo` measures, as a table and a picture for the documents.

    python benchmarks/demo_table.py [--tokens 16384] [--quick] [--write]

Runs the demo with ``--json`` in a process of its own. ``--write`` puts the table into README.md and
docs/measurements.md and draws docs/demo.svg.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

from _tables import replace

ROOT = Path(__file__).parent.parent


def table(data: dict) -> str:
    lines = [
        "| SmolLM2-135M-Instruct | format of the linear layers | MB | bits/weight | perplexity | KL to base "
        "| same top-1 | prefill tok/s | decode tok/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for v in data["variants"]:
        q, s = v["quality"], v["speed"]
        kl = "" if q["kl_mean"] is None else f"{q['kl_mean']:.4f} ± {q['kl_mean_stderr']:.1g}"
        same = "" if q["top1_agreement"] is None else f"{100 * q['top1_agreement']:.1f} %"
        lines.append(
            f"| {v['name']} | `{v['format']}` | {q['bytes'] / 1e6:.1f} | {q['bits_per_weight']:.2f} "
            f"| {q['perplexity']:.2f} | {kl} | {same} | {s['prefill_tps']:.0f} | {s['decode_tps']:.0f} |"
        )
    first = data["variants"][0]
    s = first["speed"]
    lines += [
        "",
        f"Text: {first['quality']['text']}, {first['quality']['tokens']} tokens scored "
        f"({first['quality']['protocol']}) Speed: {s['threads']} threads, {s['isa']}, "
        f"{s['bandwidth_gbps']:.0f} GB/s of memory bandwidth, load average {s['load_average']:.1f}, "
        f"Python {platform.python_version()}. The 8-bit and 4-bit rows keep the embedding in `int8/g32`. "
        "The shipped file is itself 4-bit (`uint4/g32-m(f16)`), so the base is that file dequantized, not the model as "
        "it was trained.",
    ]
    return "\n".join(lines)


def draw(data: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "gossamer"})
    names = [v["name"].split(" (")[0] for v in data["variants"]]
    panels = [
        ("size, MB", [v["quality"]["bytes"] / 1e6 for v in data["variants"]], "{:.0f}"),
        ("perplexity", [v["quality"]["perplexity"] for v in data["variants"]], "{:.2f}"),
        ("decode, tokens/s", [v["speed"]["decode_tps"] for v in data["variants"]], "{:.0f}"),
        ("prefill, tokens/s", [v["speed"]["prefill_tps"] for v in data["variants"]], "{:.0f}"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6))
    for axis, (title, values, form) in zip(axes, panels):
        bars = axis.bar(names, values, color=["#9aa5b1", "#4f83b5", "#1f4e79"], width=0.62)
        axis.bar_label(bars, [form.format(v) for v in values], padding=2, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.18 * max(values))
        axis.set_yticks([])
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--quick", action="store_true", help="512 tokens of text: does it run at all?")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.tokens = 512
    command = [sys.executable, "-m", "gossamer", "demo", "--json", "--tokens", str(args.tokens)]
    data = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    text = table(data)
    print(text)
    print(f"\n> {data['prompt']}\n{data['answer']}")
    if args.write:
        for name in ("README.md", "docs/measurements.md"):
            replace(ROOT / name, "demo", text)
        draw(data, ROOT / "docs" / "demo.svg")


if __name__ == "__main__":
    main()
