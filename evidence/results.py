"""The results of all jobs, and the names of arms, decoders and masks."""

ARM_NAMES = {
    "prefix": "all four stages",
    "without-stage-0": "without stage 0",
    "without-stage-1": "without stage 1",
    "single-stage": "one single stage",
}
DECODER_NAMES = {"neutral": "neutral prose", "human": "human captions", "both": "both kinds of captions"}
# the masks that each study compares, the paper's first
MASKS = {"easy": ("prefix", "causal"), "pairs": ("prefix", "causal", "prefix_all_images"), "ucm": ("prefix", "causal")}
MASKS |= {f"talks/{name}": MASKS["pairs"] for name in ("easy", "rad")}


class Results:
    """The results of all jobs by name (study/arm/seed), and under `run` the command, time, machine and versions."""

    def __init__(self, results: dict[str, dict]):
        self.all = results

    def arm(self, prefix: str) -> list[dict]:
        """The results of an arm, in the order of seeds."""
        found = [(int(name.rpartition("/")[2]), value) for name, value in self.all.items() if name.startswith(prefix + "/")]
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def values(self, prefix: str, key: str) -> list[float]:
        return [value[key] for value in self.arm(prefix)]

    def has(self, study: str) -> bool:
        return any(name.startswith(study + "/") for name in self.all)

    def kept(self) -> dict:
        """Everything but the loss curves, which take megabytes, and file paths of the machine."""
        kept = {name: {key: value for key, value in one.items() if key != "losses"} for name, one in self.all.items()}
        for one in kept.values():
            if "reports" in one:
                one["reports"] = {name: _numbers(report) for name, report in one["reports"].items()}
        return kept


def _numbers(report: dict) -> dict:
    sets = {writer: {k: v for k, v in one.items() if k != "file"} for writer, one in report["sets"].items()}
    return {"sets": sets, "pairs": report["pairs"]}
