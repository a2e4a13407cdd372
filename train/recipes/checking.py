"""How settings are checked: the types they are made of, and one sentence for whatever does not fit.

pydantic does the checking. Types are strict (`true` is not a number, 4.0 is not a whole number), numbers are finite, and a
key that no field has is an error.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_assignment=True)
FEW = 3  # names that are all told

# by pydantic's names of errors
MUST_BE = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def _number(value: Any) -> Any:
    """YAML reads 1e-4, which has no point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def refuse_not_finite(value: Any, path: str = "") -> Any:
    """Refuses NaN and infinity at any depth of what is handed on to others."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; it must be a finite number.")
    entries: Iterable = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        refuse_not_finite(entry, f"{path}.{key}" if path else str(key))
    return value


AtLeastOne = Annotated[int, Field(ge=1)]
AtLeastZero = Annotated[int, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]  # never the whole
Dtype = Literal["float32", "bfloat16", "float16"]  # those of prefixvlm.inference.loading
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
PlainDict = Annotated[dict[str, Any], AfterValidator(refuse_not_finite)]  # whoever reads it checks the keys


def _with_source(data: dict[str, Any]) -> dict[str, Any]:
    """Data without a `source` are of the kind that their rows look like."""
    if not isinstance(data.get("source", ""), str) or not ("source" in data or "path" in data):
        raise ValueError("needs a `source`, the name of one, or a `path`.")
    return {"source": "auto", **data}


DataSource = Annotated[PlainDict, AfterValidator(_with_source)]  # see `train/data/sources.py`


class SettingsError(ValueError):
    """Settings that do not fit. `errors` has a path of keys and a sentence for each; the message is the first of them."""

    def __init__(self, error: ValidationError):
        self.errors: list[tuple[tuple[int | str, ...], str]] = []
        for one in error.errors():
            cause = one.get("ctx", {}).get("error")
            inner = cause.errors if isinstance(cause, SettingsError) else [((), _sentence(one))]
            # pydantic puts a key that is wrong itself, and a mark of that, behind the path of its mapping
            place = one["loc"][:-2] if one["loc"][-1:] == ("[key]",) else one["loc"]
            self.errors += [(place + path, sentence) for path, sentence in inner]
        super().__init__(self.sentence())

    def sentence(self, where: str = "", name: Callable[[tuple], str] = lambda path: ".".join(map(str, path))) -> str:
        """The first error, with the file or command, `where`, and the key, which `name` makes of its path."""
        path, sentence = self.errors[0]
        key = name(path)
        if key and not sentence.startswith(("is ", "has ", "must ", "needs ")):
            key += ":"
        return ": ".join(part for part in (where, f"{key} {sentence}".strip()) if part)


def _sentence(error: Mapping[str, Any]) -> str:
    """What pydantic says of one value, in words that go on after its key."""
    kind, value, context = error["type"], reprlib.repr(error["input"]), error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if error["loc"][-1:] == ("[key]",):
        return f"has the key {value}; keys must be text."
    if kind == "missing":
        return "is missing."
    if kind in ("dict_type", "model_type"):
        return "must be a mapping."
    if kind == "literal_error":
        names = re.findall(r"'(.*?)'", context["expected"])
        return f"is {value}; {did_you_mean(error['input'], names)}"
    if kind == "string_too_short":
        return "must not be empty."
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"has {context['actual_length']} entries; it must have {bound}."
    if kind in MUST_BE:
        return f"is {value}; it must be {MUST_BE[kind].format(**context)}."
    return f"is {value}: {error['msg']}."


class Checked(BaseModel):
    """Settings that are checked when they are made, and when one is set.

    Raises:
        SettingsError: in one sentence, for what does not fit.
    """

    model_config = STRICT

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_unknown_keys([name], type(self).model_fields)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise SettingsError(error) from None

    @model_validator(mode="wrap")  # before `__init__` is given the keys as names of arguments, which must be text
    @classmethod
    def _no_unknown_keys(cls, values: Any, check: ModelWrapValidatorHandler["Checked"]) -> "Checked":
        if isinstance(values, dict):
            refuse_unknown_keys(values, cls.model_fields)
        return check(values)


def refuse_unknown_keys(keys: Iterable, known: Iterable[str]) -> None:
    """Raises a ValueError for the first key that is not known; it says which one may have been meant."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key {key}; {did_you_mean(key, known)}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The known name that looks most like `name`; all of them if none does, or they are few."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1) if len(known) > FEW else []
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."
