"""`list`: the checkpoints with MxD layers on the Hub, by what their cards say."""

from dataclasses import asdict, dataclass
from typing import Any

from mxd_convert.hub.client import client, explained, patiently
from mxd_convert.report.card import TAG


@dataclass(frozen=True)
class Listed:
    """A checkpoint on the Hub. What its card does not say is None.

    delta_ce: rise of cross-entropy, nats per token, on the text that its card names.
    """

    repo_id: str
    base: str | None
    kind: str | None
    layers: list[int] | None
    k: int | None
    delta_ce: float | None
    verdict: str | None
    downloads: int
    updated: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_checkpoints(base: str | None = None, author: str | None = None, limit: int | None = None) -> list[Listed]:
    """The checkpoints on the Hub that carry the tag of this package, newest first.

    base: only those of this model, by its id or the part after the slash. author: only those of this owner. Raises InputError where the
    Hub can't be reached.
    """
    api = client()
    with explained("the Hub", "listing"):
        found = patiently(
            lambda: list(
                api.list_models(filter=TAG, author=author, sort="last_modified", expand=["cardData", "downloads", "lastModified"])
            )
        )
    listed = [_read(info) for info in found]
    if base is not None:
        listed = [one for one in listed if one.base is not None and base in (one.base, one.base.rpartition("/")[2])]
    return listed[:limit]


def _read(info: Any) -> Listed:
    """What a card says, where it says it in the form that ours do: it may come from anyone."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    said = card.get("mxd")
    told: dict[str, Any] = said if isinstance(said, dict) else {}
    base = card.get("base_model")
    layers = _of(told.get("layers"), list)
    return Listed(
        info.id,
        _of(base[0] if isinstance(base, list) and base else base, str) or _of(told.get("base"), str),
        _of(told.get("kind"), str),
        layers if layers is not None and all(type(index) is int for index in layers) else None,
        _of(told.get("k"), int),
        _of(told.get("delta_ce"), float, int),
        _of(told.get("verdict"), str),
        info.downloads or 0,
        info.last_modified.date().isoformat() if info.last_modified else None,
    )


def _of(value: Any, *types: type) -> Any:
    return value if type(value) in types else None
