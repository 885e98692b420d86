import json
import os

import pytest

from bcn_mm._files import replacing, write_json


@pytest.mark.parametrize('suffix', ['.part', '.part.png'])
@pytest.mark.parametrize('old', [None, b'old'])
@pytest.mark.parametrize('fails', [False, True])
def test_a_file_is_whole_or_as_it_was(tmp_path, suffix, old, fails):
    folder = tmp_path / ('there' if old else 'new')
    path = folder / 'out'
    if old:
        folder.mkdir()
        path.write_bytes(old)
    try:
        with replacing(str(path), suffix) as draft:
            assert os.path.dirname(draft) == str(folder)
            assert draft.endswith(suffix)
            with open(draft, 'wb') as file:
                file.write(b'new')
            assert not old or path.read_bytes() == old
            if fails:
                raise KeyError
    except KeyError:
        pass
    left = {'out'} if old or not fails else set()
    assert {f.name for f in folder.iterdir()} == left
    if left:
        assert path.read_bytes() == (old if fails else b'new')


def test_a_writer_that_wrote_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(str(tmp_path / 'out')):
        pass
    assert not list(tmp_path.iterdir())


def test_json(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    for content in (dict(a=[1.5, None]), ['b']):
        write_json(path, content)
        assert json.loads(path.read_text()) == content
        with pytest.raises(TypeError):
            write_json(path, {1, 2})
        assert json.loads(path.read_text()) == content
        assert [f.name for f in path.parent.iterdir()] == ['x.json']
