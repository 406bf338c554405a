"""jq4 plan: what fits, from headers alone."""

import argparse

HELP = "say which formats of a model fit a memory, reading only headers"
DESCRIPTION = (
    "A table of FP16, INT8, INT4 and INT3: bytes of weights and of KV cache, what fits, what is advised and why. "
    "A config.json is enough; no weight is read."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a Hugging Face folder, or a config.json alone")
    parser.add_argument("--memory", metavar="40GB", help="memory of one device (GB = 1e9, GiB = 2**30)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a sequence (default: the model's, at most 8192)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (default 1)")


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli._models import is_checkpoint
    from jq4.cli._terminal import console, print_json
    from jq4.plan import parse_memory, plan
    from jq4.report import plan_table

    source = arguments.source
    if is_checkpoint(source):
        from jq4.checkpoint.orbax import files_folder

        source = files_folder(source) / "config.json"
    memory = None if arguments.memory is None else parse_memory(arguments.memory)
    data = plan(source, memory=memory, context=arguments.context, batch=arguments.batch).as_dict()
    if arguments.json:
        print_json(data)
        return
    out = console()
    out.print(plan_table(data))
    for note in data["notes"]:
        out.print(f"note: {note}")
    out.print(f"advice: {data['advice']}", style="bold")
