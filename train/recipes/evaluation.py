"""The settings of an evaluation, each declared once: for `prefixvlm evaluate`, and a recipe's `test`, `evaluation` and
`validation`."""

from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field, model_validator

from prefixvlm.train.recipes.checking import AtLeastOne, Checked, DataSource, Dtype, Number, Text

TaskName = Literal["captions", "karpathy", "vqa", "choices", "flickr8k", "flickr30k", "coco", "pathvqa", "easy_vqa"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)


class Decoding(Checked):
    """How texts are generated.

    Attributes:
        num_beams: 1 is greedy search.
        max_new_tokens: where a text is cut.
        batch_size: texts generated at once, of similar length.
    """

    model_config = ConfigDict(frozen=True)

    num_beams: AtLeastOne = 1
    max_new_tokens: AtLeastOne = 8
    batch_size: AtLeastOne = 256


class EvaluationSettings(Checked):
    """What a model is evaluated on, and how it generates.

    Attributes:
        task: one of `train/evaluation/tasks.py`.
        data: rows of the test set: a file, folder, glob or Hub id.
        images: the folder of its images; by default beside `data`.
        split: of the rows.
        image, texts, question, choices, answer: a row's keys of the image, of the captions, of the question, of what may
            be chosen, and of the answer or answers; by default the source's own.
        shots: examples with their answers that stand before each question, and where they come from.
        shots_data, shots_split: where examples come from; by default the test set's own data, in the split `train`.
        shots_seed: draws them, for each question others.
        prompt: asks for captions in these words; by default the image stands alone, as in stages 0 to 2.
        num_beams, batch_size: as in `Decoding`.
        max_new_tokens: as in `Decoding`; by default 64 for captions and 32 for answers.
    """

    task: TaskName
    data: Text | None = None
    images: Text | None = None
    split: Text = "test"
    image: Text | None = None
    texts: Text | None = None
    question: Text | None = None
    choices: Text | None = None
    answer: Text | None = None
    prompt: Text | None = None
    shots: Annotated[int, Field(ge=0)] = 0
    shots_data: Text | None = None
    shots_split: Text = "train"
    shots_seed: Annotated[int, Field(ge=0)] = 0
    num_beams: AtLeastOne = 1
    max_new_tokens: AtLeastOne | None = None
    batch_size: AtLeastOne = 32

    @property
    def keys(self) -> dict[str, str]:
        """The names of a row's keys that are given, by what they are of."""
        names = ("image", "texts", "question", "choices", "answer")
        return {name: key for name in names if (key := getattr(self, name)) is not None}

    def decoding(self, default_max_new_tokens: int) -> Decoding:
        """How texts are generated, of a kind of task that cuts them at `default_max_new_tokens` by default."""
        return Decoding(
            num_beams=self.num_beams,
            max_new_tokens=default_max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            batch_size=self.batch_size,
        )


class EvaluationRecipe(EvaluationSettings):
    """Evaluation in the middle of training.

    Attributes:
        every_steps: evaluate every N optimiser steps.
        examples: how many of the test set's are asked, spread evenly and always the same.
    """

    every_steps: AtLeastOne
    examples: AtLeastOne = 200


class ValidationRecipe(Checked):
    """The loss on held-out data in the middle of training, and what follows from it.

    Attributes:
        data: a data source of its own, which is not streamed; or instead
        share: of the stage's own samples, held out picture by picture. The recipe's seed draws them: all stages with the
            same data and share hold out the same ones.
        every_steps: measure every N optimiser steps, and after the last one.
        examples: at most N of the held-out samples, spread evenly over them; `None` for all.
        keep_best: keep the checkpoint with the smallest loss, and leave it as the stage's result.
        patience: end the stage after N measurements in a row that were no smaller than the smallest; `None` for never.
    """

    data: DataSource | None = None
    share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    every_steps: AtLeastOne
    examples: AtLeastOne | None = None
    keep_best: bool = True
    patience: AtLeastOne | None = None

    @model_validator(mode="after")
    def _has_one_set(self) -> "ValidationRecipe":
        if (self.data is None) == (self.share is None):
            raise ValueError("needs `data` of its own or a `share` of the stage's, one of the two.")
        return self


class FinalEvaluation(EvaluationSettings):
    """The evaluation of a recipe's finished model. Its data are by default those of the last stage, in the split `test`.

    Attributes:
        limit: ask only N examples, spread evenly over the set; `None` for all.
        table: print Table VI's layout, with the paper's row beside ours.
    """

    limit: AtLeastOne | None = None
    table: bool = False


class EvaluationRun(FinalEvaluation):
    """The evaluation of a saved model, as `prefixvlm evaluate` does it.

    Attributes:
        model: folder or Hub id.
        output: the folder that gets predictions, metrics and a gallery.
        dtype: of the weights.
        device: such as `cuda` or `cpu`; by default the first there is of cuda, Apple's mps and cpu.
        int8: read the decoder's weights as 8-bit integers.
    """

    model: Text
    output: Text
    dtype: Dtype = "float32"
    device: Text | None = None
    int8: bool = False


class CaptionRun(Checked):
    """The captions of many pictures, as `prefixvlm caption` makes them.

    Attributes:
        model: folder or Hub id.
        data: a folder of pictures, one picture, or rows that name some: a file, folder, glob or Hub id.
        output: the table, a .parquet, .jsonl or .csv file.
        images: the folder of the images that rows name; by default beside `data`.
        image: a row's key of the image; by default found out.
        split: of the rows; by default the rows of a file are all taken, and of a data set the split `train`.
        prompt: asks in these words; by default the image stands alone, as in stages 0 to 2.
        num_beams, max_new_tokens, batch_size: as in `Decoding`.
        dtype: of the weights; by default what is fast on the device.
        device, int8: as in `EvaluationRun`.
    """

    model: Text
    data: Text
    output: Text
    images: Text | None = None
    image: Text | None = None
    split: Text | None = None
    prompt: Text | None = None
    num_beams: AtLeastOne = 1
    max_new_tokens: AtLeastOne = 64
    batch_size: AtLeastOne = 32
    dtype: Dtype | None = None
    device: Text | None = None
    int8: bool = False
