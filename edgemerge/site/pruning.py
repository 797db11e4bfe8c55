"""Which models of a device's folder lose their file, and when."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice

from edgemerge.errors import FormatError
from edgemerge.site import ownership
from edgemerge.site.folder import SiteFolder

__all__ = ["drop_tried", "prune"]


def prune(folder: SiteFolder, keep: int) -> list[str]:
    """Remove all but the newest models; that which serves, and the one before it, always stay.

    Models that nobody has decided about stay too: somebody made them on the page. What has no record is
    somebody else's. Where a bad card damaged the history, records tell which models were promoted.

    Answers of models that are not here go too; before the first promotion, those of the base stay.

    Parameters
    ----------
    folder : SiteFolder
        Locked.
    keep : int
        How many models stay, at least 1. As many records of models without a file stay, too.

    Returns
    -------
    list of str
        Ids whose file was removed.
    """
    history, records = folder.history(), folder.records()
    promoted = [one.id for one in records if one.decision == "promoted"]
    latest = filter(folder.has_model, dict.fromkeys([*reversed(history), *promoted]))
    undecided = [one.id for one in records if one.decision is None]
    stay = {*islice(latest, max(2, keep)), *undecided}
    names = sorted(
        one.stem for one in folder.models.glob("*.json") if ownership.ID.fullmatch(one.stem)
    )
    removed = [name for name in names if name not in stay and folder.has_model(name)]
    for name in removed:
        folder.drop(name)
    for path in folder.answers.iterdir():
        of = ownership.ANSWERS.fullmatch(path.name)
        if history and of and not folder.has_model(of[1]):
            path.unlink()
    known = [one.id for one in folder.records()]
    without = [name for name in known if not folder.has_model(name)][:keep]
    without += filter(None, [folder.current_id()])  # also where its file was lost
    for name in names:
        if name not in without and not folder.has_model(name):
            folder.forget(name)
    return removed


def drop_tried(folder: SiteFolder) -> None:
    """Remove the model that is being tried, if nobody has decided about it, or made it before the update did.

    Call it before something else is noted in its place: from then on it looks like one of the page's, which
    `prune` leaves.

    Parameters
    ----------
    folder : SiteFolder
        Locked.
    """
    trying = folder.trying() or {}
    name = trying.get("id")
    if name is None or trying.get("is_spared") or name in folder.history():
        return
    with suppress(FormatError):  # `prune` removes what has a damaged record
        if folder.record(name).decision is None:
            folder.drop(name)
            folder.forget(name)
