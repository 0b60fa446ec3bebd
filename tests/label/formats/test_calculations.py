import pytest

from draftsmith.label.formats.calculations import first_wrong, without_marks


@pytest.mark.parametrize(
    ("solution", "span"),
    [
        ("3 + 4 = <<3+4=8>>8 eggs", (8, 9)),
        ("3 + 4 = <<3+4=7>>7 eggs", None),
        ("2 * 2 = <<2*2=4>>4, 4 - 1 = <<4-1=2>>2, 2 + 2 = <<2+2=5>>5", (19, 20)),
        ("1/3 = <<1/3=0.33>>0.33", None),  # rounded
        ("2/3 = <<2/3=0.66>>0.66", None),  # cut
        ("2/3 = <<2/3=0.68>>0.68", (6, 10)),
        ("3*.1 = <<3*.1=0.30000000000000004>>0.3", None),
        ("5 - 8 = <<5-8=-3>>3 less", None),  # the sign is in the words
        ("1/4 = <<1/4=0.25>>25%", None),
        ("7 / 2 = <<7/2=3.5>>3 cats", None),  # cut to whole cats
        ("5000*30 = <<5000*30=150000>>1,500,000.", (10, 19)),
        ("10*(2/3) = <<10*(2/3)=8>>8", (11, 12)),
        ("1,000 + 1 = <<1,000+1=1002>>1002", (12, 16)),
        ("2*8500 = <<2*8500=17000>>17 000 or so", None),
        ("007 + 1 = <<007+1=8>>8", None),
        ("<<x+1=3>>3", None),  # unknowns, and all that follows, are passed over
        ("<<3/0=3>>3", None),
        ("<<7=7=7>>7", None),
        ("<<1+1=3>> apples", None),  # no place in the text
        ("<<__import__('os')=3>>3", None),
        ("<<9**9**9**9=3>>3", None),
        ("<<1+1=1e999999999>>3", None),
        ("<<1e400*2=3>>3", None),
        ("<<1\0+1=3>>3", None),
        ("no marks at all", None),
    ],
)
def test_the_first_result_that_does_not_come_out_is_found(solution: str, span: tuple[int, int] | None) -> None:
    assert first_wrong(solution) == span
    if span is not None:
        assert without_marks(solution)[slice(*span)].strip("0123456789.,") == ""


def test_marks_are_taken_out() -> None:
    assert without_marks("3 + 4 = <<3+4=7>>7 and <<1=1>>1") == "3 + 4 = 7 and 1"


def test_an_endless_sum_is_passed_over() -> None:
    assert first_wrong(f"<<{'(' * 5000}1{')' * 5000}=3>>3") is None
