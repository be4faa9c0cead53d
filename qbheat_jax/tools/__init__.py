"""Tools for maintainers and for checks before a run. Only the command line imports them."""
