"""Load the pages' templates, which extend base.html.j2, and write pages."""

from qbheat_jax import atomic
from qbheat_jax.errors import UserError, writing
from qbheat_jax.report import text


def template(file):
    """Return the jinja2 template `file` of this folder. Raise UserError if jinja2 is missing."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"a report needs jinja2 ({error}): pip install 'qbheat_jax[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qbheat_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("number", "percent", "points", "duration"):
        environment.filters[name] = getattr(text, name)
    return environment.get_template(file)


def save(path, page):
    """Write `page`, a str, to `path` atomically, and return `path`. Create its folder. Raise UserError if writing fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, page)
    return path
