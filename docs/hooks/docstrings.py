"""Turns docstrings in the TRL format into Markdown, with links between names and formulas as MathML.

mkdocstrings loads this as a Griffe extension, see mkdocs.yml. What is understood is what our docstrings use: sections
named in `SECTIONS`, entries such as "name (`type`, *optional*):", `> subtitles` between them, [`Name`] for a name that
the reference has, `$formula$` and `$$formula$$`. Nothing is fetched: browsers draw MathML by themselves.
"""

import ast
import re
import textwrap
from pathlib import Path

import griffe
from latex2mathml.converter import convert


ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")
TITLES = {"Args": "Parameters"}

ENTRY = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \w+)*)(?: \((?P<type>.+?)\))?:(?: (?P<text>.+))?$")
ERROR = re.compile(r"^(?P<names>\[?`?[A-Z]\w+`?\]?(?:, `?[A-Z]\w+`?)*): ", re.MULTILINE)
NAME = re.compile(r"\[`~?(?P<name>[\w.]+)`\](?![\[(])")
FORMULA = re.compile(
    r"\$\$(?P<block>[^$]+)\$\$"
    r"|`\$(?P<code>[^$`]+)\$`"
    r"|(?<![\w\\$`])\$(?P<plain>[^\s$](?:[^$\n`]|\n(?!\n))*?)\$(?![\w`])"
)


def documented_names() -> dict[str, str]:
    """
    Every name that a page of docs/api shows, by its last part, and by its last two where it has more.

    Returns:
        `dict[str, str]`: name -> full dotted name, which is the anchor that mkdocstrings makes.
    """
    names = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            file = ROOT / "src" / f"{path.replace('.', '/')}.py"
            if not file.is_file():  # a class or function by itself
                module = path.rsplit(".", 1)[0]
                file, path = ROOT / "src" / f"{module.replace('.', '/')}.py", module
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    names[node.name] = names[f"{path}.{node.name}"] = f"{path}.{node.name}"
                    if isinstance(node, ast.ClassDef):
                        for method in node.body:
                            if isinstance(method, ast.FunctionDef) and ast.get_docstring(method):
                                names[f"{node.name}.{method.name}"] = f"{path}.{node.name}.{method.name}"
    return names


def link(match: re.Match, names: dict[str, str]) -> str:
    """The link to a name of ours; the bare name in code where it is another package's."""
    name = match["name"]
    shown = name.rsplit(".", 1)[-1] if "~" in match[0] else name
    return f"[`{shown}`][{names[name]}]" if name in names else f"`{shown}`"


def formula(match: re.Match) -> str:
    """MathML, with what Markdown would read otherwise as entities, and in a span, or it would begin a paragraph."""
    latex = (match["block"] or match["code"] or match["plain"]).replace("\n", " ").strip()
    mathml = convert(latex, display="block" if match["block"] else "inline")
    for character in "|_*":
        mathml = mathml.replace(character, f"&#x{ord(character):x};")
    return f"<span>{mathml}</span>"


def entries(body: str) -> str:
    """The parameters of a section as a Markdown definition list."""
    lines, mark = [], ":   "  # the first line of a description has the mark of a definition list
    for line in body.splitlines():
        if entry := ENTRY.match(line):
            names = ", ".join(f"**`{name}`**" for name in entry["names"].split(", "))
            lines += ["", names + (f" ({entry['type']})" if entry["type"] else "")]
            mark = ":   "
            line = "    " + (entry["text"] or "")
        elif line.startswith("> "):
            lines += ["", f"*{line[2:]}*"]
            line = ""
        lines.append(mark + line[4:] if line.strip() else "")
        mark = "    " if line.strip() else mark
    return "\n".join(lines)


def to_markdown(text: str, names: dict[str, str]) -> str:
    """
    One docstring as Markdown.

    Args:
        text (`str`):
            A docstring without its indentation.
        names (`dict[str, str]`):
            What [`Name`] may lead to, see `documented_names`.

    Returns:
        `str`.
    """
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    markdown = [parts[0]]
    for title, rest in zip(parts[1::2], parts[2::2], strict=True):
        # The section ends where the indentation does; an example may stand without any.
        size = re.match(r"(?:[ ]{4}.*(?:\n|$)|\n)*", rest).end()
        body, after = textwrap.dedent(rest[:size]).strip("\n"), rest[size:]
        if title in ("Args", "Attributes"):
            body = entries(body)
        elif title == "Raises":
            body = ERROR.sub(lambda match: f"\0{match['names'] if '`' in match[0] else f'`{match[1]}`'}: ", body)
            body = textwrap.indent(body, "  ").replace("  \0", "- ")
        markdown.append(f"**{TITLES.get(title, title)}**\n\n{body}\n\n{after}")
    # Blocks of code stay as they are.
    blocks = re.split(r"(^ *```.*?^ *```$)", "\n".join(markdown), flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(blocks), 2):
        linked = NAME.sub(lambda match: link(match, names), blocks[index])
        blocks[index] = FORMULA.sub(formula, linked)
    return "".join(blocks)


class TRLDocstrings(griffe.Extension):
    """Rewrites each docstring as Griffe reads it."""

    def __init__(self):
        super().__init__()
        self.names = documented_names()

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value, self.names)
