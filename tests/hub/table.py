"""The table of docs/pools.md, from the results of the tests: ``python tests/hub/table.py results.xml``.

``python -m pytest tests/hub -o junit_family=xunit1 --junitxml=results.xml`` writes the results.
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree

COLUMNS = ("experts", "tasks", "reloaded", "two processes")
HEADER = """| model pool | experts built | tasks evaluated | reloaded | two processes |
|---|---:|---:|---|---|"""


def table(results: str) -> str:
    """The results of the tests in a file as a Markdown table with a row for each model pool."""
    rows: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        values = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
        expected = case.find("skipped")
        if "pool" not in values or case.find("failure") is not None:
            continue
        row = rows.setdefault(values["pool"], {})
        row |= values if expected is None else {"experts": f"no: {expected.get('message')}"}
    lines = [" | ".join([f"`{pool}`", *(row.get(column, "") for column in COLUMNS)]) for pool, row in rows.items()]
    return "\n".join([HEADER, *(f"| {line} |" for line in lines)])


if __name__ == "__main__":
    print(table(sys.argv[1]))
