"""Checkpoints of packed weights. FORMAT.md specifies the folder that `save` writes."""

from jq4.checkpoint.manifest import Manifest as Manifest
from jq4.checkpoint.orbax import files_folder as files_folder
from jq4.checkpoint.orbax import read_extra_file as read_extra_file
from jq4.checkpoint.orbax import read_manifest as read_manifest
from jq4.checkpoint.orbax import restore as restore
from jq4.checkpoint.orbax import save as save
from jq4.checkpoint.orbax import verify as verify
