"""What mkdocs does to a page before it renders it: links into the sources lead to the reference, and the help of the
command line is filled in.
"""

import re

import typer

from onereward.cli import app


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Called by mkdocs for each page, see `hooks` in mkdocs.yml."""
    if page.file.src_uri == "api/cli.md":
        markdown += command_line()
    # ../src/onereward/data/folder.py is right where the file lies, on GitHub; the site has onereward.data.folder.
    return re.sub(
        r"\]\((?:\.\./)+src/(onereward[\w/]*)\.py\)", lambda match: f"][{match[1].replace('/', '.')}]", markdown
    )


def command_line() -> str:
    """One section for each command, with its arguments and options, from the command line itself."""
    context = typer.Context(typer.main.get_command(app), info_name="onereward")
    lines, waiting = [], [context]
    while waiting:
        context = waiting.pop(0)
        for name in getattr(context.command, "commands", {}):
            waiting.append(typer.Context(context.command.commands[name], info_name=name, parent=context))
        if hasattr(context.command, "commands"):
            continue
        lines += ["", f"## {context.command_path}", "", context.command.help, ""]
        usage = " ".join(context.command.collect_usage_pieces(context))
        lines += ["```text", f"{context.command_path} {usage}", "```", "", "| | | default |", "|---|---|---|"]
        for parameter in context.command.params:
            names = ", ".join(f"`{name}`" for name in parameter.opts)
            text = getattr(parameter, "help", None) or ""
            default = parameter.default
            if parameter.required:
                default = "needed"
            elif default is None or default is False or callable(default):
                default = ""
            else:
                default = f"`{default}`"
            lines.append(f"| {names} | {text} | {default} |")
    return "\n".join(lines) + "\n"
