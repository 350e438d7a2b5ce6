import os
import unicodedata
from pathlib import Path

import pytest

from effdet_jax.data.files import Folder, files_below, leaves_folder, read_text
from effdet_jax.errors import UnreadableError

NFC, NFD = (unicodedata.normalize(form, 'Küche 1.jpg') for form in ('NFC', 'NFD'))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    for name in ('a.jpg', 'B.JPG', NFD, 'sub/c.jpg', ' d.jpg', 'x.JPG', 'X.jpg'):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / 'outside.jpg').touch()
    (tmp_path / 'link').symlink_to('images')
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'images'


@pytest.mark.parametrize(
    ('name', 'file'),
    [
        ('a.jpg', 'a.jpg'),
        ('a.JPG', 'a.jpg'),
        (' a.jpg ', 'a.jpg'),
        (' d.jpg', ' d.jpg'),
        ('b.jpg', 'B.JPG'),
        ('x.JPG', 'x.JPG'),
        (NFC, NFD),
        (NFD, NFD),
        ('sub\\c.jpg', 'sub/c.jpg'),
        ('.\\Sub\\C.JPG', 'sub/c.jpg'),
        ('sub/../a.jpg', 'a.jpg'),
    ],
)
@pytest.mark.parametrize('named', ['{root}', 'images', '.'])
def test_a_file_is_found_by_the_name_that_another_system_gave_it(root, monkeypatch, name, file, named):
    if named == '.':
        monkeypatch.chdir(root)
    folder = Path(named.format(root=root))
    assert Folder(folder).find(name) == (str(folder / file), '', '')


@pytest.mark.parametrize('inside', ['images', 'link'])
@pytest.mark.parametrize('stated', ['images', 'link'])
def test_an_absolute_path_inside_the_folder_is_taken(root, inside, stated):
    found = Folder(Path(inside)).find(f'{root.parent}/{stated}/sub/c.jpg')
    assert found == (f'{inside}/sub/c.jpg', '', '')


@pytest.mark.parametrize(
    'name',
    [
        '../outside.jpg', '..\\outside.jpg', 'sub/../../outside.jpg', ' ../outside.jpg', '{root}/../outside.jpg',
        '/etc/passwd', 'C:\\data\\a.jpg', 'c:/data/a.jpg', '\\\\server\\data\\a.jpg', '', '.',
    ],
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(root, name):
    found = Folder(root).find(name.format(root=root))
    assert found.fault == 'unsafe_path' and f'points outside {root}' in found.detail
    assert Folder(root).images(name.format(root=root).removesuffix('.jpg')) == ([], [])


def test_two_files_that_fit_equally_well_are_a_fault(root):
    found = Folder(root).find('X.JPG')
    assert found.fault == 'missing_image' and "['X.jpg', 'x.JPG']" in found.detail


def test_a_file_that_is_not_there_is_told(root):
    assert Folder(root).find('sub/b.jpg') == (f'{root}/sub/b.jpg', 'missing_image', 'no such file')
    assert Folder(root / 'none').find('a.jpg').fault == 'missing_image'


@pytest.mark.parametrize('suffix', ['jpg', 'JPEG', 'jfif', 'png', 'bmp', 'gif', 'avif', 'webp', 'tiff', 'jp2'])
def test_images_of_a_stem_are_known_by_their_suffix(tmp_path, suffix):
    for name in (f'a.{suffix}', 'a.xml', 'a.txt', 'a.heic', 'a.b.jpg', 'ab.jpg'):
        (tmp_path / name).touch()
    images, others = Folder(tmp_path).images('a')
    assert images == [f'{tmp_path}/a.{suffix}'] and others == ['a.heic', 'a.txt', 'a.xml']
    assert Folder(tmp_path).images('A')[0] == images and Folder(tmp_path).images('a.b')[0] == [f'{tmp_path}/a.b.jpg']


def test_files_below_follow_links_once_and_leave_out_hidden_ones(tmp_path):
    for name in ('a.xml', 'one/b.XML', '.hidden/c.xml', 'one/._b.xml', 'one/b.txt'):
        (tmp_path / 'here' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'here' / name).touch()
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'd.xml').touch()
    (tmp_path / 'here' / 'linked').symlink_to('../there')
    (tmp_path / 'there' / 'back').symlink_to('../here')
    found = [os.path.relpath(path, tmp_path / 'here') for path in files_below(tmp_path / 'here', '.xml')]
    assert found == ['a.xml', 'linked/d.xml', 'one/b.XML']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_text_is_read_with_and_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / 'x').write_bytes('Küche\r\nTür'.encode(encoding))
    assert read_text(tmp_path / 'x') == 'Küche\r\nTür'


def test_text_of_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / 'x').write_bytes('a\nKüche'.encode('latin-1'))
    with pytest.raises(UnreadableError, match=r'x:2: not UTF-8 text .*: save it as UTF-8'):
        read_text(tmp_path / 'x')


def test_names_that_leave_a_folder():
    assert all(map(leaves_folder, ('../a', '/a', 'a/../..', '', '.')))
    assert not any(map(leaves_folder, ('a', 'a/../b', '..a')))
