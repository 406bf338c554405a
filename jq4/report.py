"""What the command line prints, made from the same plain data that --json prints. Numbers are worded here alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "K", "M", "B", "T")


def format_bytes(count: float) -> str:
    """Bytes with three figures and a decimal unit: 746752 -> "747 kB", 580969883648 -> "581 GB"."""
    return _scaled(count, _BYTE_UNITS, " ")


def format_count(count: float) -> str:
    """A number of parameters or tokens: 70553706496 -> "70.6B"."""
    return _scaled(count, _COUNT_UNITS, "")


def _scaled(value: float, units: Sequence[str], space: str) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if power == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{digits}{space}{units[power]}".strip()


def format_figure(value: Any) -> str:
    """A measured number, or "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text, and the others numbers, set to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


EVALUATION_LABELS = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the reference",
    "kld_mean": "KLD to the reference, mean (nats a token)",
    "kld_p50": "KLD, median",
    "kld_p90": "KLD, 90th percentile",
    "kld_p99": "KLD, 99th percentile",
    "kld_p99_9": "KLD, 99.9th percentile",
    "kld_max": "KLD, largest",
    "top1_agreement": "top-1 agreement",
    "log_perplexity_ratio": "log of perplexity over the reference's",
    "tokens": "tokens predicted",
    "context": "context (tokens a row)",
    "seconds": "seconds",
}


def evaluation_table(data: Mapping[str, Any]) -> Table:
    whose = {"adapters": data.get("adapters"), "adapters of the reference": data.get("reference_adapters")}
    run_with = [(label, adapters_phrase(adapters)) for label, adapters in whose.items() if adapters is not None]
    return make_table(f"{data['model']}", ("figure", "value"), [*run_with, *evaluation_rows(data)])


def evaluation_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of jq4.evaluate that were measured, in words; a mean with its standard error as "value ± error"."""
    return [(label, _with_error(data, key)) for key, label in EVALUATION_LABELS.items() if key in data]


def _with_error(data: Mapping[str, Any], key: str) -> str:
    error = data.get(f"{key}_standard_error")
    return format_figure(data[key]) + ("" if error is None else f" ± {error:.2g}")


def inventory_table(data: Mapping[str, Any]) -> Table:
    """The leaves of a model: see jq4.inventory."""
    with_error = any(leaf.get("sqnr_db") is not None for leaf in data["leaves"])
    columns = ["leaf", "shape", "format", "group", "bytes", "bits/weight"] + ["SQNR dB"] * with_error
    rows = []
    for leaf in data["leaves"]:
        group = "-" if leaf["group_size"] is None else str(leaf["group_size"])
        shape = " ".join(map(str, leaf["shape"])) or "scalar"
        form = " x ".join(filter(None, (leaf["format"], leaf.get("activations"))))
        row = [leaf["path"], shape, form, group, format_bytes(leaf["bytes"])]
        row.append(f"{leaf['bits_per_weight']:.2f}")
        rows.append(row + [_decibels(leaf.get("sqnr_db"))] * with_error)
    return make_table(str(data["model"]), columns, rows)


def adapters_table(adapters: Mapping[str, Any]) -> Table:
    """The adapters beside a model's weights: see jq4.train.adapters.adapter_inventory."""
    return make_table("adapters", ADAPTERS_HEAD, adapters_rows(adapters))


ADAPTERS_HEAD = ("leaf", "shape", "rank", "scaling", "parameters", "bytes")


def adapters_rows(adapters: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            leaf["path"],
            " ".join(map(str, leaf["shape"])),
            str(leaf["rank"]),
            format_figure(leaf["scaling"]),
            format_count(leaf["parameters"]),
            format_bytes(leaf["bytes"]),
        )
        for leaf in adapters["leaves"]
    ]


def adapters_sentence(adapters: Mapping[str, Any]) -> str:
    """Their size in words: "adapters of rank 16 beside 7 leaves, 123K parameters in 492 kB"."""
    size = f"{format_count(adapters['parameters'])} parameters in {format_bytes(adapters['bytes'])}"
    return f"adapters of {adapters_phrase(adapters)}, {size}"


def adapters_phrase(adapters: Mapping[str, Any]) -> str:
    """ "rank 16 beside 7 leaves"."""
    count, ranks = len(adapters["leaves"]), ", ".join(map(str, adapters["ranks"]))
    return f"rank {ranks} beside {count} {'leaf' if count == 1 else 'leaves'}"


def merge_table(data: Mapping[str, Any]) -> Table:
    """What became of the leaves that had adapters: see jq4.train.adapters.merge_lora."""
    rows = [
        (leaf["path"], leaf["format"], _decibels(leaf["error"]["sqnr_db"]), _decibels(leaf["change_db"]))
        for leaf in data["leaves"]
    ]
    return make_table(str(data["out"]), ("leaf", "became", "SQNR dB", "learned over lost, dB"), rows)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def plan_table(data: Mapping[str, Any]) -> Table:
    """Bytes of each scheme: see jq4.plan."""
    memory = data["memory"]
    columns = ["linear layers", "bits", "weights", "KV cache", "total", "read/token"]
    if memory:
        columns += [f"fits {format_bytes(memory)}", "max context", "devices"]
    rows = []
    for each in data["schemes"]:
        row = [each["name"], f"{each['bits_per_weight']:.2f}"]
        row += [format_bytes(each[key]) for key in ("weights", "kv_cache", "total", "read_per_token")]
        if memory:
            longest = f"{each['longest_context']:,}" if each["longest_context"] else "-"
            row += ["yes" if each["fits"] else "no", longest, str(each["devices"])]
        rows.append(row)
    active = (
        "" if data["active_parameters"] == data["parameters"] else f", {format_count(data['active_parameters'])} active"
    )
    title = (
        f"{data['model_type']}: {format_count(data['parameters'])} parameters{active}; "
        f"context {data['context']:,}, batch {data['batch']}" + (" (an estimate)" if data["estimate"] else "")
    )
    return make_table(title, columns, rows)


def quantize_table(data: Mapping[str, Any]) -> Table:
    """What became of each leaf: those packed, then those left dense and why."""
    rows = []
    for leaf in data["packed"]:
        sizes = [format_bytes(leaf["dense_nbytes"]), format_bytes(leaf["nbytes"])]
        shape = " ".join(map(str, leaf["shape"]))
        rows.append(
            [leaf["path"], shape, f"{leaf['format']} g{leaf['group_size']}", *sizes, _decibels(leaf["sqnr_db"])]
        )
    for leaf in data["dense"]:
        sizes = [format_bytes(leaf["dense_nbytes"]), format_bytes(leaf["nbytes"])]
        became = leaf["status"] if leaf["status"] == "packed already" else f"dense: {leaf['status']}"
        rows.append([leaf["path"], " ".join(map(str, leaf["shape"])), became, *sizes, "-"])
    return make_table(data["destination"], ("leaf", "shape", "became", "from", "to", "SQNR dB"), rows)


def conversion_title(data: Mapping[str, Any]) -> str:
    """From what to what, and whether anything is lost."""
    return f"{data['from']} -> {data['to']}: " + ("lossless" if data["lossless"] else "not lossless")


def conversion_tables(data: Mapping[str, Any]) -> Iterator[Table]:
    """What will become of each kind of weight: a table for each form and what it becomes, so that names have room."""
    forms: dict[str, list[list[str]]] = {}
    for kind in data["kinds"]:
        lost = "; ".join(filter(None, (kind["loss"] or "lossless", kind["doubt"], kind["unpacked"])))
        sizes = [format_bytes(kind["bytes"]), format_bytes(kind["bytes_made"])]
        rows = forms.setdefault(f"{kind['from']} -> {kind['to']}: {lost}", [])
        rows.append([kind["kind"], str(kind["number"]), *sizes])
    for form, rows in forms.items():
        yield make_table(form, ("weights", "number", "before", "after"), rows)


def verification_tables(data: Mapping[str, Any]) -> Iterator[Table]:
    """What the output was found to hold, a table for each thing that was declared lost."""
    losses: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for weight in data["verified"]:
        losses.setdefault(weight["loss"] or "nothing", {}).setdefault(weight["found"], []).append(weight)
    columns = ("read again as", "number", "same\ncodes", "same\nscales", "max |dW|", "|dW| / |W|")
    for loss, groups in losses.items():
        rows = []
        for found, weights in groups.items():
            said = [_all_of(weights, "same_codes"), _all_of(weights, "same_scales")]
            errors = [_largest_of(weights, name) for name in ("largest", "relative")]
            rows.append([found, str(len(weights)), *said, *errors])
        yield make_table(f"verified; declared lost: {loss}", columns, rows)


def _largest_of(weights: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [weight[name] for weight in weights if weight[name] is not None]
    return format_figure(max(map(float, values), default=None))


def _all_of(weights: Sequence[Mapping[str, Any]], name: str) -> str:
    values = {weight[name] for weight in weights}
    return "-" if values == {None} else "yes" if values == {True} else "no"


def demo_table(data: Mapping[str, Any], rows: Iterable[Sequence[str]]) -> Table:
    """Dense against packed, a column a variant."""
    return make_table(str(data["model"]), ("", *(each["name"] for each in data["variants"])), rows)


def drift_table(data: Mapping[str, Any]) -> Table:
    """How far each weight's inputs moved: see jq4.drift."""
    columns = ("weight", "slice", "divergence", "threshold", "moved", "mean shift", "scale shift", "absmax ratio")
    rows = []
    for each in data["slices"]:
        moved = {True: "MOVED", False: "no", None: "-"}[each["moved"]]
        figures = [format_figure(each[key]) for key in ("mean_shift", "scale_shift", "absmax_ratio")]
        measured = [format_figure(each[key]) for key in ("divergence", "threshold")]
        rows.append([each["path"], " ".join(map(str, each["index"])) or "-", *measured, moved, *figures])
    return make_table(str(data["model"]), columns, rows)


def training_table(data: Mapping[str, Any]) -> Table:
    """A training's loss, and what held-out rows say of its start and of its result."""
    more = [f"{data['resumed']} of them before"] if data["resumed"] else []
    more += [f"kept as of {data['kept']}"] if data.get("kept", data["steps"]) < data["steps"] else []
    steps = f"{data['steps']}" + (f" ({', '.join(more)})" if more else "")
    rows = [
        ["loss (nats a token)", format_figure(data["loss_first"]), format_figure(data["loss_last"])],
        *([label, before, after] for label, before, after in _before_and_after(data)),
        ["bits a packed weight", "", format_figure(data["bits_per_weight_packed"])],
        ["bytes of weights", "", format_bytes(data["bytes"])],
        *([["bytes of adapters", "", format_bytes(data["adapters"]["bytes"])]] if data.get("adapters") else []),
        ["steps", "", steps],
        ["tokens a second", "", format_figure(data["tokens_per_second"])],
        ["seconds of steps", "", f"{data['seconds_training']:.0f}"],
    ]
    return make_table(f"{data['training']}: {data['out']}", ("figure", "start", "trained"), rows)


def _before_and_after(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if "after" not in data:
        return []
    before, after = data["before"], data["after"]
    names = ("kld_mean", "kld_p99", "top1_agreement", "perplexity", "reference_perplexity", "tokens")
    return [
        (f"held out: {EVALUATION_LABELS[name]}", _with_error(before, name), _with_error(after, name))
        for name in names
        if name in after
    ]


def mixed_table(data: Mapping[str, Any]) -> list[Table]:
    """What each leaf costs in each format, the chosen one in brackets; the frontier; what was measured of mixes."""
    chosen = data["mix"]["chosen"]
    names = list(dict.fromkeys(each["format"] for leaf in data["sensitivity"]["leaves"] for each in leaf["options"]))
    rows = []
    for leaf in data["sensitivity"]["leaves"]:
        losses = {each["format"]: format_figure(each["loss"]) for each in leaf["options"]}
        cells = [f"[{losses[name]}]" if chosen[leaf["path"]] == name else losses.get(name, "-") for name in names]
        rows.append([leaf["path"], format_count(leaf["size"]), *cells])
    points = [[f"{each['bits']:.3f}", format_figure(each["predicted"])] for each in data["frontier"]]
    mixes = [{"name": "mix", **data["mix"]}, *data["uniform"]]
    measured = [
        [each["name"], f"{each['bits']:.3f}", format_figure(each["predicted"]), format_figure(each["measured"])]
        for each in sorted(mixes, key=lambda each: each["bits"])
    ]
    return [
        make_table(f"{data['model']}: loss of each leaf by itself, [chosen]", ("leaf", "weights", *names), rows),
        make_table("the frontier", ("bits", "KLD, predicted"), points),
        make_table("bits against KLD", ("formats", "bits", "KLD, predicted", "KLD, measured"), measured),
    ]
