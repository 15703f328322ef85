"""`list`: list the checkpoints with MxD layers on the Hub, from the metadata of their cards."""

from dataclasses import asdict, dataclass
from typing import Any

from mxd_convert.hub.client import client, hub_errors, with_retries
from mxd_convert.report.card import TAG


@dataclass(frozen=True)
class Listed:
    """A checkpoint on the Hub. A field that its card lacks is None.

    Attributes:
        repo_id: owner/name.
        base: Hub id of the base model.
        kind: kind of layer, such as "mxd".
        layers: indices of the converted layers.
        k: active experts per token.
        delta_ce: rise in cross-entropy, nats per token, on the text named in the card.
        verdict: the report's verdict.
        downloads: the Hub's count of downloads.
        updated: date of the last change, as YYYY-MM-DD.
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
        """Return the fields as JSON values."""
        return asdict(self)


def list_checkpoints(base: str | None = None, author: str | None = None, limit: int | None = None) -> list[Listed]:
    """Return the checkpoints on the Hub that have this package's tag, most recently updated first.

    Args:
        base: only conversions of this model, given as its Hub id or as the name after the slash.
        author: only checkpoints of this owner.
        limit: at most this number.

    Raises:
        InputError: if the Hub can't be reached.
    """
    api = client()
    with hub_errors("the Hub", "listing"):
        found = with_retries(
            lambda: list(
                api.list_models(filter=TAG, author=author, sort="last_modified", expand=["cardData", "downloads", "lastModified"])
            )
        )
    listed = [_read(info) for info in found]
    if base is not None:
        listed = [one for one in listed if one.base is not None and base in (one.base, one.base.rpartition("/")[2])]
    return listed[:limit]


def _read(info: Any) -> Listed:
    """Return the fields of a card. Anyone can write one, so a value of another type than in our cards is None."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    entry = card.get("mxd")
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    base = card.get("base_model")
    layers = _of(fields.get("layers"), list)
    return Listed(
        info.id,
        _of(base[0] if isinstance(base, list) and base else base, str) or _of(fields.get("base"), str),
        _of(fields.get("kind"), str),
        layers if layers is not None and all(type(index) is int for index in layers) else None,
        _of(fields.get("k"), int),
        _of(fields.get("delta_ce"), float, int),
        _of(fields.get("verdict"), str),
        info.downloads or 0,
        info.last_modified.date().isoformat() if info.last_modified else None,
    )


def _of(value: Any, *types: type) -> Any:
    """Return the value if it has one of the types, otherwise None."""
    return value if type(value) in types else None
