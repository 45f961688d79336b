"""Tags in a job's comment: `sbatch --comment=[project,]stage,run_type[,key=value...]`.

    comment := item { "," item }
    item    := word | key "=" value
    key     := project | entity | model | run | activity | precision | stage | run_type

Spaces around items, keys and values do not count. Words come before pairs; there are two
(`stage,run_type`), three (`project,stage,run_type`) or none. Exactly one word is a stage, and it
stands in its place, so that `project,stage` and `stage,run_type` cannot be taken for each other.
A stage is an activity of the closed list, or one of the six words sites already use (STAGES),
which say nothing certain about the activity and stay a name for mapping rules.

A comment without comma and equals sign is ordinary text and says nothing. Anything else that does
not follow the grammar is refused whole, with the reason: half a tag would be a wrong one.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flopledger_agent.attribution.tag_values import PRECISIONS
from flopledger_core.activities import ACTIVITIES, IDLE, UNATTRIBUTED
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import require_id, require_project

# The stages of the sbatch wrapper whose grammar this is (IMAGINE lab, compute-accounting).
STAGES: Final = frozenset({"data", "explore", "baseline", "ablate", "hyperparam", "final"})
KEYS: Final = (
    "project",
    "entity",
    "model",
    "run",
    "activity",
    "precision",
    "stage",
    "run_type",
)
COMMENT_CHARACTERS_MAX: Final = 1024
REMEDY: Final = "write [project,]stage,run_type and key=value pairs, separated by commas"


class CommentTags(msgspec.Struct, frozen=True, kw_only=True):
    """What a comment says; `trouble` why it says nothing although it looks like tags."""

    tags: dict[str, str] = {}  # project, entity, model, run, activity, precision
    names: dict[str, str] = {}  # stage, run_type
    trouble: str | None = None


def is_stage(word: str) -> bool:
    """Whether a word can be a stage."""
    return word in STAGES or _is_activity(word)


def parse_comment(comment: str | None) -> CommentTags:
    """The tags in a comment; never raises."""
    text = (comment or "").strip()
    if "," not in text and "=" not in text:
        return CommentTags()
    try:
        return _parse(text)
    except InvalidInput as error:
        return CommentTags(trouble=f"the comment's tags are not used: {error}")


def _parse(text: str) -> CommentTags:
    if len(text) > COMMENT_CHARACTERS_MAX:
        raise _refused(text, f"use at most {COMMENT_CHARACTERS_MAX} characters")
    words: list[str] = []
    values: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            if values:
                raise _refused(item.strip(), "words stand before key=value pairs")
            words.append(key)
            continue
        if key not in KEYS:
            raise InvalidInput("comment key", key, f"use one of: {', '.join(KEYS)}")
        if key in values:
            raise _refused(text, f"say {key} once")
        values[key] = value
    for key, value in _positions(words).items():
        if key in values:
            raise _refused(text, f"say {key} once")
        values[key] = value
    _check(values)
    if "activity" in values and _is_activity(values.get("stage", "")):
        if values["stage"] != values["activity"]:
            raise _refused(text, "the stage and activity= name two activities; leave one out")
    elif _is_activity(values.get("stage", "")):
        values["activity"] = values["stage"]
    names = {key: value for key, value in values.items() if key in {"stage", "run_type"}}
    values = {key: value for key, value in values.items() if key not in names}
    return CommentTags(tags=values, names=names)


def _positions(words: list[str]) -> dict[str, str]:
    if not words:
        return {}
    if len(words) not in {2, 3}:
        raise _refused(",".join(words), f"there are {len(words)} words; {REMEDY}")
    project, stage, run_type = words if len(words) == 3 else ("", *words)
    stages = [word for word in words if is_stage(word)]
    if stages != [stage] or stage in {run_type, project}:
        remedy = "write project,stage,run_type with the stage in the middle, or name the parts"
        raise _refused(",".join(words), f"{len(stages)} words are a stage; {remedy} with key=value")
    found = {"stage": stage, "run_type": run_type}
    return {"project": project, **found} if len(words) == 3 else found


def _check(values: dict[str, str]) -> None:
    """Every value can be what its key says. Errors: InvalidInput names the key and the remedy."""
    for key, value in values.items():
        if key == "project":
            require_project(value)
        elif key == "precision":
            if value not in PRECISIONS:
                raise InvalidInput(key, value, f"use one of: {', '.join(PRECISIONS)}")
        elif key == "activity":
            if not _is_activity(value):
                raise InvalidInput(key, value, "use an activity such as pretrain or sft")
        elif key == "stage" and not is_stage(value):
            stages = ", ".join(sorted(STAGES))
            raise InvalidInput(key, value, f"use an activity or one of: {stages}")
        else:
            require_id(key, value)


def _is_activity(word: str) -> bool:
    return word in ACTIVITIES and word not in {IDLE, UNATTRIBUTED}


def _refused(value: str, remedy: str) -> InvalidInput:
    return InvalidInput("comment", value[:80], remedy)
