"""The four training stages of the paper, as data: who trains, how fast, on what, under which mask."""

from dataclasses import dataclass

MODULES = ("vision_tower", "projector", "language_model")
TEXT_FORMATS = ("caption", "conversation")


@dataclass(frozen=True)
class Stage:
    """One stage of arXiv 2503.19508, section III-D, with the learning rates of Table V and the settings of section IV-B.

    Attributes:
        number: 0 to 3.
        attention_mode: who sees whom (`PrefixVLMConfig.attention_mode`).
        text_format: `caption` learns every text token after the image; `conversation` only answers and their end tokens.
        vision_tower_lr, projector_lr, language_model_lr: a module whose rate is 0 is frozen.
        noise: share of the input text tokens replaced by a noise token, labels staying clean (Algorithm 1).
        epochs: passes over the data.
        batch_size: samples an optimiser step, over all devices and accumulation steps.
        warmup: share of the steps in which the rates rise from 0; the paper names none.
        min_lr: where the cosine of every parameter group ends.
        weight_decay, beta1, beta2: of AdamW.
        max_grad_norm: gradients are clipped to it; the paper clips, but does not say at what norm.
    """

    number: int
    attention_mode: str
    text_format: str
    vision_tower_lr: float
    projector_lr: float
    language_model_lr: float
    noise: float = 0.0
    epochs: float = 1.0
    batch_size: int = 128
    warmup: float = 0.0
    min_lr: float = 1e-8
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.text_format not in TEXT_FORMATS:
            raise ValueError(
                f"Stage {self.number}: text_format is {self.text_format!r}; choose {' or '.join(TEXT_FORMATS)}."
            )
        for name in ("vision_tower_lr", "projector_lr", "language_model_lr", "min_lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"Stage {self.number}: {name} is {getattr(self, name)}; it must not be negative.")
        if not any(self.learning_rates.values()):
            raise ValueError(f"Stage {self.number}: all learning rates are 0, so nothing would train.")
        for name in ("noise", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Stage {self.number}: {name} is {getattr(self, name)}; it must lie in [0, 1).")
        if self.epochs <= 0 or self.batch_size < 1:
            raise ValueError(f"Stage {self.number}: epochs and batch_size must be positive.")

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each of `MODULES`."""
        return {module: getattr(self, f"{module}_lr") for module in MODULES}

    def prepare(self, model) -> None:
        """Sets the model's attention mode, and freezes and thaws its modules; of one with adapters it thaws nothing."""
        model.config.attention_mode = self.attention_mode
        has_adapters = hasattr(model, "peft_config")
        for module, learning_rate in self.learning_rates.items():
            if not learning_rate or not has_adapters:
                getattr(model, module).requires_grad_(learning_rate > 0)


PAPER_STAGES = {
    0: Stage(0, "bidirectional", "caption", 0.0, 1e-3, 0.0, noise=0.2),
    1: Stage(1, "prefix", "caption", 0.0, 1e-3, 0.0),
    2: Stage(2, "prefix", "caption", 5e-6, 2e-3, 2e-5),
    3: Stage(3, "prefix", "conversation", 5e-6, 1e-4, 2e-5),
}
