"""The quality report: one dict of plain data, and what is made from it alone: Markdown, an HTML page, tables.

    data = compose_report(model=..., evaluation=..., leaves=..., ...)      # ready for JSON
    write_report(data, folder)                                             # report.json, report.md, report.html

Whatever it says was measured by whoever gives it: `jq4 report` (the quality of a model against its reference) and
`jq4 quantize` (what became of each leaf, time and memory). What was not measured is left out, and never guessed.
"""

from jq4.quality_report.compose import compose_report as compose_report
from jq4.quality_report.compose import expert_coverage as expert_coverage
from jq4.quality_report.compose import leaf_rows as leaf_rows
from jq4.quality_report.quantizing import quantizing_report as quantizing_report
from jq4.quality_report.write import read_report as read_report
from jq4.quality_report.write import write_report as write_report
