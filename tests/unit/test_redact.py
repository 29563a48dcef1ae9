"""Redaction: what identifies a person goes, what a doctor would ask about stays, and every hit is counted."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import phonenumbers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stdnum import luhn

from shared.datasets import load
from shared.errors import SettingsError
from shared.redact import ORDER, Redactor
from shared.settings import DatasetSettings, RedactKind

REDACT = Redactor(ORDER)

HITS: dict[RedactKind, tuple[str, ...]] = {
    "email": (
        "jane.doe@example.org",
        "o'brien+clinic@mail.example.co.uk",
        "jane @ gmail.com",
        "JÜRGEN@münchen.de",
        "jane＠example.org",
        "анна@пример.рф",
    ),
    "phone": (
        "(212) 736-5000",
        "212.736.5000",
        "2127365000",
        "1-800-222-1222",
        "212-736-5000 ext. 12",
        "212\u2011736\u20115000",
        "２１２-７３６-５０００",
        "+44 20 7946 0958",
        "+4930123456",
        "+33 1 42 68 53 00",
    ),
    "url": ("http://jane:secret@host.example/x?y=1", "www.example.org/users/jane-doe", "HTTPS://EXAMPLE.ORG", "ftp://example.org/a_b"),
    "ip": ("192.168.0.1", "2001:db8::1", "2001:0db8:85a3:0000:0000:8a2e:0370:7334"),
    "card": ("4111 1111 1111 1111", "5555-5555-5555-4444", "4111111111111111", "3782 822463 10005", "30569309025904"),
    "iban": (
        "GB82 WEST 1234 5698 7654 32",
        "gb82west12345698765432",
        "DE89370400440532013000",
        "BE68 5390 0754 7034",
        "NO93-8601-1117-947",
    ),
    "ssn": ("536-90-4399", "536\u201190\u20114399"),
    "birth_date": (),
}


FRAGMENTS = st.one_of(
    st.sampled_from([hit for hits in HITS.values() for hit in hits]),
    st.sampled_from(
        [
            "[NAME]",
            "[PHONE]",
            "[DATE]",
            "[EMAIL]",
            "born on 3/12/1956",
            "SSN 536904399",
            "120/80",
            "x",
            "@",
            ".org",
            "www.",
            "http://",
            "GB82",
        ]
    ),
    st.text("0123456789", max_size=12),
    st.text(" ./-()[]+@:x\n\u00a0", max_size=3),
    st.text(max_size=5),
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@pytest.mark.parametrize(("kind", "hit"), [(kind, hit) for kind, hits in HITS.items() for hit in hits])
@pytest.mark.parametrize("frame", ["My doctor has {} and will call.", "({})", "{}", "Note: {}.\nThanks", "[{}]"])
def test_a_hit_is_replaced_and_its_surroundings_stay(kind: RedactKind, hit: str, frame: str) -> None:
    assert Redactor([kind])(frame.format(hit)) == (frame.format(f"[{kind.upper()}]"), {kind: 1})


@pytest.mark.parametrize(
    "text",
    [
        "DOB: {3/12/1956}, male",
        "DOB {1956-03-12}",
        "D.O.B. {3.12.56}",
        "My date of birth is {12-Mar-1956}.",
        "She was born on the {5th of May, 1960} in a small town",
        "Her birthday is {March 12, 1956}, and she takes 20 mg",
        "He was born with PKU, on {12 / 3 / 2014}",
    ],
)
def test_a_date_of_birth_is_known_by_the_words_before_it(text: str) -> None:
    hit = text[text.index("{") : text.index("}") + 1]
    assert Redactor(["birth_date"])(text.replace(hit, hit[1:-1])) == (text.replace(hit, "[BIRTH_DATE]"), {"birth_date": 1})


@pytest.mark.parametrize("text", ["my SSN is 536 90 4399", "SSN: 536904399", "Social Security number 536-90-4399"])
def test_a_social_security_number_after_those_words_needs_no_dashes(text: str) -> None:
    redacted, counts = REDACT(text)
    assert redacted.endswith(" [SSN]")
    assert counts == {"ssn": 1}


@pytest.mark.parametrize(
    "text",
    [
        "My blood pressure is 120/80, yesterday 145 / 95, pulse 72.",
        "Take 500 mg 3 x 1, a pack of 500, for 12-14 days; 2.5-5 ml every 4-6 hours.",
        "My sugars were 158 144 87 112 and 158-144-87-112, then 95, 110, 102, 99.",
        "Platelets (70 000 - 140 000 - 65 000 - 90 000) did not reach 150 000.",
        "NDC Code(s): 0555-0952-02, 0555-0953-02, 0527-1728-74, 00527172874",
        "SNPs BCMO1 rs 12934922 and rs4889294, PMID 25671960, NCT01234567, CAS 103-90-2, ICD-10 E11.65, F32.1",
        "Surgery on 3/27/14, [DATE] and March 19, 2015, at 10:15:30; results 2015-01-01T11:03:27-05:00.",
        "He was born in 1956, I was born 5 days ago, she was born at 35 weeks.",
        "Her birthday. The test was done 3/12/2014.",
        "Windows NT 6.1; GSA/5.2.43972; .NET CLR 2.0.50727; Chrome/41.0.2272.101",
        "[cid:image001.png@01D08E1E.47E509A0] myncbiPortal@2.45, 2 tablets @ 10 pm, pain..and resolved.please help",
        "Readings: 4111 1111 1111 1112, 120 80 1200, 666-12-3456, GB82 WEST 1234 5698 7654 33",
        "[NAME] of [LOCATION], call [CONTACT], born [DATE]; or [EMAIL], [PHONE], [URL], [IP], [CARD], [IBAN], [SSN], [BIRTH_DATE]",
    ],
)
def test_medical_numbers_and_placeholders_stay(text: str) -> None:
    assert REDACT(text) == (text, Counter())


def sample() -> list[str]:
    splits = load(DatasetSettings(), Path("/nonexistent/cache")).splits.values()
    return [text for rows in splits for row in rows for text in (row.question, row.summary or "")]


def test_no_question_of_the_embedded_sample_is_touched() -> None:
    texts = sample()
    assert len(texts) == 660
    assert [counts for text in texts if (counts := REDACT(text)[1])] == []


def test_only_the_kinds_asked_for_are_replaced() -> None:
    text = "jane@example.org, (212) 736-5000, 192.168.0.1"
    assert Redactor(["phone"])(text) == ("jane@example.org, [PHONE], 192.168.0.1", {"phone": 1})
    assert Redactor(["ip", "email"])(text) == ("[EMAIL], (212) 736-5000, [IP]", {"email": 1, "ip": 1})
    assert Redactor([])(text) == (text, Counter())


def test_every_kind_of_the_settings_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(get_args(RedactKind))


def test_what_holds_another_hit_counts_as_one() -> None:
    text = "https://example.org/?to=jane@example.org&tel=2127365000 and 4111 1111 1111 1111"
    assert REDACT(text) == ("[URL] and [CARD]", {"url": 1, "card": 1})


@given(TEXTS)
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once, _ = REDACT(text)
    assert REDACT(once) == (once, Counter())


@given(TEXTS)
def test_the_counts_are_the_placeholders_that_came_in_and_without_one_the_text_is_the_same(text: str) -> None:
    redacted, counts = REDACT(text)
    came = {kind: redacted.count(f"[{kind.upper()}]") - text.count(f"[{kind.upper()}]") for kind in ORDER}
    assert {kind: n for kind, n in came.items() if n} == counts
    assert counts or redacted == text


@given(st.text(st.characters(exclude_categories=["N"], exclude_characters="@＠:."), max_size=200))
def test_a_text_without_digits_or_addresses_is_unchanged(text: str) -> None:
    assert REDACT(text) == (text, Counter())


@given(st.sampled_from(["4", "51", "2720", "6011"]), st.integers(0, 10**15), st.sampled_from(["", " ", "-", "\u2011"]), st.integers(1, 9))
def test_a_card_is_known_by_its_check_digit(issuer: str, number: int, gap: str, wrong: int) -> None:
    digits = (issuer + f"{number:015}")[:15]
    check = int(luhn.calc_check_digit(digits))

    def card(last: int) -> str:
        whole = f"{digits}{last % 10}"
        return gap.join(whole[i : i + 4] for i in range(0, 16, 4))

    redact = Redactor(["card"])
    assert redact(f"paid with {card(check)}.") == ("paid with [CARD].", {"card": 1})
    assert redact(f"paid with {card(check + wrong)}.")[1] == {}


def test_an_international_number_of_every_country_is_found() -> None:
    redact = Redactor(["phone"])
    missed = []
    for region in sorted(phonenumbers.SUPPORTED_REGIONS):
        number = phonenumbers.format_number(phonenumbers.example_number(region), phonenumbers.PhoneNumberFormat.INTERNATIONAL)
        if redact(f"call {number} please") != ("call [PHONE] please", {"phone": 1}):
            missed.append((region, number))
    assert missed == []


def test_numbers_without_a_plus_are_those_of_the_region() -> None:
    text = "call 020 7946 0958 please"
    assert Redactor(["phone"], region="US")(text)[1] == {}
    assert Redactor(["phone"], region="GB")(text) == ("call [PHONE] please", {"phone": 1})


def test_an_unknown_region_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"'XX'.*US or GB"):
        Redactor(["phone"], region="XX")


@pytest.mark.parametrize(("kind", "library"), [("phone", "phonenumbers"), ("card", "stdnum"), ("iban", "stdnum"), ("ssn", "stdnum.us")])
def test_a_missing_library_names_the_extra_and_the_other_kinds_do_without(
    kind: RedactKind, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SettingsError, match=rf"harvest.redact: .*{library}.*pip install -e '\.\[privacy\]'"):
        Redactor([kind])
    assert Redactor(["email", "url", "ip", "birth_date"])("jane@example.org") == ("[EMAIL]", {"email": 1})


DOSES = "I take 20 mg of Lisinopril since March 2014, 2 x 1, my pressure is 120/80. "


@pytest.mark.parametrize("unit", ["sample", DOSES, "x", "x@", ".", "www.", "http://", "GB82", "born ", "jane@example.org "])
def test_a_megabyte_takes_seconds_whatever_it_repeats(unit: str) -> None:
    unit = " ".join(sample()) if unit == "sample" else unit
    long = unit * (1_000_000 // len(unit))
    start = time.process_time()
    REDACT(long)
    # about one; what grows with the square of the length takes hours
    assert time.process_time() - start < 10
