"""Shards: WebDataset tars with an index beside them, written whole and read at random. Here are the names that others use."""

from .index import INDEX, SHARD_NAME, ShardFile, indexed_files, read_index, write_index
from .reading import Entry, Shards, scan, shard_files, split_name
from .tar import BLOCK, members, tar_header
from .writing import AT_ONCE, COPIED, ShardFileWriter, ShardWriter, new_folder

__all__ = [
    "AT_ONCE",
    "BLOCK",
    "COPIED",
    "Entry",
    "INDEX",
    "SHARD_NAME",
    "ShardFile",
    "ShardFileWriter",
    "ShardWriter",
    "Shards",
    "indexed_files",
    "members",
    "new_folder",
    "read_index",
    "scan",
    "shard_files",
    "split_name",
    "tar_header",
    "write_index",
]
