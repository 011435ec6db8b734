"""Elements of HTML and SVG, and the colours of both themes.

Everything is ElementTree, which escapes what it is given. Pictures take their colours from classes, so that one
stylesheet, in a page or in a picture that stands alone, serves readers of light and of dark screens.
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping

Content = ET.Element | str | None

# class -> light, dark. Blue and orange are told apart by colour-blind people, too, and lines differ in their dashes.
COLOURS: Mapping[str, tuple[str, str]] = {
    "panel": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"),
    "grid": ("#d1d9e0", "#343b44"),
    "blue": ("#0b66c3", "#58a6ff"),
    "orange": ("#b8500a", "#f0883e"),
}

_RULES = """
.panel{{fill:{panel}}} .ink{{fill:{ink}}} .muted{{fill:{muted}}}
.grid{{stroke:{grid};fill:none}}
.line-blue{{stroke:{blue};fill:none;stroke-width:2}} .line-orange{{stroke:{orange};fill:none;stroke-width:2}}
.line-ink{{stroke:{ink};fill:none;stroke-width:2}} .dot-ink{{fill:{ink};stroke:{panel}}}
.dot-blue{{fill:{blue};stroke:{panel}}} .dot-orange{{fill:{orange};stroke:{panel}}}
"""
_TEXT = """text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif;font-size:12px}
.small{font-size:10px}.strong{font-weight:600}.dashed{stroke-dasharray:5 4}.hover{fill:none;pointer-events:all}"""


def element(tag: str, *content: Content, **attributes: object) -> ET.Element:
    """element("text", "4 bits", class_="ink", text_anchor="end", x=10): underscores become hyphens, a last one is
    dropped, attributes of None are left out."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    made = ET.Element(tag, {name: _short(value) for name, value in named.items()})
    for part in content:
        if isinstance(part, ET.Element):
            made.append(part)
        elif part and len(made):
            made[-1].tail = (made[-1].tail or "") + part
        elif part:
            made.text = (made.text or "") + part
    return made


def _short(value: object) -> str:
    """Coordinates with two decimals: files stay small."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def themed(rules: str, colours: Mapping[str, tuple[str, str]]) -> str:
    """CSS for both themes. rules: with {name} for a colour and {{ }} for braces."""
    light, dark = (rules.format(**{name: pair[i] for name, pair in colours.items()}) for i in (0, 1))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}\n"


def picture_style() -> str:
    """CSS of everything a picture has, for both themes."""
    return _TEXT + themed(_RULES, COLOURS)


def picture(name: str, title: str, description: str, width: float, height: float, *content: ET.Element) -> ET.Element:
    """An svg for a page that has picture_style. name: its id there."""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *content,
        viewBox=f"0 0 {_short(float(width))} {_short(float(height))}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def standing_alone(svg: ET.Element) -> str:
    """The text of an SVG file: with a style and a ground of its own, so that it is legible on pages of either theme."""
    _, _, width, height = svg.get("viewBox").split()
    ground = element("rect", width=width, height=height, rx=6, class_="panel")
    attributes = {"xmlns": "http://www.w3.org/2000/svg", **svg.attrib, "width": width, "height": height}
    alone = ET.Element("svg", attributes)
    title, description, *rest = svg
    alone.extend([title, description, element("style", picture_style()), ground, *rest])
    return ET.tostring(alone, encoding="unicode") + "\n"
