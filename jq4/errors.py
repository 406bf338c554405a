"""The one error that users of jq4 meet: it names what was found, what was wanted, and the remedy."""


class JQ4Error(ValueError):
    """Bad input or an impossible request. The command line prints it without a traceback."""


class DensifiedError(JQ4Error):
    """`quantized(f, strict=True)` met an operation that has no packed rule."""


class CheckpointError(JQ4Error):
    """A checkpoint is missing, damaged, too new, or not one of ours."""
