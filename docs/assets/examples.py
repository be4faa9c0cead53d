"""Griffe extension: show the examples of docstrings (`>>>`) as Python sessions, which Markdown takes for quotations."""

import re

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj, **_):
        """Fence each run of lines that starts with `>>>` and ends before an empty line."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^>>> .+(?:\n.+)*", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=re.MULTILINE
            )
