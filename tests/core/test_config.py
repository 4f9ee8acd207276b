"""`_core.encode_json` and `_core.decode_json` against the `json` of the standard library."""

import collections
import datetime
import enum
import json
import math
import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hornbeam import _core


class Text(str):
    def __str__(self):
        return "not this"


class Int(int):
    def __repr__(self):
        return "not this"

    __str__ = __index__ = __int__ = None


class Float(float):
    def __repr__(self):
        return "not this"


class List(list):
    def __iter__(self):
        return (x for x in [*super().__iter__(), "more"])


class Dict(dict):
    def items(self):
        return [*super().items(), ("more", 1)]


class Color(enum.IntEnum):
    RED = 3


Point = collections.namedtuple("Point", "x y")

any_text = st.text(st.characters(exclude_categories=()))  # with lone surrogates
any_float = st.floats() | st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("d", n.to_bytes(8, "little"))[0])
any_int = st.integers() | st.integers(-(10**60), 10**60)
scalars = st.none() | st.booleans() | any_int | any_float | any_text
keys = scalars | st.sampled_from([Color.RED, Text("k"), Int(7), Float(0.5)])
odd = st.sampled_from([Text("é"), Int(2**70), Int(-5), Float(1e16), Float("nan"), Color.RED, True, Point(1, "y")])
values = st.recursive(
    scalars | odd,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner, max_size=3).map(List)
        | st.dictionaries(keys, inner)
        | st.dictionaries(any_text, inner, max_size=3).map(Dict)
        | st.dictionaries(any_text, inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=30,
)
json_values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(any_text, inner), max_leaves=30)


def at_least(examples):
    """What the profile asks for, or more where a property is cheap and has many corners."""
    return settings(max_examples=max(examples, settings.default.max_examples), deadline=None)


def same(a, b):
    """Equal, of the same types, in the same order, and NaN is NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return a == b


def outcome(function, *args):
    """What a call returns or raises, for comparison; newer Pythons word some errors differently."""
    try:
        return ("returned", repr(function(*args)))
    except json.JSONDecodeError as e:
        return (type(e), e.doc) + ((e.msg, e.pos, e.lineno, e.colno) if sys.version_info < (3, 13) else ())
    except RecursionError as e:
        return (type(e),) + ((str(e),) if sys.version_info < (3, 12) else ())
    except Exception as e:
        return (type(e), str(e))


@given(values)
@at_least(500)
def test_encode_equals_dumps(value):
    assert _core.encode_json(value) == json.dumps(value).encode()


@given(any_float)
@at_least(2000)
def test_every_float_is_written_as_repr(x):
    assert _core.encode_json(x) == json.dumps(x).encode()
    assert same(_core.decode_json(json.dumps(x)), x)


def test_floats_near_powers_and_ties():
    for e in range(-1074, 1024):
        for x in (
            math.ldexp(1, e),
            math.nextafter(math.ldexp(1, e), 0),
            math.nextafter(math.ldexp(1, e), math.inf),
        ):
            assert _core.encode_json([x, -x]) == json.dumps([x, -x]).encode()
    ties = [n + f for n in range(562_949_953_421_312, 562_949_953_421_812) for f in (0.125, 0.25, 0.375, 0.5, 0.75)]
    assert _core.encode_json(ties) == json.dumps(ties).encode()
    short = [float(f"{m}e{e}") for e in range(-325, 309) for m in (1, 12, 123, 99)]
    assert _core.encode_json(short) == json.dumps(short).encode()


@given(json_values, st.sampled_from([None, 2]), st.booleans())
@at_least(500)
def test_decode_equals_loads(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert same(_core.decode_json(text), json.loads(text))
    data = text.encode("utf-8", "surrogatepass")
    assert same(_core.decode_json(data), json.loads(data))
    assert same(_core.decode_json(bytearray(data)), json.loads(data))
    if ascii_only:
        assert same(_core.decode_json(data, trusted=False), json.loads(data))


@pytest.mark.parametrize(
    "encoding",
    ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
@pytest.mark.parametrize("text", ["1", "12", "[]", '"é😀"', '{"a": [1, "\ud800"]}'])
def test_encodings_are_detected(encoding, text):
    data = text.encode(encoding, "surrogatepass")
    assert same(_core.decode_json(data), json.loads(data))


MARKS = '{}[],:" \n\t\x00\x1f\x7f\u00a0\ud800\ufeffé😀01-.eE+\\'
WORDS = ["null", "nul", "true", "false", "NaN", "Infinity", "-Infinity", "-Inf", "1.5", "1e999"]
PIECES = [
    *MARKS,
    *WORDS,
    '"a"',
    '"a":',
    "\\u",
    "d800",
    "dc00",
    "00e9",
    "\\n",
    "12345678901234567890",
]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@at_least(3000)
def test_whatever_the_text_both_do_the_same(text):
    assert outcome(_core.decode_json, text) == outcome(json.loads, text)
    data = text.encode("utf-8", "surrogatepass")
    assert outcome(_core.decode_json, data) == outcome(json.loads, data)


@given(st.binary(max_size=20))
@at_least(1000)
def test_whatever_the_bytes_both_do_the_same(data):
    assert outcome(_core.decode_json, data) == outcome(json.loads, data)


TEXT = """{"é": [1, -2.5e+3, "a\\u00e9\\n\\ud83d\\ude00", null, true, NaN, {"b": {}, "c": []}],
 "d": -Infinity}"""


def test_a_truncated_text_is_refused():
    for cut in range(len(TEXT)):
        assert outcome(_core.decode_json, TEXT[:cut]) == outcome(json.loads, TEXT[:cut])
    data = TEXT.encode()
    for cut in range(len(data)):
        assert outcome(_core.decode_json, data[:cut]) == outcome(json.loads, data[:cut])
        with pytest.raises(ValueError, match=r"malformed JSON|codec can't decode"):
            _core.decode_json(data[:cut], trusted=False)


def test_duplicate_keys():
    text = '{"a": 1, "b": 2, "\\u0061": 3}'
    assert list(_core.decode_json(text).items()) == [("a", 3), ("b", 2)]
    with pytest.raises(ValueError, match="duplicate"):
        _core.decode_json(text, trusted=False)


def test_limits_of_files():
    def nested(n):
        return "[" * n + "]" * n

    assert _core.decode_json(nested(1000), trusted=False)
    for text in (nested(1001), "[" * 1_000_000, '{"a":' * 1_000_000):
        with pytest.raises(ValueError, match="deep"):
            _core.decode_json(text, trusted=False)
    with pytest.raises(ValueError, match="lone surrogate"):
        _core.decode_json('"\ud800"', trusted=False)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_nesting_too_deep_to_decode(text):
    assert outcome(_core.decode_json, text) == outcome(json.loads, text)


def test_nesting_too_deep_to_encode():
    deep_list, deep_dict = [], {}
    for _ in range(100_000):
        deep_list, deep_dict = [deep_list], {"a": deep_dict}
    for deep in (deep_list, deep_dict):
        with pytest.raises(RecursionError, match="maximum recursion depth exceeded"):
            _core.encode_json(deep)


def test_a_high_recursion_limit_does_not_overflow_the_stack():
    limit = sys.getrecursionlimit()
    deep = "[" * 20_000 + "]" * 20_000
    try:
        sys.setrecursionlimit(50_000)
        assert _core.encode_json(_core.decode_json(deep)) == deep.encode()
    finally:
        sys.setrecursionlimit(limit)


def circular():
    a, b = [], {}
    a.append(a)
    b["x"] = [1, (2, b)]
    return [a, b]


class BadItems(dict):
    def items(self):
        return [1]


UNWRITABLE = [object(), {1, 2}, b"x", 1j, [datetime.date(2020, 1, 1)], {"a": {"b": object}}, Color]
BAD_KEYS = [(1, 2), b"x", object(), datetime.date(2020, 1, 1), datetime.date, frozenset()]
HUGE = [[10**4000, -(2**63), 2**63], [10**5000], {10**5000: 1}]


@pytest.mark.parametrize(
    "value",
    [*UNWRITABLE, *({key: 1} for key in BAD_KEYS), *circular(), *HUGE, BadItems(a=1), BadItems()],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_dumps(value):
    assert outcome(_core.encode_json, value) == outcome(lambda v: json.dumps(v).encode(), value)


@pytest.mark.parametrize("data", [None, 1, [], memoryview(b"1"), "\ufeff1", "1" * 5000, b"\xff", b"\xef\xbb\xbf"])
def test_errors_of_loads(data):
    assert outcome(_core.decode_json, data) == outcome(json.loads, data)


def test_the_same_container_twice_is_not_circular():
    shared = [1]
    value = [shared, {"a": shared, "b": (shared, shared)}]
    assert _core.encode_json(value) == json.dumps(value).encode()


def test_a_container_that_changes_while_it_is_written():
    outer = {"a": 1}

    class Meddler(dict):
        def items(self):
            outer.clear()
            outer.update({str(i): i for i in range(100)})
            return [("x", 1)]

    outer.update({"m": Meddler(y=1), "z": 2})
    assert _core.encode_json(outer) == b'{"a": 1, "m": {"x": 1}, "z": 2}'


def test_strings_are_shared():
    first, second = _core.decode_json('[{"class_name": 1}, {"class_name": 2}]')
    assert next(iter(first)) is next(iter(second))
