"""INT4 as a first-class citizen of JAX."""

from jq4.errors import CheckpointError as CheckpointError
from jq4.errors import DensifiedError as DensifiedError
from jq4.errors import JQ4Error as JQ4Error
from jq4.qarray import QArray as QArray

__version__ = "0.1.0"
