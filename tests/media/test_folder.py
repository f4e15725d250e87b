"""Paths from annotation files cannot leave the media folder."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynfocus_jax.media.folder import MediaFolder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A media folder with links of every kind, beside a secret folder."""
    base = tmp_path_factory.mktemp("tree")
    (base / "secret").mkdir()
    (base / "secret" / "a.mp4").write_text("secret")
    root = base / "media"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.mp4").write_text("b")
    (root / "a.mp4").write_text("a")
    os.symlink("a.mp4", root / "in.mp4")
    os.symlink(root / "a", root / "folder_in")
    os.symlink("../secret/a.mp4", root / "out.mp4")
    os.symlink(base / "secret", root / "folder_out")
    os.symlink("../folder_out/a.mp4", root / "a" / "twice.mp4")
    os.symlink("missing.mp4", root / "dangling.mp4")
    os.symlink("loop.mp4", root / "loop.mp4")
    os.mkfifo(root / "pipe.mp4")
    os.symlink("pipe.mp4", root / "to_pipe.mp4")
    os.symlink("/dev/zero", root / "device.mp4")
    (base / "media2").mkdir()  # its name begins with the name of the media folder
    os.symlink("../media2", root / "beside")
    return root


@pytest.mark.parametrize(
    "relative",
    ["a.mp4", "a/b.mp4", "./a//b.mp4", "in.mp4", "folder_in/b.mp4", "dangling.mp4", "no/such.mp4", "..a.mp4"],
)
def test_paths_inside(tree, relative):
    assert MediaFolder(tree).file(relative) == tree / relative


@pytest.mark.parametrize(
    ("relative", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("a\0.mp4", "NUL"),
        ("/etc/passwd", "is absolute"),
        ("//etc/passwd", "is absolute"),
        ("../../etc/passwd", r'contains "\.\."'),
        ("../media/a.mp4", r'contains "\.\."'),
        ("a/../a.mp4", r'contains "\.\."'),
        ("..", r'contains "\.\."'),
        ("./.", "is not the path of a file"),
        ("out.mp4", "is a link that leaves"),
        ("a/twice.mp4", "is a link that leaves"),
        ("folder_out/a.mp4", "goes through a link that leaves"),
        ("folder_out/no/such.mp4", "goes through a link that leaves"),
        ("beside/a.mp4", "goes through a link that leaves"),
        ("device.mp4", "is a link that leaves"),
        ("a", "is a folder"),
        ("folder_in", "is a folder"),
        ("pipe.mp4", "is a device or pipe"),
        ("to_pipe.mp4", "is a device or pipe"),
        ("é" * 200 + ".mp4", "is too long"),
        ("a/" * 3000 + "a.mp4", "is too long"),
    ],
)
def test_refused_paths(tree, relative, reason):
    with pytest.raises(ValueError, match=reason) as error:
        MediaFolder(tree).file(relative)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


NAMES = [
    "a",
    "a.mp4",
    "b.mp4",
    "in.mp4",
    "out.mp4",
    "folder_in",
    "folder_out",
    "twice.mp4",
    "loop.mp4",
    "beside",
]
PARTS = st.sampled_from(["", ".", "..", "~", "etc", "passwd", "file:", "\0", "media", *NAMES]) | st.text(
    max_size=4
)


@settings(deadline=None)
@given(st.lists(PARTS, max_size=6).map("/".join))
@example("folder_in/../../secret/a.mp4")
@example("file:/etc/passwd")
def test_accepted_paths_are_inside(tree, relative):
    try:
        path = MediaFolder(tree).file(relative)
    except ValueError:
        return
    assert path.is_absolute()
    assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(tree))
    assert not path.exists() or path.is_file()


def test_relative_root_gives_absolute_paths(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert MediaFolder(".").file("file:x") == tree / "file:x"


def test_root_may_be_a_link(tree, tmp_path):
    os.symlink(tree, tmp_path / "media")
    assert MediaFolder(tmp_path / "media").file("in.mp4") == tmp_path / "media" / "in.mp4"
    with pytest.raises(ValueError, match="leaves"):
        MediaFolder(tmp_path / "media").file("out.mp4")


def test_has(tree):
    folder = MediaFolder(tree)
    for there in ("a.mp4", "a/b.mp4", "in.mp4", "dangling.mp4"):
        assert folder.has(there)
    for missing in (
        "b.mp4",
        "a/a.mp4",
        "no/such.mp4",
        "../media/a.mp4",
        "/etc/passwd",
        "folder_out/a.mp4",
        "",
    ):
        assert not folder.has(missing)


def test_folders_are_listed_once(tree, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    folder = MediaFolder(tree)
    for i in range(50):
        folder.file(f"a/{i}.mp4")
        folder.file(f"none/{i}.mp4")
    assert sorted(listed) == [os.path.realpath(tree / "a"), os.path.realpath(tree / "none")]
