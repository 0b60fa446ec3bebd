"""The phrases that the prose of the project does without, each with what to write in its place."""

import re

# A pattern, and what to write in its place.
BANNED = {
    r"\b(?:is|are|was|were|be|been|being|gets?) (?:said|told(?! apart)|refused)\b": "say who does it: 'the command stops'",
    r"\b(?:go|goes|going|gone|went) on\b": "resumes, continues, follows",
    r"\bst(?:and|ands|anding|ood) in\b": "is in, replaces",
    r"\bst(?:and|ands|anding|ood) for itself\b": "is independent",
    r"\bof them all\b": "of all",
    r"\bheld to\b": "must agree with, is checked against",
    r"\bleft out (?:are|is|and told)\b": "begin with the subject: 'The command skips ...'",
    r"\btold otherwise\b": "by default",
}


def banned_in(text: str) -> list[str]:
    """Each banned phrase with its remedy and what surrounds it."""
    flat = " ".join(text.split())
    matches = [
        (match, remedy) for pattern, remedy in BANNED.items() for match in re.finditer(pattern, flat, re.IGNORECASE)
    ]
    return [
        f"{match[0]!r} in '{flat[max(0, match.start() - 40) : match.end() + 30]}'; {remedy}"
        for match, remedy in matches
    ]
