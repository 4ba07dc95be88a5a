"""Tables in Markdown, and pages whose tables are renewed."""

import re
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table; its first `left` columns are left-aligned, the others, with numbers, right-aligned."""
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * left}{'---:|' * (len(head) - left)}", *lines[1:]])


def between_markers(page: str, name: str, content: str) -> str:
    """Return a page with new content between its markers <!-- name: begin --> and <!-- name: end -->.

    Raises:
        ValueError: if the page does not have both markers exactly once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    found = re.split(rf"(?<={begin})\n.*?\n(?={end})", page, flags=re.DOTALL)
    if len(found) != 2:
        raise ValueError(f"The page must have the markers {begin} and {end} once.")
    return f"\n\n{content}\n\n".join(found)
