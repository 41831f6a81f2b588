"""National flags (Debian `iso-flags-png-320x240`, public domain), warped onto photographs of KDE and Lomiri."""

from collections.abc import Callable

classnames: list[str] = [
    "argentina",
    "australia",
    "brazil",
    "canada",
    "chile",
    "china",
    "cuba",
    "finland",
    "france",
    "germany",
    "greece",
    "india",
    "israel",
    "italy",
    "jamaica",
    "japan",
    "mexico",
    "norway",
    "south africa",
    "south korea",
    "spain",
    "sweden",
    "turkey",
    "united kingdom",
    "united states",
]

templates: list[Callable[[str], str]] = [
    lambda c: f"the flag of {c}.",
    lambda c: f"a photo of the flag of {c}.",
    lambda c: f"a picture of the flag of {c}.",
]
