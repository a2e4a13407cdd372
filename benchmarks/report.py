"""Results as tables: on the terminal, and as docs/PERFORMANCE.md."""


def table(results: list[dict]) -> str:
    """One line a figure that stands for a claim."""
    rows = [row for result in results for row in claims(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


CLAIMS = {
    "faster_than_llava": "times faster than LLaVA",
    "cached_faster_than_llava": "times faster than LLaVA, encoder cached",
    "faster_than_onevision": "times faster than LLaVA-OneVision",
    "times_the_gemm_limit": "times the limit of the fastest matrix product",
    "share_of_the_bandwidth_limit": "of the bandwidth limit",
    "int8_over_plain": "times faster with int8",
    "memory_of_llava": "of LLaVA's peak memory",
    "mfu": "MFU",
    "mfu_logged_by_the_trainer": "MFU as the trainer logs it",
    "faster_together": "times faster together",
    "exponent": "exponent",
}


def claims(result: dict) -> list[tuple[str, str, str]]:
    name = result["measurement"]
    if "questions" in result and "amounts" not in result:
        name += f", {result['questions']}"
    if result.get("depth", 1) < 1:
        name += f" (at {result['depth']:.0%} of the layers)"
    rows = [(name, f"{result[key]:.2f}", words) for key, words in CLAIMS.items() if key in result]
    if "over_training" in result:
        rows += [(name, f"{rate:.1f}", f"times what a {stage} takes") for stage, rate in result["over_training"].items()]
    if "prefixvlm --help" in result:
        empty = result["python"]["median_s"]
        for command in ("import prefixvlm", "prefixvlm --help"):
            rows.append((command, f"{result[command]['median_s']:.3f}", f"seconds, of which {empty:.3f} Python's own"))
    return rows
