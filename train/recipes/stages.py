"""The four training stages of the paper, as data: who trains, how fast, on what, under which mask."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from prefixvlm.train.recipes.checking import STRICT, AtLeastOne, NotNegative, Positive, Share

Module = Literal["vision_tower", "projector", "language_model"]
MODULES: tuple[Module, ...] = get_args(Module)
NoiseToken = Literal["auto", "mask", "pad", "random"]


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One stage of arXiv 2503.19508, section III-D, with the learning rates of Table V and the settings of section IV-B.

    Attributes:
        number: 0 to 3.
        attention_mode: who sees whom (`PrefixVLMConfig.attention_mode`).
        text_format: `caption` learns every text token after the image; `conversation` only answers and their end tokens.
        vision_tower_lr, projector_lr, language_model_lr: a module whose rate is 0 is frozen.
        noise: share of the input text tokens replaced by a noise token, labels staying clean (Algorithm 1).
        noise_token: which one, as the paper does not name it: `mask`, added for it to tokenizer and embeddings where there
            is none; `pad`; `random`, for each another word of the vocabulary; `auto` is the mask token if there is one,
            else the padding token, else the end token.
        epochs: passes over the data.
        batch_size: samples an optimiser step, over all devices and accumulation steps.
        warmup: share of the steps in which the rates rise from 0; the paper names none.
        min_lr: where the cosine of every parameter group ends.
        weight_decay, beta1, beta2: of AdamW.
        max_grad_norm: gradients are clipped to it, 0 for no clipping; the paper clips, but does not say at what norm.
    """

    number: Annotated[int, Field(ge=0, le=3)]
    attention_mode: Literal["causal", "prefix", "prefix_all_images", "bidirectional"]
    text_format: Literal["caption", "conversation"]
    vision_tower_lr: NotNegative
    projector_lr: NotNegative
    language_model_lr: NotNegative
    noise: Share = 0.0
    noise_token: NoiseToken = "auto"
    epochs: Positive = 1.0
    batch_size: AtLeastOne = 128
    warmup: Share = 0.0
    min_lr: NotNegative = 1e-8
    weight_decay: NotNegative = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    max_grad_norm: NotNegative = 1.0

    @model_validator(mode="after")
    def _settings_go_together(self) -> "Stage":
        rates = [rate for rate in self.learning_rates.values() if rate]
        if not rates:
            raise ValueError("all learning rates are 0, so nothing would train.")
        if self.min_lr > min(rates):
            raise ValueError(f"min_lr is {self.min_lr:g}; it must be at most the smallest learning rate, {min(rates):g}.")
        if self.noise_token != "auto" and not self.noise:
            raise ValueError(f"noise_token is {self.noise_token!r}, but noise is 0; set noise to the share of the words.")
        return self

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each of `MODULES`."""
        return {module: getattr(self, f"{module}_lr") for module in MODULES}

    @property
    def trains(self) -> dict[str, bool]:
        """Whether each of `MODULES` trains."""
        return {module: rate > 0 for module, rate in self.learning_rates.items()}

    def prepare(self, model) -> None:
        """Sets the model's attention mode, and freezes and thaws its modules; of one with adapters it thaws nothing."""
        model.config.attention_mode = self.attention_mode
        has_adapters = hasattr(model, "peft_config")
        for module, trains in self.trains.items():
            if not trains or not has_adapters:
                getattr(model, module).requires_grad_(trains)


PAPER_STAGES = {
    0: Stage(0, "bidirectional", "caption", 0.0, 1e-3, 0.0, noise=0.2),
    1: Stage(1, "prefix", "caption", 0.0, 1e-3, 0.0),
    2: Stage(2, "prefix", "caption", 5e-6, 2e-3, 2e-5),
    3: Stage(3, "prefix", "conversation", 5e-6, 1e-4, 2e-5),
}
