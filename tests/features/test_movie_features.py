"""Movie features: published files are read exactly, and nothing in a file is ever executed."""

import copyreg
import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynfocus_jax.errors import MediaError
from dynfocus_jax.features import movie_features
from dynfocus_jax.features.movie_features import read_movie_features
from dynfocus_jax.media.subtitles import Subtitle

SHAPE = (3, 5, 4)
TEXT = "<image>Hello\nthere<image>...<image> well... <b>yes</b>"


def movie(shape=SHAPE, dtype=np.float16, text=TEXT, seed=0):
    return {"feats": np.random.default_rng(seed).standard_normal(shape).astype(dtype), "inputs": text}


def read(tmp_path, content: bytes):
    path = tmp_path / "movie.pkl"
    path.write_bytes(content)
    return read_movie_features(path)


def expect_error(tmp_path, content: bytes, reason: str = ""):
    with pytest.raises(MediaError, match=r"movie\.pkl: not a file of movie features \(.*" + reason):
        read(tmp_path, content)


# --- Valid files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [SHAPE, (3, 257, 64)])  # pickle writes large arrays outside of its frames
def test_round_trip(tmp_path, protocol, dtype, shape):
    content = movie(shape, dtype)
    found = read(tmp_path, pickle.dumps(content, protocol))
    assert found.features.dtype == dtype
    np.testing.assert_array_equal(found.features, content["feats"])
    np.testing.assert_array_equal(found.times, [0.0, 1.0, 2.0])
    assert found.times.dtype == np.float64
    assert found.subtitles == [Subtitle(0.0, 1.0, "Hello there"), Subtitle(2.0, 3.0, "well <b>yes</b>")]


def test_module_names_of_numpy_1_and_2(tmp_path):
    content = pickle.dumps(movie(), 4)
    new, old = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    assert content.count(new) + content.count(old) == 1
    for name in (new, old):
        changed = content.replace(new, name).replace(old, name)
        # The first frame holds everything but the text; its length changes with the name.
        frame = 8 * (changed[2:3] == b"\x95")
        assert frame
        body = changed[11:]
        changed = changed[:3] + struct.pack("<Q", len(body)) + body
        np.testing.assert_array_equal(read(tmp_path, changed).features, movie()["feats"])


def test_memory_layouts(tmp_path):
    content = movie()
    for feats in (np.asfortranarray(content["feats"]), content["feats"][:, ::-1], content["feats"][1:]):
        text = "<image>" * len(feats)
        found = read(tmp_path, pickle.dumps({"feats": feats, "inputs": text}, 4))
        np.testing.assert_array_equal(found.features, feats)


def test_features_are_a_view_of_the_file(tmp_path):
    """Only the frames that are used are read from the disk, however long the movie is."""
    found = read(tmp_path, pickle.dumps(movie((3, 257, 64)), 4))
    base = found.features
    while getattr(base, "base", None) is not None:
        base = base.base
    assert isinstance(base, memoryview)
    assert not found.features.flags.writeable


def test_text_before_the_first_frame_belongs_to_it(tmp_path):
    found = read(tmp_path, pickle.dumps(movie(text="Once <image>upon<image><image>"), 4))
    assert found.subtitles == [Subtitle(0.0, 1.0, "Once upon")]


def test_other_entries_are_ignored(tmp_path):
    content = movie() | {"fps": 1.0, "names": ["a", ("b", None)], "ok": True, "number": 2**40, "x": {}}
    np.testing.assert_array_equal(read(tmp_path, pickle.dumps(content, 4)).features, content["feats"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (movie(text="<image><image>"), "2 markers <image>, expected 3"),
        (movie(shape=(3, 4)), r"the shape \(3, 4\)"),
        (movie(shape=(0, 5, 4), text=""), r"the shape \(0, 5, 4\)"),
        (movie(dtype=np.float64), "of type 'f8'"),
        (movie(dtype=np.int32), "of type 'i4'"),
        (movie(dtype=">f2"), "little-endian"),
        (movie() | {"feats": [1.0]}, "expected an array"),
        (movie() | {"inputs": b"bytes"}, "a string under"),
        ({"inputs": TEXT}, "expected an array"),
        ([movie()], "it holds a list"),
        (None, "it holds a NoneType"),
        ({1: 2}, "a dict with string keys"),
    ],
)
def test_invalid_content(tmp_path, content, reason):
    expect_error(tmp_path, pickle.dumps(content, 4), reason)


def test_missing_empty_truncated_and_other_files(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        read_movie_features(tmp_path / "movie.pkl")
    expect_error(tmp_path, b"", "0 bytes")
    expect_error(tmp_path, b"\x89PNG\r\n\x1a\n" + bytes(100))
    expect_error(tmp_path, pickle.dumps(movie(), 0), "operation")
    complete = pickle.dumps(movie(), 4)
    for length in range(1, len(complete)):
        expect_error(tmp_path, complete[:length])


# --- Hostile files ------------------------------------------------------------------------------------------


def write_marker(path):
    """The function that payloads call."""
    with open(path, "w") as file:
        file.write("executed")


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments
        self.state = state

    def __reduce__(self):
        return self.call if self.state is None else (*self.call, self.state)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def payloads(marker: str) -> dict[str, bytes]:
    """Return pickles that write the marker file when Python's unpickler loads them, by name."""
    shell, code = f"echo executed > {marker}", f"open({marker!r}, 'w').write('executed')"
    inside = movie() | {"extra": Calls(os.system, shell)}
    found = {
        "os.system": pickle.dumps(Calls(os.system, shell), 4),
        "protocol 2": pickle.dumps(Calls(os.system, shell), 2),
        "eval": pickle.dumps(Calls(eval, code), 4),
        "exec": pickle.dumps(Calls(exec, code), 3),
        "this module": pickle.dumps(Calls(write_marker, marker), 4),
        "beside valid features": pickle.dumps(inside, 4),
        "in place of the text": pickle.dumps(movie() | {"inputs": Calls(eval, code)}, 4),
        "in place of the array": pickle.dumps(movie() | {"feats": Calls(eval, code)}, 5),
        "in a list": pickle.dumps([Calls(eval, code)], 4),
        "protocol 0": b"cos\nsystem\n(S" + repr(shell).encode() + b"\ntR.",
        "INST": b"(S" + repr(shell).encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(shell) + b"o.",
        "NEWOBJ": b"\x80\x03cbuiltins\nmap\ncbuiltins\neval\n("
        + text(code)
        + b"t\x86\x81cbuiltins\nlist\n"
        # first map(eval, [code]), then list() of it, which runs the code
        + b"q\x000h\x000cbuiltins\nlist\ncbuiltins\nmap\ncbuiltins\neval\n]("
        + text(code)
        + b"e\x86\x81\x85R.",
        "dotted": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(shell) + b"\x85R.",
        "numpy's own": b"\x80\x04"
        + text("numpy.testing._private.utils")
        + text("runstring")
        + b"\x93"
        + text(code)
        + b"}\x86R.",
        "after the data": pickle.dumps(movie(), 4)[:-1] + b"0cos\nsystem\n" + text(shell) + b"\x85R.",
    }
    extension = 77
    copyreg.add_extension(__name__, "write_marker", extension)
    found["EXT1"] = b"\x80\x02\x82" + bytes([extension]) + text(marker) + b"\x85R."
    return found


NAMES = sorted(payloads("x"))
copyreg.remove_extension(__name__, "write_marker", 77)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_are_not_executed(tmp_path, name):
    marker = tmp_path / "marker"
    content = payloads(str(marker))[name]
    try:
        expect_error(tmp_path, content)
        assert not marker.exists()
        pickle.loads(content)  # check that the payload works
        assert marker.exists()
    finally:
        copyreg.remove_extension(__name__, "write_marker", 77)


def test_persistent_ids_and_state_of_other_objects(tmp_path):
    expect_error(tmp_path, b"\x80\x03Pname\n.", "PERSID")
    expect_error(tmp_path, b"\x80\x03X\x01\x00\x00\x00aQ.", "BINPERSID")
    # BUILD would set attributes of a function, or add unchecked entries to a dict.
    expect_error(
        tmp_path, b"\x80\x03cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.", "sets the state of something"
    )
    expect_error(tmp_path, b"\x80\x03}}X\x01\x00\x00\x00aK\x01sb.", "sets the state of something")
    expect_error(tmp_path, b"\x80\x03cnumpy\nndarray\n)R.", "calls something")
    expect_error(tmp_path, b"\x80\x03cnumpy\ndtype\n)R.", "0 arguments, expected 1 to 3")


def test_object_arrays(tmp_path):
    feats = np.empty((1, 1, 1), object)
    feats[0, 0, 0] = Calls(os.system, "true")
    expect_error(tmp_path, pickle.dumps({"feats": feats, "inputs": "<image>"}, 4))
    feats[0, 0, 0] = 1
    expect_error(tmp_path, pickle.dumps({"feats": feats, "inputs": "<image>"}, 4), "'O8'")


def pickled_array(shape, data=b"\0" * 120, dtype="f2", order=b"\x89"):
    """Return a pickle whose "feats" is an array that claims this shape, dtype and order for its data."""
    out = io.BytesIO()
    out.write(b"\x80\x03}X\x05\x00\x00\x00featscnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
    out.write(b"K\x00\x85C\x01b\x87R(K\x01")
    out.write(pickle.dumps(shape, 3)[2:-1].replace(b"q\x00", b""))
    out.write(b"cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R(K\x03" + text("<"))
    out.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + order)
    out.write(b"B" + struct.pack("<I", len(data)) + data + b"tbsX\x06\x00\x00\x00inputsX\x15\x00\x00\x00")
    out.write(b"<image>" * 3 + b"s.")
    return out.getvalue()


def test_arrays_with_wrong_sizes_and_types(tmp_path):
    assert read(tmp_path, pickled_array((3, 5, 4))).features.shape == (3, 5, 4)
    for shape in ((3, 5, 5), (2**40, 2**40, 2**40), (-3, -5, 4), (3, 5, 4.0), (3, True, 20), (2**62, 4, 30)):
        expect_error(tmp_path, pickled_array(shape))
    for dtype in ("O8", "V2", "f2,f2", "S2", "M8[s]", "(2,)f2", "f16"):
        expect_error(tmp_path, pickled_array((3, 5, 4), dtype=dtype), "of type")


def test_huge_sizes_allocate_no_memory(tmp_path):
    """Claimed sizes for which an unpickler would allocate memory before it reads the data."""
    tracemalloc.start()
    huge = struct.pack("<Q", 2**60)
    for content in (
        b"\x80\x04\x8e" + huge,
        b"\x80\x04\x8d" + huge,
        b"\x80\x05\x96" + huge,
        b"\x80\x04\x95" + huge,
    ):
        expect_error(tmp_path, content + b"abc.")
    expect_error(tmp_path, b"\x80\x04Nr\xff\xff\xff\x7f0.")  # a memo of 2^31 entries
    expect_error(tmp_path, b"\x80\x04\x8b\xff\xff\xff\x7fabc.")  # a number of 2 GiB
    expect_error(tmp_path, b"\x80\x04" + b"]" * 20_000 + b".", "more than 10000 operations")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_nested_tuples_and_long_strings(tmp_path, monkeypatch):
    """Tuples nested 40 deep: their repr would have 2^40 parts."""
    deep = b"N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
    for content in (
        b"\x80\x04" + deep + text("name") + b"\x93.",  # as a module's name
        b"\x80\x04cnumpy\ndtype\n" + deep + b"\x85R.",  # as a dtype
        b"\x80\x04" + deep + b".",
        b"\x80\x04}" + deep + b"Ns.",  # as a key
    ):
        expect_error(tmp_path, content)
    monkeypatch.setattr(movie_features, "_MAX_TEXT", 20)
    expect_error(tmp_path, pickle.dumps(movie(), 4), "a string of")


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_pickles(tmp_path, data):
    """Whatever bytes are changed, the result is a movie or an error of one sentence."""
    content = bytearray(pickle.dumps(movie((3, 2, 2)), data.draw(st.sampled_from([3, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            other = data.draw(
                st.sampled_from([b"", b".", b"R", b"b", b"(", b"t", b"cos\nsystem\n", b"0", b"\x93"])
            )
            content[place : place + data.draw(st.integers(0, 3))] = other
    found, message = read_or_error(tmp_path, bytes(content))
    if found is None:
        assert "\n" not in message
        assert len(message) < 400
    else:
        assert found.features.shape[0] == len(found.times)


def read_or_error(tmp_path, content):
    """Return the movie and an empty message, or None and the error message."""
    try:
        return read(tmp_path, content), ""
    except MediaError as error:
        return None, str(error)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "movie.pkl").write_bytes(b"\x80\x04" + content)
    with pytest.raises(MediaError):
        read_movie_features(folder / "movie.pkl")
