"""A web page that answers questions about pictures."""

from prefixvlm.inference.asking import stream_answer
from prefixvlm.inference.environment import choose_device
from prefixvlm.inference.loading import load

MAX_NEW_TOKENS = 256


def page(name: str, device: str | None = None):
    """The gradio page for a saved model.

    Args:
        name: folder or Hub id.
        device: as for `choose_device`; the weights have the dtype that is fast there.

    Raises:
        ValueError: if there is no such model.
    """
    import gradio

    model, processor = load(name, dtype=None, device=choose_device(device))

    def reply(image, question):
        if image is None:
            raise gradio.Error("Choose a picture first.")
        answer = ""
        for piece in stream_answer(model, processor, [image], question.strip(), MAX_NEW_TOKENS):
            answer += piece
            yield answer

    return gradio.Interface(
        reply,
        inputs=[gradio.Image(type="pil", label="Picture"), gradio.Textbox(label="Question (leave empty for a caption)")],
        outputs=gradio.Textbox(label="Answer"),
        title="PrefixVLM",
        description=f"{name}: {model.num_parameters():,} parameters",
        flagging_mode="never",
    )
