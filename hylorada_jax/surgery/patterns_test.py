"""Patterns mean what Python's re says, take linear time, and are refused where they cannot."""

import re
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hylorada_jax.errors import TargetError
from hylorada_jax.surgery.patterns import matches
from hylorada_jax.surgery.targets import by_pattern

LAYERS = [
    f"{model}.layers.{depth}.{layer}"
    for model in ("model", "visual", "language_model.model")
    for depth in (0, 1, 11)
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate-up", "Attn.QProj")
]


def matched(pattern, names):
    return [name for name in names if name in next(matches([pattern], names))]


def of_python(pattern, names):
    return [name for name in names if re.fullmatch(pattern, name)]


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(?!.*visual).*(?:q_proj|k_proj)$",
        r"(?!visual)(?=.*\.1\.)(?!.*[\])]|.*\(.*up).*",
        r"\A(?!model).*\Z",
        r"(?!(?:(?:m|v)[\w().]*\.(?:0|11)\.)).*_proj",
        r"(?!).*",
        r".*\.(?P<depth>\d+)\.(?:self_attn|mlp)\.[qk]_proj",
        r"(?i).*attn\.q_?proj",
        r".*(?i:ATTN)\.(?-i:QProj)",
        r"(?x) .* \. q_proj  # the query",
        r"(?#of the MLP).*mlp.*",
        r"model\.layers\.[0-9]{,1}\..*",
        r"model\.layers\.\d{2,}\..*|.*\bgate\b.*|visual\.\D+\x31\u0031\..*",
        r".*[[:alpha:]]",
        r"[^\s\d]+\.0\.[\w.]+",
        r"[\W\w]*[^a-zA-Z]up",
        r".*?\N{FULL STOP}Q.*",
        "[\ud800-\udfff].*|visual.*",
        r"",
    ],
)
@pytest.mark.filterwarnings("ignore:Possible nested set")  # Python's own, of the oracle
def test_what_patterns_match_is_what_python_says(pattern):
    assert matched(pattern, LAYERS) == of_python(pattern, LAYERS)


def test_letters_beyond_ascii_are_themselves():
    names = ["schicht.größe", "schicht.grösse", "層.q", "層.Q"]
    for pattern in ["schicht.größe", ".*gr[ö-ü]ss?e", "層.[^Q]", ".*ö.e", "\u5c64.*"]:
        assert matched(pattern, names) == of_python(pattern, names)


ATOMS = st.sampled_from([
    *"ab_.1A^$",
    r"\.", r"\d", r"\w", r"\D", r"\W", r"\s", r"\S", r"\b", r"\B", r"\Z", "[ab]", "[^a]", r"[\w.-]",
    r"[^\W_]", r"[^\s\d]", "[a-z1]", r"\x61", r"\141", "", "(?i:a)", "(?-i:a)", "(?s:.)",
])  # fmt: skip
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{,2}", "{1,}", "{1,3}?"])
PATTERNS = st.recursive(
    ATOMS,
    lambda part: st.one_of(
        st.lists(part, min_size=1, max_size=4).map("".join),
        st.lists(part, min_size=1, max_size=3).map("|".join).map("({})".format),
        st.tuples(part.map("(?:{})".format), REPEATS).map("".join),
    ),
    max_leaves=8,
)
WHOLE = st.tuples(
    st.sampled_from(["", "(?i)", "(?x)", "(?ms)", "(?a)"]),
    st.sampled_from(["", "^", r"\A"]),
    st.lists(
        st.tuples(st.sampled_from(["(?!", "(?="]), PATTERNS).map("{0[0]}{0[1]})".format), max_size=2
    ).map("".join),
    PATTERNS,
).map("".join)
NAMES = st.text(string.ascii_letters[:3] + "AB._1- ", min_size=1, max_size=8)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pattern=WHOLE, names=st.lists(NAMES, min_size=1, max_size=8, unique=True))
def test_any_pattern_matches_what_python_says(pattern, names):
    assert matched(pattern, names) == of_python(pattern, names)


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["layers.1.self_attn.q_proj", "q_proj"],
        [r"\d+\.mlp\..*", "gate-up"],
        ["q_proj|k_proj", "proj"],
        [r"^model\.layers\.1\..*", "^layers.*", "model|^visual.*|up_proj"],
        [r"^(?!visual).*_proj", "Attn.QProj"],
        ["(?i:attn.qproj)$", "..proj", "model.layers.[01].*"],
        [".*", "q_proj"],
    ],
)
def test_keys_of_peft_match_as_in_peft(keys):
    get_pattern_key = pytest.importorskip("peft").utils.other.get_pattern_key
    ours: dict[str, str] = {}
    for key, found in zip(keys, matches(keys, LAYERS, endings=True), strict=True):
        ours = dict.fromkeys(found, key) | ours
    assert {name: ours.get(name, name) for name in LAYERS} == {n: get_pattern_key(keys, n) for n in LAYERS}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(.*)\.\1", "back-reference"),
        (r"(?P<a>.)(?P=a)", "back-reference"),
        (r".*(?!up)", "lookahead"),
        (r"(?<!up).*", "lookbehind"),
        (r"(?!a)b|c(?=d)", "lookahead"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"(?>a)", "atomic"),
        (r"a*+", "possessive"),
        ("a{1001}", "repetition size"),
        ("(?:a{100}){100}", "repetition size"),
        ("a{99999999999999999999}", "repetition number"),
        ("(?:.?[a-z]?.?){300}", "size of"),
        ("*", "nothing to repeat"),
        (r"\pL", r"bad escape \\p"),
        (r"(?<name>a)", "unknown extension"),
        (r"\C", "bad escape"),
        ("[z-a]", "bad character range"),
        ("(" * 1400 + ")" * 1400, "recursion"),
        ("a|" * 10**6, "length of 2,000,000"),
    ],
)
def test_what_is_refused_is_named(pattern, reason, capfd):
    with pytest.raises(TargetError, match=reason) as error:
        matched(pattern, LAYERS)
    assert len(str(error.value)) < 600
    assert capfd.readouterr() == ("", "")


SLOW = "model." + "layers" * 30


@pytest.mark.parametrize(
    "pattern",
    [
        r"([a-z_.0-9]+)+!",
        r"(.*)*(.*)*(.*)*!",
        r"(?!(s|s?)*!)(?=(a*)*b|.*).*!(a|a)*",
        r"(?:.?[a-z]?.?){75}!",
        r"(?i)" + r"[\0-\U0010ffff]?" * 50 + "!",
    ],
)
def test_a_hostile_pattern_takes_milliseconds(pattern):
    start = time.process_time()
    assert not next(matches([pattern], [*LAYERS, SLOW]))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("pattern", "names"),
    [(".*", LAYERS), (".*", ["q"]), ("x" * 2000 + "|.*", LAYERS), ("|" * 2000 + ".*", ["q"])],
)
def test_hostile_numbers_of_patterns_are_refused(pattern, names):
    start = time.process_time()
    with pytest.raises(TargetError, match="few and small"):
        list(matches([pattern] * 10**5, names))
    assert time.process_time() - start < 10


def test_a_model_can_have_a_pattern_for_each_layer():
    names = [f"model.layers.{depth}.self_attn.q_proj" for depth in range(300)]
    assert by_pattern([(name, depth) for depth, name in enumerate(names)], names) == {
        name: depth for depth, name in enumerate(names)
    }
