"""Results as tables, on the terminal and in docs/PERFORMANCE.md:

    python -m benchmarks.report RESULTS.jsonl [RESULTS.jsonl ...]

writes the figures of these files between the page's two marks; the words around them are written by hand.
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "PERFORMANCE.md"
START, END = "<!-- figures: written by `python -m benchmarks.report` -->", "<!-- end of figures -->"
CLAIMS = {
    "faster_than_llava": "times as fast as LLaVA",
    "cached_faster_than_llava": "times as fast as LLaVA, encoder's features from the cache",
    "faster_than_onevision": "times as fast as LLaVA-OneVision",
    "times_the_gemm_limit": "times what the fastest matrix product would take for these operations",
    "share_of_the_bandwidth_limit": "of the limit set by the bandwidth of one row times a matrix",
    "int8_over_plain": "times as fast with int8",
    "memory_of_llava": "of LLaVA's peak memory",
    "mfu": "MFU, counted here",
    "mfu_logged_by_the_trainer": "MFU, as the trainer logs it (first step included)",
    "faster_together": "times as fast together",
}


def claims(result: dict) -> list[tuple[str, str, str]]:
    """What was measured, the figure, and what it means."""
    name = result["measurement"]
    if "faster_together" in result:
        name += f", {result['questions']} asked"
    if result.get("depth", 1) < 1:
        name += f" ({_share(result['depth'])})"
    rows = [(name, f"{result[key]:.2f}", words) for key, words in CLAIMS.items() if key in result]
    rows += [
        (name, f"{rate:.0f}", f"times what the {stage} takes") for stage, rate in result.get("over_training", {}).items()
    ]
    if "amounts" in result:
        rows.append((name, f"{result['exponent']:.2f}", f"exponent; {result['marginal']:.2f} between the last two"))
    if result["measurement"] == "input pipeline":
        rows.append((name, f"{result['samples_per_second']:.0f}", "samples a second in one process"))
    if "prefixvlm --help" in result:
        for command in ("import prefixvlm", "prefixvlm --help"):
            rows.append(
                (command, f"{result[command]['median_s']:.2f}", f"s; Python alone {result['python']['median_s']:.2f}")
            )
    return rows


def table(results: list[dict]) -> str:
    """For a terminal."""
    rows = [row for result in results for row in claims(result)] or [("", "", "")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def figures(files: list[list[dict]]) -> str:
    """For the page: a section a file, with its command, device and versions."""
    return "\n".join(_section(results) for results in files)


def _section(results: list[dict]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    where = sorted({result["where"] for result in results if "," in result["where"]}, key=len)[-1]
    lines = [f"### `{results[0]['command']}`", "", f"{where} and as said; {versions}.", ""]
    if rows := [row for result in results for row in claims(result) if "amounts" not in result]:
        shown = [[name, f"**{value}**", words] for name, value, words in rows]
        lines += [markdown_table(["measured", "", ""], shown), ""]
    for result in results:
        if seconds := {
            side: values for side, values in result.items() if isinstance(values, dict) and "median_s" in values
        }:
            shown = [[side, _range(values), _further(values)] for side, values in seconds.items()]
            lines += [f"{_title(result)}:", "", markdown_table(["", "seconds, median (least to most)", ""], shown), ""]
        if "amounts" in result:
            lines += _growth(result)
    return "\n".join(lines)


def _title(result: dict) -> str:
    extras = {
        "questions": "{} questions",
        "gflop_a_step": "{:,.0f} GFLOP",
        "gemm_gflops": "matrix products reach {:,.0f} GFLOP/s",
        "megabytes_a_token": "{:,.0f} MB a token",
        "gemv_gb_per_second": "one row times a matrix reads {:.1f} GB/s",
    }
    known = [words.format(result[key]) for key, words in extras.items() if key in result]
    if "depth" in result:
        known.insert(0, _share(result["depth"]))
    return f"{result['measurement'].capitalize()} ({'; '.join([*known, result['where']])})"


def _share(depth: float) -> str:
    return f"{depth:.0%} of the layers" if depth else "one layer"


def _range(values: dict) -> str:
    return f"{values['median_s']:.3f} ({values['min_s']:.3f} to {values['max_s']:.3f}, {values['rounds']} times)"


def _further(values: dict) -> str:
    words = {
        "tokens_per_second": "{:.1f} tokens/s",
        "peak_gib": "peak {:.2f} GiB",
        "full_size_gflop": "{:,.0f} GFLOP at full size",
    }
    return ", ".join(text.format(values[key]) for key, text in words.items() if key in values)


def _growth(result: dict) -> list[str]:
    gflop = result["gflop"] or ["" for _ in result["amounts"]]
    rows = [
        [str(amount), f"{one['median_s']:.3f}", str(flops)]
        for amount, one, flops in zip(result["amounts"], result["seconds"], gflop, strict=True)
    ]
    peaks = [[f"{gib:.2f}"] for gib in result.get("peak_gib", [])]
    rows = [row + peak for row, peak in zip(rows, peaks, strict=True)] if peaks else rows
    counted = "" if result["exponent_of_flops"] is None else f"; of the operations {result['exponent_of_flops']:.2f}"
    fitted = f"exponent **{result['exponent']:.2f}**, {result['marginal']:.2f} between the last two{counted}"
    heads = [result["measurement"].removeprefix("cost by "), "seconds", "GFLOP", *(["peak, GiB"] if peaks else [])]
    return [f"{_title(result)}, {fitted}:", "", markdown_table(heads, rows), ""]


def main() -> None:
    files = [[json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()] for name in sys.argv[1:]]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{figures(files)}\n{END}{after}", encoding="utf-8")
    print(f"Saved to {PAGE}")


if __name__ == "__main__":
    main()
