"""The index of a sharded checkpoint is not trusted: it names no code, and no file outside its folder."""

import io
import pickle

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo

import lightning_overlap.state.dcp as dcp
from lightning_overlap import CheckpointError


class Looked:
    """Pickled as a look-up by getattr, which is how Python 3.11.2 writes the members of an enum."""

    def __init__(self, of, name):
        self.looked_up = getattr, (of, name)

    def __reduce__(self):
        return self.looked_up


def test_an_index_looks_up_nothing_but_members_of_its_enum():
    def read(what):
        return dcp.IndexUnpickler(io.BytesIO(pickle.dumps(what))).load()

    enum = type(dcp.MemoryFormatEncoding.TORCH_CONTIGUOUS_FORMAT)
    assert read(Looked(enum, "TORCH_PRESERVE_FORMAT")) is enum.TORCH_PRESERVE_FORMAT
    for of, name in ((enum, "__init__"), (dcp.Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="it names"):
            read(Looked(of, name))


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "..", ""])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    place = dcp.MetadataIndex("model.w")
    index = dcp.Metadata({}, storage_data={place: _StorageInfo(name, 0, 1)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        dcp.FolderReader(tmp_path)
