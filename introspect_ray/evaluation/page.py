"""Self-contained HTML pages in one house style.

A page loads nothing: style and script are inline, and a content security policy forbids the rest. All text reaches a
page through templates that escape it.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from introspect_ray.evaluation.scores import format_value


def render_page(template: str, **values: Any) -> str:
    """The page that a template of `evaluation/templates` makes of `values`; a value that it lacks is a defect.

    Filters: `score` (two decimals), `signed` (the same with its sign), `percent` (a share, as 0 to 100).
    """
    environment = Environment(
        loader=PackageLoader("introspect_ray.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = format_value
    environment.filters["signed"] = lambda value: f"+{format_value(value)}" if value >= 0.005 else format_value(value)
    environment.filters["percent"] = lambda value: f"{100 * min(1.0, max(0.0, value)):.2f}"
    return environment.get_template(template).render(**values)
