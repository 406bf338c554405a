"""The one error that users of jq4 meet: it names what was found, what was wanted, and the remedy."""

_LONGEST = 3000  # characters; what a file holds may be longer than anyone reads


class JQ4Error(ValueError):
    """Bad input or an impossible request. The command line prints it without a traceback."""

    def __str__(self) -> str:
        """The message, which quotes files: shortened in its middle, and with nothing that a terminal would obey."""
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
        return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


class DensifiedError(JQ4Error):
    """`quantized(f, strict=True)` met an operation that has no packed rule."""


class CheckpointError(JQ4Error):
    """A checkpoint is missing, damaged, too new, or not one of ours."""
