"""What a PrefixVLM is: the shapes of its three parts and the attention mask that joins them.

This file travels to the Hub with every checkpoint, so it imports only transformers.
"""

import copy
import importlib
import os

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, Qwen2Config, SiglipVisionConfig

ATTENTION_MODES = ("causal", "prefix", "prefix_all_images", "bidirectional")

IMAGE_TOKEN = "<|image_pad|>"
TURN_START_TOKEN = "<|im_start|>"
TURN_END_TOKEN = "<|im_end|>"

IGNORE_INDEX = -100  # the label of a position without a target
# arguments of `save_pretrained` that only a push takes
PUSH_KWARGS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags", "token")
# arguments of `from_pretrained` that say where on the Hub a file is
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# the row of Qwen2.5's own "<|image_pad|>", which the language model never saw in text
QWEN_IMAGE_TOKEN_ID = 151655

AUTO_MAP = {
    "AutoConfig": "configuration_prefix_vlm.PrefixVLMConfig",
    "AutoModel": "modeling_prefix_vlm.PrefixVLMModel",
    "AutoModelForCausalLM": "modeling_prefix_vlm.PrefixVLMForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_prefix_vlm.PrefixVLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_prefix_vlm.PrefixVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_prefix_vlm.PrefixVLMForConditionalGeneration",  # of transformers 5
    "AutoProcessor": "processing_prefix_vlm.PrefixVLMProcessor",
}

PAPER_VISION = {  # Table IIb, SigLIP so400m
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
PAPER_TEXT = {  # Table IIa, Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],  # the end of a turn, the end of a text
}
PRESETS: dict[str, dict] = {
    # Table IV counts 18 M parameters in the projector, which a hidden layer 8960 wide gives
    "paper": {"projector_hidden_size": 8960},
    "tiny": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "text_config": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
        },
        "image_token_id": 1,
    },
}


def image_tokens(patch_grid: int, pixel_shuffle: int, mean_pooling: int) -> int:
    """P, the number of tokens that the projector makes of G x G patches.

    Raises:
        ValueError: for two compressions at once, or groups that do not divide the grid.
    """
    for name, group in (("pixel_shuffle", pixel_shuffle), ("mean_pooling", mean_pooling)):
        if not isinstance(group, int) or group < 1 or patch_grid % group:
            raise ValueError(
                f"{name} is {group!r}, which does not divide a grid of {patch_grid} x {patch_grid} patches; choose a "
                f"divisor of {patch_grid}."
            )
    if pixel_shuffle > 1 < mean_pooling:
        raise ValueError(f"pixel_shuffle is {pixel_shuffle} and mean_pooling {mean_pooling}; leave one of them at 1.")
    return (patch_grid // (pixel_shuffle * mean_pooling)) ** 2


def needs_rope_theta() -> bool:
    """transformers 4.x reads `rope_theta` and `rope_scaling`; 5.x replaced both by `rope_parameters`."""
    return not hasattr(Qwen2Config(), "rope_parameters")


def _readable_text_config(values: dict) -> dict:
    """A text configuration saved by transformers 5 in 4.x's form; without this, 4.x silently falls back to theta 10,000."""
    rope = values.get("rope_parameters")
    if rope is None or not needs_rope_theta():
        return values
    values = {key: value for key, value in values.items() if key != "rope_parameters"}
    rope = dict(rope)
    local = rope.get("sliding_attention")
    if values.get("model_type") == "gemma3_text" and local and local.get("rope_type", "default") == "default":
        values["rope_local_base_freq"] = local["rope_theta"]
        rope = dict(rope["full_attention"])
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            "This decoder has different rotary embeddings in its layers, which only transformers 5 can read; upgrade to it."
        )
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            values[name] = rope.pop(name)
    values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return values


def _sub_config(values, default_class, defaults):
    if isinstance(values, PretrainedConfig):
        return copy.deepcopy(values)  # what this class sets in it stays here
    if values is None:
        return default_class(**defaults)
    values = copy.deepcopy(values)
    model_type = values.pop("model_type", default_class.model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model of type {model_type!r}; backbones must be classes of transformers.")
    return CONFIG_MAPPING[model_type](**values)


class PrefixVLMConfig(PretrainedConfig):
    """Configuration of a vision encoder, a two-layer projector and a decoder language model.

    The defaults are the paper's pair, SigLIP so400m/14 at 224 pixels and Qwen2.5-0.5B (arXiv 2503.19508, Table II).

    Args:
        vision_config: a transformers vision configuration or its fields; `model_type` chooses the class
            (default `siglip_vision_model`).
        text_config: a transformers decoder configuration or its fields (default `qwen2`).
        attention_mode: who attends to whom, one of `causal`, `prefix` (Fig. 3b, 6b), `prefix_all_images` (Fig. 6a) and
            `bidirectional` (Fig. 3a, stage 0).
        projector_hidden_size: width between the projector's two layers; `None` takes the text width.
        projector_hidden_act: activation between them.
        image_token_id: the token that stands for one image feature in `input_ids`.
        vision_feature_layer: the encoder's hidden states that the projector reads, an index into them as in LLaVA: 0 are
            its embeddings, -1 is its last layer. Of the last layer they are what the encoder returns (in SigLIP, DINOv2
            and ViT after its final norm, in CLIP without one); of earlier ones, before any norm. Later layers do not exist.
        pixel_shuffle: s, so that s x s neighbouring patches become one image token, side by side in the projector's input.
        mean_pooling: s, so that they become one by their mean. At most one of both can be above 1.
        projector_norm: whether a LayerNorm stands before the projector, for features that no norm of the encoder's has
            passed; the paper's have.
        tie_word_embeddings: whether the language head shares its weights with the embeddings; `None` follows `text_config`,
            which holds it from then on.

    Raises:
        ValueError: for an unknown attention mode or backbone type, a layer that the encoder does not have, or patches that
            cannot be compressed as asked.
    """

    model_type = "prefix_vlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # `Trainer` gathers all other outputs from all processes, which needs equal shapes
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "token_losses"]

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        attention_mode="prefix",
        projector_hidden_size=None,
        projector_hidden_act="gelu",
        image_token_id=QWEN_IMAGE_TOKEN_ID,
        tie_word_embeddings=None,
        vision_feature_layer=-1,
        pixel_shuffle=1,
        mean_pooling=1,
        projector_norm=False,
        **kwargs,
    ):
        if attention_mode not in ATTENTION_MODES:
            raise ValueError(f"attention_mode is {attention_mode!r}; choose one of {', '.join(ATTENTION_MODES)}.")
        if not isinstance(projector_norm, bool):
            raise ValueError(f"projector_norm is {projector_norm!r}; choose true or false.")
        # sub-configurations first: the base class passes settings such as attn_implementation on to them
        if isinstance(text_config, dict):
            text_config = _readable_text_config(text_config)
        self.vision_config = _sub_config(vision_config, SiglipVisionConfig, PAPER_VISION)
        if self.vision_config.model_type == "siglip_vision_model":
            self.vision_config.vision_use_head = False  # patch features only, no pooling head
        self.text_config = _sub_config(text_config, Qwen2Config, PAPER_TEXT)
        self.attention_mode = attention_mode
        self.projector_hidden_size = projector_hidden_size
        self.projector_hidden_act = projector_hidden_act
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.pixel_shuffle = pixel_shuffle
        self.mean_pooling = mean_pooling
        self.projector_norm = projector_norm
        _ = self.num_vision_layers, self.num_image_tokens  # which check them
        if tie_word_embeddings is None:
            tie_word_embeddings = self.tie_word_embeddings
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}  # an older folder may lack some
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, repo_id: str | None = None, **kwargs):
        """Writes config.json, and the code that reads it without this package."""
        push_kwargs = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        if not __name__.startswith("transformers_modules"):  # as remote code, transformers copies the files beside this one
            importlib.import_module(".hub_export", __package__).export_code(save_directory)
        if push_to_hub:
            # only now that every file is there
            self.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **push_kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "PrefixVLMConfig":
        """The configuration called `name`: `paper` (0.9 billion parameters) or `tiny` (for tests)."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the language head shares its weights with the embeddings: what `text_config` says."""
        return bool(getattr(self.text_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    def to_dict(self) -> dict:
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    @property
    def custom_pipelines(self) -> dict[str, dict]:
        """Pipelines that come with the model, anew each time: transformers writes classes into what it is given."""
        return {"image-to-text": {"impl": "pipeline_prefix_vlm.PrefixVLMPipeline", "pt": ["AutoModelForImageTextToText"]}}

    @property
    def is_mm_prefix_lm(self) -> bool:
        """Whether the tokens of an image attend to each other in both directions, by the name under which vLLM asks."""
        return self.attention_mode == "prefix"

    @property
    def num_vision_layers(self) -> int | None:
        """How many of the encoder's layers exist: those up to `vision_feature_layer`. `None` if it does not count them."""
        layers, index = getattr(self.vision_config, "num_hidden_layers", None), self.vision_feature_layer
        if layers is None:
            if index != -1:
                raise ValueError(
                    f"vision_feature_layer is {index}, but a {self.vision_config.model_type} encoder gives only its last "
                    "layer; leave it at -1."
                )
            return None
        if not -layers - 1 <= index <= layers:
            raise ValueError(
                f"vision_feature_layer is {index}, but the encoder has {layers} layers; choose {-layers - 1} to {layers}."
            )
        return index % (layers + 1)

    @property
    def patch_grid(self) -> int:
        """How many patches lie along a side of an image (16 for 224 pixels and patches of 14)."""
        image, patch = (getattr(self.vision_config, name, None) for name in ("image_size", "patch_size"))
        if not isinstance(image, int) or not isinstance(patch, int):
            raise ValueError(
                f"A {self.vision_config.model_type} encoder has no fixed square image size with square patches; choose "
                "another one, or give vision_config an image_size and a patch_size."
            )
        return image // patch

    @property
    def num_image_tokens(self) -> int:
        """P, how many tokens one image takes in the sequence: one per patch, or per group of patches."""
        return image_tokens(self.patch_grid, self.pixel_shuffle, self.mean_pooling)


if __name__.startswith("transformers_modules"):
    # `transformers serve --trust-remote-code` of 5.x loads a model by its Auto class only if this list names its type
    from transformers.models.auto import modeling_auto

    multimodal_models = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    multimodal_models.setdefault(PrefixVLMConfig.model_type, "PrefixVLMForConditionalGeneration")

__all__ = ["PrefixVLMConfig"]
