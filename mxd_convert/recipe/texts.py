"""The section `data` of a recipe: the texts to train and to evaluate on."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mxd_convert.recipe.section import Positive, Rate, Section, is_local


class Fields(Section):
    """Where a text is and how its documents are stored."""

    path: str | None = None
    """A Hub dataset, or a local .txt, .jsonl (both also .gz) or .parquet file, a folder of such files, or a glob."""
    config: str | None = None
    """Configuration of a Hub dataset that has several (wikitext-103-raw-v1); null: the dataset's default."""
    split: str | None = None
    """Split of a Hub dataset; null: train."""
    text: str = "text"
    """Field that contains a document (.jsonl, .parquet, Hub datasets): its text, or a chat as a list of messages with `role` and
    `content`, which is rendered with the tokenizer's chat template."""
    missing: Literal["refuse", "skip"] = "refuse"
    """Rows whose text is missing or null. refuse: stop with an error. skip: leave them out and report their number."""

    @model_validator(mode="after")
    def _config_of_a_dataset(self) -> "Fields":
        if self.config is not None and (self.path is None or is_local(self.path)):
            text = (
                "no dataset is named" if self.path is None else f"{self.path} is local, and only Hub datasets have configurations"
            )
            raise ValueError(f"config: {self.config!r} is given, but {text}. Set config: null, or set path to a Hub dataset.")
        return self


class Source(Fields):
    """One of several texts."""

    path: str
    """A Hub dataset, or a local .txt, .jsonl (both also .gz) or .parquet file, a folder of such files, or a glob."""
    weight: Rate | None = None
    """Share of the text, in characters and relative to the weights of the other sources. Reading stops where the first source
    ends. null for all sources: all of them are read to their end."""


class Sources(Fields):
    """One text, or several."""

    sources: list[Source] | None = None
    """Several texts instead of `path`, each with path, config, split, text, missing and weight. null: one text."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, content: Any) -> Any:
        """Accept a plain list of sources."""
        return {"sources": content} if isinstance(content, list) else content

    @model_validator(mode="after")
    def _one_or_several(self) -> "Sources":
        if self.sources is None:
            return self
        if not self.sources:
            raise ValueError("sources: the list is empty. Name at least one source, or set path.")
        if self.path not in (None, type(self).model_fields["path"].default):
            raise ValueError(f"path: {self.path!r:.80} is given, and sources too. Remove one of them.")
        weights = [source.weight for source in self.sources]
        if None in weights and any(weights):
            raise ValueError(
                f"sources: source {weights.index(None)} has no weight, but others have. Give each a weight, or none."
            )
        return self

    def entries(self) -> Iterator[tuple[str, Source]]:
        """Yield (key below the section, source) of every text: ("path", ...) for one text, ("sources.0.path", ...) for several."""
        if self.sources is not None:
            yield from ((f"sources.{number}.", source) for number, source in enumerate(self.sources))
        elif self.path is not None:
            yield "", Source(**{name: getattr(self, name) for name in Fields.model_fields})

    @property
    def is_given(self) -> bool:
        """Return whether there is a text."""
        return self.path is not None or self.sources is not None

    @property
    def where(self) -> str:
        """Return the paths of the texts for errors."""
        return " + ".join(source.path for _, source in self.entries())

    @property
    def shown(self) -> str:
        """Return the names of the texts for messages: Hub datasets, and names of local files."""
        return " + ".join(
            source.path.rstrip("/").rpartition("/")[2] if is_local(source.path) else source.path for _, source in self.entries()
        )


class Text(Sources):
    """A text to train on."""

    path: str | None = "Skylion007/openwebtext"
    """A Hub dataset, or a local .txt, .jsonl (both also .gz) or .parquet file, a folder of such files, or a glob."""
    split: str | None = "train"
    """Split of a Hub dataset; null: train."""


class EvalText(Sources):
    """A text to evaluate on."""

    path: str | None = None
    """As data.train.path, for evaluation; null: a tenth of the training documents, chosen by content, is held out."""
    tokens: Positive = 262_144
    """Number of tokens to evaluate on."""


class Data(Section):
    """Text to train and to evaluate on."""

    train: Text = Text()
    """Training text."""
    eval: EvalText = EvalText()
    """Evaluation text. It never overlaps the training text."""
    context: Annotated[int, Field(ge=2)] = 128
    """Block length in tokens: the base model reads the text in blocks of this length."""
    tokens: Positive = 480_000_000
    """Number of tokens to train on. Blocks are drawn at random from that many tokens of the text, and from at least 4 million. A
    shorter text is repeated in a new order."""
