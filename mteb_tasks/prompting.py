"""Which prompt each kind of row gets in an evaluation, as one table, and other prompts on request.

A row's kind is that of its task: retrieval, questions about an image, and so on. Within a kind, a prompt goes to the
rows that hold what it asks for: ``<sent>`` a text, ``<image>`` an image, both of them a text beside an image.

The defaults are those under which the public scores of E5-V were made: ``text``, ``image`` and, for an image with a
text, ``composed``. The wording of that last one was a little different, see :data:`PUBLIC`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

from e5v_st.model.prompts_e5v import IMAGE, PROMPTS, SENTENCE

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

    from .public_scores import PublicTask

#: Stands for every kind on the command line.
ALL = "all"
#: What a row holds, by which its default prompt is named.
SHAPES = ("text", "image", "composed")
#: The composed prompt of mteb's own entry of E5-V, with which the public scores of tasks that have a text beside an
#: image were made: it has a stray ``[INST]``, and "Describe" in place of "desribe" (mteb 2.26, ``e5_v.py``).
PUBLIC = "mteb-composed"
NAMED: dict[str, str] = {
    **PROMPTS,
    PUBLIC: '[INST] <image> Modify this image with "<sent>" Describe modified image in one word: [/INST]',
}


@dataclass(frozen=True)
class Kind:
    """A kind of rows.

    Attributes:
        name: As ``--prompt`` takes it.
        about: What the rows are.
        types: mteb's types of the tasks that have such rows.
        tasks: Beginnings of the names of such tasks; these go before types.
        prompts: Names of the prompts by what a row holds, where they are not those of :data:`SHAPES` themselves.
    """

    name: str
    about: str
    types: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)

    def default(self, shape: str) -> str:
        """Returns the name of the prompt that a row gets which holds this."""
        return self.prompts.get(shape, shape)


#: The first row that fits a task is its kind; the last one fits all.
KINDS: tuple[Kind, ...] = (
    Kind(
        "composed",
        "an image, and what should be different about it",
        tasks=("CIRR", "E5VCIRR", "FashionIQ", "E5VFashionIQ", "E5VEmojiComposed", "EDIRIT2I"),
    ),
    Kind(
        "question",
        "an image with a question about it, and its answers",
        ("VisionCentricQA",),
        (
            "OVEN",
            "InfoSeek",
            "VQA2",
            "VizWiz",
            "WebQA",
            "BLINK",
            "CVBench",
            "OKVQA",
            "ReMuQ",
            "LLaVA",
            "EncyclopediaVQA",
        ),
    ),
    Kind("compositionality", "images, and captions of which one is right", ("Compositionality",)),
    Kind("document", "pages as images, and questions that find them", ("DocumentUnderstanding",)),
    Kind("sts", "pairs of sentences", ("STS",), prompts={"text": "sts"}),
    Kind("visual-sts", "pairs of sentences that are drawn as images", ("VisualSTS(eng)", "VisualSTS(multi)")),
    Kind(
        "classification",
        "what is sorted into classes",
        ("ImageClassification", "Classification", "MultilabelClassification"),
    ),
    Kind("clustering", "what is put into groups", ("ImageClustering", "Clustering")),
    Kind("zero-shot", "images, and the names of classes in mteb's templates", ("ZeroShotClassification",)),
    Kind("retrieval", "everything else"),
)


def kind_of(task: TaskMetadata | PublicTask) -> Kind:
    """Returns the kind of a task's rows.

    Example:
        >>> import mteb
        >>> kind_of(mteb.get_task("OVENIT2TRetrieval").metadata).name
        'question'
    """
    named = (kind for kind in KINDS if kind.tasks and task.name.startswith(kind.tasks))
    typed = (kind for kind in KINDS if task.type in kind.types)
    return next(named, None) or next(typed, KINDS[-1])


def shape_of(prompt: str) -> str:
    """Returns what a row must hold for a prompt: ``"text"``, ``"image"`` or ``"composed"``."""
    return "text" if IMAGE not in prompt else "composed" if SENTENCE in prompt else "image"


def read_choices(words: Iterable[str]) -> str | None:
    """Reads what ``--prompt KIND=NAME`` says.

    Args:
        words: Each ``KIND=NAME``.

    Returns:
        The choices in one order and one spelling, without those that are the default; ``None`` where none is left.

    Raises:
        ValueError: If there is no such kind or prompt.

    Example:
        >>> read_choices(["question=fused", "sts=sts"])
        'question=fused'
    """
    kinds = {kind.name: kind for kind in KINDS}
    chosen: dict[tuple[str, str], str] = {}
    for word in words:
        name, _, prompt = word.partition("=")
        if name not in (ALL, *kinds):
            raise ValueError(f"got --prompt {word!r}, want KIND=NAME with one of the kinds {', '.join((ALL, *kinds))}")
        if prompt not in NAMED:
            near = get_close_matches(prompt, NAMED, n=1)
            hint = f"; is it {near[0]!r}?" if near else ""
            raise ValueError(f"there is no prompt {prompt!r}{hint} There are {', '.join(NAMED)}")
        shape = shape_of(NAMED[prompt])
        for own in kinds if name == ALL else (name,):
            chosen[own, shape] = prompt
    told = {key: prompt for key, prompt in chosen.items() if prompt != kinds[key[0]].default(key[1])}
    return ",".join(_spell(told)) or None


def _spell(chosen: Mapping[tuple[str, str], str]) -> list[str]:
    """Returns ``KIND=NAME`` for each choice, and ``all=NAME`` for a prompt that every kind has."""
    kinds: dict[str, set[str]] = {}
    for (kind, _), prompt in chosen.items():
        kinds.setdefault(prompt, set()).add(kind)
    whole = sorted(prompt for prompt, own in kinds.items() if len(own) == len(KINDS))
    single = [f"{kind}={prompt}" for prompt, own in kinds.items() if prompt not in whole for kind in own]
    return [*(f"{ALL}={prompt}" for prompt in whole), *sorted(single)]


def chosen_for(choices: str | None, kind: Kind) -> dict[str, str]:
    """Returns the names of the prompts that were chosen for a kind, by what a row holds.

    Args:
        choices: As :func:`read_choices` returns them.
        kind: Of a task.

    Example:
        >>> chosen_for("all=mteb-composed,sts=text", KINDS[4])
        {'composed': 'mteb-composed', 'text': 'text'}
    """
    pairs = [word.split("=") for word in (choices or "").split(",") if word]
    return {shape_of(NAMED[prompt]): prompt for own, prompt in pairs if own in (ALL, kind.name)}
