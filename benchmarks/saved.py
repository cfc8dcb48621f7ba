"""How saved results are read: nothing here needs what made them."""

from typing import Any, NamedTuple

OURS, AGAIN = "trainops", "trainops again"

Case = dict[str, Any]


def medians(case: Case) -> dict[str, float]:
    """Seconds of every provider that was timed."""
    return {
        name: found["seconds"]["median"] for name, found in case.get("providers", {}).items() if "seconds" in found
    }


def opponents(case: Case) -> dict[str, float]:
    """Seconds of all others: neither trainops nor its other ways to do the work, whose names begin alike."""
    return {name: seconds for name, seconds in medians(case).items() if not name.startswith(OURS)}


class Interval(NamedTuple):
    """A median of ratios taken within rounds, and where it lies with 95% confidence."""

    median: float
    low: float
    high: float


def relative_of(case: Case, name: str) -> Interval | None:
    """The time of anybody over that of trainops."""
    found = case.get("providers", {}).get(name, {})
    return Interval(**found["relative"]) if "relative" in found else None


def relative(case: Case) -> dict[str, Interval]:
    """The time of every opponent over that of trainops."""
    found = {name: relative_of(case, name) for name in opponents(case)}
    return {name: interval for name, interval in found.items() if interval is not None}


def fastest(case: Case) -> str | None:
    """The opponent to be measured against."""
    others = relative(case)
    return min(others, key=others.__getitem__, default=None)


def ratio(case: Case) -> Interval | None:
    """The time of the fastest opponent over that of trainops."""
    return min(relative(case).values(), default=None)


def noise(case: Case) -> Interval | None:
    """The time of trainops over its own."""
    return relative_of(case, AGAIN)


def verdict(case: Case, opponent: str | None = None) -> str:
    """Whether trainops is "ahead" of an opponent, "behind" it, or neither with any confidence: "level".

    The default opponent is the fastest one. It takes a difference that is larger than that between trainops and
    itself, and larger than that with confidence.
    """
    found, own = ratio(case) if opponent is None else relative(case).get(opponent), noise(case)
    if found is None:
        return ""
    bar = 1.0 if own is None else max(1.0, own.high, 1 / own.low)
    return "ahead" if found.low > bar else "behind" if found.high < 1 / bar else "level"


def share(case: Case) -> Interval | None:
    """The bandwidth of trainops over that of the operation that shows it."""
    found = case.get("limit", {})
    return Interval(**found["share"]) if "share" in found else None


def caption(results: dict[str, Any]) -> str:
    """Where and with what."""
    found = results["environment"]
    threads = f", {found['threads']} thread{'s' * (found['threads'] > 1)}" if found["type"] == "cpu" else ""
    versions = f"torch {found['torch']}, trainops {found['trainops']} ({found['commit']})"
    return f"{found['device']}{threads}, {versions}" + ", a quick run" * found["quick"]
