"""Takes what identifies a person out of a text before it leaves for the teacher; nothing is taken out that `harvest.redact` does not name.

Each hit becomes a placeholder of its kind, `[EMAIL]`, `[PHONE]`, ..., as MeQSum itself writes [NAME] and [DATE]:
  email       jane.doe@example.org, also with a space beside the @
  phone       numbers that can exist (libphonenumber) in a region or, with a +, anywhere, in groups as people there write them
  url         web addresses, whole: http://, https://, ftp://, www.
  ip          IPv4 and IPv6
  card        payment cards, by issuer, grouping and check digit
  iban        bank accounts, by country, structure and check digits
  ssn         US social security numbers: with dashes, or in any form after those words
  birth_date  a whole date after "born", "DOB", "date of birth", "birthday"; a year alone stays

Questions about health are full of numbers: doses, readings, product codes. So a number needs a check digit, a grouping or a word before it
to be a hit: a rare form that is missed is better than a question that means something else. Names, places and record numbers are not
found: they take a model, and a person who reads what it did.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from typing import assert_never

from shared.commands import install
from shared.contracts import Example
from shared.errors import SettingsError
from shared.settings import RedactKind

Finder = Callable[[str], Iterator[tuple[int, int]]]
"""From a text to the spans to be replaced: [start, end) in characters, ascending, none overlapping."""

ORDER: tuple[RedactKind, ...] = ("url", "email", "iban", "card", "ssn", "ip", "birth_date", "phone")
"""What may hold another kind comes before it: a URL may hold an e-mail address, a card number what looks like a phone number."""

_DASH = r"[\u2010-\u2015-]"
_GAP = r"[ \u00a0.\u2010-\u2015-]?"

_URL = re.compile(r"\b(?:(?:https?|ftp)://|www\.)[^\s<>\"\[\]]*[^\s<>\"\[\]'.,;:!?(){}]", re.IGNORECASE)
# possessive, and only from the beginning of a word: else long words take time that grows with the square of their length
_EMAIL = re.compile(r"(?<![\w.%+&'-])[\w.%+&'-]++ ?[@＠] ?(?:[\w-]+\.)+(?:[^\W\d_]{2,}|xn--[\w-]+)(?!\w)")
_IP = re.compile(
    r"(?<!\w)(?<!\d\.)\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|(?<![\w:.])[\da-f]{1,4}(?:::?[\da-f]{1,4}){2,7}(?:::)?(?![\w:])",
    re.IGNORECASE | re.ASCII,
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d\d(?:[A-Z\d]{11,30}|(?:[ -][A-Z\d]{4}){2,7}(?:[ -][A-Z\d]{1,3})?)(?!\w)", re.IGNORECASE | re.ASCII)
_CARD = re.compile(
    rf"(?<!\w)(?:(?:4\d|5[1-5]|2[2-7]|6\d|35)\d\d(?:{_GAP}\d{{4}}){{3}}"  # Visa, Mastercard, Discover and UnionPay, JCB
    rf"|3[47]\d\d{_GAP}\d{{6}}{_GAP}\d{{5}}"  # American Express
    rf"|3[068]\d\d{_GAP}\d{{6}}{_GAP}\d{{4}})(?!\w)",  # Diners Club
    re.ASCII,
)
_SSN = re.compile(
    rf"(?:(?<![\w-])(?=\d{{3}}{_DASH}\d\d{_DASH}\d)|\b(?:SSN|social security)\b[^\d\n]{{0,20}})"
    rf"(?P<hit>\d{{3}}{_GAP}\d\d{_GAP}\d{{4}})(?![\w-])",
    re.IGNORECASE | re.ASCII,
)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"\d\d?(?:st|nd|rd|th)?"
_BIRTH_DATE = re.compile(
    r"\b(?:born\b|d\.?o\.?b\b\.?|date of birth|birth ?da(?:te|y))[^\d\n.;!?]{0,20}?"
    rf"(?P<hit>\d\d? ?[/.-] ?\d\d? ?[/.-] ?\d\d(?:\d\d)?|\d{{4}} ?[/.-] ?\d\d? ?[/.-] ?\d\d?"
    rf"|{_MONTH}[ .-]{{1,2}}{_DAY}[ ,-]{{1,2}}\d{{4}}|{_DAY}[ .-](?:of )?{_MONTH}[ ,.-]{{1,2}}\d{{4}})(?!\w)",
    re.IGNORECASE | re.ASCII,
)
# fewer digits make a number only in a handful of small countries; libphonenumber alone takes seconds for a megabyte full of doses
_SEVEN_DIGITS = re.compile(r"\d(?:[\Wx]{0,4}\d){6}", re.IGNORECASE)


class Redactor:
    """Replaces what `kinds` name in a text. `region`: the country, as two letters of ISO 3166, whose phone numbers need no +.

    Raises SettingsError for an unknown region, and where a kind's library is not installed.
    """

    def __init__(self, kinds: Sequence[RedactKind], *, region: str = "US") -> None:
        try:
            self._finders = {kind: _finder(kind, region) for kind in ORDER if kind in kinds}
        except ImportError as exc:
            raise SettingsError(f"harvest.redact: {', '.join(kinds)}: {exc.name} is missing: {install('privacy')}") from exc

    def __call__(self, text: str) -> tuple[str, Counter[str]]:
        """`text` with its hits replaced, and their number by kind. What comes out holds no hits: redacting it again changes nothing."""
        counts: Counter[str] = Counter()
        before = -1
        # a placeholder is a new boundary, beside which something may be found that was not before
        while counts.total() > before:
            before = counts.total()
            for kind, find in self._finders.items():
                if spans := list(find(text)):
                    text = _replace(text, spans, f"[{kind.upper()}]")
                    counts[kind] += len(spans)
        return text, counts


class Redaction:
    """Takes out of examples what `kinds` names, and counts it; with None nothing is done and no library needed.

    Raises SettingsError for an unknown region, and where a library is missing.
    """

    def __init__(self, kinds: Sequence[RedactKind] | None, *, region: str = "US") -> None:
        self.counts: Counter[str] = Counter()
        """Hits so far, by kind."""
        self._redactor = None if kinds is None else Redactor(kinds, region=region)

    def of(self, example: Example) -> Example:
        """The example with placeholders in its texts."""
        if self._redactor is None:
            return example
        question, found = self._redactor(example.question)
        summary = example.summary
        if summary is not None:
            summary, more = self._redactor(summary)
            found += more
        self.counts += found
        return example.model_copy(update={"question": question, "summary": summary})


def _replace(text: str, spans: list[tuple[int, int]], placeholder: str) -> str:
    parts, done = [], 0
    for start, end in spans:
        parts += [text[done:start], placeholder]
        done = end
    return "".join([*parts, text[done:]])


def _finder(kind: RedactKind, region: str) -> Finder:
    match kind:
        case "url":
            return _matches(_URL)
        case "email":
            return _matches(_EMAIL)
        case "ip":
            return _matches(_IP, _is_ip)
        case "birth_date":
            return _matches(_BIRTH_DATE)
        case "iban":
            return _ibans()
        case "card":
            from stdnum import luhn

            return _matches(_CARD, lambda hit: bool(luhn.is_valid(re.sub(r"\D", "", hit))))
        case "ssn":
            from stdnum.us import ssn

            return _matches(_SSN, lambda hit: bool(ssn.is_valid(re.sub(r"\D", "", hit))))
        case "phone":
            return _phones(region)
    assert_never(kind)


def _matches(pattern: re.Pattern[str], valid: Callable[[str], bool] = lambda hit: True) -> Finder:
    """Valid matches of `pattern`, or of its group `hit` if it has one."""
    hit = "hit" if "hit" in pattern.groupindex else 0

    def find(text: str) -> Iterator[tuple[int, int]]:
        return (match.span(hit) for match in pattern.finditer(text) if valid(match[hit]))

    return find


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _ibans() -> Finder:
    from stdnum import iban

    def find(text: str) -> Iterator[tuple[int, int]]:
        for match in _IBAN.finditer(text):
            start, end = match.span()
            # words after the number look like its groups; of a country's banks the library knows too few, so they are left unasked
            while end > start and not iban.is_valid(text[start:end], check_country=False):
                end = max(text.rfind(" ", start, end), text.rfind("-", start, end))
            if end > start:
                yield start, end

    return find


def _phones(region: str) -> Finder:
    import phonenumbers

    if region not in phonenumbers.SUPPORTED_REGIONS:
        raise SettingsError(f"region {region!r}: not a country that has phone numbers; give two capital letters such as US or GB")

    def find(text: str) -> Iterator[tuple[int, int]]:
        if not _SEVEN_DIGITS.search(text):
            return
        # any looser, and the sugars 158 144 87 112 are a phone number; without max_tries the search ends unsaid after 65,535 candidates
        found = phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.STRICT_GROUPING, max_tries=sys.maxsize)
        for match in found:
            # a bracket around the whole number belongs to the sentence
            opened = match.raw_string[0] in "([" and not {")", "]"} & set(match.raw_string)
            yield match.start + opened, match.end

    return find
