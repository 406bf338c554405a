"""The report's files: report.json is the data, report.md and report.html are made from it. Each is replaced whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq4.errors import JQ4Error
from jq4.quality_report.compose import FORMAT, VERSION
from jq4.quality_report.markdown import markdown_of
from jq4.quality_report.page import page_of

JSON, MARKDOWN, PAGE = "report.json", "report.md", "report.html"
FILES = (JSON, MARKDOWN, PAGE)


def write_report(data: Mapping[str, Any], folder: str | Path) -> dict[str, str]:
    """Writes the three files into `folder`, made if need be; returns their paths by kind."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {JSON: json.dumps(data, indent=2) + "\n", MARKDOWN: markdown_of(data), PAGE: page_of(data)}
    for name, text in texts.items():
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
    return {Path(name).suffix[1:]: str(folder / name) for name in FILES}


def read_report(path: str | Path) -> dict[str, Any]:
    """The data of a report.json, or of the one in a folder.

    Raises:
      JQ4Error: for a file that is missing, no JSON, or no report of a version that is known.
    """
    file = Path(path) / JSON if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JQ4Error(f"{file}: there is no such report; write one with `jq4 report`") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JQ4Error(f"{file}: not a JSON file ({error}); give a report.json") from None
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise JQ4Error(f"{file}: not a report of jq4's (no format {FORMAT!r} in it); give a report.json")
    if data.get("version") != VERSION:
        raise JQ4Error(f"{file}: version {data.get('version')!r} of the report, wanted {VERSION}; use a newer jq4")
    return dict(data)
