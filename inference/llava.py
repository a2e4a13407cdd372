"""Makes a PrefixVLM of a LLaVA of transformers: the same logits in causal mode, and from there a mask of its own.

Shapes: P image tokens.
"""

import copy
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from prefixvlm.inference.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.inference.loading import one_line, refuse_missing_path
from prefixvlm.modeling_vlm.vision_tower_prefix_vlm import build_tower

LEVEL = "vision_model."  # of weights' names, which some classes of transformers 5 have dropped
# encoders of which a LLaVA reads patch features as `PrefixVLM` does, and how it leaves out other tokens
ENCODERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
# before a template that knows lists of parts alone: makes such of texts, which training and plain chats have
PARTS_OF_TEXTS = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}{%- if message.content is string -%}"
    "{%- set ns.messages = ns.messages + [dict(message, content=[{'type': 'text', 'text': message.content}])] -%}"
    "{%- else -%}{%- set ns.messages = ns.messages + [message] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = ns.messages -%}"
)
# a conversation whose prompt has to be the same by both processors
PROBE: list[dict] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A box."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
]


def from_llava(folder: str) -> tuple[PrefixVLMForConditionalGeneration, PrefixVLMProcessor]:
    """The PrefixVLM in causal mode, and its processor, that a LLaVA's weights and settings make.

    Args:
        folder: folder or Hub id of a `LlavaForConditionalGeneration` with a CLIP or SigLIP encoder.

    Raises:
        ValueError: for another model, or one that cannot be mapped to the same logits and prompts, saying why.
    """
    refuse_missing_path(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a LLaVA that can be loaded ({one_line(error)}).") from error
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"{folder} is a {config.model_type}; only a llava, whose projector reads whole pictures of one size, has a "
            "counterpart here."
        )
    joint = config_of(config)
    llava, report = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{folder} lacks weights, such as {min(report['missing_keys'])}.")
    model = model_of(llava, joint)
    try:
        theirs = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no processor that can be loaded ({one_line(error)}).") from error
    processor = processor_of(theirs, model)
    known = model.generation_config.eos_token_id
    model.set_stop_tokens(processor.tokenizer)
    if known is not None:  # whatever closes a turn by its template, the model was to stop there
        model.generation_config.eos_token_id = known
    return model, processor


def config_of(config: LlavaConfig) -> PrefixVLMConfig:
    """The configuration with which `PrefixVLM` in causal mode computes what a LLaVA does.

    Raises:
        ValueError: for features that the projector here cannot read.
    """
    vision, layer = copy.deepcopy(config.vision_config), config.vision_feature_layer
    strategy = config.vision_feature_select_strategy
    if ENCODERS.get(vision.model_type) != strategy:
        wanted = ", ".join(f"{kind} with {how!r}" for kind, how in ENCODERS.items())
        raise ValueError(
            f"The encoder is a {vision.model_type} with vision_feature_select_strategy {strategy!r}, whose tokens are not "
            f"the patches alone; only {wanted} can be mapped."
        )
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer}; the projector here reads one layer of the encoder.")
    layers = vision.num_hidden_layers
    if vision.model_type == "siglip_vision_model" and layer % (layers + 1) == layers:
        # a LLaVA reads the last layer before the final norm, as here only earlier ones are read: so it is made one
        vision.num_hidden_layers, layer = layers + 1, -2
    return PrefixVLMConfig(
        vision_config=vision,
        text_config=config.text_config,
        attention_mode="causal",
        image_token_id=config.image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_layer=layer,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        dtype=config.dtype,
    )


def model_of(llava: LlavaForConditionalGeneration, config: PrefixVLMConfig) -> PrefixVLMForConditionalGeneration:
    """The model with a LLaVA's weights, which both then share, and with its settings for generation."""
    tower = build_tower(config).to(dtype=llava.dtype)
    _copy(llava.model.vision_tower, tower)
    with torch.device("meta"):  # an empty frame for the decoder and its head
        language_model = AutoModelForCausalLM.from_config(config.text_config)
    setattr(language_model, language_model.base_model_prefix, llava.model.language_model)
    language_model.set_output_embeddings(llava.get_output_embeddings())
    model = PrefixVLMForConditionalGeneration(config, tower, language_model)
    model.projector.to(llava.dtype)
    if not llava.config.multimodal_projector_bias:
        nn.init.zeros_(model.projector.linear_1.bias)
        nn.init.zeros_(model.projector.linear_2.bias)
    _copy(llava.model.multi_modal_projector, model.projector)
    generation = copy.deepcopy(llava.generation_config)
    generation.bad_words_ids = model.generation_config.bad_words_ids
    model.generation_config = generation
    return model.eval()


def _copy(theirs: nn.Module, ours: nn.Module) -> None:
    """Copies the weights that a module here has from its counterpart, which may have more."""
    given = {name.removeprefix(LEVEL): value for name, value in theirs.state_dict().items()}
    taken = {name: given.get(name.removeprefix(LEVEL), value) for name, value in ours.state_dict().items()}
    ours.load_state_dict(taken)


def processor_of(theirs, model: PrefixVLMForConditionalGeneration) -> PrefixVLMProcessor:
    """The processor that prepares pictures and prompts as a LLaVA's does.

    Raises:
        ValueError: for one without a chat template, or whose prompts or pictures come out differently.
    """
    template = theirs.chat_template or getattr(theirs.tokenizer, "chat_template", None)
    if template is None:
        raise ValueError("The LLaVA has no chat template; add one to its processor, as it was trained with.")
    wanted = _prepared(theirs)
    if not _takes_texts(theirs, template):
        template = PARTS_OF_TEXTS + template
    for start in ("", "{{ bos_token }}"):  # which a LLaVA's tokenizer may add by itself
        processor = PrefixVLMProcessor(
            theirs.image_processor,
            theirs.tokenizer,
            start + template,
            num_image_tokens=model.config.num_image_tokens,
            image_token=theirs.image_token,
        )
        if processor.image_token_id != model.config.image_token_id:
            raise ValueError(
                f"The processor's {theirs.image_token} is token {processor.image_token_id}, but the model's image token is "
                f"{model.config.image_token_id}; they do not belong together."
            )
        try:
            found = _prepared(processor)
        except ValueError as error:
            raise ValueError(f"The LLaVA's chat template cannot be used here: {error}") from error
        if all(torch.equal(found[name], wanted[name]) for name in ("input_ids", "pixel_values")):
            return processor
    raise ValueError("The LLaVA's processor makes other prompts or pictures of a conversation than the one here.")


def _takes_texts(processor, template: str) -> bool:
    """Whether a template writes contents that are texts as it writes a list of one."""
    texts = [{**message, "content": message["content"][-1]["text"]} for message in PROBE]
    parts = [{**message, "content": message["content"][-1:]} for message in PROBE]
    try:
        one, other = (processor.apply_chat_template(said, chat_template=template) for said in (texts, parts))
    except Exception:  # of any kind that a template may raise
        return False
    return one == other


def _prepared(processor) -> dict[str, torch.Tensor]:
    messages = copy.deepcopy(PROBE)
    messages[0]["content"][0]["image"] = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def import_llava(folder: str, output: Path) -> None:
    """Saves what `from_llava` makes in a folder of its own.

    Raises:
        ValueError: as `from_llava`, or for a folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already; choose another folder.")
    model, processor = from_llava(folder)
    model.save_pretrained(output)
    processor.save_pretrained(output)
