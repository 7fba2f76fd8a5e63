"""Parameters that a docstring explains together (``a, b: ...``) are one name to the parser of
Google's style, which would take the second for a type.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

TOGETHER = re.compile(r"^ +\w+(?:, \w+)+: ", re.MULTILINE)
NO_BREAK = "\N{NO-BREAK SPACE}"


class Together(Extension):
    """Keeps them in one word."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = TOGETHER.sub(
                lambda match: match[0].replace(", ", f",{NO_BREAK}"), text
            )
