"""How saved results are read: nothing here needs what made them."""

from typing import Any

OURS, AGAIN = "trainops", "trainops again"

Case = dict[str, Any]


def medians(case: Case) -> dict[str, float]:
    """Seconds of every provider that was timed."""
    return {
        name: found["seconds"]["median"] for name, found in case.get("providers", {}).items() if "seconds" in found
    }


def opponents(case: Case) -> dict[str, float]:
    """Seconds of all others."""
    return {name: seconds for name, seconds in medians(case).items() if name not in (OURS, AGAIN)}


def ratio(case: Case) -> float | None:
    """The time of the fastest opponent over that of trainops."""
    times, others = medians(case), opponents(case)
    return min(others.values()) / times[OURS] if others and OURS in times else None


def noise(case: Case) -> float | None:
    """By how much trainops differs from itself."""
    times = medians(case)
    return times[AGAIN] / times[OURS] - 1 if AGAIN in times and OURS in times else None


def share(case: Case) -> float | None:
    """The bandwidth of trainops over that of the operation that shows it."""
    ours = case.get("providers", {}).get(OURS, {})
    if "bytes_per_second" not in ours or "limit" not in case:
        return None
    return ours["bytes_per_second"] / case["limit"]["bytes_per_second"]


def caption(results: dict[str, Any]) -> str:
    """Where and with what."""
    found = results["environment"]
    threads = f", {found['threads']} thread{'s' * (found['threads'] > 1)}" if found["type"] == "cpu" else ""
    versions = f"torch {found['torch']}, trainops {found['trainops']} ({found['commit']})"
    return f"{found['device']}{threads}, {versions}" + ", a quick run" * found["quick"]
