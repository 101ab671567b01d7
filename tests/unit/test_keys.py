"""Content keys: nothing that differs shares one, and they stay what they are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_connector.keys import (
    digest,
    encoder_key,
    salt_of,
    segment_key,
    split_variant,
    variant_key,
)


@dataclass(frozen=True)
class Named:
    """What a key is made from.

    Attributes:
        kind: "kv" or "encoder"; the latter has neither salt nor donor.
    """

    kind: str
    identifier: str
    fingerprint: str
    salt: str | None
    donor: str | None

    @property
    def key(self) -> str:
        if self.kind == "encoder":
            return encoder_key(self.identifier, fingerprint=self.fingerprint)
        return segment_key(
            self.identifier, fingerprint=self.fingerprint, donor=self.donor, salt=self.salt
        )


# Words that look like each other's neighbours in the text that is hashed.
words = st.sampled_from(
    ["", "a", "b", "ab", "null", "None", "0", "1", '"', '","salt":"a', "\\", "é", "\ud800", "\0"]
) | st.text(max_size=4)
kv_names = st.builds(
    Named,
    kind=st.just("kv"),
    identifier=words,
    fingerprint=words,
    salt=st.none() | words,
    donor=words,
)
encoder_names = st.builds(
    Named,
    kind=st.just("encoder"),
    identifier=words,
    fingerprint=words,
    salt=st.none(),
    donor=st.none(),
)


@settings(max_examples=100)
@given(a=kv_names | encoder_names, b=kv_names | encoder_names)
def test_keys_are_equal_exactly_when_all_they_are_made_from_is(a: Named, b: Named) -> None:
    assert (a.key == b.key) == (a == b)


@settings(max_examples=50)
@given(name=kv_names, other=words)
def test_a_change_of_any_single_part_changes_the_key(name: Named, other: str) -> None:
    changed = {
        Named("kv", other, name.fingerprint, name.salt, name.donor),
        Named("kv", name.identifier, other, name.salt, name.donor),
        Named("kv", name.identifier, name.fingerprint, other, name.donor),
        Named("kv", name.identifier, name.fingerprint, None, name.donor),
        Named("kv", name.identifier, name.fingerprint, name.salt, other),
        Named("encoder", name.identifier, name.fingerprint, None, None),
    } - {name}
    assert name.key not in {each.key for each in changed}
    assert len({each.key for each in changed}) == len(changed)


def test_no_salt_is_a_namespace_of_its_own() -> None:
    salts = [None, "", "None", "null"]
    assert (
        len(
            {
                segment_key("image", fingerprint="model", donor="canonical", salt=salt)
                for salt in salts
            }
        )
        == 4
    )


def test_encoder_rows_and_kv_of_an_item_have_different_keys() -> None:
    assert encoder_key("image", fingerprint="model") != segment_key(
        "image", fingerprint="model", donor="canonical", salt=None
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            segment_key("image", fingerprint="model", donor="canonical", salt=None),
            "bc87645639955608e76447795792686405008135e627e83713322e1d1d3844cd",
        ),
        (
            segment_key("image", fingerprint="model", donor="first_seen", salt="tenant"),
            "3b7b22102f66dab7b3f9cdd8aefcee7d87ad990048840e964779e874396d26e1.b7081bf0833ebb61",
        ),
        (
            encoder_key("image", fingerprint="model"),
            "2086e4eff8664d77d398adc6ea80e5d7fd4a54b2afa7e14b6a59279dd7506e6f",
        ),
    ],
    ids=["kv", "kv of a tenant", "encoder"],
)
def test_keys_of_this_format_version_never_change(key: str, expected: str) -> None:
    """Another digest means that stores of running systems are silently lost: raise
    `FORMAT_VERSION` if that is meant."""
    assert key == expected


def test_the_order_of_parts_does_not_matter() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", ["1", 1.5, True, None, [1], {"a": 1}])
def test_the_type_of_a_part_matters(other: object) -> None:
    assert digest({"a": 1}) != digest({"a": other})


@settings(max_examples=50)
@given(name=kv_names, other=kv_names, ordinals=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_variants_are_equal_exactly_when_item_and_variant_are(
    name: Named, other: Named, ordinals: tuple[int, int]
) -> None:
    first, second = str(ordinals[0]), str(ordinals[1])
    same = (name.key, first) == (other.key, second)
    assert (variant_key(name.key, first) == variant_key(other.key, second)) == same
    assert variant_key(name.key, first) != name.key


@settings(max_examples=50)
@given(item=words | st.just("a/b"), variant=words.filter(lambda word: "/" not in word))
def test_a_variant_key_can_be_taken_apart(item: str, variant: str) -> None:
    assert split_variant(variant_key(item, variant)) == (item, variant)


def test_variant_keys_never_change() -> None:
    assert variant_key("digest", "3") == "digest/3"


def test_a_key_tells_whose_it_is() -> None:
    def key(identifier: str, salt: str | None) -> str:
        return segment_key(identifier, fingerprint="f", donor="d", salt=salt)

    salts = [None, "", "a", "b", "a.b/c@"]
    found = [salt_of(key("x", salt)) for salt in salts]
    assert found[0] == salt_of(encoder_key("x", fingerprint="f")) == ""
    assert len(set(found)) == len(found)
    assert all(len(salt) == 16 for salt in found[1:])
    assert found == [salt_of(variant_key(key("y", salt), "3")) for salt in salts]
