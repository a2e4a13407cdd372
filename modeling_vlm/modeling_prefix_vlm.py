"""The network: a vision encoder, a two-layer projector, a decoder language model, and the mask that joins them.

This file travels to the Hub with every checkpoint, so it imports only torch, transformers and its own siblings.

Shapes: B batch, T tokens, K keys (past and present), P image tokens, I images in the batch, G patches along a side of an
image, N supervised tokens, D width of the language model, V vocabulary.
"""

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..configuration.configuration_prefix_vlm import (
    HUB_KWARGS,
    IGNORE_INDEX,
    IMAGE_TOKEN,
    PUSH_KWARGS,
    QWEN_IMAGE_TOKEN_ID,
    PrefixVLMConfig,
)
from ..configuration.conversation_prefix_vlm import load_tokenizer, turn_end_id
from ..configuration.vision_backbone_prefix_vlm import vision_backbone
from .cpu_prefix_vlm import cpu_products, one_token
from .engines_prefix_vlm import decoder_for, engine_of, refuse_mode
from .loss_prefix_vlm import head_and_loss, is_plain
from .masking_prefix_vlm import as_additive, attention_mask_4d, image_index
from .positions_prefix_vlm import attention_window, cache_lengths, context, documents, is_empty, positions
from .tying_prefix_vlm import fill_head, is_tied, is_tied_checkpoint, refuse_to_drop_head, tied_weights_keys
from .vision_tower_prefix_vlm import PatchGroups, build_tower, load_tower

if hasattr(BaseModelOutputWithPast, "cache"):
    raise ImportError(
        f"transformers {transformers.__version__} calls a model's cache by another name than this code knows; install "
        "a version before 5.24: pip install 'transformers<5.24'"
    )

# what others read from `get_image_features`: on transformers 4 the features themselves, on 5 an output that holds them
FEATURES_IN_OUTPUT = int(transformers.__version__.partition(".")[0]) >= 5


@dataclass
class PrefixVLMModelOutputWithPast(ModelOutput):
    """Output of `PrefixVLMModel`.

    last_hidden_state: (B, T, D), after the language model's final norm.
    past_key_values: the cache, when one is used.
    hidden_states, attentions: of the language model, when requested.
    image_hidden_states: (I, P, D), the projected image features.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class PrefixVLMCausalLMOutputWithPast(ModelOutput):
    """Output of `PrefixVLMForConditionalGeneration`.

    loss: scalar, next-token cross-entropy (paper, Eq. 1), when labels are given.
    logits: (B, T, V) or fewer positions by `logits_to_keep`; `None` with `skip_logits`.
    token_losses: (N,), the detached loss of each supervised token, row by row.
    The rest as in `PrefixVLMModelOutputWithPast`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class PrefixVLMProjector(nn.Module):
    """Linear - activation - Linear, from the width of the vision encoder to that of the language model (Fig. 2).

    Before them, `pixel_shuffle` or `mean_pooling` make one of neighbouring patches, and `projector_norm` normalises it.
    """

    def __init__(self, config: PrefixVLMConfig):
        super().__init__()
        text_width = config.text_config.hidden_size
        hidden_width = config.projector_hidden_size or text_width
        self.groups = PatchGroups(config.pixel_shuffle, config.mean_pooling)
        read_width = config.vision_config.hidden_size * config.pixel_shuffle**2
        self.norm = nn.LayerNorm(read_width) if config.projector_norm else nn.Identity()
        self.linear_1 = nn.Linear(read_width, hidden_width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.norm(self.groups(features)))))


class PrefixVLMPreTrainedModel(PreTrainedModel):
    config_class = PrefixVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False  # its kernels silently drop a dense mask
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # 4.x asks this before it allows a static cache
    calls_all_modules = False  # also outside training, where weights are sharded and a batch may have no image

    def _init_weights(self, module):
        # only the projector and timm models reach this: transformers' backbones initialise themselves
        if hasattr(module, "init_non_persistent_buffers"):  # timm's name for values that are not among the weights
            module.init_non_persistent_buffers()
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=getattr(self.config.text_config, "initializer_range", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers 4

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            # by default it would be reentrant, which gives adapters of the frozen image encoder no gradient
            super().gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As in transformers. A head that is untied on the way starts as a copy of the embeddings, which it was.

        Raises:
            ValueError: if `tie_word_embeddings=True` would drop the checkpoint's own head.
        """
        asked = kwargs.get("tie_word_embeddings", getattr(kwargs.get("config"), "tie_word_embeddings", None))
        if asked:
            is_tied_there = is_tied_checkpoint(cls.config_class, pretrained_model_name_or_path, kwargs)
            refuse_to_drop_head(pretrained_model_name_or_path, asked, is_tied_there)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        fill_head(model, report["missing_keys"])
        return (model, report) if output_loading_info else model

    def load_adapter(self, *args, **kwargs):
        result = super().load_adapter(*args, **kwargs)  # on 5.x not by `load_state_dict`
        self._take_mode_of_adapters()
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)  # as PEFT loads an adapter
        self._take_mode_of_adapters()

    def _take_mode_of_adapters(self):
        """Sets the attention mode that the adapters in this model were trained in, where their adapter_config.json has it.

        Raises:
            ValueError: if they were trained in different ones.
        """
        modes = {}
        for name, adapter in getattr(self, "peft_config", {}).items():
            if mode := (adapter.auto_mapping or {}).get("attention_mode"):
                modes[mode] = name
                adapter.task_type = adapter.task_type or "CAUSAL_LM"  # without one, PEFT writes a mapping of its own
        if len(modes) > 1:
            trained = " and ".join(f"{name} in {mode}" for mode, name in modes.items())
            raise ValueError(f"One model cannot have adapters of different attention modes: {trained}; load one of them.")
        if modes:
            self.config.attention_mode = next(iter(modes))

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, repo_id: str | None = None, **kwargs):
        """Writes a complete Hub repository: weights, configuration, and the code that loads them without this package."""
        push_kwargs = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs}
        for adapter in getattr(self, "peft_config", {}).values():
            adapter.auto_mapping = {**(adapter.auto_mapping or {}), "attention_mode": self.config.attention_mode}
            adapter.task_type = adapter.task_type or "CAUSAL_LM"
        if (shared := is_tied(self)) is not None:
            self.config.tie_word_embeddings = shared  # whatever was set in between
        generation = getattr(self, "generation_config", None)
        if generation is not None and isinstance(generation.eos_token_id, list):  # 4.x's `Trainer` adds one that is there
            generation.eos_token_id = list(dict.fromkeys(generation.eos_token_id))
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._complete_repository(save_directory)
        if push_to_hub:
            # transformers 4 would split a path object, and 5 would pass `revision` to a call that does not take it
            self.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **push_kwargs)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # every push passes here, after transformers has put an empty card into the folder
        self._complete_repository(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _complete_repository(self, folder):
        if not __name__.startswith("transformers_modules"):  # as remote code, transformers copies the files beside this one
            importlib.import_module("..configuration.hub_export", __package__).export(folder)


class PrefixVLMModel(PrefixVLMPreTrainedModel):
    """Image and text to hidden states: the model without applying its language head.

    The weights live here under `vision_tower`, `projector` and `language_model`, so that this class and
    `PrefixVLMForConditionalGeneration` read the same checkpoints.
    """

    def __init__(self, config: PrefixVLMConfig, vision_tower=None, language_model=None):
        super().__init__(config)
        for given in (vision_tower, language_model):
            for module in given.modules() if given is not None else ():
                module._is_hf_initialized = True  # else post_init on 4.x reinitialises what resizing has replaced
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        text = language_model.config
        if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
            # transformers 4 would let sdpa leave out the soft-capping of Gemma 2
            language_model.set_attn_implementation("eager")
        engine = engine_of(text)
        if engine is not None:
            refuse_mode(engine, config.attention_mode)
            if self.can_generate():
                raise ValueError(f"{engine} attention is for {engine} alone, which loads the model by AutoModel; use sdpa.")
            language_model = decoder_for(engine, language_model)
        self.vision_tower = build_tower(config) if vision_tower is None else vision_tower
        self.projector = PrefixVLMProjector(config)
        self.language_model = language_model
        self._tied_weights_keys = tied_weights_keys(language_model, "language_model.")
        parts = [module for module in self.modules() if isinstance(module, PreTrainedModel) and module is not self]
        self._no_split_modules = sorted({name for part in parts for name in part._no_split_modules or ()})
        self.post_init()
        # the backbones also name layers that are absent here, and accelerate refuses to shard a model by those
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules))

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return None if self.engine else self.language_model.get_output_embeddings()  # an engine has its own

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    @property
    def engine(self) -> str | None:
        """The inference engine whose attention the decoder uses, `vllm` or `sglang`; `None` for that of transformers."""
        return engine_of(self.language_model.config)

    def get_decoder(self):
        return self.language_model if self.engine == "sglang" else self.language_model.get_decoder()

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (I, C, H, W) to the encoder's patch features (I, G * G, width of the encoder), before any compression.

        Raises:
            ValueError: for images of another shape than the encoder's.
        """
        return self._encode(pixel_values).last_hidden_state

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs):
        """Images (I, C, H, W) to projected features (I, P, D), as models of transformers give them to those who call it.

        Args:
            kwargs: arguments of the encoder, such as `output_hidden_states`; and `vision_feature_layer`, which can only be
                what the configuration says.

        Returns:
            On transformers 4 the features. On 5 the encoder's output, `last_hidden_state` being its patch features, with
            the projected ones as `pooler_output`.

        Raises:
            ValueError: for images of another shape than the encoder's, or a choice of features that this model lacks.
        """
        as_tuple = kwargs.pop("return_dict", None) is False
        self._refuse_choice_of_features(kwargs)
        output = self._encode(pixel_values, **kwargs)
        features = self._project(output.last_hidden_state)
        if not FEATURES_IN_OUTPUT:
            return features
        output = BaseModelOutputWithPooling(**{**output, "pooler_output": features})
        return output.to_tuple() if as_tuple else output

    def _refuse_choice_of_features(self, kwargs: dict) -> None:
        """Takes arguments of LLaVA out of `kwargs`; raises a ValueError for one that asks for other features."""
        own = self.config.vision_feature_layer
        if kwargs.pop("vision_feature_layer", None) not in (None, own):
            raise ValueError(f"vision_feature_layer is {own} in this model, whose projector reads no other; leave it out.")
        for name in ("vision_feature_select_strategy", "image_sizes", "interpolate_pos_encoding"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name} cannot be chosen: images have the encoder's size, and the projector reads all patch features; "
                    "leave it out."
                )

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
        """The encoder's output for images (I, C, H, W), its `last_hidden_state` (I, G * G, ...) of patches alone."""
        pixel_values = pixel_values.flatten(0, -4)  # (B, n, C, H, W) is accepted too
        shape = self._image_shape
        if pixel_values.shape[1:] != shape:
            raise ValueError(
                f"pixel_values holds images of {_by(pixel_values.shape[1:])} (channels, height, width), but the encoder "
                f"reads {_by(shape)}; prepare them with this model's own processor."
            )
        pixel_values = pixel_values.to(next(self.vision_tower.parameters()).dtype)
        with cpu_products(self, pixel_values):
            output = self.vision_tower(pixel_values=pixel_values, return_dict=True, **kwargs)
        # class, distillation and register tokens stand before the patches
        output["last_hidden_state"] = output.last_hidden_state[:, -(self.config.patch_grid**2) :]
        return output

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        config = self.config.vision_config
        return (getattr(config, "num_channels", 3), config.image_size, config.image_size)

    def _project(self, vision_features: torch.Tensor) -> torch.Tensor:
        is_autocast = torch.is_autocast_enabled(vision_features.device.type)
        with cpu_products(self, vision_features):
            if is_autocast and not torch.is_autocast_enabled(vision_features.device.type):
                vision_features = vision_features.float()  # a cache may keep them in bfloat16
            return self.projector(vision_features)

    def _update_causal_mask(
        self, attention_mask, is_image, inputs_embeds, past_key_values=None, document_ids=None, cache_position=None
    ):
        """The 4D attention mask of this forward pass, in the form that the attention implementation expects.

        Args:
            attention_mask: (B, K), 0 at padding; `None` where nothing is padded.
            is_image: (B, T) bool, where this pass holds image features. Cached positions need no marking: they come
                before every query, where all modes agree.
            inputs_embeds: (B, T, ...), read for its shape and dtype only.
            past_key_values: the cache; its size decides K.
            document_ids: (B, T), the packed sample of each position.
            cache_position: (T,), where these tokens go in the cache, as transformers 4 passes it.

        Returns:
            (B, 1, T, K), bool for `sdpa`, 0 and the most negative number for `eager`.
        """
        batch, length = inputs_embeds.shape[:2]
        device = is_image.device
        past, capacity = cache_lengths(past_key_values, length, cache_position)
        window = attention_window(self.config.text_config)
        tokens = capacity if window is None or torch.compiler.is_compiling() else max(capacity, int(past) + length)
        if window is not None and tokens > window:
            raise ValueError(
                f"{tokens} tokens exceed the sliding window of {window} in some layers of this "
                f"{self.config.text_config.model_type} decoder; shorten the input, or choose another decoder."
            )
        valid = (torch.arange(capacity, device=device) < past + length).expand(batch, capacity)
        if attention_mask is not None:
            valid = valid & nn.functional.pad(attention_mask.bool(), (0, capacity))[:, :capacity]
        queries = torch.arange(length, device=device) + past
        image_ids = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        image_ids[:, queries] = image_index(is_image, self.config.num_image_tokens)
        mask = attention_mask_4d(valid, image_ids, self.config.attention_mode, queries, document_ids)
        return self._in_form_of_attention(mask, inputs_embeds.dtype)

    def _in_form_of_attention(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A bool mask in the form that the decoder's attention implementation expects."""
        implementation = self.language_model.config._attn_implementation
        if implementation == "eager":
            return as_additive(mask, dtype)
        if implementation != "sdpa":
            raise ValueError(f"The decoder's {implementation} attention would drop the 4D mask; use sdpa or eager.")
        return mask

    def _refuse_prompt(self, is_image, position_ids, past_key_values, cache_position) -> None:
        """Raises a ValueError for a prompt that the decoder would misread."""
        if torch.compiler.is_compiling():  # asking the device would break the graph
            return
        past = int(cache_lengths(past_key_values, 0, cache_position)[0])
        if past and self.config.attention_mode == "prefix_all_images" and is_image.any():
            raise ValueError(
                "With prefix_all_images attention, earlier tokens attend to later images, so a new image changes what is "
                "cached; pass the whole conversation without a cache."
            )
        limit, tokens = context(self.config.text_config), past + is_image.shape[1]
        if limit is None or tokens <= limit or is_image.shape[1] == 1:  # transformers too lets an answer exceed it
            return
        if position_ids is not None:  # padding does not count, and packed samples do not count together
            tokens = int(position_ids.max()) + 1
        if tokens > limit:
            raise ValueError(
                f"The prompt has {tokens} tokens, but this {self.config.text_config.model_type} decoder reads at most "
                f"{limit}; shorten it."
            )

    def _may_hold_images(self, length: int) -> bool:
        """Whether a pass of so many tokens may bring images; a single token is a generated one, never an image's."""
        return length > 1 or self.config.num_image_tokens == 1

    def _is_image(self, input_ids, inputs_embeds) -> torch.Tensor:
        """(B, T) bool, True at image positions."""
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        placeholder = self.get_input_embeddings()(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == placeholder).all(dim=-1)

    def _embed(self, input_ids, inputs_embeds, pixel_values, vision_features, token_type_ids):
        """The embeddings with the image features filled in, the image positions, and the features."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and vision_features is not None:
            raise ValueError("Pass at most one of `pixel_values` and `vision_features`.")
        if self.engine is not None and pixel_values is None and vision_features is None:
            # the features are embeddings already; whatever asked the device would break the engine's CUDA graphs
            return self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds, None, None
        is_placeholder = self._is_image(input_ids, inputs_embeds)
        is_image = is_placeholder if token_type_ids is None else token_type_ids.bool()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            vision_features = self.get_vision_features(pixel_values)
        if vision_features is not None:
            image_hidden_states = self._project(vision_features).to(inputs_embeds.dtype)
            self._refuse_mismatch(is_image, len(image_hidden_states), image_hidden_states.shape[1])
            scale = self._scale_of_inputs()
            features = image_hidden_states if scale is None else image_hidden_states / scale
            inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], features)
            return inputs_embeds, is_image, image_hidden_states
        if self._may_hold_images(inputs_embeds.shape[1]):
            self._refuse_mismatch(is_placeholder, 0)
            self._refuse_parts_of_images(is_image, self.config.num_image_tokens)  # whose features are embeddings already
        if self.calls_all_modules or (self.training and torch.is_grad_enabled()):
            inputs_embeds = inputs_embeds + self._of_no_image()
        return inputs_embeds, is_image, None

    def _scale_of_inputs(self) -> float | None:
        """What the decoder multiplies all its inputs by, although it is meant for words alone; `None` for nothing.

        transformers 4 does so in Gemma 1 and 2; 5 scales Gemma's words where they are looked up, as both do for Gemma 3.
        """
        text = self.config.text_config
        is_scaled = text.model_type in ("gemma", "gemma2") and not hasattr(self.get_input_embeddings(), "embed_scale")
        return text.hidden_size**0.5 if is_scaled else None

    def _refuse_mismatch(self, is_image: torch.Tensor, images: int, features: int | None = None) -> None:
        if torch.compiler.is_compiling():  # counting would break the graph
            return
        features = self.config.num_image_tokens if features is None else features
        wanted = int(is_image.sum())
        if wanted != images * features:
            raise ValueError(
                f"The text has {wanted} image tokens, but {images} image(s) of {features} features each make "
                f"{images * features}; let the processor place the image tokens."
            )
        self._refuse_parts_of_images(is_image, features)

    def _refuse_parts_of_images(self, is_image: torch.Tensor, features: int) -> None:
        if torch.compiler.is_compiling():
            return
        # images are separated by counting from the start of a row and of a pass
        if parts := [count for count in is_image.sum(dim=-1).tolist() if count % features]:
            raise ValueError(
                f"A row has {parts[0]} image tokens, but an image makes {features}; keep the tokens of an image in "
                "one row and one pass."
            )

    def _of_no_image(self) -> torch.Tensor:
        """A scalar 0 that depends on encoder and projector, for a batch without images in training.

        Their parameters then get a gradient, which is 0, in every batch; and of several processes, whose batches may have
        images, all call the same modules. DDP and FSDP need both.
        """
        blank = torch.zeros(1, *self._image_shape, device=self.device)
        return 0.0 * self._project(self.get_vision_features(blank)).mean()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> PrefixVLMModelOutputWithPast:
        """Runs vision encoder, projector and language model.

        Args:
            input_ids: (B, T), with P copies of `config.image_token_id` for each image.
            pixel_values: (I, C, H, W), the images in reading order.
            attention_mask: (B, K), 0 at padding, on either side; or a 4D mask, used as is. In an inference engine (see
                engines_prefix_vlm.py), whose own attention knows what to mask, there must be none, and none is made.
            position_ids: (B, T); by default counted from the first token after padding, from 0 in each document. Where they
                start again, a packed sample starts, as in padding-free batches of transformers and TRL.
            token_type_ids: (B, T), 1 at image positions; needed only if `inputs_embeds` already contains image features.
            document_ids: (B, T), the packed sample of each position; documents do not attend to each other. By default
                they follow from `position_ids`.
            vision_features: (I, G * G, width of the encoder), from `get_vision_features`, instead of `pixel_values`.

        Raises:
            ValueError: if image tokens and image features differ in number, a row has a part of an image, a prompt exceeds
                the decoder's context, a bidirectional model is given a cache, or `prefix_all_images` a new image after a
                cached prompt: earlier tokens attend to it, so the whole conversation has to be passed without a cache. In
                `prefix` and `causal` mode a cache goes on with new images.
        """
        if self.config.attention_mode == "bidirectional":
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "A bidirectional (stage 0) model cannot use a cache, since tokens attend to later ones; pass "
                    "use_cache=False, or set config.attention_mode = 'prefix'."
                )
            use_cache = False
        inputs_embeds, is_image, image_hidden_states = self._embed(
            input_ids, inputs_embeds, pixel_values, vision_features, token_type_ids
        )

        length = inputs_embeds.shape[1]
        cache_position = kwargs.get("cache_position")
        self._refuse_choice_of_features(kwargs)
        if self.engine is not None:
            refuse_mode(self.engine, self.config.attention_mode)  # which may have been set since
            if attention_mask is not None:
                raise ValueError(f"{self.engine} attention would drop the attention_mask; leave it out.")
        elif not isinstance(attention_mask, dict) and (attention_mask is None or attention_mask.ndim == 2):
            if document_ids is None and is_empty(past_key_values):
                document_ids = documents(length, position_ids, **kwargs)
            if position_ids is None:
                position_ids = positions(attention_mask, document_ids, length)
            if self._may_hold_images(length):
                self._refuse_prompt(is_image, position_ids, past_key_values, cache_position)
            if length > 1:
                attention_mask = self._update_causal_mask(
                    attention_mask, is_image, inputs_embeds, past_key_values, document_ids, cache_position
                )
            # else a single token, after all others, sees them all, as in the mask the decoder makes of the 2D one

        decoder = self.get_decoder()
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        with cpu_products(self, inputs_embeds):
            outputs = one_token(decoder, **inputs) or decoder(**inputs, return_dict=True)
        result = PrefixVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
        )
        return result.to_tuple() if return_dict is False else result


class PrefixVLMForConditionalGeneration(PrefixVLMModel, GenerationMixin):
    """Generates text about images; the class behind `AutoModelForVision2Seq` and its siblings."""

    accepts_loss_kwargs = True

    def __init__(self, config: PrefixVLMConfig, vision_tower=None, language_model=None):
        super().__init__(config, vision_tower, language_model)
        # never generated: an image token in the output would ask for an image that was not given
        self.generation_config.bad_words_ids = [[config.image_token_id]]  # ten times faster than suppress_tokens

    @property
    def base_model(self) -> PrefixVLMModel:
        """The same modules without the head and without this object's hooks, for callers that apply the head themselves."""
        backbone = PrefixVLMModel.__new__(PrefixVLMModel)
        nn.Module.__init__(backbone)
        # TRL also replaces `forward` with one that calls this
        own = (backbone.__dict__.keys() - {"_modules", "training"}) | {"forward"}
        backbone.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        return backbone

    model = base_model  # the name that TRL uses with transformers 4

    @classmethod
    def from_backbones(
        cls,
        vision: str = "google/siglip-so400m-patch14-224",
        text: str = "Qwen/Qwen2.5-0.5B",
        dtype: torch.dtype = torch.float32,
        device_map=None,
        image_size: int | None = None,
        chat_template: str | None = None,
        **config,
    ) -> "PrefixVLMForConditionalGeneration":
        """Joins two pretrained backbones with a new projector.

        Args:
            vision: Hub id or folder of a SigLIP, SigLIP 2, CLIP, DINOv2 or ViT-like model (of a two-tower model, the image
                tower), or of a convolutional one of timm.
            text: Hub id or folder of any decoder that `AutoModelForCausalLM` loads and that obeys a 4D mask.
            dtype: the dtype of all weights.
            device_map: of the weights of each half, as in transformers; needs accelerate.
            image_size: side of the images in pixels, to which position embeddings are interpolated once; by default that
                of the pictures which the vision model's preprocessor makes.
            chat_template: `chatml` or `own`, as given to `PrefixVLMProcessor.from_backbones`: it decides which tokens the
                vocabulary needs, and which one ends an answer.
            config: fields of `PrefixVLMConfig`, such as `attention_mode` and `projector_hidden_size`; and arguments of
                transformers for the Hub (`cache_dir`, `revision`, `token`, ...), which go to both.

        Raises:
            ValueError: for a vision model without square patches or with missing weights, an image size or a field of the
                configuration that does not fit it, or a decoder that ignores the mask or whose head does more than this
                class supports.
        """
        hub = {name: config.pop(name) for name in HUB_KWARGS if name in config}
        weights = {"dtype": dtype, **hub}
        if device_map is not None:
            weights["device_map"] = device_map
        backbone = vision_backbone(vision, image_size, **hub)
        text_config = AutoConfig.from_pretrained(text, **hub)
        if type(text_config) not in AutoModelForCausalLM._model_mapping or not hasattr(text_config, "vocab_size"):
            raise ValueError(
                f"{text} is a {text_config.model_type} model, not a decoder language model alone; choose one, or save the "
                "decoder inside it to a folder of its own."
            )
        refuse_to_drop_head(text, config.get("tie_word_embeddings"), text_config.tie_word_embeddings)
        tokenizer = load_tokenizer(text, chat_template, **hub)
        image_token_id = config.pop("image_token_id", None)
        if image_token_id is None:
            image_token_id = _image_token_id(tokenizer, text_config)
        vocabulary = max(image_token_id + 1, text_config.vocab_size, 0 if tokenizer is None else len(tokenizer))
        joint = PrefixVLMConfig(
            vision_config=backbone.config, text_config=text_config, image_token_id=image_token_id, dtype=dtype, **config
        )
        tower = load_tower(backbone, joint, **weights)
        language_model, report = AutoModelForCausalLM.from_pretrained(
            text, config=joint.text_config, output_loading_info=True, **weights
        )
        if text_config.tie_word_embeddings:
            fill_head(language_model, report["missing_keys"])
        if report["missing_keys"]:
            raise ValueError(f"{text} lacks weights of the decoder: {sorted(report['missing_keys'])[:3]}.")
        if vocabulary > language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(vocabulary, mean_resizing=False)
            joint.text_config.vocab_size = vocabulary
        model = cls(joint, tower, language_model).to(dtype).eval()
        model.projector.to(model.get_input_embeddings().weight.device)
        model._check_decoder(text)
        model.generation_config.eos_token_id = language_model.generation_config.eos_token_id
        if tokenizer is not None:
            model.set_stop_tokens(tokenizer)
        return model

    def set_stop_tokens(self, tokenizer) -> None:
        """Makes `generate` stop also at the end of a turn and of a text, and pad as the tokenizer does."""
        known = self.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known]
        ends = [turn_end_id(tokenizer), tokenizer.eos_token_id, *known]
        self.generation_config.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]
        pad = tokenizer.pad_token_id
        self.generation_config.pad_token_id = tokenizer.eos_token_id if pad is None else pad

    @torch.no_grad()
    def _check_decoder(self, name: str):
        """Checks that the decoder does what this class relies on, with two tokens that may see each other, or may not.

        Raises:
            ValueError: if the first token does not see the second where the mask is open, or is seen by it where the mask
                is closed; or if `_head` does not give the decoder's logits.
        """
        weight = self.get_input_embeddings().weight
        # no rows of its own, some of which are zeros or all alike
        first, second, other = (
            torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)) * weight.std().item()
        )
        pair = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=weight.device)
        opened, closed = (self._in_form_of_attention(mask, weight.dtype) for mask in (pair, pair.tril().triu()))

        def states(mask: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
            embeds = torch.stack(tokens)[None].to(weight)
            return self.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state[0]

        try:
            hidden, changed = states(opened, first, second), states(opened, first, other)
            apart, leaked = states(closed, first, second), states(closed, other, second)
            embeds = torch.stack([first, second])[None].to(weight)
            logits = self.language_model(inputs_embeds=embeds, attention_mask=opened, use_cache=False).logits[0]
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} does not accept a 4D attention mask, so it cannot be the decoder: {error}") from error
        if torch.equal(hidden[0], changed[0]):
            raise ValueError(
                f"{name} ignores a 4D attention mask, so the image could not be left unmasked; choose another."
            )
        if not torch.equal(apart[1], leaked[1]):
            raise ValueError(
                f"{name} has layers, such as convolutions, that pass on earlier tokens whatever the mask says; choose "
                "another."
            )
        if not torch.allclose(self._head(hidden), logits, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{name} modifies its logits after the language head in an unknown way; choose another.")

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) to logits (..., V), with the scaling and soft-capping that some decoders add."""
        config = self.config.text_config
        with cpu_products(self, hidden_states):
            logits = self.get_output_embeddings()(hidden_states)
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        return logits

    def _loss(self, hidden_states, logits, targets, num_items_in_batch):
        """The loss, and the detached losses of the supervised tokens, from logits or, without them, from hidden states.

        Args:
            targets: (B, T), the token to predict at each position, -100 for none.
        """
        supervised = targets != IGNORE_INDEX
        items = supervised.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        items = items.to(hidden_states.device) if torch.is_tensor(items) else items
        if logits is not None and torch.compiler.is_compiling():  # choosing the supervised positions would break the graph
            losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            return losses / items, None
        if logits is None and self._has_plain_head():
            return head_and_loss(self.get_output_embeddings(), hidden_states[supervised], targets[supervised], items)
        scores = self._head(hidden_states[supervised]) if logits is None else logits[supervised]
        losses = nn.functional.cross_entropy(scores.float(), targets[supervised], reduction="none")
        return losses.sum() / items, losses.detach()

    def _has_plain_head(self) -> bool:
        """Whether `_head` is a single matrix product."""
        scaling = ("logits_scaling", "logit_scale", "final_logit_softcapping")
        return is_plain(self.get_output_embeddings()) and not any(
            getattr(self.config.text_config, name, None) for name in scaling
        )

    def forward(  # type: ignore[override]  # more arguments, where transformers has them
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> PrefixVLMCausalLMOutputWithPast:
        """Computes logits and loss; see `PrefixVLMModel.forward` for the inputs not described here.

        Args:
            labels: (B, T), the token ids to predict, -100 where there is no target; position t is predicted from t - 1.
            shift_labels: (B, T), labels that are shifted already: position t is predicted from t. They replace `labels`.
            logits_to_keep: compute logits only for the last N positions, or for these positions (0: all).
            num_items_in_batch: what the summed loss is divided by; by default the number of supervised tokens. A trainer
                that accumulates gradients passes the count of the whole batch.
            skip_logits: with labels, run the head on the supervised positions only and return no logits: the same loss
                for a fraction of the memory.
        """
        # no parameter by name: `Trainer` would take it for labels that every batch must have, and evaluate nothing
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            document_ids=document_ids,
            **kwargs,
        )
        hidden_states: Any = outputs.last_hidden_state
        loss = logits = token_losses = None
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            if document_ids is None:
                document_ids = documents(labels.shape[1], position_ids, **kwargs)
            if document_ids is not None:  # the last token of a document does not predict the first of the next
                is_last = nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1))
                shift_labels = shift_labels.masked_fill(is_last.to(shift_labels.device), IGNORE_INDEX)
            if attention_mask is not None and attention_mask.ndim == 2:  # nor does padding predict the first after it
                is_padding = attention_mask[:, -labels.shape[1] :] == 0
                shift_labels = shift_labels.masked_fill(is_padding.to(shift_labels.device), IGNORE_INDEX)
        if shift_labels is None or not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # with labels every position is needed
            logits = self._head(hidden_states if shift_labels is not None else hidden_states[:, kept])
        if shift_labels is not None:
            loss, token_losses = self._loss(
                hidden_states, logits, shift_labels.to(hidden_states.device), num_items_in_batch
            )
        result = PrefixVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            token_losses=token_losses,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, pixel_values=None, token_type_ids=None, **kwargs
    ):
        past, _ = cache_lengths(past_key_values, 0)
        if token_type_ids is None or past > 0:
            # passes the image positions to `create_masks_for_generate`, which gets no token ids; embeddings cover the
            # prompt alone, so once it is cached the ids are read
            token_type_ids = self._is_image(input_ids, inputs_embeds if past == 0 else None).long()
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        # images go with the pass that contains their tokens: the prompt, or a continuation with new images
        is_image = model_inputs["token_type_ids"]
        has_images = pixel_values is not None and self._may_hold_images(is_image.shape[1]) and bool(is_image.any())
        model_inputs["pixel_values"] = pixel_values if has_images else None
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats every sample for beams; the images of a sample stay together. Images that are in the cache are left out.

        Raises:
            ValueError: if image tokens and images differ in number.
        """
        pixel_values = model_kwargs.pop("pixel_values", None)
        past, _ = cache_lengths(model_kwargs.get("past_key_values"), 0)
        is_image = self._is_image(input_ids, model_kwargs.get("inputs_embeds"))
        if pixel_values is None:
            self._refuse_mismatch(is_image[:, past:], 0)
        else:
            pixel_values = pixel_values.flatten(0, -4)
            images, new = (
                (part.sum(dim=-1) // self.config.num_image_tokens).tolist() for part in (is_image, is_image[:, past:])
            )
            if len(pixel_values) == sum(new):
                images = new
            elif len(pixel_values) != sum(images):
                self._refuse_mismatch(is_image[:, past:], len(pixel_values))
            groups = [group[len(group) - count :] for group, count in zip(pixel_values.split(images), new, strict=True)]
            pixel_values = torch.cat([group.repeat(expand_size, 1, 1, 1) for group in groups])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "pixel_values": pixel_values}

    def create_masks_for_generate(self, attention_mask, past_key_values, token_type_ids, **kwargs):
        """The mask that `generate` prepares for a static cache; transformers' own would be causal."""
        # the embeddings are named `input_embeds` on 4.x and `inputs_embeds` on 5.x
        inputs_embeds = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else kwargs["input_embeds"]
        is_image, cache_position = token_type_ids.bool(), kwargs.get("cache_position")
        if self._may_hold_images(is_image.shape[1]):
            self._refuse_prompt(is_image, kwargs.get("position_ids"), past_key_values, cache_position)
        return self._update_causal_mask(
            attention_mask, is_image, inputs_embeds, past_key_values, cache_position=cache_position
        )


def _by(shape) -> str:
    return " x ".join(map(str, shape))


def _image_token_id(tokenizer, text_config) -> int:
    if tokenizer is not None:
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return QWEN_IMAGE_TOKEN_ID if text_config.vocab_size > QWEN_IMAGE_TOKEN_ID else text_config.vocab_size


__all__ = ["PrefixVLMForConditionalGeneration", "PrefixVLMModel", "PrefixVLMPreTrainedModel"]
